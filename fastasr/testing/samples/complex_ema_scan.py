# SPDX-License-Identifier: Apache-2.0
"""Samples of complex_ema_scan. States are given as real and imaginary parts."""

from fastasr.ops._ema import ACTIVATIONS, DIRECTIONS, LAYOUTS
from fastasr.ops.complex_ema_scan import definition
from fastasr.testing.table import Invalid, Make, OpTable, Sample

NAMES = ("x", "alpha", "delta", "theta", "gamma", "omega", "state", "padding_mask")


def complex_ema(
    make: Make,
    length: int,
    batch: int,
    channels: int,
    states: int = 4,
    *,
    layout: str = "LBD",
    direction: str = "forward",
    alpha: float = 0.0,
    delta: float = 0.0,
    theta: float = -1.0,
    spread: float = 0.5,
    state: bool = False,
    mask: bool = False,
    **options,
) -> dict:
    """A call with random parameters; ``alpha``, ``delta`` and ``theta`` are their means, before the sigmoid."""
    sizes = {"L": length, "B": batch, "D": channels}
    rows = channels * (2 if direction == "bidirectional" else 1)
    arguments = {
        "x": make.normal(*(sizes[letter] for letter in layout)),
        "alpha": make.normal(rows, states, scale=spread, mean=alpha),
        "delta": make.normal(rows, states, scale=spread, mean=delta),
        "theta": make.normal(rows, mean=theta),
        "gamma": make.normal(rows, states, 2),
        "omega": make.normal(channels),
        "layout": layout,
        "direction": direction,
        **options,
    }
    if state:
        arguments |= {"state": make.normal(batch, channels, states, 2), "return_state": True}
    if mask:
        arguments["padding_mask"] = make.uniform(batch, length) > 0.7
    return arguments


def _registered(a: dict) -> tuple:
    tensors = [a.get(name) for name in NAMES]
    tensors[1:3] = [p.reshape(p.shape[:2]) for p in tensors[1:3]]
    tensors[3] = tensors[3].reshape(-1)
    tensors[5] = None if tensors[5] is None else tensors[5].reshape(-1)
    options = (
        a.get("truncation") or 0,
        DIRECTIONS[a.get("direction", "forward")],
        ACTIVATIONS[a.get("activation", "identity")],
        LAYOUTS[a.get("layout", "LBD")],
        a.get("return_state", False),
    )
    return *tensors, *options


def _random(make: Make, shape) -> dict:
    kind = shape.choice(("plain", "state", "bidirectional"))
    options = {
        "layout": shape.choice(tuple(LAYOUTS)),
        "activation": shape.choice(("identity", "silu", "gelu")),
        "direction": shape.choice(("forward", "reverse")),
        "mask": shape.choice((False, True)),
        "state": kind == "state",
    }
    if kind == "bidirectional":
        options["direction"] = kind
    batch, states = shape.choice((0, 1, 2, 3)), shape.choice((1, 2, 3, 4, 5, 16))
    return complex_ema(make, shape.size(), batch, shape.size(), states, **options)


def _sample(name: str, *sizes: int, exact: bool = True, thorough: bool = False, **options) -> Sample:
    return Sample(name, lambda m: complex_ema(m, *sizes, **options), exact, thorough)


def _with(**arguments):
    return lambda m: complex_ema(m, 7, 3, 8) | {k: v(m) if callable(v) else v for k, v in arguments.items()}


