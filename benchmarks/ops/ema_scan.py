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
from fastasr.benchmarks.case import (
    BOTH,
    FORWARD,
    Case,
    Cost,
    Implementation,
    Unavailable,
    compiled,
    costs_of,
    parameters,
    simple,
)

LENGTHS = (1, 16, 64, 200, 512, 2048, 16384)
BATCH, CHANNELS = 4, 512
CURVE, CURVE_CHANNELS = tuple(2**k for k in range(6, 18)), 128


def _upstream(x, damping, decay, expansion, projection, residual) -> Implementation:
    try:
        from espnet2.asr_transducer.decoder.modules.mega.multi_head_damped_ema import MultiHeadDampedEMA
    except (ImportError, OSError) as error:
        raise Unavailable(f"the package espnet cannot be imported ({error})") from None
    module = MultiHeadDampedEMA(x.shape[-1], damping.shape[1], torch.nn.SiLU()).to(x)
    values = {
        "damping_factor": damping,
        "decay_factor": decay,
        "ema_expansion_matrix": expansion,
        "kernel_projection_matrix": projection,
        "residual_weight": residual,
    }
    for name, value in values.items():
        parameter = getattr(module, name)
        parameter.data = value.detach().reshape(parameter.shape).clone()
    return Implementation(lambda: module(x)[0], parameters(x, *module.parameters()))


def _inputs(length: int, batch: int, channels: int, states: int, device: str, dtype: torch.dtype):
    make = partial(torch.randn, device=device, dtype=dtype)
    x, residual = make(length, batch, channels), make(channels)
    damping, decay = 0.2 * make(channels, states), 0.2 * make(channels, states)
    return x, damping, decay, make(channels, states), make(channels, states), residual


def _make(length: int, batch: int, states: int, device: str, dtype: torch.dtype):
    inputs = _inputs(length, BATCH, CHANNELS, states, device, dtype)
    call = partial(ops.ema_scan, activation="silu")
    formula = partial(ops.ema_scan.definition, activation="silu")
    return {
        "eager": lambda: simple(formula, *inputs),
        "compile": lambda: simple(compiled(formula), *inputs),
        "upstream": lambda: _upstream(*inputs),
        "fastasr": lambda: simple(call, *inputs),
    }


def _costs(elements: int, size: int) -> dict[str, Cost]:
    return costs_of(
        Cost(2 * elements * size),  # x; y
        Cost(3 * elements * size),  # x, dy; dx
    )


def scan_case(op: str, name: str, sizes: tuple[int, ...], make: Callable, quick: bool = False) -> Case:
    """Returns a case of ema_scan or of complex_ema_scan: the two move the same bytes."""
    shape = "x".join(map(str, sizes))
    costs = partial(_costs, math.prod(sizes))
    return Case(op, name or shape, shape, make, costs, copy=True, passes=(FORWARD, BOTH), quick=quick)


def _case(length: int, states: int = 4, batch: int = BATCH) -> Case:
    sizes = length, batch, CHANNELS
    name = "" if states == 4 else f"{length}x{batch}x{CHANNELS}, {states} states"
    return scan_case("ema_scan", name, sizes, partial(_make, length, batch, states), length == 200)


def _curve_make(length: int, device: str, dtype: torch.dtype):
    inputs = _inputs(length, 1, CURVE_CHANNELS, 4, device, dtype)
    return {
        "upstream": lambda: _upstream(*inputs),
        "fastasr": lambda: simple(partial(ops.ema_scan, activation="silu"), *inputs),
    }


def _curve_case(length: int) -> Case:
    sizes = length, 1, CURVE_CHANNELS
    return scan_case("ema_scan", f"length {length}", sizes, partial(_curve_make, length))


CASES = (*(_case(length) for length in LENGTHS), _case(2048, 16), *map(_curve_case, CURVE))
ON_DEVICE = (
    *(_case(length, 4, 8) for length in (1, 2048, 16384)),
    _case(2048, 4, 2),
    _case(2048, 16, 8),
)
