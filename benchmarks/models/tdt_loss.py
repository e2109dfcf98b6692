# SPDX-License-Identifier: Apache-2.0
"""The joiner and the loss of a token-and-duration transducer at Parakeet's sizes, forward and backward.

"upstream" is transformers' joint and its ``tdt_loss``, which hold the logits. ``python -m
fastasr.benchmarks.studies.transducer_memory --tdt`` draws the memory over U and V.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastasr import rnnt
from fastasr.benchmarks import upstream
from fastasr.benchmarks.case import BOTH
from fastasr.benchmarks.harness import Variant
from fastasr.benchmarks.models.unit import FASTASR, UPSTREAM, Run, benchmark
from fastasr.benchmarks.rows import Row

NAME = "tdt_loss"
DURATIONS = [0, 1, 2, 3, 4]
CASE, MEMORY = "joiner and loss", "memory"
# B, T, U, D, V
CASES = {
    CASE: ((4, 188, 40, 640, 8193), (1, 188, 40, 640, 8193), (1, 20, 5, 64, 30)),
    MEMORY: tuple((1, 188, u, 640, v) for v in (1025, 4097, 8193) for u in (10, 20, 40, 80)),
}
TINY = {CASE: ((2, 12, 4, 16, 20),)}
QUICK = {"cases": TINY}


class Problem:
    """Random outputs of encoder and predictor, and the losses of either implementation."""

    def __init__(self, batch: int, frames: int, symbols: int, channels: int, outputs: int):
        torch.manual_seed(0)
        self.am, self.lm = torch.randn(batch, frames, channels), torch.randn(batch, symbols + 1, channels)
        self.head = torch.nn.Linear(channels, outputs + len(DURATIONS))
        self.outputs = outputs
        lengths = torch.full((batch,), frames), torch.full((batch,), symbols)
        self.ends = torch.randint(0, outputs - 1, (batch, symbols)), *lengths, outputs - 1, DURATIONS

    def leaves(self) -> tuple[Tensor, ...]:
        return self.am.requires_grad_(), self.lm.requires_grad_(), *self.head.parameters()

    def upstream(self) -> Tensor:
        logits = self.head(torch.relu(self.am[:, :, None] + self.lm[:, None]))
        tokens, steps = logits[..., : self.outputs], logits[..., self.outputs :]
        return upstream.module("transformers.loss.loss_tdt").tdt_loss(tokens, steps, *self.ends)

    def fused(self) -> Tensor:
        return rnnt.tdt_joiner_loss(self.am, self.lm, self.head.weight, self.head.bias, *self.ends)


@benchmark(NAME)
def measure(run: Run, *, cases=CASES) -> Iterator[list[Row]]:
    """Yields the rows of each case and size; those of MEMORY are for their peak memory."""
    every = [(case, size) for case, sizes in cases.items() for size in sizes]
    for case, (batch, frames, symbols, channels, outputs) in every:
        shape = f"{batch}x{frames}x{symbols}x{channels}, V={outputs}"
        if run.skip(case, shape, BOTH):
            continue
        run.report(f"{NAME}: {case}, {shape}")
        problem = Problem(batch, frames, symbols, channels, outputs)
        leaves, calls = problem.leaves(), {UPSTREAM: problem.upstream, FASTASR: problem.fused}
        variants = {
            name: Variant(lambda call=call, leaves=leaves: torch.autograd.grad(call(), leaves))
            for name, call in calls.items()
        }
        large = outputs > 1000
        operands = (batch * (frames + symbols + 1) + outputs) * channels
        yield run.rows(
            variants,
            6 * batch * frames * (symbols + 1) * channels * (outputs + len(DURATIONS)),
            reps=1 if case == MEMORY else run.reps or (3 if large else run.settings.reps),
            warmup=1 if large else run.settings.warmup,
            sample_seconds=0.0 if large else None,
            memory=True,
            case=case,
            shape=shape,
            pass_=BOTH,
            bytes=3 * 4 * operands,
        )
