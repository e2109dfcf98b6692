# SPDX-License-Identifier: Apache-2.0
"""Whiten: keeps the covariance of the channels near a multiple of the identity, through the gradients.

The forward pass is the identity. Over all N frames of x, with the channels in G groups of c, each centred,

    S_g = x_g^T x_g    d = mean of the diagonals    w = sum_g |S_g|^2 / (G c) / d^2

w is 1 if every S_g is the same multiple of the identity, and larger otherwise. If w reaches ``whitening_limit``, the
gradient g of x becomes g + grad_scale |g| v / |v|, with

    v_g = dw / dx_g = 4 / (G c d^2) x_g (S_g - w d I)
"""

import logging
import random
from functools import partial

import torch
from torch.autograd.function import once_differentiable

from fastasr._transforms import Function
from fastasr.models.common.graph_capture import recording
from fastasr.models.common.verdicts import Settled, Verdict, Verdicts
from fastasr.models.zipformer.checkpointing import decided
from fastasr.ops import _dispatch, _gemm
from fastasr.ops._layout import ChannelRows

_EPS = 1.0e-20
_OPERATORS = "whitening_covariance", "whitening_change"


def whitening_metric(x, num_groups):
    """Returns w of x (..., channels), a scalar tensor of x's dtype."""
    return _metric(_grouped(x, num_groups))[0]


def _grouped(x, num_groups):
    frames = x.reshape(-1, num_groups, x.shape[-1] // num_groups).transpose(0, 1)  # [G, N, c]
    return frames - frames.mean(dim=1, keepdim=True)


def _metric(frames):
    covariance = _gemm.batched(frames.transpose(1, 2), frames)  # [G, c, c]
    d = covariance.diagonal(dim1=1, dim2=2).mean()
    size = covariance.shape[0] * covariance.shape[1]
    return covariance.square().sum() / size / (d * d + _EPS), covariance, d


def whitening_gradient(grad, x, num_groups, strength, native=True):
    """Returns the new gradient in the dtype of ``grad``, computed in float32 or better.

    ``strength(w)`` returns grad_scale, a number or a scalar tensor, or None if the gradient stays unchanged; w is a
    scalar tensor, or a float where the native kernels compute it.
    """
    if native and x.numel() and grad.shape == x.shape and _dispatch.serves_floats(_OPERATORS, grad, x):
        return _native_gradient(grad, x.detach(), num_groups, strength)
    compute = torch.promote_types(x.dtype, torch.float32)
    frames = _grouped(x.detach().to(compute), num_groups)
    metric, covariance, d = _metric(frames)
    grad_scale = strength(metric)
    if grad_scale is None:
        return grad
    covariance.diagonal(dim1=1, dim2=2).sub_(metric * d)
    covariance *= 4.0 / (covariance.shape[0] * covariance.shape[1]) / (d * d + _EPS)
    penalty = _gemm.batched(frames, covariance)
    penalty -= penalty.mean(
        dim=1, keepdim=True
    )  # 0 but for rounding, which the gradient of a bias would add up
    penalty = penalty.transpose(0, 1).reshape(x.shape)
    scale = grad_scale * (_norm(grad, compute) / (_norm(penalty, compute) + _EPS))
    return torch.addcmul(grad.to(compute), penalty, scale).to(grad.dtype)


def _native_gradient(grad, x, num_groups, strength):
    """Computes two thirds of the covariance, which is symmetric, and takes a few passes in place of torch's dozen."""
    library, by_channel = torch.ops.fastasr_cpu, ChannelRows(x, -1)
    rows = by_channel.rows if by_channel.rows.stride(1) == 1 else by_channel.rows.contiguous()
    frames, covariance, found = library.whitening_covariance.default(rows, num_groups)
    metric, d = found.tolist()
    grad_scale = strength(metric)
    if grad_scale is None:
        return grad
    change = covariance, metric, d, float(grad_scale)
    return by_channel.back(library.whitening_change.default(by_channel.of(grad), frames, *change))


def _norm(x, dtype):
    return torch.linalg.vector_norm(x, dtype=dtype)


class _Whitening(Function):
    @staticmethod
    def forward(ctx, x, module):
        ctx.save_for_backward(x)
        ctx.module = module
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        module = ctx.module

        def strength(metric):
            if random.random() < 0.005:
                _log(module, x, metric)
            return _strength(module, metric)

        with torch.autocast(x.device.type, enabled=False):  # backward() may be called inside autocast
            return whitening_gradient(grad, x, module.num_groups, strength), None


class _Recorded(Function):
    """_Whitening in a recorded pass: it acts where the host's number says so."""

    @staticmethod
    def forward(ctx, x, module, numbers):
        ctx.save_for_backward(x)
        ctx.module, ctx.numbers = module, numbers
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,), module, acts, recorded = ctx.saved_tensors, ctx.module, ctx.numbers, ctx.numbers.recording.back

        def plan():
            if not acts.on:
                return [0.0, 0.0]
            if random.random() < 0.005:
                float(module.whitening_limit)  # that of the log
            return [float(module.whitening_limit), float(module.grad_scale)]

        limit, scale = recorded.numbers(plan, 2).values.unbind()
        white = recorded.verdict(partial(_hear, module), acts)

        def strength(metric):
            white.copy_(metric < limit)
            return torch.where(white, 0.0, scale)

        grad = grad.clone()
        with torch.autocast(x.device.type, enabled=False), recorded.only_if(acts):
            grad.copy_(whitening_gradient(grad, x, module.num_groups, strength, native=False))
        return grad, None, None


def _strength(module, metric):
    """Returns grad_scale if the metric reaches its limit, and tells the module's next call which share holds."""
    white = metric < float(module.whitening_limit)
    if isinstance(white, torch.Tensor) and white.is_cuda:
        _hear(module, Verdict(Verdicts(white)))
        # two numbers would give one of the default dtype
        return torch.where(white, 0.0, metric.new_full((), float(module.grad_scale)))
    white = bool(white)
    _hear(module, Settled(white))
    return None if white else float(module.grad_scale)


def _hear(module, verdict):
    """Sets the share of calls by what the last one found: at once, or where a GPU is to say so at the next call."""
    if verdict.is_known:
        module.prob = module.min_prob if verdict.read() else module.max_prob
    else:
        vars(module)["_verdict"] = verdict


def _log(module, x, metric):
    limit = float(module.whitening_limit)  # always read, because reading may draw a random number
    if logging.getLogger().isEnabledFor(logging.DEBUG):
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

    def __init__(self, num_groups, whitening_limit, prob, grad_scale):
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

    def forward(self, x):
        recorded = recording()
        if recorded is not None and x.requires_grad:
            return _Recorded.apply(
                x, self, recorded.numbers(lambda: [_acts(self, float(self.grad_scale))], 1)
            )
        grad_scale = float(self.grad_scale)
        if not x.requires_grad:
            return x
        return _Whitening.apply(x, self) if _acts(self, grad_scale) else x


def _acts(self, grad_scale):
    """Draws whether this call checks the limit."""
    verdict = vars(self).pop("_verdict", None)
    if verdict is not None:
        _hear(self, Settled(verdict.read()))
    return not (random.random() > decided(lambda: self.prob) or grad_scale == 0)
