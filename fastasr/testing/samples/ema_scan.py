# SPDX-License-Identifier: Apache-2.0
"""Samples of ema_scan."""

from fastasr.ops._ema import ACTIVATIONS, DIRECTIONS, LAYOUTS
from fastasr.ops.ema_scan import definition
from fastasr.testing.table import Invalid, Make, OpTable, Sample

NAMES = ("x", "damping", "decay", "expansion", "projection", "residual", "state", "padding_mask")


def ema(
    make: Make,
    length: int,
    batch: int,
    channels: int,
    states: int = 4,
    *,
    layout: str = "LBD",
    direction: str = "forward",
    damping: float = 0.0,
    decay: float = 0.0,
    spread: float = 0.5,
    state: bool = False,
    mask: bool = False,
    **options,
) -> dict:
    """A call with random parameters; ``damping`` and ``decay`` are their means, before the sigmoid."""
    sizes = {"L": length, "B": batch, "D": channels}
    rows = channels * (2 if direction == "bidirectional" else 1)
    arguments = {
        "x": make.normal(*(sizes[letter] for letter in layout)),
        "damping": make.normal(rows, states, scale=spread, mean=damping),
        "decay": make.normal(rows, states, scale=spread, mean=decay),
        "expansion": make.normal(rows, states),
        "projection": make.normal(rows, states),
        "residual": make.normal(channels),
        "layout": layout,
        "direction": direction,
        **options,
    }
    if state:
        arguments |= {"state": make.normal(batch, channels, states), "return_state": True}
    if mask:
        arguments["padding_mask"] = make.uniform(batch, length) > 0.7
    return arguments


def _registered(a: dict) -> tuple:
    tensors = [a.get(name) for name in NAMES]
    tensors[1:5] = [p.reshape(p.shape[:2]) for p in tensors[1:5]]
    options = (
        a.get("truncation") or 0,
        DIRECTIONS[a.get("direction", "forward")],
        ACTIVATIONS[a.get("activation", "identity")],
        LAYOUTS[a.get("layout", "LBD")],
        a.get("return_state", False),
    )
    return *tensors, *options


def _random(make: Make, shape) -> dict:
    # not relu and tanh: they map infinities, which a convolution and a scan reach by different NaNs, to numbers; nor
    # truncated: an infinity taints more than its window (tests/ops/test_ema_scan.py draws truncated calls)
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
    return ema(make, shape.size(), batch, shape.size(), states, **options)


def _sample(name: str, *sizes: int, exact: bool = True, thorough: bool = False, **options) -> Sample:
    return Sample(name, lambda m: ema(m, *sizes, **options), exact, thorough)


def _with(**arguments):
    return lambda m: ema(m, 7, 3, 8) | {k: v(m) if callable(v) else v for k, v in arguments.items()}


TABLE = OpTable(
    op="ema_scan",
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
        _sample("layer", 200, 4, 64, activation="silu", mask=True),
        _sample("channels and a tail", 75, 2, 65, activation="relu"),
        _sample("batch first", 100, 3, 48, layout="BLD", activation="gelu"),
        _sample("time last", 83, 2, 70, layout="BDL", activation="tanh", mask=True),
        _sample("one state", 90, 2, 33, 1),
        _sample("five states", 90, 2, 33, 5, activation="silu"),
        _sample("16 states", 70, 2, 40, 16, state=True),
        _sample("64 states", 40, 2, 20, 64, direction="bidirectional"),
        _sample("bidirectional, truncated", 150, 2, 30, direction="bidirectional", truncation=20, mask=True),
        _sample("reverse, truncated", 150, 2, 30, 6, direction="reverse", truncation=64, layout="BDL"),
        _sample("truncation beyond the end", 20, 2, 8, truncation=50),
        _sample("one channel", 130, 3, 1, layout="BDL"),
        # 13 channels: with 3, gradients of 12 numbers, chance put eager ahead in 4 of 24 draws
        _sample("long, few channels", 5000, 1, 13, activation="silu", state=True),
        _sample("decay close to 1", 700, 1, 40, damping=-7.0, decay=-3.0, state=True),
        _sample("decay close to 0", 300, 1, 40, damping=12.0, decay=12.0, state=True),
        _sample("decay is 0 and 1", 20, 2, 64, spread=100.0),
        _sample("close to 1, truncated", 700, 1, 40, damping=-7.0, decay=-3.0, truncation=100),
        _sample("one step", 1, 4, 70, state=True, activation="silu"),
        _sample("one step, no state", 1, 3, 33),
        _sample("no steps", 0, 2, 5, state=True),
        _sample("no batch", 6, 0, 5, state=True),
        _sample("no channels", 6, 2, 0, state=True),
        Sample("no residual", lambda m: ema(m, 40, 2, 24) | {"residual": None}),
        Sample(
            "three-dimensional parameters",
            lambda m: {
                k: v.unsqueeze(-1) if k in ("damping", "decay", "expansion") else v
                for k, v in ema(m, 30, 2, 16).items()
            },
        ),
        Sample(
            "NaN and inf",
            lambda m: (
                ema(m, 1, 1, 4) | {"x": m.values(1.0, float("nan"), float("inf"), 2.0).reshape(1, 1, 4)}
            ),
            exact=False,
        ),
    ),
    invalid=(
        Invalid("unknown layout", _with(layout="DBL"), ValueError, "layout"),
        Invalid("layout is a number", _with(layout=0), TypeError, "layout"),
        Invalid("unknown direction", _with(direction="backward"), ValueError, "direction"),
        Invalid("unknown activation", _with(activation="swish"), ValueError, "activation"),
        Invalid("x is a matrix", _with(x=lambda m: m.normal(7, 8)), ValueError, "x"),
        Invalid("damping for other channels", _with(damping=lambda m: m.normal(7, 4)), ValueError, "damping"),
        Invalid("no states", _with(damping=lambda m: m.normal(8, 0)), ValueError, "damping"),
        Invalid("65 states", _with(damping=lambda m: m.normal(8, 65)), ValueError, "damping"),
        Invalid("decay of other states", _with(decay=lambda m: m.normal(8, 3)), ValueError, "decay"),
        Invalid("expansion is a vector", _with(expansion=lambda m: m.normal(8)), ValueError, "expansion"),
        Invalid(
            "projection has a tail", _with(projection=lambda m: m.normal(8, 4, 2)), ValueError, "projection"
        ),
        Invalid("bidirectional with one half", _with(direction="bidirectional"), ValueError, "damping"),
        Invalid("residual would broadcast", _with(residual=lambda m: m.normal(1)), ValueError, "residual"),
        Invalid("state of another batch", _with(state=lambda m: m.normal(2, 8, 4)), ValueError, "state"),
        Invalid("return_state is a number", _with(return_state=1), TypeError, "return_state"),
        Invalid(
            "bidirectional with a state",
            lambda m: ema(m, 7, 3, 8, direction="bidirectional") | {"return_state": True},
            ValueError,
            "direction",
        ),
        Invalid("mask is floating", _with(padding_mask=lambda m: m.normal(3, 7)), TypeError, "padding_mask"),
        Invalid(
            "mask is transposed", _with(padding_mask=lambda m: m.normal(7, 3) > 0), ValueError, "padding_mask"
        ),
        Invalid("mask is a list", _with(padding_mask=[True]), TypeError, "padding_mask"),
        Invalid("truncation of no taps", _with(truncation=0), ValueError, "truncation"),
        Invalid("truncation is a float", _with(truncation=3.0), TypeError, "truncation"),
        Invalid("truncation with a state", _with(truncation=3, return_state=True), ValueError, "truncation"),
    ),
    random=_random,
)
