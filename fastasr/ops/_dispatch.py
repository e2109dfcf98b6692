# SPDX-License-Identifier: Apache-2.0
"""The choice of the kernel that serves a tensor: backends, their availability, and the reasons.

A :class:`KernelFamily` groups the kernels that share one implementation (``swoosh`` serves three ops). For a tensor's
device and dtype it answers with the kernels to call, or with ``None``: then the op runs its eager definition. The
choice is made once per (device, dtype) and remembered until :func:`backend` changes it.
"""

import contextlib
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from fastasr._transforms import is_transformed, transforms_active
from fastasr.kernels import Unlaunchable

BACKENDS = ("cpu", "cuda", "triton", "eager")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_log = logging.getLogger("fastasr")


# --------------------------------------------------------------------------- what is installed
NATIVE_LIBRARY = Path(__file__).resolve().parents[1] / "libfastasr.so"


@cache
def why_not_native() -> str:
    """Loads the native library, once; says why there is none, or returns "". It holds ``torch.ops.fastasr_cpu.*``."""
    if not NATIVE_LIBRARY.exists():
        return "the native library is not built (installed with FASTASR_NATIVE=0, or from source files alone)"
    try:
        torch.ops.load_library(NATIVE_LIBRARY)
        problem = torch.ops.fastasr_cpu.machine_problem()
    except Exception as error:  # a binary for another system must not stop the import: it is reported
        problem = str(error)
    if problem:
        return f"the native library did not load: {problem}"
    wrong = torch.ops.fastasr_cpu.setting_problem()  # FASTASR_SIMD names no set of this library and machine
    if wrong:
        raise ValueError(wrong)
    return ""


@cache
def native_build_info() -> dict:
    """Returns the native library's SIMD level in use and CUDA architectures; {} when it is missing. Only the Python
    version that built it also gets the compiler's facts.
    """
    if why_not_native():
        return {}
    library = torch.ops.fastasr_cpu
    architectures = library.cuda_architectures() or None
    info = {
        "simd": library.simd_level(),
        "simd_set": library.simd_name(),
        "bf16_gains": library.bf16_gains(),
        "cuda_architectures": architectures,
        "cuda_devices": library.cuda_devices() if architectures else None,
    }
    try:
        built = importlib.import_module("fastasr._build_info")
    except ImportError:  # made for another version of Python
        return info
    return {"compiler": built.compiler, "torch_abi": built.torch_abi, "nvcc": built.nvcc} | info


@cache
def _why_no_triton() -> str:
    try:
        importlib.import_module("triton")
    except Exception as error:
        return f"triton does not import: {error}"
    return ""


def interpreting() -> bool:
    """Says whether Triton kernels run in its interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def why_not_cpu(*operators: str) -> str:
    """Says why ``torch.ops.fastasr_cpu.<operator>`` cannot serve here, for one of ``operators``, or returns ""."""
    if why_not_native():
        return why_not_native()
    if all(hasattr(torch.ops.fastasr_cpu, operator) for operator in operators):
        return ""
    return "the native library has no kernel for it: it was built from another version, build it again"


def serves_floats(operators: Sequence[str], *tensors: torch.Tensor) -> bool:
    """Says whether ``torch.ops.fastasr_cpu.<operator>`` compute these: plain float32 on the CPU."""
    return (
        direct(*tensors)
        and all(t.is_cpu and t.dtype is torch.float32 for t in tensors)
        and _forced in ("auto", "cpu")
        and not why_not_cpu(*operators)
    )


def _why_not_cuda(name: str) -> str:
    if why_not_native():
        return why_not_native()
    if native_build_info()["cuda_architectures"] is None:
        return "the native library was built without CUDA"
    if not hasattr(torch.ops.fastasr_cuda, f"{name}_forward"):
        return "the native library has no CUDA kernel for it"
    return "" if torch.cuda.is_available() else "no CUDA device"


def _why_not_triton() -> str:
    reason = _why_no_triton()
    if reason or interpreting():
        return reason
    return "" if torch.cuda.is_available() else "no CUDA device"


def _why_not_triton_on(device: torch.device | None = None) -> str:
    """Says why the Triton kernels do not serve a CUDA device, by default the current one, or returns ""."""
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this is torch for ROCm"
    return _too_old(device, 80)


def _why_not_cuda_on(device: torch.device | None = None) -> str:
    """Says why the native library's CUDA kernels do not serve a CUDA device, or returns ""."""
    return _too_old(device, min(map(int, re.findall(r"\d+", native_build_info()["cuda_architectures"]))))


