# SPDX-License-Identifier: Apache-2.0
"""``fastasr env``: what is installed, and what is missing and why."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path

import torch

import fastasr
from fastasr import processor
from fastasr.benchmarks.environment import cpu_name
from fastasr.cli.console import escape, no_gpu, out, table
from fastasr.ops import _dispatch, _gemm

# extra -> distributions it brings
EXTRAS = {
    "cli": ("typer", "rich"),
    "bench": ("matplotlib", "jinja2", "psutil"),
    "asr": ("numpy", "soundfile", "soxr", "kaldi-native-fbank", "kaldialign", "onnx", "onnxruntime"),
}
UPSTREAM = ("zipformer",)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> dict:
    if not torch.cuda.is_available():
        return {"devices": [], "reason": no_gpu()}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"devices": devices, "reason": ""}


def _granted(groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Returns the cores that this process may use, by its affinity or its container's share of time."""
    cores = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        if (groups / "cpu.max").exists():
            quota, period = (groups / "cpu.max").read_text().split()
        else:
            quota, period = ((groups / "cpu" / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        if float(quota) > 0:  # ValueError: "max"; -1 in the older files
            cores = min(cores, float(quota) / float(period))
    return round(cores, 2)


def _amx() -> bool:
    return "amx_tile" in processor.fields().get("flags", "").split()


def _native() -> dict:
    """Returns the native library's build information. A negative count of devices is a CUDA error code."""
    info = {str(key).replace("_", " "): value for key, value in _dispatch.native_build_info().items()}
    devices = info.get("cuda devices")
    if isinstance(devices, int) and devices < 0:
        info["cuda devices"] = f"none (CUDA error {-devices})"
    return info


def _products() -> dict:
    kept, under_load = _gemm.kept()
    return {
        "file": str(_gemm.cache_file()),
        "choices kept": kept,
        "made under load": under_load,
        "in force": os.environ.get("FASTASR_GEMM") or "auto",
    }


def collect() -> dict:
    """Returns everything that the command shows, in types that JSON has."""
    missing = {extra: [d for d in needed if _version(d) is None] for extra, needed in EXTRAS.items()}
    triton = next((row for row in _dispatch.table() if row["backend"] == "triton"), None)
    return {
        "versions": {
            "fastasr": fastasr.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda (torch)": torch.version.cuda,
            "zipformer (upstream)": _version("zipformer"),
            "system": platform.platform(),
        },
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "cores granted": _granted(),
            "torch threads": torch.get_num_threads(),
            "torch SIMD level": torch.backends.cpu.get_cpu_capability(),
            "AMX": "there" if _amx() else "none",
        },
        "cuda": _cuda(),
        "native": {
            "loaded": not _dispatch.why_not_native(),
            "reason": _dispatch.why_not_native(),
            **_native(),
        },
        "triton": {
            "usable": bool(triton and triton["available"]),
            "reason": triton["reason"] if triton else "no op has a Triton kernel",
        },
        "backend": os.environ.get("FASTASR_BACKEND") or "auto",
        "matrix products": _products(),
        "missing": {extra: names for extra, names in missing.items() if names},
    }


def _text(value: object) -> str:
    if value is None:
        return "[yellow]not installed[/]"
    if isinstance(value, list | tuple):
        return escape(", ".join(map(str, value))) or "none"
    return escape(value)


def _block(console, name: str, values: dict) -> None:
    shown = table("", "", title=name)
    shown.show_header = False
    for key, value in values.items():
        shown.add_row(f"  {escape(key)}", _text(value))
    console.print(shown)


def run(as_json: bool) -> None:
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2, default=str))
        return
    console = out()
    _block(
        console,
        "Versions",
        {k: ("none" if k.startswith("cuda") and not v else v) for k, v in found["versions"].items()},
    )
    cpu = found["cpu"]
    if cpu["torch threads"] > math.ceil(cpu["cores granted"]):
        cpu |= {"torch threads": f"{cpu['torch threads']}, more than there are cores: set OMP_NUM_THREADS"}
    _block(console, "CPU", cpu)
    devices = found["cuda"]["devices"]
    shown = {
        f"cuda:{i}": f"{d['name']}, sm_{d['capability'].replace('.', '')}, {d['memory_gib']} GiB"
        for i, d in enumerate(devices)
    }
    _block(console, "CUDA", shown or {"devices": found["cuda"]["reason"]})
    native = {k: v for k, v in found["native"].items() if k not in ("loaded", "reason")}
    loaded = "yes" if found["native"]["loaded"] else f"no: {found['native']['reason']}"
    _block(console, "Native library", {"loaded": loaded, **native})
    usable = "usable" if found["triton"]["usable"] else f"not usable: {found['triton']['reason']}"
    _block(console, "Backends", {"in force": found["backend"], "Triton kernels": usable})
    products = found["matrix products"]
    if products["made under load"]:
        products |= {
            "made under load": f"{products['made under load']}, measured again once the machine is idle"
        }
    _block(console, "Matrix products", products)
    if found["missing"]:
        missing = {
            f"extra '{extra}'": f"{', '.join(names)} not installed: pip install 'fastasr[{extra}]'"
            for extra, names in found["missing"].items()
        }
        _block(console, "Missing", missing)
