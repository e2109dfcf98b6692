# SPDX-License-Identifier: Apache-2.0
"""The environment a row is stamped with: commit, versions, device, threads, date."""

import functools
import hashlib
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

import fastasr
from fastasr import ops, processor
from fastasr.swap.source_hash import normal_form

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

    Outside a checkout (an installed wheel) it is ``v<version>``. The environment variable FASTASR_COMMIT names the
    commit for a copy of its files.
    """
    if "FASTASR_COMMIT" in os.environ:
        return os.environ["FASTASR_COMMIT"]
    here = Path(__file__).resolve()
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    head = _git(here.parent, "rev-parse", "--short=10", "HEAD") if tracked else None
    if not head:
        return f"v{fastasr.__version__}"
    root = Path((_git(here.parent, "rev-parse", "--show-toplevel") or "").strip() or here.parent)
    paths = [p for p in MEASURED_PATHS if (root / p).exists()]
    changes = _git(root, "diff", "HEAD", "--", *paths, ":(exclude)benchmarks/results")
    if not changes:
        return head.strip()
    return f"{head.strip()}-dirty.{hashlib.sha1(changes.encode()).hexdigest()[:6]}"


@functools.cache
def code(suite: str, name: str, device: str = "cpu") -> str:
    """Returns a hash of the files of an op or a model without their comments; "" outside a checkout.

    An op's files have its name: its declaration, and its kernels for this device. A model's files are those of its
    folder, with which the model's name starts, or of all models where it has none.
    """
    if name in ops.NAMES and suite != "models":
        stem = ops.OPS[name].definition.__module__.rpartition(".")[2]
        tops = (
            ("csrc/cpu", "csrc/bindings") if torch.device(device).type == "cpu" else ("csrc/cuda", "kernels")
        )
        own = (p for top in ("fastasr/ops", *tops) for p in (ROOT / top).rglob(f"{stem}.*"))
    else:
        models = ROOT / "fastasr" / "models"
        folders = (p for p in models.glob("*/") if name.startswith(p.name))
        own = max(folders, key=lambda p: len(p.name), default=models).rglob("*.py")
    own = sorted(p for p in own if p.suffix != ".pyc")
    contents = (path.name + _meaning(path.read_text(), path.suffix) for path in own)
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:12] if own else ""


def _meaning(source: str, suffix: str) -> str:
    """Returns what decides the speed of a source in Python or C++: not its comments, not its empty lines."""
    if suffix == ".py":
        return normal_form(source)
    code = re.sub(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', r"\1", source, flags=re.DOTALL)
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


@functools.cache
def cpu_name() -> str:
    """Returns the CPU's model name, and its family, model and widest vectors or AMX, as a virtual machine may give many
    CPUs one name. Without /proc/cpuinfo it gives the name from lscpu, or the architecture.
    """
    fields = processor.fields()
    if "model name" in fields:
        name = fields["model name"]
        if "cpu family" in fields and "model" in fields:
            name += f", family {fields['cpu family']} model {fields['model']}"
        return name + _widest_set(fields.get("flags", ""))
    try:
        listing = subprocess.run(["lscpu"], capture_output=True, text=True, timeout=10).stdout
        for line in listing.splitlines():
            if line.startswith("Model name"):
                return line.split(":", 1)[1].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.machine()


def _widest_set(flags: str) -> str:
    for flag, name in (("amx_tile", "AMX"), ("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX")):
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
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


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
