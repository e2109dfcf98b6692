# SPDX-License-Identifier: Apache-2.0
"""The loss of a pruned transducer after the encoder: smoothed loss, windows, joiner, pruned loss; forward and backward.

"upstream" is the recipes' code: fast_rnnt's functions (its C++ compiled here) around a joiner in eager PyTorch. Cases
"joiner and loss" are the last two steps alone, over the rows B T R and the outputs V, with their peak memory, which
``python -m fastasr.benchmarks.studies.transducer_memory`` draws. fastasr keeps logits up to a size, unless the caller
decides; "logits again" never keeps them.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import rnnt
from fastasr.benchmarks import upstream
from fastasr.benchmarks.case import BOTH, Report
from fastasr.benchmarks.harness import Variant
from fastasr.benchmarks.models.unit import COMPILE, FASTASR, UPSTREAM, Run, benchmark
from fastasr.benchmarks.rows import Row
from fastasr.ops._joiner import KEPT_BYTES

NAME = "pruned_transducer"
AGAIN = "fastasr, logits again"
WHOLE, PART = "whole path", "joiner and loss"
# (case, B, T, S, R, D, V)
WHOLES = tuple((WHOLE, 4, 400, 60, 5, 512, v) for v in (500, 5000))
PARTS = tuple(
    (PART, batch, frames, 60, 5, 512, outputs)
    for batch, frames in ((4, 100), (4, 400), (8, 750), (40, 750))
    for outputs in (500, 2000, 5000)
)
CASES = (*WHOLES, *PARTS)
TINY = ((WHOLE, 2, 12, 4, 3, 16, 20), (PART, 2, 12, 4, 3, 16, 20))
QUICK = {"cases": TINY}
LONG = 2e11  # A joiner and loss of more operations are timed once.


def shape_name(batch, frames, symbols, s_range, channels, outputs) -> str:
    return f"{batch}x{frames}x{symbols}x{s_range}x{channels}, V={outputs}"


class _Problem:
    """Random scores of both joiners, symbols, and the losses of either implementation."""

    def __init__(self, batch: int, frames: int, symbols: int, s_range: int, channels: int, outputs: int):
        torch.manual_seed(0)
        self.s_range = s_range
        self.am, self.lm = torch.randn(batch, frames, channels), torch.randn(batch, symbols + 1, channels)
        self.simple_am = torch.randn(batch, frames, outputs)
        self.simple_lm = torch.randn(batch, symbols + 1, outputs)
        output = torch.nn.Linear(channels, outputs)
        self.weight, self.bias = output.weight.detach(), output.bias.detach()
        self.symbols = torch.randint(1, outputs, (batch, symbols))
        self.boundary = torch.tensor([[0, 0, symbols, frames]] * batch)
        starts = torch.arange(frames) * (symbols + 1 - s_range) // max(1, frames - 1)
        self.ranges = (starts.unsqueeze(1) + torch.arange(s_range)).expand(batch, -1, -1).contiguous()

    def leaves(self, whole: bool) -> tuple[Tensor, ...]:
        simple = (self.simple_lm, self.simple_am) if whole else ()
        return tuple(t.requires_grad_() for t in (self.am, self.lm, self.weight, self.bias, *simple))

    def windows(self, package) -> tuple[Tensor, Tensor]:
        simple, occupation = package.rnnt_loss_smoothed(
            self.simple_lm,
            self.simple_am,
            self.symbols,
            0,
            lm_only_scale=0.25,
            am_only_scale=0.0,
            boundary=self.boundary,
            reduction="sum",
            return_grad=True,
        )
        return simple, package.get_rnnt_prune_ranges(*occupation, self.boundary, self.s_range)

    def upstream(self, package, whole: bool) -> Tensor:
        simple, ranges = self.windows(package) if whole else (0.0, self.ranges)
        am, lm = package.do_rnnt_pruning(self.am, self.lm, ranges)
        logits = F.linear(torch.tanh(am + lm), self.weight, self.bias)
        pruned = package.rnnt_loss_pruned(
            logits, self.symbols, ranges, 0, boundary=self.boundary, reduction="sum"
        )
        return 0.5 * simple + pruned

    def fused(self, keep_logits: bool | None, whole: bool) -> Tensor:
        simple, ranges = self.windows(rnnt) if whole else (0.0, self.ranges)
        pruned = rnnt.pruned_joiner_loss(
            self.am,
            self.lm,
            self.weight,
            self.bias,
            self.symbols,
            ranges,
            0,
            self.boundary,
            reduction="sum",
            keep_logits=keep_logits,
        )
        return 0.5 * simple + pruned


def cost(case: str, batch, frames, symbols, s_range, channels, outputs) -> tuple[int, int]:
    """Returns (bytes, multiply and add operations) of forward and backward: operands and gradients once,
    products once.
    """
    rows = batch * frames * s_range
    operands = batch * (frames + symbols + 1) * channels + outputs * channels
    flops = 6 * rows * channels * outputs
    if case == WHOLE:
        operands += batch * (frames + symbols + 1) * outputs
        flops += 6 * batch * frames * (symbols + 1) * outputs
    return 3 * 4 * operands + 16 * rows, flops


def keeps_logits(batch, frames, symbols, s_range, channels, outputs) -> bool:
    """Says whether fastasr keeps the logits of this size where the caller does not decide."""
    return 4 * batch * frames * s_range * (channels + outputs) <= KEPT_BYTES


def _eager_bytes(batch, frames, symbols, s_range, channels, outputs) -> int:
    """Estimates the bytes that the eager joiner and loss hold at the peak of their backward."""
    return batch * frames * s_range * (20 * outputs + 4 * channels)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _calls(
    problem: _Problem, case: str, sizes, compile_: bool, report: Report
) -> dict[str, Callable[[], Tensor]]:
    package, whole = upstream.module("fast_rnnt"), case == WHOLE
    theirs = partial(problem.upstream, package, whole)
    calls = {}
    if whole or _eager_bytes(*sizes) < 0.6 * _memory_bytes():
        calls[UPSTREAM] = theirs
    else:
        where = f"{NAME}: {case}, {shape_name(*sizes)}"
        report(f"{where}: {UPSTREAM} not measured: it needs more memory than is free")
    if whole and compile_:
        torch._dynamo.reset()
        calls[COMPILE] = torch.compile(theirs, dynamic=False)
    calls[FASTASR] = partial(problem.fused, None, whole)
    if keeps_logits(*sizes):
        calls[AGAIN] = partial(problem.fused, False, whole)
    return calls


@benchmark(NAME)
def measure(run: Run, *, cases=CASES) -> Iterator[list[Row]]:
    """Yields the rows of each case; ``settings.compile`` measures torch.compile."""
    for case, *sizes in cases:
        shape = shape_name(*sizes)
        if run.skip(case, shape, BOTH):
            continue
        run.report(f"{NAME}: {case}, {shape}")
        problem = _Problem(*sizes)
        leaves = problem.leaves(case == WHOLE)
        variants = {
            name: Variant(lambda call=call, leaves=leaves: torch.autograd.grad(call(), leaves))
            for name, call in _calls(problem, case, sizes, run.settings.compile, run.report).items()
        }
        moved, flops = cost(case, *sizes)
        once = case == PART and flops > LONG
        yield run.rows(
            variants,
            flops,
            reps=1 if once else run.reps or run.settings.reps,
            warmup=1 if once else run.settings.warmup,
            sample_seconds=0.0 if once else None,
            memory=case == PART,
            case=case,
            shape=shape,
            pass_=BOTH,
            bytes=moved,
        )
