# SPDX-License-Identifier: Apache-2.0
"""Measures the seconds from nothing to a swapped model, and keeps them as a row.

    python scripts/newcomer.py WHEEL

This Python has torch and upstream's package zipformer. A fresh environment sees its packages and gets the wheel alone:
nothing is downloaded and this Python stays as it is. Leave the machine idle meanwhile. docs/install.md and the README
show benchmarks/results/newcomer.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastasr import files
from fastasr.benchmarks.environment import stamp

NONE_YET = "No row yet: `scripts/newcomer.py` writes one."
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "newcomer.json"
STEPS = {
    "environment": "a fresh environment that sees torch",
    "install": "`pip install` of the wheel",
    "model": "a swapped model that has run",
}
MODEL = "a small Zipformer of two layers"  # The package is upstream's, from PyPI.
SWAP = """
import fastasr, torch
from zipformer.modules.zipformer import Zipformer

sizes = {"encoder_dim": (64, 96), "encoder_unmasked_dim": (48, 64), "downsampling_factor": (1, 2)}
model = Zipformer(**sizes, num_encoder_layers=1).eval()
report = fastasr.accelerate(model)
model(torch.randn(100, 1, 64), torch.tensor([100]))
assert report.replaced
"""


def measure(wheel: Path, folder: Path) -> dict[str, float]:
    """Returns step -> the seconds since the beginning at which it has ended."""
    begin, ended = time.perf_counter(), {}

    def step(name: str, *command) -> None:
        subprocess.run(list(map(str, command)), cwd=folder, check=True)
        ended[name] = round(time.perf_counter() - begin, 1)
        print(f"{ended[name]:6.1f} s  {STEPS[name].replace('`', '')}", flush=True)

    step("environment", sys.executable, "-m", "venv", folder / "new")
    (packages,) = (folder / "new" / "lib").glob("python*/site-packages")
    (packages / "torch-of-another.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = folder / "new" / "bin" / "python"
    quiet = ("--quiet", "--disable-pip-version-check")
    step("install", python, "-m", "pip", "install", *quiet, "--no-deps", "--no-index", wheel)
    step("model", python, "-c", SWAP)
    return ended


def table() -> str:
    """Returns the newest row as Markdown."""
    if not RESULTS.exists():
        return NONE_YET
    row = json.loads(RESULTS.read_text(encoding="utf-8"))[-1]
    lines = ["| what there is | after |", "|---|---:|"]
    lines += [f"| {what} | {row[name]:.1f} s |" for name, what in STEPS.items()]
    where = f"{row['device_name']}, torch {row['torch']}, commit {row['commit']}, {row['date'][:10]}"
    what = (
        f"The model is {MODEL}; a wheel of {row['wheel_mb']:.1f} MB; the machine's load was {row['load']:.1f}"
    )
    return "\n".join([*lines, "", f"{what}; **{where}**."])


def sentence() -> str:
    """Returns what the README says of the newest row."""
    if not RESULTS.exists():
        return NONE_YET
    row = json.loads(RESULTS.read_text(encoding="utf-8"))[-1]
    return (
        f"Where torch and the package `zipformer` are installed, it takes {row['model']:.0f} s from nothing to\n"
        f"{MODEL} that is swapped and has run ([measured](docs/install.md#from-the-wheel))."
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.resolve()
    row = stamp() | {"wheel_mb": round(wheel.stat().st_size / 1e6, 1), "load": round(os.getloadavg()[0], 1)}
    with tempfile.TemporaryDirectory() as folder:
        row |= measure(wheel, Path(folder))
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    files.write(RESULTS, json.dumps([*before, row], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
