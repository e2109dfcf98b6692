# SPDX-License-Identifier: Apache-2.0
"""``torch.ops.fastasr.<op>``: what the dispatcher calls for every op, from the functions of its written file.

The operator returns every output, without elements if not asked for, and behind them the kept tensors, without elements
unless its last argument ``keep`` is set. ``<op>_backward`` takes gradients, saved tensors and options, and returns a
tensor without elements where there is no gradient.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr._transforms import by_formula
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import PLAIN
from fastasr.ops._op import Arguments, Op, Saved
from fastasr.ops._register import cast, register
from fastasr.ops._runtime import (
    as_tuple,
    formula_gradients,
    gradients_without,
    result_or_results,
    stand_in,
    transformed_gradients,
)


def register_op(op: Op, schema: str, backward_schema: str = "") -> Any:
    """Registers the operator and its backward; returns a function that calls it."""
    rules: dict[str, Callable] = {}
    if backward_schema:
        transformed = None if op.written.released else partial(_transformed_backward, op)
        parts = partial(_run_backward, op), partial(_fake_backward, op)
        op.backward_operator = register(backward_schema, *parts, transformed=transformed)
        rules = {"setup_context": partial(_set_up, op), "backward": partial(_backward, op)}
    if op.written.autocast is not None:
        rules["autocast"] = partial(_under_autocast, op)
    fake, transformed = op.written.fake, partial(_transformed, op)
    op.operator = register(schema, partial(_run, op), fake, transformed=transformed, **rules)
    return partial(_call, op)


def _call(op: Op, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
    """Calls the operator, or the formula for tensors of a class with torch's functions of its own, such as torchao's
    quantised weights: it knows those that the formula calls."""
    if any(map(_has_functions, arguments)):
        a, _ = _read(op, arguments)
        return _as_registered(op, a, as_tuple(op.definition(**a._asdict())))
    return op.operator(*arguments)


def _has_functions(value: Any) -> bool:
    if not isinstance(value, Tensor) or type(value) in PLAIN:
        return False
    return type(value).__torch_function__ is not torch._C._disabled_torch_function_impl


def _read(op: Op, arguments: Sequence[Any]) -> tuple[Arguments, bool]:
    """Returns the op's arguments, and whether the operator keeps what the backward pass needs."""
    count = len(op.written.Arguments._fields)
    return op.written.Arguments(*arguments[:count]), any(arguments[count:])


def _read_backward(op: Op, arguments: Sequence[Any]) -> tuple[Sequence[Any], Saved, Sequence[Any]]:
    """Returns the gradients of the outputs, what was saved, and which gradients are wanted, if the op asks for it."""
    graded = len(op.written.graded)
    count = graded + len(op.written.Saved._fields)
    return arguments[:graded], op.written.Saved(*arguments[graded:count]), arguments[count:]


def _kernels(op: Op, a: Arguments | Saved) -> Any:
    return op.family.kernels(*(getattr(a, name) for name in op.written.deciding))


