# SPDX-License-Identifier: Apache-2.0
"""rnnt_joiner at the sizes of a pruned transducer: 8,000 rows of 512 channels, 500 and 5,000 outputs."""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import Case, Cost, Implementation, costs_of, parameters, versions

BATCH, FRAMES, LENGTH, S_RANGE, CHANNELS = 4, 400, 60, 5, 512


def _make(outputs: int, keep_logits: bool | None, device: str, dtype: torch.dtype):
    like = {"device": device, "dtype": dtype}
    inputs = (
        torch.randn(BATCH, FRAMES, CHANNELS, **like),
        torch.randn(BATCH, LENGTH + 1, CHANNELS, **like),
        torch.randn(outputs, CHANNELS, **like) * CHANNELS**-0.5,
        torch.randn(outputs, **like) * 0.1,
    )
    symbols = torch.randint(1, outputs, (BATCH, LENGTH), device=device)
    starts = torch.arange(FRAMES, device=device) * (LENGTH + 1 - S_RANGE) // (FRAMES - 1)
    starts = starts.expand(BATCH, FRAMES).contiguous()
    options = {"symbols": symbols, "starts": starts, "s_range": S_RANGE, "termination_symbol": 0}

    def fused() -> Implementation:
        call = partial(ops.rnnt_joiner, *inputs, **options, keep_logits=keep_logits)
        return Implementation(lambda: torch.stack(call()), parameters(*inputs))

    return versions(ops.rnnt_joiner, *inputs, options=options, result=torch.stack) | {"fastasr": fused}


def _costs(outputs: int, size: int) -> dict[str, Cost]:
    rows = BATCH * FRAMES * S_RANGE
    operands = (BATCH * (FRAMES + LENGTH + 1) + outputs) * CHANNELS * size
    product = 2 * rows * CHANNELS * outputs
    return costs_of(Cost(operands + 8 * rows, product), Cost(2 * operands + 8 * rows, 2 * product))


def _case(outputs: int, keep_logits: bool | None = None) -> Case:
    shape = f"{BATCH}x{FRAMES}x{S_RANGE}x{CHANNELS}, V={outputs}"
    name = shape if keep_logits is None else f"{shape}, logits computed again"
    make, costs = partial(_make, outputs, keep_logits), partial(_costs, outputs)
    return Case("rnnt_joiner", name, shape, make, costs, quick=keep_logits is None and outputs <= 500)


CASES = (_case(500), _case(500, False), _case(5000), _case(5000, False))
ON_DEVICE = CASES[::2]
