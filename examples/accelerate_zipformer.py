# SPDX-License-Identifier: Apache-2.0
"""Swap kernels into upstream's Zipformer (PyPI package ``zipformer``), check them, train a step, undo it.

    python examples/accelerate_zipformer.py [--medium]

The default is a two-stack miniature with random weights: a few seconds on a CPU.
"""

import argparse
import random
import time

import torch

import fastasr
from fastasr.benchmarks import upstream


def seed() -> None:
    """Seeds both generators: Zipformer draws from torch and from Python's ``random``."""
    torch.manual_seed(0)
    random.seed(0)


def training_step(model: torch.nn.Module, x: torch.Tensor, lengths: torch.Tensor) -> float:
    """Runs one forward and backward from a fixed random state; returns the loss."""
    seed()
    model.train()
    model.zero_grad()
    output, _ = model(x, lengths)
    loss = output.square().mean()
    loss.backward()
    model.eval()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--medium", action="store_true", help="Zipformer-M, the published medium configuration"
    )
    options = parser.parse_args()
    # Any upstream model will do. Without upstream's own inner torch.compile the first call is 18 s shorter.
    model = upstream.zipformer("medium" if options.medium else "tiny", inner_compile=False)
    seed()
    inputs = upstream.example(batch=2, frames=120)

    with torch.inference_mode():
        before, _ = model(*inputs)
    loss_before = training_step(model, *inputs)

    # This line swaps the kernels. verify= runs every swapped module both ways on these inputs and undoes any that
    # disagree.
    report = fastasr.accelerate(model, verify=inputs)
    print(report)

    with torch.inference_mode():
        start = time.perf_counter()
        after, _ = model(*inputs)
        took = time.perf_counter() - start
    loss_after = training_step(model, *inputs)
    print(f"forward {took * 1e3:.0f} ms; largest difference of the output {(after - before).abs().max():.1e}")
    print(f"training step from the same seed: loss {loss_before:.6f} before, {loss_after:.6f} after")

    print(f"restored {fastasr.restore(model)} modules")


if __name__ == "__main__":
    main()
