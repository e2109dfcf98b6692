# SPDX-License-Identifier: Apache-2.0
"""complex_ema_scan as a Megalodon block calls it: (B, D, L), 16 states, no activation.

``fft`` is upstream's method, a convolution by FFT with a kernel computed at each call, written from the mathematics:
upstream's own code needs its CUDA extension.
"""

import math
from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import Case, simple, versions
from fastasr.benchmarks.ops.ema_scan import scan_case

LENGTHS = (1, 64, 200, 512, 2048)
BATCH, CHANNELS, STATES = 4, 512, 16


def by_fft(x, alpha, delta, theta, gamma, omega):
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


def _inputs(length: int, device: str, dtype: torch.dtype):
    make = partial(torch.randn, device=device, dtype=dtype)
    alpha, delta = 0.2 * make(CHANNELS, STATES), 0.2 * make(CHANNELS, STATES)
    theta, gamma, omega = make(CHANNELS) - 4, make(CHANNELS, STATES, 2), 0.25 * make(CHANNELS)
    return make(BATCH, CHANNELS, length), alpha, delta, theta, gamma, omega


def _case(length: int) -> Case:
    def make(device: str, dtype: torch.dtype):
        inputs = _inputs(length, device, dtype)
        fft = {"fft": lambda: simple(by_fft, *inputs)}
        return versions(ops.complex_ema_scan, *inputs, options={"layout": "BDL"}, others=fft)

    return scan_case("complex_ema_scan", "", (BATCH, CHANNELS, length), make, length == 200)


CASES = tuple(_case(length) for length in LENGTHS)
ON_DEVICE = (_case(2048),)