TABLE = OpTable(
    op="complex_ema_scan",
    definition=definition,
    registered=_registered,
    result=lambda a, outputs: outputs if a.get("return_state") else outputs[0],
    samples=(
        _sample("lbd", 9, 2, 6, thorough=True),
        _sample("state", 7, 2, 5, 3, state=True, activation="silu", layout="BLD", thorough=True),
        _sample(
            "reverse, state, mask", 8, 3, 4, 2, state=True, mask=True, direction="reverse", thorough=True
        ),
        _sample(
            "bidirectional",
            6,
            2,
            5,
            2,
            direction="bidirectional",
            layout="BDL",
            activation="gelu",
            thorough=True,
        ),
        _sample("truncated", 9, 2, 5, 2, truncation=3, mask=True, activation="tanh", thorough=True),
        _sample("layer", 200, 4, 64, 16, layout="BDL"),
        _sample("channels and a tail", 75, 2, 65, activation="relu", mask=True),
        _sample("batch first", 100, 3, 48, layout="BLD", activation="gelu"),
        _sample("one state", 90, 2, 33, 1),
        _sample("five states", 90, 2, 33, 5, activation="silu", state=True),
        _sample("64 states", 40, 2, 20, 64, direction="bidirectional"),
        _sample("bidirectional, truncated", 150, 2, 30, direction="bidirectional", truncation=20, mask=True),
        _sample("reverse, truncated", 150, 2, 30, 6, direction="reverse", truncation=64, layout="BDL"),
        _sample("truncation beyond the end", 20, 2, 8, truncation=50),
        _sample("long, few channels", 5000, 1, 3, activation="silu", state=True),
        _sample("radius close to 1", 700, 1, 40, alpha=-7.0, delta=-3.0, state=True),
        _sample("radius close to 1, slow", 700, 1, 40, alpha=-7.0, delta=-3.0, theta=-9.0, state=True),
        _sample("radius close to 1, fast", 700, 1, 40, alpha=-7.0, delta=-3.0, theta=2.0),
        _sample("radius close to 0", 300, 1, 40, alpha=12.0, delta=12.0, state=True),
        _sample("radius is 0 and 1", 20, 2, 64, spread=100.0),
        _sample("close to 1, truncated", 700, 1, 40, alpha=-7.0, delta=-3.0, truncation=100),
        _sample("one step", 1, 4, 70, state=True, activation="silu"),
        _sample("one step, no state", 1, 3, 33),
        _sample("no steps", 0, 2, 5, state=True),
        _sample("no batch", 6, 0, 5, state=True),
        _sample("no channels", 6, 2, 0, state=True),
        Sample("no residual", lambda m: complex_ema(m, 40, 2, 24) | {"omega": None}),
        Sample(
            "parameters as the module has them",
            lambda m: {
                k: v.reshape(16, 1) if k == "omega" else v.reshape(16, -1, 1) if k in NAMES[1:4] else v
                for k, v in complex_ema(m, 30, 2, 16).items()
            },
        ),
        Sample(
            "NaN and inf",
            lambda m: (
                complex_ema(m, 1, 1, 4)
                | {"x": m.values(1.0, float("nan"), float("inf"), 2.0).reshape(1, 1, 4)}
            ),
            exact=False,
        ),
    ),
    invalid=(
        Invalid("unknown layout", _with(layout="DBL"), ValueError, "layout"),
        Invalid("unknown direction", _with(direction="backward"), ValueError, "direction"),
        Invalid("unknown activation", _with(activation="swish"), ValueError, "activation"),
        Invalid("x is a matrix", _with(x=lambda m: m.normal(7, 8)), ValueError, "x"),
        Invalid("alpha for other channels", _with(alpha=lambda m: m.normal(7, 4)), ValueError, "alpha"),
        Invalid("no states", _with(alpha=lambda m: m.normal(8, 0)), ValueError, "alpha"),
        Invalid("65 states", _with(alpha=lambda m: m.normal(8, 65)), ValueError, "alpha"),
        Invalid("delta of other states", _with(delta=lambda m: m.normal(8, 3)), ValueError, "delta"),
        Invalid("theta per state", _with(theta=lambda m: m.normal(8, 4)), ValueError, "theta"),
        Invalid("gamma is real", _with(gamma=lambda m: m.normal(8, 4)), ValueError, "gamma"),
        Invalid("gamma has a tail", _with(gamma=lambda m: m.normal(8, 4, 3)), ValueError, "gamma"),
        Invalid("bidirectional with one half", _with(direction="bidirectional"), ValueError, "alpha"),
        Invalid("omega would broadcast", _with(omega=lambda m: m.normal(1)), ValueError, "omega"),
        Invalid(
            "state of another batch", _with(state=lambda m: m.normal(2, 8, 4).cfloat()), ValueError, "state"
        ),
        Invalid("state is half of it", _with(state=lambda m: m.normal(3, 8, 4)), ValueError, "state"),
        Invalid(
            "state is of integers", _with(state=lambda m: m.normal(3, 8, 4, 2).int()), TypeError, "state"
        ),
        Invalid("return_state is a number", _with(return_state=1), TypeError, "return_state"),
        Invalid(
            "bidirectional with a state",
            lambda m: complex_ema(m, 7, 3, 8, direction="bidirectional") | {"return_state": True},
            ValueError,
            "direction",
        ),
        Invalid("mask is floating", _with(padding_mask=lambda m: m.normal(3, 7)), TypeError, "padding_mask"),
        Invalid("truncation of no taps", _with(truncation=0), ValueError, "truncation"),
        Invalid("truncation with a state", _with(truncation=3, return_state=True), ValueError, "truncation"),
    ),
    random=_random,
)
