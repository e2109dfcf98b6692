# SPDX-License-Identifier: Apache-2.0
"""layer_norm_lstm at the sizes of torchaudio's Emformer RNN-T: a layer of its predictor, over a sequence and one step.

Upstream is torchaudio's ``_CustomLSTM``.
"""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BOTH,
    FORWARD,
    Case,
    Cost,
    Implementation,
    parameters,
    upstream_member,
    versions,
)

UNITS, EPS = 512, 1e-3


PARAMETERS = "x2g.weight", "p2g.weight", "g_norm.weight", "g_norm.bias", "c_norm.weight", "c_norm.bias"


def _upstream(state, x, *values):
    module = upstream_member("torchaudio.models.rnnt._CustomLSTM")(x.shape[-1], UNITS, True, EPS).to(x)
    module.load_state_dict(dict(zip(PARAMETERS, values, strict=True)))
    return Implementation(lambda: module(x, state)[0], parameters(x, *module.parameters()))


def _make(steps: int, batch: int, state: bool, device: str, dtype: torch.dtype):
    randn = partial(torch.randn, device=device, dtype=dtype)
    inputs = (
        randn(steps, batch, UNITS),
        randn(4 * UNITS, UNITS) * UNITS**-0.5,
        randn(4 * UNITS, UNITS) * UNITS**-0.5,
        *(randn(4 * UNITS) * 0.2 + mean for mean in (1, 0)),
        *(randn(UNITS) * 0.2 + mean for mean in (1, 0)),
    )
    given = [randn(batch, UNITS), randn(batch, UNITS)] if state else None
    return versions(
        ops.layer_norm_lstm,
        *(*inputs, *(given or (None, None)), EPS),
        others={"upstream": lambda: _upstream(given, *inputs)},
        compiles=False,
        differentiable=inputs,
        result=lambda y: y[0],
    )


def _costs(rows: int, size: int) -> dict[str, Cost]:
    weights, flops = 8 * UNITS * UNITS, 16 * rows * UNITS * UNITS
    moved = (weights + 2 * rows * UNITS) * size
    return {FORWARD: Cost(moved, flops), BOTH: Cost(4 * moved, 3 * flops)}


def _case(steps: int, batch: int, state: bool = False) -> Case:
    name = f"{steps}x{batch}x{UNITS}" + (" with a state" if state else "")
    return Case(
        "layer_norm_lstm",
        name,
        f"{steps}x{batch}x{UNITS}",
        partial(_make, steps, batch, state),
        partial(_costs, steps * batch),
        passes=(FORWARD, BOTH),
        quick=steps * batch <= 16,
    )


CASES = (
    _case(50, 4),
    _case(50, 1),
    _case(1, 1, True),
    _case(1, 10, True),
    _case(10, 1),
    _case(100, 16),
    _case(50, 64),
)
# of a transducer's predictor
ON_DEVICE = (_case(50, 16), _case(50, 64), _case(1, 1, True), _case(1, 10, True))
