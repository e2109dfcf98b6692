# SPDX-License-Identifier: Apache-2.0
"""Whiten: keeps the covariance of the channels near a multiple of the identity, through the gradients.

The forward pass is the identity; ``fastasr.ops.whitening_gradient`` has the mathematics of the backward pass.
"""

import logging
import random
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr import ops
from fastasr._recording import has_values, recording
from fastasr._transforms import Function
from fastasr.models.common.ragged import frames_of_nobody
from fastasr.models.common.schedules import peek
from fastasr.models.common.verdicts import Settled, Verdict, Verdicts
from fastasr.models.zipformer.checkpointing import decided
from fastasr.models.zipformer.decisions import changing
from fastasr.models.zipformer.schedules import FloatLike
from fastasr.ops.whitening_gradient import Whitened, moments_of, whiten_, whitening_metric


class _Whitening(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: "Whiten") -> Tensor:
        ctx.save_for_backward(x, frames_of_nobody(x))
        ctx.module = module
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden = ctx.saved_tensors
        module = ctx.module
        if random.random() < 0.005:
            _log(module, x)
        limit = float(module.whitening_limit)
        numbers = module.num_groups, limit, peek(module.grad_scale)
        y, white = ops.whitening_gradient(grad, x, *numbers, padding_mask=hidden)
        if not has_values(white):
            return y, None
        verdict = Verdict(Verdicts(white))
        if not (verdict.is_known and verdict.read()):
            float(module.grad_scale)  # reading it may draw a random number
        _hear(module, verdict)
        return y, None


def _change(
    module: "Whiten", acts: Any, hidden: Tensor | None, grad: Tensor, x: Tensor, moments: Any
) -> None:
    """Changes the gradient in place in a recorded pass, if ``acts``, a number from the host, is not 0."""
    recorded = acts.recording.back

    def plan() -> list[float]:
        if not acts.on:
            return [0.0, 0.0]
        if random.random() < 0.005:
            float(module.whitening_limit)  # the log's read
        return [float(module.whitening_limit), float(module.grad_scale)]

    limits = recorded.numbers(plan, 2).values
    white = recorded.verdict(partial(_hear, module), acts)
    whiten_(grad, x, module.num_groups, limits, acts.values[:1], white, hidden, moments)


def _hear(module: "Whiten", verdict: Settled | Verdict) -> None:
    """Sets the share of calls by what the last one found: at once, or where a GPU is to say so at the next call."""
    if verdict.is_known:
        module.prob = module.min_prob if verdict.read() else module.max_prob
    else:
        vars(module)["_verdict"] = verdict


def _log(module: "Whiten", x: Tensor) -> None:
    limit = float(module.whitening_limit)  # always read, because reading may draw a random number
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        metric = whitening_metric(x, module.num_groups)
        logging.debug(
            "Whiten: name=%s, num_groups=%d, num_channels=%d, metric=%.2f, limit=%.2f",
            *(module.name, module.num_groups, x.shape[-1], float(metric), limit),
        )


class Whiten(torch.nn.Module):
    """x (..., channels) -> x.

    A share ``prob`` of the calls that need gradients changes them if w reaches ``whitening_limit``; ``grad_scale`` is
    the size of the change relative to the gradient. ``prob`` may be a pair of shares: the smaller one holds after a
    call within the limit, the larger one otherwise. Every call that needs gradients draws one number from Python's
    ``random``; a backward pass that checks the limit draws one more, and one per schedule that it reads. On CUDA the
    backward pass does not wait for the device: the next call reads which share holds.

    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        num_groups: int,
        whitening_limit: FloatLike,
        prob: tuple[float, float] | float,
        grad_scale: FloatLike,
    ) -> None:
        super().__init__()
        if num_groups < 1 or float(whitening_limit) < 1 or float(grad_scale) < 0:
            raise ValueError(
                f"Whiten: expected num_groups >= 1, whitening_limit >= 1 and grad_scale >= 0, got {num_groups}, "
                f"{float(whitening_limit)} and {float(grad_scale)}"
            )
        self.num_groups = num_groups
        self.whitening_limit = whitening_limit
        self.grad_scale = grad_scale
        self.min_prob, self.max_prob = (prob, prob) if isinstance(prob, (int, float)) else prob
        if not 0 < self.min_prob <= self.max_prob <= 1:
            raise ValueError(f"Whiten: expected 0 < min_prob <= max_prob <= 1, got prob={prob}")
        self.prob = self.max_prob
        self.name = None

    def forward(self, x: Tensor) -> Tensor:
        recorded = recording()
        if recorded is not None and x.requires_grad:
            numbers = recorded.numbers(lambda: [_acts(self, float(self.grad_scale))], 1)
            hidden, act = frames_of_nobody(x), numbers.values[:1]
            change = partial(_change, self, numbers, hidden)
            return changing(x, change, moments_of, lambda x: Whitened(x, self.num_groups, act, hidden))
        grad_scale = float(self.grad_scale)
        if not x.requires_grad:
            return x
        return _whitened(x, self) if _acts(self, grad_scale) else x


@torch.compiler.disable  # Its module and its random number are no part of a graph: torch.compile raises an error.
def _whitened(x: Tensor, module: Whiten) -> Any:
    return _Whitening.apply(x, module)


def _acts(self: "Whiten", grad_scale: float) -> bool:
    """Draws whether this call checks the limit."""
    verdict = vars(self).pop("_verdict", None)
    if verdict is not None:
        _hear(self, Settled(verdict.read()))
    return not (random.random() > decided(lambda: self.prob) or grad_scale == 0)
