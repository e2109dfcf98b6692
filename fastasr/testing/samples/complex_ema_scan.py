# SPDX-License-Identifier: Apache-2.0
"""Samples of complex_ema_scan. States are given as real and imaginary parts."""

from dataclasses import replace

from fastasr.testing.samples.ema_scan import Average
from fastasr.testing.table import Invalid, Make, Sample


def _parameters(make: Make, rows: int, states: int, spread: float, means: dict) -> dict:
    return {
        "alpha": make.normal(rows, states, scale=spread, mean=means["alpha"]),
        "delta": make.normal(rows, states, scale=spread, mean=means["delta"]),
        "theta": make.normal(rows, mean=means["theta"]),
        "gamma": make.normal(rows, states, 2),
    }


def _as_the_module_has_them(make: Make) -> dict:
    arguments = AVERAGE.call(make, 30, 2, 16)
    for name in ("alpha", "delta", "theta"):
        arguments[name] = arguments[name].reshape(16, -1, 1)
    return arguments | {"omega": arguments["omega"].reshape(16, 1)}


AVERAGE = Average("complex_ema_scan", _parameters, {"alpha": 0.0, "delta": 0.0, "theta": -1.0}, "omega", (2,))
_shared, _sample, _changed = AVERAGE.table(), AVERAGE.sample, AVERAGE.changed
TABLE = replace(
    _shared,
    samples=(
        *_shared.samples,
        _sample("layer", 200, 4, 64, 16, layout="BDL"),
        _sample("long, few channels", 5000, 1, 3, activation="silu", state=True),
        _sample("|q| close to 1, slow", 700, 1, 40, alpha=-7.0, delta=-3.0, theta=-9.0, state=True),
        _sample("|q| close to 1, fast", 700, 1, 40, alpha=-7.0, delta=-3.0, theta=2.0),
        Sample("parameters as the module has them", _as_the_module_has_them),
    ),
    invalid=(
        *_shared.invalid,
        Invalid("theta per state", _changed(theta=lambda m: m.normal(8, 4)), ValueError, "theta"),
        Invalid("gamma is real", _changed(gamma=lambda m: m.normal(8, 4)), ValueError, "gamma"),
        Invalid(
            "complex state of another batch",
            _changed(state=lambda m: m.normal(2, 8, 4).cfloat()),
            ValueError,
            "state",
        ),
        Invalid("state is half of it", _changed(state=lambda m: m.normal(3, 8, 4)), ValueError, "state"),
    ),
)
