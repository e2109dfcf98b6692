# SPDX-License-Identifier: Apache-2.0
"""toeplitz_attention at the sizes of ESPnet's MEGA decoder: size 512, queries and keys of 128, values of 1024."""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import BACKWARD, BOTH, FORWARD, Case, Cost, Implementation, compiled, parameters

definition = ops.toeplitz_attention.definition

SIZE, KEYS, VALUES = 512, 128, 1024


def _formula(query_key, gate, value, qk_weight, qk_bias, position_bias):
    return definition(query_key, gate, value, qk_weight, qk_bias, position_bias, activate_value=True)


def _fused(query_key, gate, value, qk_weight, qk_bias, position_bias):
    return ops.toeplitz_attention(
        query_key, gate, value, qk_weight, qk_bias, position_bias, activate_value=True
    )


def _make(length: int, batch: int, device: str, dtype: torch.dtype):
    like = {"device": device, "dtype": dtype}
    mixed = torch.randn(length, batch, KEYS + VALUES + 2 * SIZE, **like)  # slices of one projection
    query_key = mixed[..., SIZE : SIZE + KEYS]
    gate = mixed[..., SIZE + KEYS : SIZE + KEYS + VALUES]
    value = torch.randn(length, batch, VALUES, **like)
    qk_weight, qk_bias = torch.randn(2, KEYS, **like) * 0.3, torch.randn(2, KEYS, **like) * 0.3
    inputs = query_key, gate, value, qk_weight, qk_bias, torch.randn(2 * length - 1, **like) * 0.3

    def build(function) -> Implementation:
        return Implementation(lambda: function(*inputs), parameters(*inputs))

    return {
        "eager": lambda: build(_formula),
        "compile": lambda: build(compiled(_formula)),
        "fastasr": lambda: build(_fused),
    }


def _costs(length: int, batch: int, size: int) -> dict[str, Cost]:
    frames, pairs = length * batch, batch * length * (length + 1) // 2  # causal
    forward = Cost(frames * (KEYS + 3 * VALUES) * size, 2 * pairs * (KEYS + VALUES))
    # scores again; weights' gradient and the values'; the queries' and the keys'
    backward = Cost(frames * (2 * KEYS + 6 * VALUES) * size, 2 * pairs * (3 * KEYS + 2 * VALUES))
    both = Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return {FORWARD: forward, BACKWARD: backward, BOTH: both}


def _case(length: int, batch: int, quick: bool = True) -> Case:
    name = f"{length}x{batch}, {KEYS}, {VALUES}"
    shape = f"{length}x{batch}x{VALUES}"
    return Case(
        "toeplitz_attention",
        name,
        shape,
        partial(_make, length, batch),
        partial(_costs, length, batch),
        quick=quick,
    )


CASES = (_case(200, 4), _case(1024, 4, quick=False))
ON_DEVICE = CASES
