# SPDX-License-Identifier: Apache-2.0
"""The joiner and the loss of a token-and-duration transducer at Parakeet's sizes, forward and backward.

"upstream" is transformers' joint and its ``tdt_loss``, which hold the logits. ``python -m
fastasr.benchmarks.studies.transducer_memory --tdt`` draws the memory over U and V.
"""

from collections.abc import Iterator

from torch import Tensor

from fastasr import rnnt
from fastasr.benchmarks import upstream
from fastasr.benchmarks.case import BOTH
from fastasr.benchmarks.models import rnnt_loss
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


class Problem(rnnt_loss.Problem):
    def __init__(self, *sizes: int):
        super().__init__(*sizes, len(DURATIONS))
        self.ends = *(end.long() for end in self.ends), self.blank, DURATIONS

    def upstream(self) -> Tensor:
        tokens, steps = self.logits().tensor_split((self.blank + 1,), -1)
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
        calls = {UPSTREAM: problem.upstream, FASTASR: problem.fused}
        flops, moved = problem.cost(outputs)
        fields = {"case": case, "shape": shape, "bytes": moved} | ({"reps": 1} if case == MEMORY else {})
        yield rnnt_loss.rows_of(run, calls, problem.leaves(), flops, outputs > 1000, **fields)
