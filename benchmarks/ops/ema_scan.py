# SPDX-License-Identifier: Apache-2.0
"""ema_scan as a MEGA block calls it: (L, B, D), SiLU and the residual term included.

Upstream is ESPnet's ``MultiHeadDampedEMA``, a convolution by FFT. Lengths from one step to the longest recordings;
the cost must grow with the length and no faster.
"""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BACKWARD,
    BOTH,
    FORWARD,
    Case,
    Cost,
    Implementation,
    Unavailable,
    compiled,
    parameters,
    simple,
)
from fastasr.ops.ema_scan import definition

LENGTHS = (1, 16, 64, 200, 512, 2048, 16384)
BATCH, CHANNELS = 4, 512


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


def _make(length: int, states: int, device: str, dtype: torch.dtype):
    make = partial(torch.randn, device=device, dtype=dtype)
    x, residual = make(length, BATCH, CHANNELS), make(CHANNELS)
    damping, decay = 0.2 * make(CHANNELS, states), 0.2 * make(CHANNELS, states)
    inputs = (x, damping, decay, make(CHANNELS, states), make(CHANNELS, states), residual)
    call = partial(ops.ema_scan, activation="silu")
    formula = partial(definition, activation="silu")
    return {
        "eager": lambda: simple(formula, *inputs),
        "compile": lambda: simple(compiled(formula), *inputs),
        "upstream": lambda: _upstream(*inputs),
        "fastasr": lambda: simple(call, *inputs),
    }


def _costs(elements: int, size: int) -> dict[str, Cost]:
    return {
        FORWARD: Cost(2 * elements * size),  # x; y
        BACKWARD: Cost(3 * elements * size),  # x, dy; dx
        BOTH: Cost(5 * elements * size),
    }


def _case(length: int, states: int = 4) -> Case:
    shape = f"{length}x{BATCH}x{CHANNELS}"
    return Case(
        "ema_scan",
        shape if states == 4 else f"{shape}, {states} states",
        shape,
        partial(_make, length, states),
        partial(_costs, length * BATCH * CHANNELS),
        copy=True,
        passes=(FORWARD, BOTH),
        quick=length == 200,
    )


CASES = (*(_case(length) for length in LENGTHS), _case(2048, 16))
