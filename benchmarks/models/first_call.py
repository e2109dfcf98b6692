# SPDX-License-Identifier: Apache-2.0
"""Times the first and the second call of a model in this process and prints them as JSON.

Run as ``python -m fastasr.benchmarks.models.first_call IMPLEMENTATION SIZE`` in a fresh process.
"""

import json
import sys
import time

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.models import zipformer


def seconds(implementation: str, size: str) -> dict[str, float]:
    model, inputs = upstream.zipformer(size), upstream.example(zipformer.BATCH, zipformer.FRAMES)
    measured = {}
    if implementation == zipformer.FASTASR:
        import fastasr

        start = time.perf_counter()
        fastasr.accelerate(model)
        measured[zipformer.SWAP] = time.perf_counter() - start
    for call in (zipformer.FIRST, zipformer.SECOND):
        start = time.perf_counter()
        with torch.no_grad():
            model(*inputs)
        measured[call] = time.perf_counter() - start
    return measured


if __name__ == "__main__":
    print(json.dumps(seconds(*sys.argv[1:3])))
