# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing of modules that draw from Python's ``random``.

``torch.utils.checkpoint`` replays only torch's generators when it recomputes a function in the backward pass. The
modules of this package draw from Python's generator. Without its state, the recomputation would skip other parts than
the forward pass: the gradients would be wrong, or the saved tensors would not match.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._pytree import tree_map_only

Decide = Callable[[], Any]

# Records or replays the decisions of the running modules. While it is None, the modules decide.
_tape: Callable[[Decide], Any] | None = None


def decided(decide: Decide) -> Any:
    """Returns ``decide()``; in a recomputation, the value that it had in the forward pass. Modules use it for decisions
    that depend neither on a random number nor on their arguments.
    """
    return decide() if _tape is None else _tape(decide)


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """Returns ``function(*args, **kwargs)`` without keeping the tensors that its backward pass needs. They are computed
    again from the same random numbers. Arguments are those of ``torch.utils.checkpoint.checkpoint``.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return torch.utils.checkpoint.checkpoint(
        _Replayed(function), *args, use_reentrant=use_reentrant, **kwargs
    )


class _Replayed:
    """The function of one checkpoint. Its first call is the forward pass; later calls restore the random state of the
    first."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.state: tuple[Any, ...] | None = None  # state of Python's generator
        self.decisions: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.state is None:
            self.state = random.getstate()
            with _Recorded(self._recorder()):
                return self._forward(args, kwargs)
        now = random.getstate()
        random.setstate(self.state)
        decisions = iter(self.decisions)
        try:
            with _Recorded(lambda decide: next(decisions)):
                return self.function(*args, **kwargs)
        finally:  # torch may end the recomputation early by an exception
            random.setstate(now)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        # The reentrant checkpoint runs the forward pass without gradients and the recomputation with them. Modules draw
        # some numbers only if gradients are needed, so this call turns them on to draw the same numbers.
        with torch.enable_grad():
            result = self.function(*args, **kwargs)
        return tree_map_only(Tensor, Tensor.detach, result)

    def _recorder(self) -> Callable[[Decide], Any]:
        outer = _tape

        def record(decide: Decide) -> Any:
            decision = decide() if outer is None else outer(decide)
            self.decisions.append(decision)
            return decision

        return record


class _Recorded:
    """Has ``tape`` take the decisions inside this context."""

    def __init__(self, tape: Callable[[Decide], Any]) -> None:
        self.tape = tape

    def __enter__(self) -> None:
        global _tape
        self.previous, _tape = _tape, self.tape

    def __exit__(self, *exception: Any) -> None:
        global _tape
        _tape = self.previous
