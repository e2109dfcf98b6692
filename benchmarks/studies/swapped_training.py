# SPDX-License-Identifier: Apache-2.0
"""Shows that a swapped model trains like the one as shipped: the PyPI recogniser as shipped and swapped, on real
speech.

    python -m fastasr.benchmarks.studies.swapped_training [--steps 50] [--out FILE]

trains it three times from one seed on the telephone prompts (`examples/train_transducer.py --upstream`): as shipped,
swapped, and as shipped with every parameter moved by one rounding, which shows how far rounding alone takes such a run.
Writes the losses of every step, their relative differences and the environment as JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fastasr import files
from fastasr.asr.recipe import speech, training
from fastasr.asr.recipe.curves import read
from fastasr.benchmarks.environment import stamp

ROOT = Path(__file__).resolve().parents[2]
RUNS = {"upstream": False, "swapped": True, "upstream, parameters rounded": False}


def moved_by_one_rounding(model: torch.nn.Module) -> None:
    """Multiplies every parameter by 1 ± one unit of rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)


def losses(name: str, swap: bool, steps: int, size: str, speeches, units) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        options = training.Options(
            out=Path(folder), steps=steps, size=size, upstream=True, swap=swap, checkpoint_every=steps
        )
        trainer = training.Trainer(options, *speeches, units)
        if name.endswith("rounded"):
            moved_by_one_rounding(trainer.model)
        trainer.run()
        return read(Path(folder) / "log.csv")["loss"]


def summary(curve: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Returns the relative differences of two curves, step by step: the median, the largest, and how many exceed 1e-5,
    as they may where two windows of the pruned lattice tie and rounding decides.
    """
    found = [abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True)]
    return {
        "median": statistics.median(found),
        "largest": max(found),
        "above 1e-5": sum(d > 1e-5 for d in found),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", default="small", choices=("small", "tiny"))
    parser.add_argument(
        "--cache", type=Path, default=Path("demo/cache"), help="downloads (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/swapped_training.json")
    options = parser.parse_args(arguments)
    speeches = speech.load(options.cache)
    units = training.learn_units("char", speeches[0])
    curves = {
        name: losses(name, swap, options.steps, options.size, speeches, units) for name, swap in RUNS.items()
    }
    shipped = curves["upstream"]
    differences = {name: summary(curve, shipped) for name, curve in curves.items() if name != "upstream"}
    for name, difference in differences.items():
        print(f"{name}: relative differences of the losses over {len(shipped)} steps: {difference}")
    report = {"size": options.size, "relative_differences": differences, "losses": curves, **stamp()}
    files.write(options.out, json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
