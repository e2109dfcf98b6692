# SPDX-License-Identifier: Apache-2.0
"""The check of an op under transforms: forward-mode differentiation and ``torch.func``.

Under each of them an op gives what plain autograd makes of the formula, by both of its names: as public function and as
registered operator. Where the formula itself cannot be transformed, the op says so with its name and the transform's.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastasr import ops
from fastasr.testing.seeds import seed_torch, seeded
from fastasr.testing.table import Make, OpTable, Sample, flat, floating
from fastasr.testing.tolerance import Comparison, compare

Function = Callable[..., Tensor]
Tensors = tuple[Tensor, ...]


# A sum in another order errs at most this many times as much as eager's; a value that a transform loses errs by its
# size.
ROUNDING = 8.0


# --------------------------------------------------------------------------- what is compared
def _dual(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    with forward_ad.dual_level():
        pairs = zip(tensors, tangents, strict=True)
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(*pair) for pair in pairs)))


def _jvp(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    return torch.func.jvp(f, tensors, tangents)


def _jvp_by_autograd(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    return torch.autograd.functional.jvp(f, tensors, tangents)


def _vjp(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    y, gradients, *_ = torch.func.vjp(f, *tensors)
    return y, *gradients(_cotangent(y))


def _grad(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    gradients, y = torch.func.grad(_loss(f), tuple(range(len(tensors))), has_aux=True)(*tensors)
    return y, *gradients


def _vjp_by_autograd(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    return y, *torch.autograd.grad(y, leaves, _cotangent(y), materialize_grads=True)


def _vmap(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    return (torch.func.vmap(f, randomness="same")(*_batches(tensors, tangents)),)


def _loop(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    return (torch.stack([f(*one) for one in zip(*_batches(tensors, tangents), strict=True)]),)


def _hessian_product(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    gradient = torch.func.grad(_loss(f), tuple(range(len(tensors))), has_aux=True)
    (gradients, _), (products, _), *_ = torch.func.jvp(gradient, tensors, tangents)
    return *gradients, *products


def _hessian_product_by_autograd(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    leaves = [t.clone().requires_grad_() for t in tensors]
    loss, _ = _loss(f)(*leaves)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    inner = torch.stack([(g * d).sum() for g, d in zip(gradients, tangents, strict=True)]).sum()
    return *gradients, *torch.autograd.grad(inner, leaves, materialize_grads=True)


def _loss(f: Function) -> Callable[..., tuple[Tensor, Tensor]]:
    def loss(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        y = f(*tensors)
        return (y * _cotangent(y)).sum(), y

    return loss


def _cotangent(y: Tensor, step: float = 0.7) -> Tensor:
    return torch.arange(y.numel(), dtype=y.dtype, device=y.device).mul(step).sin().reshape(y.shape)


def _batches(tensors: Tensors, tangents: Tensors) -> list[Tensor]:
    pairs = zip(tensors, tangents, strict=True)
    return [torch.stack([t, t + 0.1 * d if t.is_floating_point() else t]) for t, d in pairs]


# ------------------------------------------------- a transform that begins behind the forward pass
def _leaves(f: Function, tensors: Tensors) -> tuple[Tensors, Tensor, list[Tensor]]:
    """Returns leaves, f's output of them, and two of its gradients."""
    leaves = tuple(t.clone().requires_grad_() for t in tensors)
    y = f(*leaves)
    return leaves, y, [_cotangent(y), _cotangent(y, 0.3)]


def _dual_gradients(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    leaves, y, (first, second) = _leaves(f, tensors)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(first, second)
        found = torch.autograd.grad(y, leaves, cotangent, materialize_grads=True)
        return sum((tuple(forward_ad.unpack_dual(d)) for d in found), ())


def _dual_gradients_by_autograd(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    return sum(zip(*_gradients(f, tensors), strict=True), ())


def _batched_gradients(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    leaves, y, cotangents = _leaves(f, tensors)
    stacked = torch.stack(cotangents)
    return torch.autograd.grad(y, leaves, stacked, is_grads_batched=True, materialize_grads=True)


def _batched_gradients_by_autograd(f: Function, tensors: Tensors, tangents: Tensors) -> Tensors:
    return tuple(map(torch.stack, zip(*_gradients(f, tensors), strict=True)))


def _gradients(f: Function, tensors: Tensors) -> list[Tensors]:
    leaves, y, cotangents = _leaves(f, tensors)
    return [torch.autograd.grad(y, leaves, c, retain_graph=True, materialize_grads=True) for c in cotangents]


# name -> the transform, and the same computation without it
TRANSFORMS = {
    "dual tensors": (_dual, _jvp_by_autograd),
    "jvp": (_jvp, _jvp_by_autograd),
    "vjp": (_vjp, _vjp_by_autograd),
    "grad": (_grad, _vjp_by_autograd),
    "vmap": (_vmap, _loop),
    "vmap of every tensor": (_vmap, _loop),
    "jvp of grad": (_hessian_product, _hessian_product_by_autograd),
    "dual cotangents": (_dual_gradients, _dual_gradients_by_autograd),
    "batched cotangents": (_batched_gradients, _batched_gradients_by_autograd),
}
NAMES = ("forward-mode differentiation", "torch.func.grad", "torch.func.vmap")  # in messages


# --------------------------------------------------------------------------- the check
def transforms(table: OpTable, sample: Sample, dtype: torch.dtype, device: str) -> None:
    """Compares the op under each transform with the formula in float64 without any."""
    arguments, tangents = (sample.arguments(Make(dtype, device, seed)) for seed in (0, "tangents"))
    for name, (transform, plain) in TRANSFORMS.items():
        for what, comparison in _compared(table, arguments, tangents, name, transform, plain):
            assert comparison.within(ROUNDING), f"{what}: {comparison}"


def _compared(
    table: OpTable, arguments: dict, tangents: dict, name: str, transform: Callable, plain: Callable
) -> Iterator[tuple[str, Comparison]]:
    every = {key: t for key, t in arguments.items() if isinstance(t, Tensor)}
    names = list(every if name == "vmap of every tensor" else floating(arguments))
    given = tuple(tuple(call[key] for key in names) for call in (arguments, tangents))

    def calling(f: Function) -> Function:
        def run(*tensors: Tensor) -> Tensor:
            seed_torch(seeded("call"))
            return flat(f(**arguments | dict(zip(names, tensors, strict=True))))

        return run

    try:
        eager = transform(calling(table.definition), *given)
    except (RuntimeError, NotImplementedError):
        eager = None
    else:
        wide = (tuple(t.double() if t.is_floating_point() else t for t in group) for group in given)
        expected = plain(calling(table.definition), *wide)
    functions = {"function": table.function, "registered op": lambda **a: table.call_registered(a)}
    for kind, f in functions.items():
        what = f"{kind} under {name}"
        try:
            found = transform(calling(f), *given)
        except RuntimeError as error:
            message = str(error)
            named = message.startswith(f"fastasr.{table.op}: ") and any(n in message for n in NAMES)
            assert named, f"{what}: the message does not name op and transform: {message}"
            can = eager is not None and not (name == "dual cotangents" and ops.OPS[table.op].written.released)
            assert not can, f"{what}: the formula can do it: {message}"
            continue
        assert eager is not None, f"{what}: the formula cannot do it"
        for i, (one, *others) in enumerate(zip(found, eager, expected, strict=True)):
            assert one is not None, f"{what}: there is no tangent"
            yield f"{what}, result {i}", compare(one, *others)
