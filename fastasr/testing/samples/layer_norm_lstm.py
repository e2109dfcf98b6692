# SPDX-License-Identifier: Apache-2.0
"""Samples of layer_norm_lstm."""

from fastasr.ops.layer_norm_lstm import definition
from fastasr.testing.table import Invalid, Make, OpTable, Sample

NAMES = (
    "x",
    "input_weight",
    "hidden_weight",
    "gate_weight",
    "gate_bias",
    "cell_weight",
    "cell_bias",
    "hidden",
    "cell",
)


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


def _sample(name: str, *sizes: int, exact=True, thorough=False, large=False, draws=4, **options) -> Sample:
    return Sample(name, lambda m: lstm(m, *sizes, **options), exact, thorough, large, draws)


def _with(**arguments):
    return lambda m: (
        lstm(m, 4, 3, 5, 6, state=True) | {k: v(m) if callable(v) else v for k, v in arguments.items()}
    )


TABLE = OpTable(
    op="layer_norm_lstm",
    definition=definition,
    registered=lambda a: (*(a.get(name) for name in NAMES), a["eps"], False),
    result=lambda a, outputs: outputs[:3],
    samples=(
        _sample("sequence", 5, 2, 3, 4, thorough=True, large=True, draws=16),
        _sample("sequence with a state", 3, 3, 5, 6, state=True, thorough=True, draws=16),
        _sample("one step", 1, 2, 7, 12, state=True, thorough=True, draws=16),
        _sample("predictor", 20, 4, 64, 128, large=True, draws=6),
        _sample("units and a tail", 12, 3, 40, 70, state=True, large=True),
        _sample("three units", 9, 5, 33, 19, state=True, large=True),
        _sample("two steps of one sequence", 2, 1, 48, 96, state=True, large=True),
        _sample("one step of seven sequences", 1, 7, 64, 130, state=True, large=True),
        _sample("many sequences", 4, 37, 16, 65, large=True),
        _sample("narrow input", 15, 2, 1, 32, large=True),
        _sample("small epsilon", 10, 4, 24, 48, eps=1e-5, large=True),
        _sample("one unit", 6, 2, 3, 1, exact=False),
        _sample("no steps", 0, 2, 3, 4, state=True, exact=False),
        _sample("no sequences", 3, 0, 5, 6, state=True, exact=False),
        _sample("no inputs", 2, 1, 0, 7, exact=False),
        Sample(
            "NaN and inf",
            lambda m: (
                lstm(m, 1, 3, 2, 4)
                | {"x": m.values(1.0, 2.0, float("nan"), 1.0, float("inf"), 0.0).view(1, 3, 2)}
            ),
            exact=False,
        ),
    ),
    invalid=(
        Invalid("x is a matrix", _with(x=lambda m: m.normal(3, 5)), ValueError, "x"),
        Invalid(
            "input_weight for other inputs",
            _with(input_weight=lambda m: m.normal(24, 4)),
            ValueError,
            "input",
        ),
        Invalid(
            "hidden_weight is square",
            _with(hidden_weight=lambda m: m.normal(6, 6)),
            ValueError,
            "hidden_weight",
        ),
        Invalid("no units", _with(hidden_weight=lambda m: m.normal(0, 0)), ValueError, "hidden_weight"),
        Invalid(
            "gate_weight of a quarter", _with(gate_weight=lambda m: m.normal(6)), ValueError, "gate_weight"
        ),
        Invalid("gate_bias of a quarter", _with(gate_bias=lambda m: m.normal(6)), ValueError, "gate_bias"),
        Invalid(
            "cell_weight of all gates", _with(cell_weight=lambda m: m.normal(24)), ValueError, "cell_weight"
        ),
        Invalid("cell_bias is a matrix", _with(cell_bias=lambda m: m.normal(1, 6)), ValueError, "cell_bias"),
        Invalid("hidden of another batch", _with(hidden=lambda m: m.normal(2, 6)), ValueError, "hidden"),
        Invalid("cell without batch", _with(cell=lambda m: m.normal(6)), ValueError, "cell"),
        Invalid("eps is negative", _with(eps=-1.0), ValueError, "eps"),
        Invalid("eps is a string", _with(eps="small"), TypeError, "eps"),
        Invalid(
            "weights of another dtype",
            _with(input_weight=lambda m: m.normal(24, 5).double()),
            TypeError,
            "input",
        ),
    ),
    thread_invariant=False,
    unread=("hidden_weight",),  # a state of zeros is not multiplied by it
    # what LayerNorm divides by is all rounding where there is one unit; without steps eager's graph leads nowhere
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
