# SPDX-License-Identifier: Apache-2.0
"""Installs one wheel with every torch from 2.11 on and several Pythons, runs a part of the tests, compiles the sources,
and keeps the rows.

    python scripts/test_matrix.py WHEEL FOLDER [--python PYTHON...] [--torch 2.N...]

Each pair gets an environment in FOLDER, where pip also keeps what it downloads; both are removed at the end. An
environment has torch 2.N as pip finds it: a CPU build if pip is configured with an index of CPU builds. By default
these are python3.11 to python3.14 as far as they exist here, and every 2.N that pip finds. docs/testing.md shows
benchmarks/results/test_matrix.json.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from fastasr import files
from fastasr.benchmarks import environment
from fastasr.benchmarks.markdown import grid

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "test_matrix.json"
OLDEST = 11
PYTHONS = tuple(f"python3.{minor}" for minor in range(11, 15))
TOOLS = ("numpy", "pytest", "pytest-xdist", "hypothesis")
COMPILERS = ("setuptools", "wheel", "ninja", "cmake", "pybind11")
# These tests check values and gradients of every op in float32, its registration, torch.compile; gradients at a clamp's
# bounds, which torch 2.14 changed; a forked process; and, with the Triton that torch brings, launches of compiled
# kernels, and a few kernels on an emulated GPU.
KERNELS = "test_launch", "test_ptx"
TESTS = (
    "tests/ops/test_contract.py",
    "tests/ops/test_clamped_gradients.py",
    "tests/ops/test_fork.py",
    *(f"tests/kernels/{name}.py" for name in KERNELS),
)
CHOSEN = " or ".join(("parity and float32", "opcheck", "compiles", "of_a_clamp", "forked", *KERNELS))
ASK = """
import importlib.util, json, sys, torch, fastasr
from fastasr.ops import _dispatch
x = torch.randn(3, 8, requires_grad=True)
fastasr.ops.swoosh_l(x).sum().backward()
assert torch.isfinite(x.grad).all()
print(json.dumps({
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "triton": __import__("triton").__version__ if importlib.util.find_spec("triton") else "",
    "backend": _dispatch.explain_choice("swoosh", "cpu", torch.float32)[0],
    "reason": _dispatch.why_not_native(),
}))
"""


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def last_line(done: subprocess.CompletedProcess) -> str:
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"exit code {done.returncode}"


def compiled(folder: Path) -> str:
    """Returns how the checkout's sources compile against an environment's torch, without CUDA code."""
    python, build = folder / "bin/python", folder / "build"
    command = f"""export PATH={folder}/bin:$PATH  # ninja and cmake
      source <(scripts/python_headers.sh {python} {folder}/headers)
      export FASTASR_CUDA=0 CMAKE_ARGS="${{CMAKE_ARGS:-}} -DFASTASR_SETS=native"
      {python} setup.py --quiet build_ext --build-temp {build}/temp --build-lib {build}/lib"""
    done = run("bash", "-c", command, cwd=ROOT)
    print(done.stdout[-3000:] if done.returncode else "", flush=True)
    return last_line(done) if done.returncode else "compiled"


def pair(wheel: Path, folder: Path, python: str, minor: int) -> dict:
    """Returns the row of one Python and one torch."""
    shutil.rmtree(folder, ignore_errors=True)
    row = {"python": python, "torch": f"2.{minor}"} | dict.fromkeys(
        ("wheel", "sources", "backend", "reason", "tests"), ""
    )
    run(python, "-m", "venv", folder, check=True)
    downloads = folder.parent / "downloads"
    pip = (folder / "bin/python", "-m", "pip", "install", "--quiet", "--cache-dir", downloads)
    done = run(*pip, f"torch~=2.{minor}.0", *TOOLS, *COMPILERS)
    if done.returncode:
        return row | {"wheel": "no torch: " + last_line(done)}
    done = run(*pip, "--no-deps", wheel)
    if done.returncode:
        return row | {"wheel": "refused by pip: " + last_line(done)}
    row["wheel"] = "installed"
    done = run(folder / "bin/python", "-c", ASK, cwd=folder)
    if done.returncode:
        return row | {"tests": "fastasr does not import: " + last_line(done)}
    row |= json.loads(last_line(done)) | {"sources": compiled(folder)}
    # The folder has the tests and no package, so that they import the wheel's.
    shutil.copytree(ROOT / "tests", folder / "tree/tests")
    for name in ("pyproject.toml", "scripts"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "tree" / name)
    command = (folder / "bin/python", "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", "-m", "not long")
    begin = time.monotonic()
    # As in the suite: with more threads than cores, each parallel loop waits for threads that do not run.
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = run(*command, "-k", CHOSEN, *TESTS, cwd=folder / "tree", env=one_thread)
    print(done.stdout[-3000:] if done.returncode else last_line(done), flush=True)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last_line(done))
    return row | {"tests": ", ".join(counts) or last_line(done), "seconds": round(time.monotonic() - begin)}


def torches() -> list[int]:
    """Returns N of every torch 2.N that pip finds, from the oldest that fastasr runs with."""
    found = run(sys.executable, "-m", "pip", "index", "versions", "torch").stdout
    return sorted({int(n) for n in re.findall(r"\b2\.(\d+)\.\d+", found) if int(n) >= OLDEST})


def table() -> str:
    """Returns the table of the newest row of each pair."""
    if not RESULTS.exists():
        return "No rows yet: `make test-matrix` writes them."
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    newest = {(row["python"], row["torch"]): row for row in rows}
    lines = []
    for row in newest.values():
        kernels = row["backend"] + (f": {row['reason']}" if row["reason"] else "")
        minutes = f"{row['seconds'] / 60:.0f} min" if "seconds" in row else ""
        triton = row.get("triton", "")
        built = row["wheel"], row.get("sources", "")
        lines.append((row["python"], row["torch"], triton, *built, kernels, row["tests"], minutes))
    titles = "Python", "torch", "Triton", "wheel", "sources", "kernels", "tests", "time"
    return "\n".join(grid(titles, lines, 1))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", nargs="*", default=[p for p in PYTHONS if shutil.which(p)])
    parser.add_argument("--torch", nargs="*", help="2.11 and so on")
    options = parser.parse_args()
    minors = [int(v.partition(".")[2]) for v in options.torch] if options.torch else torches()
    options.folder.mkdir(parents=True, exist_ok=True)
    where = {"commit": environment.commit(), "device": environment.device_name()}
    for python in options.python:
        for minor in minors:
            row = pair(options.wheel.resolve(), options.folder.resolve() / "environment", python, minor)
            row |= {"date": datetime.now(UTC).date().isoformat(), **where}
            print(row, flush=True)
            rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
            files.write(RESULTS, json.dumps([*rows, row], indent=1) + "\n")
    for made in ("environment", "downloads"):
        shutil.rmtree(options.folder / made, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