def _too_old(device: torch.device | None, least: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor >= least:
        return ""
    return f"the kernels need compute capability {least / 10}, and the device has {major}.{minor}"


# --------------------------------------------------------------------------- the forced backend
def _initial_backend() -> str:
    name = os.environ.get("FASTASR_BACKEND", "auto") or "auto"
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"FASTASR_BACKEND: expected one of {('auto', *BACKENDS)}, got {name!r}")
    return name


_forced = _initial_backend()


def forced_backend() -> str:
    """Returns the backend in force: "auto", or the one that was asked for."""
    return _forced


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces every op to one backend inside the ``with`` block, for the whole process, not for one thread.

    ``name``: "auto", "eager", "cpu", "cuda" or "triton". An op that has no such kernel for the tensor it is given
    raises ``RuntimeError`` with the reason; "eager" always works.
    """
    global _forced
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"fastasr.backend: name: expected one of {('auto', *BACKENDS)}, got {name!r}")
    previous, _forced = _forced, name
    _forget()
    try:
        yield
    finally:
        _forced = previous
        _forget()


def _forget() -> None:
    for family in FAMILIES.values():
        family.chosen.clear()
        family.native = None
    prepare()


def prepare() -> None:
    """Loads the native library, where there is one, and opens the shortest path to its kernels."""
    if why_not_native() or _forced not in ("auto", "cpu"):
        return
    for family in FAMILIES.values():
        for implementation in family.implementations:
            if implementation.backend == "cpu" and not implementation.why_not():
                family.native = implementation.load()


# --------------------------------------------------------------------------- kernels
@dataclass(frozen=True)
class Kernels:
    """The callables of one backend for one kernel family."""

    backend: str
    forward: Callable
    backward: Any  # callable, or None if the kernels have no backward pass
    # that of the recording of the backward pass, if it is recorded
    later: Callable[..., bool] | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Implementation:
    """One backend of a kernel family: where it works, why it may not, and how to load it."""

    backend: str
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[], str]
    load: Callable[[], Kernels]
    # Says why it does not serve a CUDA device.
    why_not_on: Callable[..., str] = lambda device=None: ""


@dataclass
class KernelFamily:
    name: str
    ops: tuple[str, ...]
    implementations: tuple[Implementation, ...]
    # The definition calls a vendor library's kernel, so falling back to it needs no warning.
    vendor: bool = False
    chosen: dict = field(default_factory=dict)
    # by device and dtype: the backend whose kernels the device could not launch, and why
    failed: dict = field(default_factory=dict)
    # Returns the native kernels while they serve plain CPU tensors, else None. An op's shortest path calls them before
    # any check: the kernels' own checks raise ValueError, and the op then takes the checked path.
    native: Kernels | None = None

    def __post_init__(self) -> None:
        FAMILIES[self.name] = self

    def kernels(self, x: torch.Tensor, *others: torch.Tensor | None) -> Kernels | None:
        """Returns the kernels for tensors like ``x``, or None to run the eager definition. A float64 among ``others``
        asks for float64 kernels.
        """
        key = (x.device, widest(x, others))
        try:
            return self.chosen[key]
        except KeyError:
            pass
        kernels = self._choose(*key)
        self.chosen[key] = kernels
        return kernels

    def give_up(self, error: Unlaunchable, x: torch.Tensor, *others: torch.Tensor | None) -> None:
        """Leaves tensors like ``x`` to the eager definition from now on: the device cannot launch a kernel. Warns, and
        raises ``RuntimeError`` where the backend is forced.
        """
        key = (x.device, widest(x, others))
        self.failed[key] = "triton", str(error)
        self.chosen[key] = self._choose(*key)

    def _choose(self, device: torch.device, dtype: torch.dtype) -> Kernels | None:
        forced = _forced
        if forced == "eager":
            return None
        reasons = []
        for implementation in self.implementations:
            if forced not in ("auto", implementation.backend):
                continue
            reason = self.why_not(implementation, device, dtype)
            if not reason:
                return implementation.load()
            if device.type in implementation.device_types or forced != "auto":
                reasons.append(f"{implementation.backend}: {reason}")
        where = f"{self.name} on {device.type}, {str(dtype).removeprefix('torch.')}"
        # A family without ops speeds up a step of ours, and needs no kernel of every backend.
        if forced != "auto" and (self.ops or reasons):
            raise RuntimeError(
                f"fastasr: backend {forced!r} is forced but cannot serve {where}: "
                f"{'; '.join(reasons) or 'there is no such kernel'}"
            )
        if reasons and not self.vendor:
            _log.warning("%s runs in eager: %s", where, "; ".join(reasons))
        return None

    def why_not(self, implementation: Implementation, device: torch.device, dtype: torch.dtype) -> str:
        """Says why an implementation does not serve tensors of this device and dtype, or returns ""."""
        backend = implementation.backend
        interpreted = backend == "triton" and _forced == "triton" and interpreting()
        if device.type not in implementation.device_types and not (interpreted and device.type == "cpu"):
            return f"serves {', '.join(implementation.device_types)} tensors only"
        if dtype not in implementation.dtypes:
            return f"no {str(dtype).removeprefix('torch.')} kernel"
        failed, why = self.failed.get((device, dtype), ("", ""))
        return (
            implementation.why_not()
            or (implementation.why_not_on(device) if device.type == "cuda" else "")
            or (why if failed == backend else "")
        )


FAMILIES: dict[str, KernelFamily] = {}


def gpu_backends() -> dict[str, str]:
    """Returns op -> the backend of its kernels for GPUs, of the ops that have some."""
    return {
        op: implementation.backend
        for family in FAMILIES.values()
        for implementation in family.implementations
        for op in family.ops
        if "cuda" in implementation.device_types
    }


def widest(x: torch.Tensor, others: tuple[torch.Tensor | None, ...]) -> torch.dtype:
    """Returns float64 where any of ``others`` is float64, else x's dtype."""
    for t in others:  # A generator would take half a microsecond of every call.
        if t is not None and t.dtype is torch.float64:
            return torch.float64
    return x.dtype


