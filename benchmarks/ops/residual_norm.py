# SPDX-License-Identifier: Apache-2.0
"""gated_residual_norm and residual_norm at the sizes of ESPnet's MEGA decoder."""

import torch

from fastasr import ops
from fastasr.benchmarks.case import Case, costs, shaped, versions

SIZE, BETWEEN, EPS = 512, 1152, 1e-12


def _case(gated: bool, length: int, batch: int) -> Case:
    op = "gated_residual_norm" if gated else "residual_norm"

    def make(device: str, dtype: torch.dtype):
        like = {"device": device, "dtype": dtype}
        x, hidden = torch.randn(length, batch, SIZE, **like), torch.randn(length, batch, SIZE, **like)
        inputs = hidden, torch.rand(SIZE, **like) + 0.5, torch.randn(SIZE, **like)
        if gated:  # update and candidate are the ends of one projection
            mixed = torch.randn(length, batch, 2 * SIZE + BETWEEN, **like)
            inputs = mixed[..., :SIZE], mixed[..., -SIZE:], *inputs
        return versions(getattr(ops, op), x, *inputs, options={"eps": EPS})

    n = length * batch * SIZE
    passes = costs((5 * n, 0), (8 * n, 0)) if gated else costs((3 * n, 0), (4 * n, 0))
    return shaped(op, (length, batch, SIZE), make, passes, copy=True)


CASES = (_case(True, 200, 4), _case(True, 1024, 4), _case(False, 200, 4), _case(False, 1024, 4))
ON_DEVICE = CASES
