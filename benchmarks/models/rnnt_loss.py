# SPDX-License-Identifier: Apache-2.0
"""The exact transducer loss at Parakeet's sizes, forward and backward: from given logits, and with the joiner.

"upstream" is torchaudio's ``rnnt_loss``, whose library must fit the installed torch. Given logits, both return their
gradient as a tensor of the same size; ours can write it over the logits.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastasr import rnnt
from fastasr.benchmarks import limits, upstream
from fastasr.benchmarks.case import BOTH
from fastasr.benchmarks.harness import Variant
from fastasr.benchmarks.models.unit import FASTASR, UPSTREAM, Run, benchmark
from fastasr.benchmarks.rows import Row
from fastasr.compat import torchaudio as compat

NAME = "rnnt_loss"
LOGITS, IN_PLACE, JOINER = "from logits", "from logits, in place", "joiner and loss"
# B, T, U, D, V
CASES = {
    LOGITS: ((4, 188, 40, 640, 1025), (1, 188, 40, 640, 8193), (1, 20, 5, 64, 30)),
    IN_PLACE: ((1, 188, 40, 640, 8193),),
    JOINER: ((4, 188, 40, 640, 8193), (1, 188, 40, 640, 8193), (1, 20, 5, 64, 30)),
}
TINY = dict.fromkeys(CASES, ((2, 12, 4, 16, 20),))
QUICK = {"cases": TINY}


class Problem:
    """Random outputs of encoder and predictor, and the losses of either implementation. ``more`` outputs follow the
    tokens."""

    def __init__(self, batch: int, frames: int, symbols: int, channels: int, outputs: int, more: int = 0):
        torch.manual_seed(0)
        self.am, self.lm = torch.randn(batch, frames, channels), torch.randn(batch, symbols + 1, channels)
        self.head, self.blank = torch.nn.Linear(channels, outputs + more), outputs - 1
        targets = torch.randint(0, outputs - 1, (batch, symbols), dtype=torch.int32)
        self.ends = targets, *(torch.full((batch,), n, dtype=torch.int32) for n in (frames, symbols))

    def leaves(self) -> tuple[Tensor, ...]:
        return self.am.requires_grad_(), self.lm.requires_grad_(), *self.head.parameters()

    def cost(self, outputs: int) -> tuple[int, int]:
        """Returns the operations of the joiner with its gradients, and the bytes of its operands."""
        rows, channels = self.am.shape[0] * self.am.shape[1] * self.lm.shape[1], self.am.shape[2]
        operands = self.am.numel() + self.lm.numel() + outputs * channels
        return 6 * rows * channels * len(self.head.weight), 3 * 4 * operands

    def logits(self) -> Tensor:
        return self.head(torch.relu(self.am[:, :, None] + self.lm[:, None]))

    def upstream(self, logits: Tensor | None = None) -> Tensor:
        loss = upstream.module("torchaudio.functional").rnnt_loss
        if not hasattr(torch.ops.torchaudio, "rnnt_loss_forward"):
            raise upstream.MissingUpstream("torchaudio's library does not load with this torch")
        return loss(
            self.logits() if logits is None else logits, *self.ends, blank=self.blank, reduction="sum"
        )

    def fused(self, logits: Tensor | None = None, in_place: bool = False) -> Tensor:
        if logits is not None:
            options = {"blank": self.blank, "reduction": "sum", "in_place": in_place}
            return compat.rnnt_loss(logits, *self.ends, **options)
        call = self.am, self.lm, self.head.weight, self.head.bias, self.ends[0], self.blank
        return rnnt.joiner_loss(*call, reduction="sum", activation="relu")


@benchmark(NAME)
def measure(run: Run, *, cases=CASES) -> Iterator[list[Row]]:
    """Yields the rows of each case and size. Raises ``upstream.MissingUpstream``."""
    for case, sizes in cases.items():
        for batch, frames, symbols, channels, outputs in sizes:
            shape = f"{batch}x{frames}x{symbols}x{channels}, V={outputs}"
            if run.skip(case, shape, BOTH):
                continue
            run.report(f"{NAME}: {case}, {shape}")
            problem = Problem(batch, frames, symbols, channels, outputs)
            fused = partial(problem.fused, in_place=True) if case == IN_PLACE else problem.fused
            calls, leaves, limit = {UPSTREAM: problem.upstream, FASTASR: fused}, problem.leaves(), None
            flops, moved = problem.cost(outputs)
            if case != JOINER:
                given = problem.logits().detach().requires_grad_()
                calls = {name: partial(call, given) for name, call in calls.items()}
                leaves, flops, moved = (given,), 0, 2 * 4 * given.numel()
                copied = limits.copy_seconds(moved)
                limit = copied, f"copy {moved / copied / 1e9:.1f} GB/s"
            fields = {"case": case, "shape": shape, "bytes": moved}
            yield rows_of(run, calls, leaves, flops, outputs > 1000, limit=limit, **fields)


def rows_of(
    run: Run, calls: dict[str, Callable], leaves: tuple[Tensor, ...], flops: int, large: bool, **fields
) -> list[Row]:
    """Returns a row for each call that returns a loss, forward and backward. ``large``: three rounds are enough."""
    variants = {
        name: Variant(lambda call=call: torch.autograd.grad(call(), leaves)) for name, call in calls.items()
    }
    reps = run.reps or (3 if large else run.settings.reps)
    how = {"warmup": 1, "sample_seconds": 0.0} if large else {"warmup": run.settings.warmup}
    return run.rows(variants, flops, **{"reps": reps, "memory": True, "pass_": BOTH, **how, **fields})
