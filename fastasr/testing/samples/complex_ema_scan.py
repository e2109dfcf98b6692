# SPDX-License-Identifier: Apache-2.0
"""Samples of complex_ema_scan, and its benchmark as a Megalodon block calls it: (B, D, L), 16 states, no activation.
States are given as real and imaginary parts.

``fft`` is upstream's method, a convolution by FFT with a kernel computed at each call, written from the mathematics:
upstream's own code needs its CUDA extension.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastasr.testing.samples.ema_scan import Average, measured
from fastasr.testing.speed import Case, computed
from fastasr.testing.table import Make, Sample, invalid, sampler


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
_shared, _sample = AVERAGE.table(), sampler(AVERAGE.call)
TABLE = replace(
    _shared,
    samples=(
        *_shared.samples,
        _sample("layer", (200, 4, 64, 16), layout="BDL"),
        _sample("long, few channels", (5000, 1, 3), activation="silu", state=True),
        _sample("|q| close to 1, slow", (700, 1, 40), alpha=-7.0, delta=-3.0, theta=-9.0, state=True),
        _sample("|q| close to 1, fast", (700, 1, 40), alpha=-7.0, delta=-3.0, theta=2.0),
        Sample("parameters as the module has them", _as_the_module_has_them),
    ),
    invalid=(
        *_shared.invalid,
        *invalid(
            lambda m: AVERAGE.call(m, 7, 3, 8),
            ("theta per state", "theta", lambda m: m.normal(8, 4)),
            ("gamma is real", "gamma", lambda m: m.normal(8, 4)),
            ("complex state of another batch", "state", lambda m: m.normal(2, 8, 4).cfloat()),
            ("state is half of it", "state", lambda m: m.normal(3, 8, 4)),
        ),
    ),
)


# --- the benchmark


def by_fft(
    x: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor, **_: object
) -> Tensor:
    """Returns the formula on (B, D, L) as the product of two transforms, in float32 or better."""
    length, states = x.shape[-1], alpha.shape[1]
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    alpha, delta, theta, gamma = (t.to(wide) for t in (alpha, delta, theta, gamma))
    p = torch.sigmoid(alpha)
    n = torch.arange(1, states + 1, device=x.device, dtype=wide)
    angle = n * (torch.sigmoid(theta) * (2 * math.pi / states)).unsqueeze(-1)
    log_q = torch.complex(torch.log1p(-p * torch.sigmoid(delta)), angle)
    powers = torch.exp(log_q.unsqueeze(-1) * torch.arange(length, device=x.device, dtype=wide))
    weight = torch.complex(gamma[..., 0], gamma[..., 1]) * (p * states**-0.5)
    kernel = (weight.unsqueeze(-1) * powers).sum(1).real
    transform = torch.fft.rfft(x.to(wide), n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(transform, n=2 * length)[..., :length]
    return (y + omega.to(wide).unsqueeze(-1) * x).to(x.dtype)


def sized(L: int = 2048, B: int = 4, D: int = 512, N: int = 16) -> Case:
    def arguments(make: Make) -> dict:
        return AVERAGE.call(make, L, B, D, N, spread=0.2, theta=-4.0, layout="BDL")

    others = {"fft": lambda **call: computed(by_fft, call)}
    return measured("complex_ema_scan", "", (B, D, L), arguments, others=others)


CASES = tuple(sized(length) for length in (1, 64, 200, 512, 2048))
ON_DEVICE = (sized(2048),)
WATCH = "the device's `sinpi` and `cospi`; what two complex states per pass cost"
