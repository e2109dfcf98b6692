# SPDX-License-Identifier: Apache-2.0
"""The environment a row is stamped with: commit, versions, device, threads, date."""

import functools
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from fastasr import processor
from fastasr.ops._dispatch import gpu_backends

ROOT = Path(__file__).resolve().parent.parent
# A change in these makes a measurement a different one; results and documentation do not.
MEASURED_PATHS = ("fastasr", "kernels", "csrc", "benchmarks", "setup.py", "CMakeLists.txt")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@functools.cache
def commit() -> str:
    """Returns the commit of the working tree; ``<commit>-dirty.<hash of the changes>`` when measured files differ from
    it.

    Outside a checkout (an installed wheel) it is ``v<version>``. The environment variable FASTASR_COMMIT says it for a
    copy of a commit's files.
    """
    if "FASTASR_COMMIT" in os.environ:
        return os.environ["FASTASR_COMMIT"]
    here = Path(__file__).resolve()
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    head = _git(here.parent, "rev-parse", "--short=10", "HEAD") if tracked else None
    if not head:
        return f"v{_fastasr_version()}"
    root = Path((_git(here.parent, "rev-parse", "--show-toplevel") or "").strip() or here.parent)
    paths = [p for p in MEASURED_PATHS if (root / p).exists()]
    changes = _git(root, "diff", "HEAD", "--", *paths, ":(exclude)benchmarks/results")
    if not changes:
        return head.strip()
    return f"{head.strip()}-dirty.{hashlib.sha1(changes.encode()).hexdigest()[:6]}"


@functools.cache
def _sources():
    """Returns scripts/sources.py of the checkout, which knows what a file needs, or None outside a checkout."""
    path = ROOT / "scripts" / "sources.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("sources", path)
    found = sys.modules["sources"] = sys.modules.get("sources") or importlib.util.module_from_spec(spec)
    if not hasattr(found, "closure"):
        spec.loader.exec_module(found)
    return found


@functools.cache
def code(suite: str, name: str, device: str = "cpu") -> str:
    """Returns a hash of the files that an op or model is made of, without its samples and without the harness; "" if
    there is no checkout or no such file. A model's name starts with that of its benchmark.
    """
    sources = _sources()
    if sources is None:
        return ""
    path = sources.ops().get(name)
    if path is None:
        benchmarks = (p for p in (ROOT / "benchmarks" / "models").glob("*.py") if name.startswith(p.stem))
        path = max(benchmarks, key=lambda p: len(p.stem), default=None)
    if path is None:
        return ""
    others = ("kernels", "csrc/cuda")
    if torch.device(device).type != "cpu":  # kernels in Triton need nothing of csrc
        others = ("csrc/cpu",) if gpu_backends().get(name) == "cuda" else ("csrc",)
    # every benchmark imports the module that can make a Zipformer; one that does has the word itself
    others = (*others, "fastasr/testing", "benchmarks/upstream.py")
    needed = sources.closure(path, without=tuple(ROOT / other for other in others))
    files = (p for p in needed if p == path or not p.is_relative_to(ROOT / "benchmarks"))
    return sources.digest(files)[:12]


def _fastasr_version() -> str:
    try:
        import fastasr

        return str(fastasr.__version__)
    except (ImportError, AttributeError):
        return "unknown"


@functools.cache
def cpu_name() -> str:
    """Returns the CPU's model name, and its family, model and widest vectors, as a virtual machine may give many CPUs
    one name. It reads /proc/cpuinfo, else the name alone from lscpu, else the architecture.
    """
    fields = processor.fields()
    if "model name" in fields:
        name = fields["model name"]
        if "cpu family" in fields and "model" in fields:
            name += f", family {fields['cpu family']} model {fields['model']}"
        return name + _widest_vectors(fields.get("flags", ""))
    try:
        listing = subprocess.run(["lscpu"], capture_output=True, text=True, timeout=10).stdout
        for line in listing.splitlines():
            if line.startswith("Model name"):
                return line.split(":", 1)[1].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.machine()


def _widest_vectors(flags: str) -> str:
    for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX")):
        if flag in flags.split():
            return f", {name}"
    return ""


def int8_saturates() -> bool:
    """Says whether onnxruntime adds two int8 products in 16 bits, which saturate: on x86 without VNNI."""
    return platform.machine() == "x86_64" and "vnni" not in processor.fields().get("flags", "vnni")


def device_name(device: str = "cpu") -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} ({os.cpu_count()} cores)"


@functools.cache
def triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        import triton

        return str(triton.__version__)
    except ImportError:
        return None


def stamp(device: str = "cpu") -> dict:
    """Returns the environment fields of a row for ``device``, with the present date (UTC)."""
    return {
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
