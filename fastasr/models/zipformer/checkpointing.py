# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing of modules that draw from Python's ``random``.

``torch.utils.checkpoint`` replays torch's generators when it computes a function again in the backward pass, and no
others. The modules of this package draw from Python's: without its state they would skip other parts than before, and
the gradients would be those of another function, or the saved tensors would not match.
"""

import random

import torch
import torch.utils.checkpoint
from torch.utils._pytree import tree_map_only

_tape = None  # what takes the decisions of the modules that are running; None: themselves


def decided(decide):
    """``decide()``, or in a recomputation what it was in the forward pass: for what a module decides by neither a
    random number nor its arguments.
    """
    return decide() if _tape is None else _tape(decide)


def checkpoint(function, *args, use_reentrant=False, **kwargs):
    """``function(*args, **kwargs)`` without the tensors that its backward pass needs: they are computed again, from the
    same random numbers. Arguments are those of ``torch.utils.checkpoint.checkpoint``.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return torch.utils.checkpoint.checkpoint(
        _Replayed(function), *args, use_reentrant=use_reentrant, **kwargs
    )


class _Replayed:
    """The function of one checkpoint. Its first call is the forward pass, all others begin where that began."""

    def __init__(self, function):
        self.function = function
        self.state = None  # of Python's generator
        self.decisions = []

    def __call__(self, *args, **kwargs):
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
        finally:  # whatever ends the recomputation early
            random.setstate(now)

    def _forward(self, args, kwargs):
        if torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        # The reentrant checkpoint runs this without gradients, and the recomputation with them. Modules draw some
        # numbers only where gradients are needed, so they are here too, for as long as this call lasts.
        with torch.enable_grad():
            result = self.function(*args, **kwargs)
        return tree_map_only(torch.Tensor, torch.Tensor.detach, result)

    def _recorder(self):
        outer = _tape

        def record(decide):
            decision = decide() if outer is None else outer(decide)
            self.decisions.append(decision)
            return decision

        return record


class _Recorded:
    """While it lasts, ``tape`` takes the decisions."""

    def __init__(self, tape):
        self.tape = tape

    def __enter__(self):
        global _tape
        self.previous, _tape = _tape, self.tape

    def __exit__(self, *exception):
        global _tape
        _tape = self.previous
