# SPDX-License-Identifier: Apache-2.0
"""Samples of layer_norm_lstm, and its benchmark: a layer of the predictor of torchaudio's Emformer RNN-T, over a
sequence and one step. Upstream is torchaudio's ``_CustomLSTM``.
"""

from typing import Any

from torch import Tensor

from fastasr.testing.speed import BOTH, FORWARD, Case, Cost, Implementation, case, parameters, upstream_member
from fastasr.testing.table import Make, OpTable, Sample, sampler


def lstm(
    make: Make, steps: int, batch: int, inputs: int, units: int, *, state: bool = False, eps: float = 1e-3
) -> dict:
    arguments = {
        "x": make.normal(steps, batch, inputs),
        "input_weight": make.normal(4 * units, inputs, scale=max(1, inputs) ** -0.5),
        "hidden_weight": make.normal(4 * units, units, scale=units**-0.5),
        "gate_weight": make.normal(4 * units, scale=0.3, mean=1.0),
        "gate_bias": make.normal(4 * units, scale=0.3),
        "cell_weight": make.normal(units, scale=0.3, mean=1.0),
        "cell_bias": make.normal(units, scale=0.3),
        "eps": eps,
    }
    if state:
        arguments |= {"hidden": make.normal(batch, units, scale=0.5), "cell": make.normal(batch, units)}
    return arguments


_sample = sampler(lstm, draws=4)
TABLE = OpTable(
    op="layer_norm_lstm",
    samples=(
        _sample("sequence", (5, 2, 3, 4), thorough=True, large=True, draws=16),
        _sample("sequence with a state", (3, 3, 5, 6), state=True, thorough=True, draws=16),
        _sample("one step", (1, 2, 7, 12), state=True, thorough=True, draws=16),
        _sample("predictor", (20, 4, 64, 128), large=True, draws=6),
        _sample("two blocks of units", (2, 3, 3, 20), state=True),
        _sample("two blocks of sequences", (1, 18, 2, 7)),
        _sample("units and a tail", (12, 3, 40, 70), state=True, large=True),
        _sample("three units", (9, 5, 33, 19), state=True, large=True),
        _sample("two steps of one sequence", (2, 1, 48, 96), state=True, large=True),
        _sample("one step of seven sequences", (1, 7, 64, 130), state=True, large=True),
        _sample("many sequences", (4, 37, 16, 65), large=True),
        _sample("narrow input", (15, 2, 1, 32), large=True),
        _sample("small epsilon", (10, 4, 24, 48), eps=1e-5, large=True),
        _sample("one unit", (6, 2, 3, 1), exact=False),
        _sample("no steps", (0, 2, 3, 4), state=True, exact=False),
        _sample("no sequences", (3, 0, 5, 6), state=True, exact=False),
        _sample("no inputs", (2, 1, 0, 7), exact=False),
        Sample(
            "NaN and inf",
            lambda m: (
                lstm(m, 1, 3, 2, 4)
                | {"x": m.values(1.0, 2.0, float("nan"), 1.0, float("inf"), 0.0).view(1, 3, 2)}
            ),
            exact=False,
        ),
        Sample(
            "NaN in the forget gate's bias, no state",
            lambda m: lstm(m, 2, 3, 2, 4) | {"gate_bias": m.values(*[0.5] * 5, float("nan"), *[0.5] * 10)},
            exact=False,
        ),
    ),
    thread_invariant=False,
    unread=("hidden_weight",),  # the op skips the product with a state of zeros
    # With one unit LayerNorm divides by pure rounding error; without steps eager's graph does not reach the arguments
    random=lambda m, shape: lstm(
        m,
        shape.choice((1, 2, 5)),
        shape.choice((0, 1, 2, 3, 6)),
        shape.size(),
        2 + shape.size(),
        state=shape.choice((False, True)),
        eps=shape.choice((0.1, 1.0)),
    ),
)


# --- the benchmark

UNITS = 512
PARAMETERS = {
    "input_weight": "x2g.weight",
    "hidden_weight": "p2g.weight",
    "gate_weight": "g_norm.weight",
    "gate_bias": "g_norm.bias",
    "cell_weight": "c_norm.weight",
    "cell_bias": "c_norm.bias",
}


def _upstream(
    x: Tensor, eps: float, hidden: Tensor | None = None, cell: Tensor | None = None, **values: Any
) -> Implementation:
    units = values["cell_weight"].shape[0]
    lstm = upstream_member("torchaudio.models.rnnt._CustomLSTM")(x.shape[-1], units, True, eps).to(x)
    lstm.load_state_dict({PARAMETERS[name]: value for name, value in values.items()})
    state = None if hidden is None else [hidden, cell]
    return Implementation(lambda: lstm(x, state)[0], parameters(x, *lstm.parameters()))


def _case(steps: int, batch: int, state: bool = False, inputs: int = UNITS, units: int = UNITS) -> Case:
    def costs(size: int) -> dict[str, Cost]:
        weights = 4 * units * (inputs + units)
        moved, flops = (weights + steps * batch * (inputs + units)) * size, 2 * steps * batch * weights
        return {FORWARD: Cost(moved, flops), BOTH: Cost(4 * moved, 3 * flops)}

    shape = f"{steps}x{batch}x{inputs}"
    return case(
        "layer_norm_lstm",
        shape + " with a state" * state,
        lambda m: lstm(m, steps, batch, inputs, units, state=state),
        costs,
        shape=shape,
        others={"upstream": _upstream},
        compiles=False,
        differentiable=("x", *PARAMETERS),
        result=lambda _, y: y[0],
        passes=(FORWARD, BOTH),
    )


def sized(T: int = 50, B: int = 4, D: int = UNITS, H: int = UNITS) -> Case:
    return _case(T, B, inputs=D, units=H)


CASES = (
    _case(50, 4),
    _case(50, 1),
    _case(1, 1, True),
    _case(1, 10, True),
    _case(10, 1),
    _case(100, 16),
    _case(50, 64),
)
# The sizes are a transducer predictor's.
ON_DEVICE = (_case(50, 16), _case(50, 64), _case(1, 1, True), _case(1, 10, True))
WATCH = (
    "programs that wait for each other in one launch (with `_together` returning False, each phase is "
    "a launch); a driver that refuses that launch with error 720 or 801"
)