# --------------------------------------------------------------------------- the results
def _run(op: Op, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
    (a, keep), written = _read(op, arguments), op.written
    kernels = _kernels(op, a)
    if kernels is not None:
        try:
            found = as_tuple(written.run_kernels(kernels, *a, *[keep] * bool(written.kept)))
        except Unlaunchable as error:
            op.family.give_up(error, *(getattr(a, name) for name in written.deciding))
        else:
            return result_or_results(
                t.new_empty(0)
                if name in written.kept and not keep
                else t
                if name in written.strided
                else t.contiguous()
                for name, t in zip(written.results, found, strict=True)
            )
    with torch.no_grad():
        found = as_tuple(op.definition(**a._asdict()))
    inputs = {t.untyped_storage().data_ptr() for t in a if isinstance(t, Tensor)}
    return _as_registered(
        op, a, (t.clone() if t.untyped_storage().data_ptr() in inputs else t for t in found)
    )


def _transformed(op: Op, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
    a, _ = _read(op, arguments)
    found = as_tuple(by_formula(op, a))
    return _as_registered(op, a, (t.clone() if any(t is x for x in a) else t for t in found))


def _as_registered(op: Op, a: Arguments, formulas: Iterable[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Returns the formula's results as the operator does."""
    found, dtypes = list(formulas), op.written.result_dtypes(a)
    found += [found[0].new_empty(0) for _ in dtypes[len(found) :]]
    found = [t.to(dtype) for t, dtype in zip(found, dtypes, strict=True)]
    return result_or_results(t.contiguous() if op.written.dense else t for t in found)


def _under_autocast(op: Op, dtype: torch.dtype, *arguments: Any) -> tuple[Any, ...]:
    """Casts the arguments as autocast does for this dtype."""
    (a, _), rule = _read(op, arguments), op.written.autocast
    if callable(rule):
        a = rule(op, dtype, a)
    else:
        a = a._replace(**dict(zip(rule, cast(dtype, *(getattr(a, name) for name in rule)), strict=True)))
    return *a, *arguments[len(a) :]


# --------------------------------------------------------------------------- the gradients
def _set_up(op: Op, ctx: Any, inputs: tuple, output: Any) -> None:
    (a, keep), written = _read(op, inputs), op.written
    found = dict(zip(written.results, as_tuple(output), strict=True))
    constant = found.keys() - written.graded
    constant |= {name for name, flag in written.graded.items() if flag and not getattr(a, flag)}
    ctx.mark_non_differentiable(*(found[name] for name in constant))
    ctx.set_materialize_grads(written.materialize)
    values = a._asdict() | found
    if written.released and keep and _kernels(op, a) is not None:
        values |= {name: stand_in(values[name]) for name in written.released}
    ctx.save_for_backward(*(values[name] for name in written.saves))
    ctx.rest = *(values[name] for name in written.Saved._fields[len(written.saves) :]), keep


def _backward(op: Op, ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    written = op.written
    names = *written.Arguments._fields, *["keep"] * bool(written.kept)
    grads = grads[: len(written.graded)]
    if all(grad is None for grad in grads):
        return (None,) * len(names)
    *options, keep = ctx.rest
    saved = written.Saved(*ctx.saved_tensors, *options)
    if written.kept and not keep:
        again = op.operator(*(getattr(saved, name) for name in written.Arguments._fields), True)
        saved = saved._replace(**dict(zip(written.kept, again[-len(written.kept) :], strict=True)))
    flags = written.graded.values()
    grads = tuple(
        g if not flag or getattr(saved, flag) else None for g, flag in zip(grads, flags, strict=True)
    )
    # An argument that the dispatcher left out needs no gradient.
    needs = [*ctx.needs_input_grad, *[False] * len(names)][: len(written.Arguments._fields)]
    found = as_tuple(op.backward_operator(*grads, *saved, *[needs] * written.asks))
    absent = _absent(op, saved, [needs] * written.asks)
    given = {
        name: None if none else d for name, none, d in zip(written.differentiable, absent, found, strict=True)
    }
    return tuple(map(given.get, names))


def _absent(op: Op, saved: Saved, needs: Sequence[Sequence[bool]]) -> list[bool]:
    """Says for each floating tensor whether it has no gradient."""
    asked = op.written.Arguments(*needs[0]) if needs else None
    return [
        getattr(saved, name) is None or (asked is not None and not getattr(asked, name))
        for name in op.written.differentiable
    ]


def _run_backward(op: Op, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
    grads, saved, needs = _read_backward(op, arguments)
    kernels = _kernels(op, saved)
    if kernels is None:
        found = formula_gradients(op, grads, saved)
    else:
        try:
            found = op.written.differentiate(kernels, grads, saved, *needs)
        except Unlaunchable as error:
            found = gradients_without(error, op, grads, saved)
    results: list[Tensor] = []
    for d, none in zip(found, _absent(op, saved, needs), strict=True):
        if d is None or none:
            results.append(saved[0].new_empty(0))
        else:  # one gradient may be that of two tensors
            d = d.contiguous() if op.written.dense else d
            results.append(d.clone() if any(d is other for other in results) else d)
    return result_or_results(results)


def _fake_backward(op: Op, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
    _, saved, needs = _read_backward(op, arguments)
    tensors = [getattr(saved, name) for name in op.written.differentiable]
    return result_or_results(
        saved[0].new_empty(0) if none else t.new_empty(t.shape) if op.written.dense else torch.empty_like(t)
        for t, none in zip(tensors, _absent(op, saved, needs), strict=True)
    )


def _transformed_backward(op: Op, *arguments: Any) -> Tensor | tuple[Tensor, ...]:
    """Computes the backward's results under a transform."""
    grads, saved, _ = _read_backward(op, arguments)
    found = transformed_gradients(op, grads, saved)
    none = torch.empty(0, dtype=saved[0].dtype, device=saved[0].device)
    return result_or_results(none if d is None else d for d in found)
