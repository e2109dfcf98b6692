# SPDX-License-Identifier: Apache-2.0
"""The launchers of csrc/cuda, called through ctypes on CPU tensors: over the emulation of csrc/tests they compute
there what a GPU would.
"""

import ctypes
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_int, c_int64, c_void_p
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastasr.ops import _dispatch

OPS = ("ema_scan", "complex_ema_scan")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
AXES = ((0, 1, 2), (1, 0, 2), (2, 0, 1))  # axes of time, batch and channels, by layout


class _Sequence(Structure):
    _fields_ = [("data", c_void_p), ("time", c_int64), ("batch", c_int64), ("channel", c_int64)]


class _Scan(Structure):
    _fields_ = [
        ("dtype", c_int),
        ("complex", c_int),
        *((name, c_int64) for name in ("length", "batch", "channels", "states", "truncation")),
        ("direction", c_int),
        ("activation", c_int),
        ("x", _Sequence),
        *((name, c_void_p) for name in ("damping", "decay", "expansion", "projection", "residual", "state")),
        ("mask", c_void_p),
        ("workspace", c_void_p),
    ]


class _Grads(Structure):
    _fields_ = [
        ("grad", _Sequence),
        ("grad_state", c_void_p),
        ("dx", _Sequence),
        *(
            (name, c_void_p)
            for name in ("ddamping", "ddecay", "dexpansion", "dprojection", "dresidual", "dstate")
        ),
    ]


def load(path: Path) -> ctypes.CDLL:
    """Opens a library that csrc/cuda/ema_scan.cu was compiled into."""
    library = ctypes.CDLL(str(path))
    library.fastasr_cuda_ema_scan_forward.argtypes = [POINTER(_Scan), _Sequence, c_void_p, c_void_p]
    library.fastasr_cuda_ema_scan_backward.argtypes = [POINTER(_Scan), POINTER(_Grads), c_void_p]
    library.fastasr_cuda_ema_scan_forward_workspace.restype = c_int64
    library.fastasr_cuda_ema_scan_backward_workspace.restype = c_int64
    return library


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _sequence(t: Tensor, layout: int) -> _Sequence:
    return _Sequence(t.data_ptr(), *(t.stride(axis) for axis in AXES[layout]))


def _scan(
    x, damping, decay, expansion, projection, residual, state, mask, truncation, direction, activation, layout
):
    for t in (damping, decay, expansion, projection, residual, state, mask):
        assert t is None or t.is_contiguous()
    sizes = (x.shape[axis] for axis in AXES[layout])
    parameters = map(_pointer, (damping, decay, expansion, projection, residual, state, mask))
    return _Scan(
        DTYPES[x.dtype],
        projection.dim() == 3,
        *sizes,
        damping.shape[1],
        truncation,
        direction,
        activation,
        _sequence(x, layout),
        *parameters,
    )


def _forward(library: ctypes.CDLL, x: Tensor, damping: Tensor, *rest) -> tuple[Tensor, Tensor]:
    *options, need_state = rest
    scan, layout = _scan(x, damping, *options), options[-1]
    y = x.new_empty(x.shape)
    shape = (scan.batch, scan.channels, scan.states, 2)[: 4 if scan.complex else 3]
    final = damping.new_empty(shape if need_state else 0)
    workspace = x.new_empty(library.fastasr_cuda_ema_scan_forward_workspace(byref(scan)), dtype=torch.uint8)
    scan.workspace = workspace.data_ptr()
    state = final.data_ptr() if need_state else None
    assert library.fastasr_cuda_ema_scan_forward(byref(scan), _sequence(y, layout), state, None) == 0
    return y, final


def _backward(library: ctypes.CDLL, grad: Tensor, grad_state: Tensor | None, *inputs) -> tuple[Tensor, ...]:
    scan, layout = _scan(*inputs), inputs[-1]
    grads = [None if t is None else t.new_empty(t.shape) for t in inputs[:7]]
    descriptor = _Grads(
        _sequence(grad, layout), _pointer(grad_state), _sequence(grads[0], layout), *map(_pointer, grads[1:])
    )
    size = library.fastasr_cuda_ema_scan_backward_workspace(byref(scan), byref(descriptor))
    workspace = grad.new_empty(size, dtype=torch.uint8)
    scan.workspace = workspace.data_ptr()
    assert library.fastasr_cuda_ema_scan_backward(byref(scan), byref(descriptor), None) == 0
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


@contextmanager
def serving(library: ctypes.CDLL, op: str):
    """Makes a library's kernels, on CPU tensors, the op's only ones inside the ``with`` block."""
    family = _dispatch.FAMILIES[op]
    kernels = _dispatch.Kernels("cuda", partial(_forward, library), partial(_backward, library))
    ours = _dispatch.Implementation("cuda", ("cpu",), _dispatch.FLOATING, str, lambda: kernels)
    before, family.implementations = family.implementations, (ours,)
    _dispatch._forget()
    try:
        yield
    finally:
        family.implementations = before
        _dispatch._forget()
