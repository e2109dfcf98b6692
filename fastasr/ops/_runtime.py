# SPDX-License-Identifier: Apache-2.0
"""The functions that the written files of the ops call."""

from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor as is_batched  # of is_grads_batched=True
from torch.autograd import Function, forward_ad

from fastasr._transforms import refuse, refuse_unless_batched, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, Kernels, forced_backend
from fastasr.ops._op import Needs, Op, Saved

# Kernels decline arguments by ValueError (``decline`` in csrc/bindings/dispatch.h), and the dispatcher raises
# NotImplementedError where it has no kernel for the tensors.
NOT_MINE = (ValueError, NotImplementedError)
MASKS, COMPUTE = (torch.bool, *FLOATING), (torch.float32, torch.float64)
BOOL, INT64 = (torch.bool,), (torch.int64,)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def operand(
    t: Tensor | None, dtype: torch.dtype | None, layout: Callable[[Tensor], Tensor] = Tensor.contiguous
) -> Tensor | None:
    """Returns a tensor as kernels read it."""
    return None if t is None else layout(t if dtype is None or t.dtype is dtype else t.to(dtype))


def back(grad: Tensor | None, t: Tensor | None) -> Tensor | None:
    """Returns a gradient in the dtype of its tensor, and None for an absent one."""
    return None if grad is None or t is None else grad if grad.dtype is t.dtype else grad.to(t.dtype)


def back_in_shape(grad: Tensor | None, t: Tensor | None) -> Tensor | None:
    """Returns a gradient in the dtype and shape of its tensor, which may have one of several shapes."""
    grad = back(grad, t)
    return grad if grad is None or t is None or grad.shape == t.shape else grad.reshape(t.shape)


Like = namedtuple("Like", "shape dtype")  # stands for an argument whose memory is released
# makes a named tuple in half the time of a call of its class, which is a Python function
make = tuple.__new__


def listed(*sizes: object) -> str:
    """Returns a shape as an error message shows it."""
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def applied(function: type[Function]) -> Callable:
    """Returns the C++ call inside ``function.apply``, whose other code serves transforms and costs 1 us."""
    return super(Function, function).apply  # type: ignore[misc]  # torch declares no base


def stand_in(t: Tensor) -> Tensor:
    """Returns a tensor of the same shape and dtype over the memory of one number: a NaN, which shows wherever it is
    read.
    """
    return t.new_full((), float("nan")).expand(t.shape)


T = TypeVar("T", Tensor, None)


def not_a_view(t: T) -> T:
    """Returns t, and not as a view: autograd refuses to change a view in place that a node returns."""
    return t.data if t is not None and t._is_view() else t


def promoted(first: Tensor, *others: Tensor | None) -> torch.dtype:
    dtype = first.dtype
    for t in others:
        if t is not None and t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def wide(first: Tensor, *others: Tensor | None) -> torch.dtype:
    return torch.promote_types(promoted(first, *others), torch.float32)


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def result_or_results(found: Iterable[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Returns the one tensor, or a tuple of several, as operators do."""
    tensors = tuple(found)
    return tensors[0] if len(tensors) == 1 else tensors


@contextmanager
def _recording() -> Iterator[None]:
    """Lets autograd record inside the ``with`` block. An operator's implementation runs below autograd's dispatch keys,
    where ``torch.enable_grad`` alone changes nothing: gradients would silently be zero.
    """
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)
    with guard, torch.enable_grad():
        yield


# --------------------------------------------------------------------------- the formula in the kernels' place
def laid_out(op: Op, found: Any) -> Any:
    """Returns the formula's results. On the meta device, which has the formula alone, so that tools can count its
    operations, they get the strides that kernels give them.
    """
    results = as_tuple(found)
    if not results[0].is_meta or forced_backend() == "eager" or not op.written.dense:
        return found
    allocate = {name: f for name, f in (op.strides or {}).items() if callable(f)}

    def stored(name: str, t: Tensor) -> Tensor:
        if name in allocate:
            return allocate[name](t.shape, dtype=t.dtype, device=t.device).copy_(t)
        return t.contiguous()

    return result_or_results(stored(*pair) for pair in zip(op.written.results, results, strict=False))


def formula_gradients(op: Op, grads: Sequence[Tensor], saved: Saved) -> tuple[Tensor | None, ...]:
    """Computes the gradients by autograd, in float32 or better."""
    values = {name: getattr(saved, name) for name in op.written.Arguments._fields}
    leaves = []
    for name in op.written.differentiable:
        t = values[name]
        if t is not None:
            t = values[name] = t.detach().to(wide(t), copy=True).requires_grad_()
        leaves.append(t)
    with _recording():
        outputs = as_tuple(op.definition(**values))
    pairs = [
        (o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=False) if g is not None and o.requires_grad
    ]
    wanted = [t for t in leaves if t is not None]
    found: Iterator[Tensor] = map(torch.zeros_like, wanted)
    if pairs:
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, materialize_grads=True))
    return tuple(
        None if t is None else next(found).to(getattr(saved, name).dtype)
        for name, t in zip(op.written.differentiable, leaves, strict=True)
    )


def gradients_of_formula(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor | None, ...]:
    """The ``gradients`` of an op whose kernels have no backward pass."""
    return formula_gradients(op, grads, saved)


def node_gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Sequence[bool] = ()
) -> tuple[Tensor | None, ...]:
    """Returns a node's gradients: by its kernels, or by the formula under a transform that began after the forward
    pass, and where the device cannot launch the kernels.
    """
    batched = transforms_active() or forward_ad._current_level >= 0
    for grad in grads:
        batched = batched or (grad is not None and is_batched(grad))
    if batched:
        if not op.written.released:
            return transformed_gradients(op, grads, saved)
        refuse_unless_batched(op.name)
    try:
        return op.written.differentiate(kernels, grads, saved, needs)
    except Unlaunchable as error:
        return gradients_without(error, op, grads, saved)


def transformed_gradients(op: Op, grads: Sequence[Tensor], saved: Saved) -> tuple[Tensor | None, ...]:
    """Computes the gradients by the formula, under a transform that began after the forward pass."""
    try:
        return formula_gradients(op, grads, saved)
    except (RuntimeError, NotImplementedError) as error:
        refuse(op.name, error)


def gradients_without(
    error: Unlaunchable, op: Op, grads: Sequence[Tensor], saved: Saved
) -> tuple[Tensor | None, ...]:
    """Computes the gradients by the formula where the device cannot launch the kernels, and stops calling these. Raises
    ``RuntimeError`` where the formula's arguments are not kept.
    """
    if op.written.released:
        raise RuntimeError(
            f"fastasr.{op.name}: the kernels cannot compute the gradients here: {error}; "
            f"compute values and gradients under `with fastasr.backend('eager'):`"
        ) from error
    op.family.give_up(error, *(getattr(saved, name) for name in op.written.deciding))
    return formula_gradients(op, grads, saved)