def _serving(family: str, device_type: str, index: int | None, dtype: torch.dtype, forced: str) -> str:
    # When the graph runs, a traced dual level exists in C++ alone, and the operator would not see it.
    if forward_ad._current_level >= 0 and not transforms_active():
        return ""
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    kernels = FAMILIES[family]._choose(device, dtype)
    return "" if kernels is None else kernels.backend


# torch.compiler.assume_constant_result sets this, but calling it imports torch._dynamo, which takes as long as torch.
vars(_serving)["_dynamo_marked_constant"] = True


def served(family: str, x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Says whether a kernel serves x. Code that is being traced asks this: a graph is valid for one forced backend
    only.
    """
    return _serving(family, x.device.type, x.device.index, widest(x, others), _forced) != ""


def serving(family: str, x: torch.Tensor) -> str:
    """Returns the backend whose kernels serve x, or "" for the eager definition, also of code that is being traced."""
    if torch.compiler.is_compiling():
        return _serving(family, x.device.type, x.device.index, x.dtype, _forced)
    kernels = FAMILIES[family].kernels(x)
    return "" if kernels is None else kernels.backend


def native_kernels(
    name: str,
    operator: str = "",
    load: Callable[[], Kernels] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
) -> Implementation:
    """Returns the C++ kernels ``torch.ops.fastasr_cpu.<name>_forward`` and, if there is one, ``_backward``, or what
    ``load`` returns for calls of ``operator``.
    """
    reason = partial(why_not_cpu, operator or f"{name}_forward")
    return Implementation("cpu", ("cpu",), dtypes, reason, load or partial(_registered, "cpu", name))


def cuda_kernels(name: str) -> Implementation:
    """Returns the CUDA kernels ``torch.ops.fastasr_cuda.<name>_forward`` and, if there is one, ``_backward``."""
    load = partial(_registered, "cuda", name)
    return Implementation("cuda", ("cuda",), FLOATING, partial(_why_not_cuda, name), load, _why_not_cuda_on)


def registered(backend: str, name: str) -> Callable:
    """Returns ``torch.ops.fastasr_<backend>.<name>`` without the Python function around it, whose call costs 0.1 us.
    Where it declines a call it raises ValueError.
    """
    overload = getattr(getattr(torch.ops, f"fastasr_{backend}"), name).default
    operator = getattr(overload, "_op", overload)
    return operator if _declines_by_type() else partial(_declining, operator)


@cache
def _declines_by_type() -> bool:
    """Says whether torch makes a ValueError of the exception by which kernels decline a call (``decline`` in
    csrc/bindings/dispatch.h). torch 2.15 makes a RuntimeError of each exception.
    """
    try:
        torch.ops.fastasr_cpu.kept_digest.default(torch.empty(0, dtype=torch.float32, device="cpu"))
    except ValueError:
        return True
    except RuntimeError:
        return False
    raise AssertionError("kept_digest takes a mask that is not bool")


def _declining(operator: Callable, *arguments: Any) -> Any:
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if str(error).startswith("fastasr, "):  # how the reason of a declined call begins
            raise ValueError(str(error)) from error
        raise


def _registered(backend: str, name: str) -> Kernels:
    has_backward = hasattr(getattr(torch.ops, f"fastasr_{backend}"), f"{name}_backward")
    backward = registered(backend, f"{name}_backward") if has_backward else None
    return Kernels(backend, registered(backend, f"{name}_forward"), backward)


def triton_kernels(name: str) -> Implementation:
    """Returns the Triton launchers ``fastasr.kernels.<name>.<name>_forward`` and, if there is one, ``_backward``."""

    def load() -> Kernels:
        module = importlib.import_module(f"fastasr.kernels.{name}")
        return Kernels(
            "triton", getattr(module, f"{name}_forward"), getattr(module, f"{name}_backward", None)
        )

    return Implementation("triton", ("cuda",), FLOATING[:3], _why_not_triton, load, _why_not_triton_on)


def triton_launchers(name: str) -> Implementation:
    """Returns the module of launchers ``fastasr.kernels.<name>`` in the place of a forward pass."""

    def load() -> Kernels:
        launchers: Any = importlib.import_module(f"fastasr.kernels.{name}")
        return Kernels("triton", launchers, None)

    return replace(triton_kernels(name), load=load)


def table() -> list[dict]:
    """Returns one row per op and backend: op, backend, available, reason, devices, dtypes. The reason may be that the
    current CUDA device is too old.
    """
    rows = []
    for family in FAMILIES.values():
        for op in family.ops:
            for implementation in family.implementations:
                reason = implementation.why_not()
                if not reason and torch.cuda.is_available():
                    reason = implementation.why_not_on()
                devices = list(implementation.device_types)
                rows.append(_row(op, implementation.backend, reason, devices, implementation.dtypes))
            rows.append(_row(op, "eager", "", ["any"], FLOATING))
    return rows


def _row(op: str, backend: str, reason: str, devices: list[str], dtypes: tuple[torch.dtype, ...]) -> dict:
    names = [str(d).removeprefix("torch.") for d in dtypes]
    row = {"op": op, "backend": backend, "available": not reason, "reason": reason}
    return row | {"devices": devices, "dtypes": names}


def explain_choice(family: str, device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """Returns (backend, reason) that a tensor of this kind gets now; the reason says why it is eager, else it is ""."""
    device = torch.device(device)
    reasons = []
    if _forced == "eager":
        return "eager", "backend 'eager' is forced"
    for implementation in FAMILIES[family].implementations:
        if _forced not in ("auto", implementation.backend):
            continue
        reason = FAMILIES[family].why_not(implementation, device, dtype)
        if not reason:
            return implementation.backend, ""
        if device.type in implementation.device_types:
            reasons.append(f"{implementation.backend}: {reason}")
    return "eager", "; ".join(reasons) or f"no kernel for {device.type} tensors"


def why_eager(ops: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> str:
    """Says which of the ops run in eager though they have kernels for such a device, and why, or returns ""."""
    ops_by_reason: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        served = family.vendor or not any(device.type in i.device_types for i in family.implementations)
        found = [] if served else [op for op in ops if op in family.ops]
        if found and (reason := explain_choice(family.name, device, dtype)[1]):
            ops_by_reason.setdefault(reason, []).extend(found)
    return "; ".join(f"{', '.join(names)} in eager: {reason}" for reason, names in ops_by_reason.items())


# --------------------------------------------------------------------------- plain tensors
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_PLAIN_OR_NONE = PLAIN | {type(None)}


def direct(*tensors: torch.Tensor | None) -> bool:
    """Says whether kernels may be called without the dispatcher: for plain tensors, while nothing is traced
    or transformed.

    Fake, functional, distributed and other subclassed tensors, and everything under ``torch.compile`` or
    ``torch.export``, go through the registered op instead.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return False
    return _PLAIN_OR_NONE.issuperset(map(type, tensors))
