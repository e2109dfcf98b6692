# SPDX-License-Identifier: Apache-2.0
"""Blocks with a norm in front of each branch and one behind the last: x + f(LN x), x + g(LN x), ..., LN(x + h(LN x)).

On a GPU one kernel adds a branch to the stream and normalises the sum for the next branch, or computes the last norm of
a block and the first of the next.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastasr import ops
from fastasr._recording import recording
from fastasr.models.common.plain import has_known_forward, runs, weight_and_bias
from fastasr.ops._register import autocast_dtype

B = TypeVar("B", bound=torch.nn.Module)


class Stream:
    """The stream x within a block. ``fused`` says whether kernels add to it, which needs norms of torch's."""

    def __init__(self, x: Tensor, fused: bool) -> None:
        self.fused, self.autocast = fused, autocast_dtype(x) is not None
        # All blocks after the first get float32, because autocast computes norms in it.
        self.x = x.float() if fused and self.autocast and x.dtype.itemsize == 2 else x

    def add(self, norm: Any, update: Tensor, scale: float = 1.0) -> Tensor:
        """Adds scale · update to x. Returns the norm of the sum, under autocast as narrow as the update."""
        if not self._is_served(update):
            self.x = torch.add(self.x, update, alpha=scale)  # one pass
            normed: Tensor = norm(self.x)
            return normed
        self.x, normed = ops.add_norm(self.x, update, *weight_and_bias(norm), norm.eps, scale)
        return normed

    def _is_served(self, update: Tensor) -> bool:
        """Says whether kernels add this update: outside of autocast no layer casts its input."""
        return self.fused and (self.autocast or update.dtype is self.x.dtype)


class End(NamedTuple):
    """The end of a block: its last norm, and what it adds to the stream in front of it."""

    stream: Stream
    norm: Any
    update: Tensor
    scale: float = 1.0

    def normed(self, following: Any = None) -> tuple[Tensor, Tensor | None]:
        """Returns the block's output, and its norm for the first branch of the next block where that has ``following``
        as its first norm and one kernel computes both."""
        stream, norm, update, scale = self
        if following is not None and stream._is_served(update):
            parameters = *weight_and_bias(norm), *weight_and_bias(following)
            return ops.add_two_norms(stream.x, update, *parameters, norm.eps, following.eps, scale)
        if stream.fused and stream.autocast:
            # The stream takes the update's place, so that the norm has its dtype: x + s u is s times u + x / s, and a
            # norm is the same of a row and of its multiple.
            parameters = *weight_and_bias(norm), norm.eps / scale**2, 1.0 / scale
            return ops.add_norm(update, stream.x, *parameters)[1], None
        return stream.add(norm, update, scale), None


def through(
    blocks: Iterator[B],
    x: Tensor,
    call: Callable[[B, Tensor], Tensor],
    branches: Callable[[B, Tensor, Tensor | None], End],
    first_norm: Callable[[B], torch.nn.Module | None],
) -> Tensor:
    """Returns x behind the blocks. ``first_norm`` returns a block's first norm, one of torch's, where kernels serve it
    and a call of the block does what ``branches`` and ``End.normed`` do, else None. ``branches`` takes the first norm
    of x if it has been computed."""
    block, normed = next(blocks, None), None
    while block is not None:
        end = None if first_norm(block) is None else branches(block, x, normed)
        if end is None:
            x = call(block, x)
        follower = next(blocks, None)
        if end is not None:
            x, normed = end.normed(None if follower is None else first_norm(follower))
        block = follower
    return x


def computes(block: torch.nn.Module, cls: type[torch.nn.Module]) -> bool:
    """Says whether a call of the block runs ``cls.forward`` now. In a recording of all blocks that includes blocks
    which would record their own calls."""
    return runs(block, cls.forward) or (recording() is not None and has_code_of(block, cls))


def has_code_of(block: torch.nn.Module, cls: type[torch.nn.Module]) -> bool:
    """Says whether the block runs ``cls.forward``, or replays recorded calls of it: one of fastasr's own, to which only
    ``accelerate`` binds a forward, or another one that was swapped."""
    if not has_known_forward(block):
        return False
    bound = vars(block).get("forward")
    return type(block) is cls or (
        bound is not None and inspect.unwrap(bound.__func__.fastasr_forward) is cls.forward
    )
