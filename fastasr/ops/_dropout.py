# SPDX-License-Identifier: Apache-2.0
"""Dropout in training on the CPU, with the random numbers that torch itself draws but several times faster.

``torch.nn.functional.dropout`` draws word by word unless torch draws with MKL, which it does on Intel's CPUs alone. The
kernel advances torch's generator by the same numbers, a block of 624 words at a time, so a seed gives the same mask as
in torch. The first call tests on this torch whether the draws agree. Where they do not, and for everything but plain
float32 tensors on the CPU, torch's function is called.

The kernel reads, advances and writes back the generator: threads that draw with torch's own functions meanwhile may
draw the same numbers.
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled

from fastasr._transforms import Function
from fastasr.ops import _dispatch

OPERATORS = "dropout_forward", "dropout_backward", "dropout_keep", "dropout_windows"
_LOCK = threading.Lock()


def dropout(x: Tensor, p: float, residual: Tensor | None = None) -> Tensor:
    """Returns F.dropout(x, p) + residual, as in training."""
    tensors = (x,) if residual is None else (x, residual)
    if not serves(p, *tensors) or (residual is not None and residual.shape != x.shape):
        y = F.dropout(x, p)
        return y if residual is None else y + residual
    if is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Dropout.apply(x, residual, p)
    return _forward(x, residual, p)[0]


def windows(like: Tensor, places: Tensor, sequences: int, keys: int, p: float) -> Tensor:
    """Draws F.dropout(ones, p) for ones of (sequences, queries, keys) and returns the columns ``places`` (queries,
    lanes) of each row: (sequences, queries, lanes) of like's dtype.
    """
    if serves(p, like):
        operator = torch.ops.fastasr_cpu.dropout_windows.default
        return drawn(operator, (like.detach(), places), sequences, keys, p)
    queries = places.shape[0]
    dense = F.dropout(like.new_ones(sequences, queries, keys), p)
    rows = torch.arange(queries, device=places.device, dtype=torch.int64)[:, None] * keys
    return dense.flatten(1).index_select(1, (rows + places).flatten()).reshape(sequences, *places.shape)


def draw_mask(x: Tensor, dropout_p: float, dropout_shared_dim: int | None) -> Tensor:
    """Draws the dropout mask with one ``torch.rand`` call of x's dtype, as upstream does."""
    shape = list(x.shape)
    if dropout_shared_dim is not None:
        shape[dropout_shared_dim] = 1
    mask = torch.rand(*shape, device=x.device, dtype=x.dtype)
    return mask.gt_(dropout_p).mul_(1.0 / (1.0 - dropout_p))  # in place: a cast would be one more launch


def serves(p: float, *tensors: Tensor) -> bool:
    return (
        0 < p < 1
        and _dispatch.serves_floats(OPERATORS, *tensors)
        and all(t.is_contiguous() for t in tensors)
        and _draws_are_torchs()
    )


@cache
def _draws_are_torchs() -> bool:
    """Says whether the kernel draws what this torch draws and leaves the generator in the same state."""
    generator = torch.Generator().manual_seed(2)
    for count, p in ((701, 0.1), (400, 0.5)):
        state = generator.get_state()
        expected = torch.empty(count, dtype=torch.float32, device="cpu").bernoulli_(
            1 - p, generator=generator
        )
        try:
            keep = _dispatch.registered("cpu", "dropout_forward")(
                torch.ones(count, dtype=torch.float32, device="cpu"), None, state, p
            )[1]
        except ValueError:  # The state has a different layout.
            return False
        if not (torch.equal(keep, expected.to(torch.uint8)) and torch.equal(state, generator.get_state())):
            return False
    return True


def drawn(operator: Callable[..., Any], tensors: tuple[Tensor | None, ...], *rest: float) -> Any:
    with _LOCK:
        state = torch.default_generator.get_state()
        found = operator(*tensors, state, *rest)
        torch.default_generator.set_state(state)
    return found


def _forward(x: Tensor, residual: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """Returns y and which elements were kept."""
    return drawn(torch.ops.fastasr_cpu.dropout_forward.default, (x, residual), p)


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, p: float) -> Tensor:
        y, keep = _forward(x, residual, p)
        ctx.save_for_backward(keep)
        ctx.p = p
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (keep,) = ctx.saved_tensors
        if is_grad_enabled():  # the caller wants a second derivative
            dx = grad * (keep.view(grad.shape) / (1 - ctx.p))
        else:
            dx = torch.ops.fastasr_cpu.dropout_backward.default(grad.contiguous(), keep, ctx.p)
        return dx, grad if ctx.needs_input_grad[1] else None, None
