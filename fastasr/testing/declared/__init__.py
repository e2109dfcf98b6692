# SPDX-License-Identifier: Apache-2.0
"""Reads the declaration of an op: its arguments, shapes, results and kernel calls, from its formula.

``scripts/opgen`` writes the ops' files from this, and the generic checks, the fuzzer and the documentation read it.
``fastasr.ops`` itself never does: at run time an op is its written file.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import get_type_hints

from torch import Tensor

from fastasr.ops._op import Op
from fastasr.testing.declared import signature
from fastasr.testing.declared.shapes import words
from fastasr.testing.declared.signature import Argument, Output


class Declared:
    """An op's declaration, read. ``op`` holds the fields as they were written."""

    def __init__(self, op: Op) -> None:
        formula = op.definition
        self.op, self.name = op, op.name
        self.arguments = signature.arguments(formula)
        self.tensors = tuple(a for a in self.arguments if a.pattern)
        self.options = tuple(a for a in self.arguments if not a.pattern)
        self.one_dtype, self.wide = op.one_dtype.split(), [a.name for a in self.tensors if a.wide]
        self.autocast = op.autocast or ("one dtype" if op.one_dtype else None)
        self.leader = self.argument(self.one_dtype[0]) if self.one_dtype else self.tensors[0]
        self.outputs = signature.outputs(formula)
        self.keeps = tuple(signature.output(name, hint) for name, hint in (op.keeps or {}).items() if hint)
        self.found = (*self.outputs, *self.keeps)
        self.graded = tuple(o for o in self.outputs if not o.constant)
        floating = tuple(a for a in self.tensors if a.kind == "floating")
        self.differentiable = floating if self.graded else ()
        # Their dtypes choose the kernels. The others have the leader's, or are cast to it.
        others = [a.name for a in floating if a.name not in (self.leader.name, *self.one_dtype)]
        self.deciding = [self.leader.name, *others]
        # whether these give the dtype in which kernels read all floating operands, in place of the first output
        self.one_work_dtype = any(a.wide for a in floating)
        self.sizes: dict[str, Callable] = op.sizes or {}
        self.strides = op.strides or {}
        # The kernels' call, or the part for gradients, asks which gradients are wanted; other calls give all of them.
        self.asks = "needs" in op.backward or (bool(op.gradients) and not op.backward)
        # whether the part for gradients needs the gradient of every output; autograd makes zeros for constants too
        hints = get_type_hints(op.gradients) if op.gradients else {}
        constants = any(o.constant and not o.flag for o in self.outputs)
        self.materialize = hints.get("grads") != Sequence[Tensor | None] and not constants
        self._read_kernel_calls()
        read = [o.name for o in self.outputs if o.name in (*self.backward, *(op.keeps or ()))]
        self.saves = [*(a.name for a in self.tensors), *read, *(o.name for o in self.keeps)]

    def _read_kernel_calls(self) -> None:
        tensors, options = [a.name for a in self.tensors], [a.name for a in self.options]
        always = [f"grad_{o.name}" for o in self.graded]
        self.forward = words(self.op.forward) or [*tensors, *options, *["keep"] * bool(self.keeps)]
        backward, _, results = self.op.backward.partition("->")
        self.backward_results = results.split() or [a.name for a in self.differentiable]
        # Only the forward call has the flags that ask for outputs.
        options = [name for name in options if not name.startswith("return_")]
        needs = " ".join(f"needs.{a.name}" for a in self.differentiable)
        tokens = words(backward.replace("*needs", needs)) or [
            *always,
            *tensors,
            *(o.name for o in self.keeps),
            *options,
        ]
        self.backward = [always[0] if always and token == "grad" else token for token in tokens]
        shapes = any(".shape[" in token for token in tokens)
        self.unread = [a.name for a in self.differentiable if shapes and a.name not in tokens]

    def argument(self, name: str) -> Argument:
        return next(a for a in self.arguments if a.name == name)

    def layout(self, name: str) -> str | Callable:
        """Returns the strides of an argument, an output or a gradient, or "" for contiguous memory."""
        grad = name.startswith("grad_") and name not in {a.name for a in self.arguments}
        return self.strides.get(name) or (self.strides.get("grad") if grad else None) or ""

    def like(self, output: Output) -> str:
        """Returns the argument whose strides an output has, or ""."""
        like = self.layout(output.name)
        return like if isinstance(like, str) else ""

    def known_sizes(self) -> set[str]:
        """Returns the names that shapes may use before a tensor binds them: options, and the results of ``sizes``."""
        given = {name for names in self.sizes for name in names.split()}
        return given | {a.name for a in self.options if a.kind == "int" and not a.optional}

    def in_binding_order(self) -> Iterator[Argument]:
        """Returns the tensors, each after those that bind the names in its shape: first the leader, then in the
        signature's order. T + L binds L only where no tensor has L alone.
        """
        left, known = sorted(self.tensors, key=lambda a: a is not self.leader), self.known_sizes()
        while left:
            found: dict[bool, Argument] = {}
            for a in left:
                try:
                    lines = list(a.pattern.bind(set(known), a.name))
                except ValueError as error:
                    reason = error
                    continue
                found.setdefault(any(" - (" in line for line in lines) and a is not self.leader, a)
            if not found:
                raise ValueError(f"{self.name}: {reason}")
            a = found.get(False) or found[True]
            list(a.pattern.bind(known, a.name))
            left.remove(a)
            yield a

    def dtype_names(self, output: Output) -> list[str]:
        """Returns the arguments that an output's dtype is promoted from."""
        others = {o.name: o for o in self.found}
        names = ([name] if name not in others else self.dtype_names(others[name]) for name in output.dtype)
        return [name for group in names for name in group]


@cache
def declared(op: Op) -> Declared:
    return Declared(op)
