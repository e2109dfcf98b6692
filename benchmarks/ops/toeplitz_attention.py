# SPDX-License-Identifier: Apache-2.0
"""toeplitz_attention at the sizes of ESPnet's MEGA decoder: size 512, queries and keys of 128, values of 1024."""

import torch

from fastasr import ops
from fastasr.benchmarks.case import Case, costs, versions

SIZE, KEYS, VALUES = 512, 128, 1024


def _case(length: int, batch: int, quick: bool = True) -> Case:
    def make(device: str, dtype: torch.dtype):
        like = {"device": device, "dtype": dtype}
        mixed = torch.randn(length, batch, KEYS + VALUES + 2 * SIZE, **like)  # slices of one projection
        query_key = mixed[..., SIZE : SIZE + KEYS]
        gate = mixed[..., SIZE + KEYS : SIZE + KEYS + VALUES]
        value = torch.randn(length, batch, VALUES, **like)
        qk_weight, qk_bias = torch.randn(2, KEYS, **like) * 0.3, torch.randn(2, KEYS, **like) * 0.3
        inputs = query_key, gate, value, qk_weight, qk_bias, torch.randn(2 * length - 1, **like) * 0.3
        return versions(ops.toeplitz_attention, *inputs, options={"activate_value": True})

    frames, pairs = length * batch, batch * length * (length + 1) // 2  # causal
    passes = costs(
        (frames * (KEYS + 3 * VALUES), 2 * pairs * (KEYS + VALUES)),
        # scores again; weights' gradient and the values'; the queries' and the keys'
        (frames * (2 * KEYS + 6 * VALUES), 2 * pairs * (3 * KEYS + 2 * VALUES)),
    )
    name, shape = f"{length}x{batch}, {KEYS}, {VALUES}", f"{length}x{batch}x{VALUES}"
    return Case("toeplitz_attention", name, shape, make, passes, quick=quick)


CASES = (_case(200, 4), _case(1024, 4, quick=False))
ON_DEVICE = CASES
