# SPDX-License-Identifier: Apache-2.0
"""Measures the limits of the machine once per run: the time of a plain copy, the rates of the best GEMM and of reading.

An elementwise op that moves ``n`` bytes cannot be faster than a copy that moves as many (half read, half
written, into a destination that exists already); a product cannot be faster than the library's best GEMM.
The fractions in the rows refer to these. A call that reads its weights once, as a chunk of a stream does,
cannot be faster than a sum over as many bytes.
"""

import functools

import torch

from fastasr.benchmarks.harness import interleave


def copy_buffers(bytes_moved: int, device: str = "cpu"):
    """Returns source and destination; ``destination.copy_(source)`` reads and writes ``bytes_moved`` together."""
    elements = max(1, bytes_moved // 8)
    source = torch.ones(elements, dtype=torch.float32, device=device)
    return source, torch.zeros_like(source)


@functools.cache
def copy_seconds(bytes_moved: int, device: str = "cpu", reps: int = 15) -> float:
    """Returns median seconds of a copy that moves ``bytes_moved`` bytes, both directions counted."""
    source, destination = copy_buffers(bytes_moved, device)
    return interleave({"copy": lambda: destination.copy_(source)}, reps=reps, device=device)["copy"].median


@functools.cache
def read_bytes_per_second(size: int = 1 << 28, reps: int = 7) -> float:
    """Returns the rate at which the CPU reads memory that is in no cache: the best of sums over ``size`` bytes."""
    memory = torch.ones(size // 4)
    timings = interleave({"read": memory.sum}, reps=reps)
    return memory.nbytes / min(timings["read"].samples)


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor):
    """Returns a oneDNN product of torch's own, or None. On some CPUs it is twice as fast as ``F.linear``."""
    try:
        call = torch.ops.mkldnn._linear_pointwise
        call(x[:2], weight, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return lambda: call(x, weight, None, "none", [], "")


# rows and columns of the large matrices, by type of device
SIDES = {"cpu": 1024, "cuda": 8192}


@functools.cache
def large_product(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Returns a call of the fastest of torch's own GEMMs on large matrices, its multiply and add operations, and the
    seconds of its fastest call.
    """
    size = SIDES[torch.device(device).type]
    x = torch.randn(2 * size, size, device=device, dtype=dtype)
    weight = torch.randn(size, size, device=device, dtype=dtype)
    variants = {"matmul": lambda: torch.nn.functional.linear(x, weight)}
    if torch.device(device).type == "cpu" and (onednn := _onednn_linear(x, weight)):
        variants["onednn"] = onednn
    with torch.no_grad():
        timings = interleave(variants, reps=7, device=device)
    seconds, fastest = min((min(timing.samples), name) for name, timing in timings.items())
    return torch.no_grad()(variants[fastest]), 2 * x.shape[0] * size * size, seconds


def gemm_flops_per_second(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Returns the best rate of torch's own GEMMs on large matrices, in multiply and add operations per second."""
    _, flops, seconds = large_product(device, dtype)
    return flops / seconds
