# SPDX-License-Identifier: Apache-2.0
"""Samples of balancer_gradient. It is not the gradient of a function, so it has its own tests instead of the
contract."""

from fastasr.testing.table import Make, OpTable, Sample


def _call(make: Make, shape: tuple[int, ...], channel_dim: int = -1) -> dict:
    limits = {"min_mean": -0.05, "max_mean": 0.05, "min_rms": 0.2, "max_rms": 0.5, "grad_scale": 0.04}
    return {"grad": make.normal(*shape), "x": make.normal(*shape), **limits, "channel_dim": channel_dim}


TABLE = OpTable(
    op="balancer_gradient",
    samples=(
        Sample("matrix", lambda m: _call(m, (2, 8))),
        Sample("tbc", lambda m: _call(m, (6, 2, 16))),
        Sample("channels first", lambda m: _call(m, (3, 12, 5), 1)),
    ),
)
