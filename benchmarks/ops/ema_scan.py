# SPDX-License-Identifier: Apache-2.0
"""ema_scan as a MEGA block calls it: (L, B, D), SiLU and the residual term included.

Upstream is ESPnet's ``MultiHeadDampedEMA``, a convolution by FFT. Lengths range from one step to the longest
recordings; the cost must grow linearly with the length.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import BOTH, FORWARD, Case, costs, module, upstream_member, versions

LENGTHS = (1, 16, 64, 200, 512, 2048, 16384)
BATCH, CHANNELS = 4, 512
CURVE, CURVE_CHANNELS = tuple(2**k for k in range(6, 18)), 128


def _upstream(x, damping, decay, expansion, projection, residual):
    average = upstream_member(
        "espnet2.asr_transducer.decoder.modules.mega.multi_head_damped_ema.MultiHeadDampedEMA"
    )
    state = {"damping_factor": damping, "decay_factor": decay, "ema_expansion_matrix": expansion}
    state |= {"kernel_projection_matrix": projection, "residual_weight": residual}
    average = average(x.shape[-1], damping.shape[1], torch.nn.SiLU()).to(x)
    return module(average, x, result=lambda y: y[0], **state)


def _inputs(length: int, batch: int, channels: int, states: int, device: str, dtype: torch.dtype):
    make = partial(torch.randn, device=device, dtype=dtype)
    x, residual = make(length, batch, channels), make(channels)
    damping, decay = 0.2 * make(channels, states), 0.2 * make(channels, states)
    return x, damping, decay, make(channels, states), make(channels, states), residual


def scan_case(op: str, name: str, sizes: tuple[int, ...], make: Callable, quick: bool = False) -> Case:
    """Returns a case of ema_scan or of complex_ema_scan: the two move the same bytes."""
    shape, n = "x".join(map(str, sizes)), math.prod(sizes)
    passes = costs((2 * n, 0), (3 * n, 0))  # x; y. x, dy; dx
    return Case(op, name or shape, shape, make, passes, copy=True, passes=(FORWARD, BOTH), quick=quick)


def _make(sizes: tuple[int, ...], curve: bool, device: str, dtype: torch.dtype):
    inputs = _inputs(*sizes, device, dtype)
    upstream = {"upstream": lambda: _upstream(*inputs)}
    made = versions(ops.ema_scan, *inputs, options={"activation": "silu"}, others=upstream)
    return {name: made[name] for name in ("upstream", "fastasr")} if curve else made


def _case(length: int, states: int = 4, batch: int = BATCH) -> Case:
    sizes = length, batch, CHANNELS
    name = "" if states == 4 else f"{length}x{batch}x{CHANNELS}, {states} states"
    make = partial(_make, (*sizes, states), False)
    return scan_case("ema_scan", name, sizes, make, length == 200)


def _curve_case(length: int) -> Case:
    sizes = length, 1, CURVE_CHANNELS
    return scan_case("ema_scan", f"length {length}", sizes, partial(_make, (*sizes, 4), True))


CASES = (*(_case(length) for length in LENGTHS), _case(2048, 16), *map(_curve_case, CURVE))
ON_DEVICE = (*(_case(length, 4, 8) for length in (1, 2048, 16384)), _case(2048, 4, 2), _case(2048, 16, 8))
