# SPDX-License-Identifier: Apache-2.0
"""Transforms that kernels do not know: ``torch.func`` (grad, vjp, jvp, vmap, and what is made of them) and forward-mode
differentiation. Below them a kernel sees plain numbers, so tangents would be lost without an error. The formula in
eager PyTorch serves there: every step of it is an operator that the transforms know.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as transforms_active
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Says whether a transform is active. Calls of ops have this written out, which saves 50 ns."""
    return transforms_active() or forward_ad._current_level >= 0


def transform() -> str:
    """Returns the name of the innermost active transform."""
    if transforms_active():
        kind = torch._C._functorch.peek_interpreter_stack().key().name.lower()
        if kind != "jvp":
            return f"torch.func.{kind}"
    return "forward-mode differentiation"


def refuse(name: str, cause: Exception | None = None) -> NoReturn:
    """Raises RuntimeError, which says that ``name`` cannot be transformed, for the reason of ``cause``."""
    why = f": {cause}" if cause else "; its gradient is written by hand, for torch's reverse mode alone"
    raise RuntimeError(f"fastasr.{name}: not possible under {transform()}{why}") from cause


def refuse_unless_batched(name: str) -> None:
    """Refuses a function without a formula. Under vmap the dispatcher calls kernels once per element of the batch."""
    if is_transformed() and transform() != "torch.func.vmap":
        refuse(name)


class Formula(Protocol):
    """An op as far as a transform needs it (``fastasr.ops._op.Op``)."""

    @property
    def name(self) -> str: ...

    @property
    def definition(self) -> Callable[..., Any]: ...


def by_formula(op: Formula, a: Any) -> Any:
    """Computes the op by its formula, under the transform."""
    try:
        return op.definition(**a._asdict())
    except (RuntimeError, NotImplementedError) as error:
        refuse(op.name, error)


def _of_plain_gradients(name: str, backward: Callable[..., Any], repeats: bool) -> Callable[..., Any]:
    """Returns the backward pass, which refuses gradients with tangents, because its kernels would lose them, and takes
    a batch of gradients (``torch.autograd.grad(is_grads_batched=True)``) one by one if it ``repeats``."""

    @wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse(name)
        if repeats and not torch.compiler.is_compiling() and (level := _level_of_batches()):
            return _one_by_one(backward, ctx, grads, level)
        return backward(ctx, *grads)

    return run


def _level_of_batches() -> int:
    """Returns the level of torch's vmap of gradients, an older one than ``torch.func.vmap``; 0 if it is not active."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def _one_by_one(backward: Callable[..., Any], ctx: Any, grads: Sequence[Any], level: int) -> Any:
    # A gradient that is the same for the whole batch gets a first dimension of 1.
    batches = [None if g is None else torch._remove_batch_dim(g, level, 1, 0) for g in grads]
    size = max(len(b) for b in batches if b is not None)
    rows = [backward(ctx, *(None if b is None else b[i % len(b)] for b in batches)) for i in range(size)]
    found = zip(*((row,) if isinstance(row, Tensor) else row for row in rows), strict=True)
    return tuple(None if ts[0] is None else torch._add_batch_dim(torch.stack(ts), 0, level) for ts in found)


class Function(torch.autograd.Function):
    """A function with a backward pass by hand. Under a transform ``formula`` serves in its place, if it has one."""

    formula: Callable[..., Any] | None = None
    repeats = True  # whether a backward pass can run again
    known_as: str

    def __init_subclass__(cls) -> None:
        cls.known_as = f"{cls.__module__.removeprefix('fastasr.')}.{cls.__name__.lstrip('_')}"
        backward = _of_plain_gradients(cls.known_as, cls.backward, cls.repeats)
        cls.backward = staticmethod(backward)  # type: ignore[method-assign]  # it wraps each class's own

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if is_transformed():
            if cls.formula is None:
                refuse(cls.known_as)
            return cls.formula(*args)
        # This is the C++ call inside Function.apply, whose other code serves transforms and costs 1 us.
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]  # torch declares no base
