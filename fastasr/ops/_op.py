# SPDX-License-Identifier: Apache-2.0
"""The declaration of an op: ``@op(...)`` on its formula in eager PyTorch.

The formula's signature gives names, defaults, shapes, dtypes, options and results (:mod:`fastasr.ops._signature`). From
it come the checks and their messages, the registered operator with its fake, autograd and autocast rule, the paths
without the dispatcher, the calls that must be refused, and a row of documentation. An irregular part is a function
whose first argument is the :class:`Op`.
"""

import linecache
import re
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from fastasr.ops import _layout, _parts, _shapes, _signature, _source
from fastasr.ops._dispatch import KernelFamily, cuda_kernels, native_kernels, triton_kernels
from fastasr.ops._errors import Errors
from fastasr.ops._register import cast, register

P, R = ParamSpec("P"), TypeVar("R")

OPS: dict[str, "Op"] = {}
KERNELS = {"cpu": native_kernels, "cuda": cuda_kernels, "triton": triton_kernels}
STRIDES = {
    "contiguous": Tensor.contiguous,
    "channels": _layout.dense_channels,
    "rows": _layout.rows,
    "int64": lambda t: t.to(torch.int64).contiguous(),
    "matrix": lambda t: t.flatten(1).contiguous(),
    "vector": lambda t: t.flatten().contiguous(),
    "any": lambda t: t,
}


class Declined(RuntimeError):
    """The shortest path raises this for a part that cannot serve the call; the checked path then takes the call."""


@dataclass(eq=False, repr=False)
class Op(Errors):
    """A declaration and all that follows from it. Calling it on the formula returns the public function, which has the
    formula as ``.definition`` and the op as ``.op``.

    In the fields that are functions ``a`` holds the arguments by name, ``saved`` what ``saves`` names and the options,
    and ``needs`` a bool per floating tensor, or None where kernels give all gradients at once.
    """

    kernels: str | KernelFamily  # backends by name, the preferred first; or a family that several ops share
    _: KW_ONLY
    returns: str = "y"  # the outputs' names
    summary: str = ""  # what the table of ops says; by default the docstring's first line

    # dtypes and strides
    one_dtype: str = ""  # these arguments must have the first one's dtype, except under an autocast rule
    # The autocast rule: "one dtype" casts those arguments, names cast others, a function (op, dtype, a) -> a casts by
    # itself, "formula" does what eager does, and None applies no rule.
    autocast: str | Callable | None = None
    # The dtypes of these arguments choose the kernels, which read floating tensors in it: float64 where one argument
    # has it, else the first one's dtype. By default the first output's dtype chooses, and C++ kernels read it.
    deciding: str = ""
    wide: str = ""  # kernels get these arguments in that dtype, but at least float32
    own_dtype: str = ""  # kernels get these arguments in their own dtype
    strides: dict | None = None  # argument or "grad" -> strides of STRIDES; else contiguous
    like: str = ""  # results have this argument's strides; else they are contiguous
    empty: Callable | None = None  # torch.empty for an output of kernels that is not contiguous

    # The calls of the kernels are names, literals, "keep", "grad" and expressions in parentheses. By default they get
    # all tensors, then all options, as in the signature.
    forward: str = ""
    # "... -> x y _" names the results; "x=y" is the gradient of both; "*needs" and "needs.x" say which ones are wanted
    backward: str = ""
    # (op, kernels, a, dtype of the first output, keep) -> outputs and keeps
    launch: Callable | None = None
    # (op, kernels, grads, saved, needs) -> gradients of the floating tensors
    gradients: Callable | None = None
    flagged: Callable | None = None  # (op, grads, found, saved) adds the gradients of outputs behind a flag

    # conditions on several arguments, and those that the signature cannot express
    sizes: dict | None = None  # {names: function of a}: sizes for the shapes after the first
    needs: dict | None = None  # argument -> the one that it may not be given without
    check: Callable | None = None  # (op, a); the native kernels check the same, or ``fits`` does

    # the backward pass
    # Kernels hand these on besides the outputs: {name: Annotated[Tensor, shape, dtype]}. Where the shape depends on the
    # backend it is a function (backend, a) -> sizes.
    keeps: dict | None = None
    saves: str = ""  # the saved arguments, outputs and keeps; by default all tensors and keeps
    unread: str = ""  # gradients need only shape and dtype of these: their memory is released
    materialize: bool = True  # False: gradients of outputs may be None
    differentiable: bool = True  # False: the op computes a gradient itself; differentiating it raises

    # The shortest path, to the native kernels. Code may use the arguments, the names of the op's file, _kernels, keep.
    # code, or (native, keep, *arguments) -> outputs and keeps; by default ``forward``
    fast: str | Callable = ""
    # code, or (*arguments) -> bool: a condition beside the types, kernels check the rest; "False": no such path
    fits: str | Callable = ""
    # Code for torch's own call, with its autograd, where that may be best: the call; a tuple, _call, of all that the
    # answer depends on; a condition for what torch would not refuse; and the answer: True, False, or None if unknown
    by_torch: tuple[str, str, str, str] | None = None
    fast_strides: str = ""  # arguments that must be contiguous; by default the first

    def __call__(self, formula: Callable[P, R]) -> Callable[P, R]:
        self.name, self.definition = formula.__name__, formula
        self.summary = self.summary or formula.__doc__.partition("\n")[0].removeprefix("Returns ").rstrip(".")
        self._read(formula)
        if not isinstance(self.kernels, KernelFamily):
            family = tuple(KERNELS[backend](self.name) for backend in self.kernels.split())
            self.kernels = KernelFamily(self.name, (self.name,), family)
        self.family = self.kernels
        if self.name not in self.family.ops:
            self.family.ops += (self.name,)

        self.source = _source.write(self)
        space = self._compile()
        self.checks = space["_check"]
        self.backward_operator, self.operator = self._register(space)
        function = space[self.name]
        function.__module__, function.__doc__ = formula.__module__, formula.__doc__
        function.__annotations__ = formula.__annotations__
        function.__signature__ = _signature.plain(formula)
        OPS[self.name] = self
        return self.public(function)

    def public(self, function: Callable) -> Callable:
        """Makes ``function`` the public one; as a decorator it serves a function that wraps the generated one."""
        function.op, function.definition, self.function = self, self.definition, function
        return function

    def _read(self, formula: Callable) -> None:
        """Reads the texts of the declaration and what its signature says."""
        self.arguments = _signature.arguments(formula)
        self.tensors = tuple(a for a in self.arguments if a.pattern)
        self.options = tuple(a for a in self.arguments if not a.pattern)
        self.is_gradient = not self.differentiable
        self.differentiable = tuple(a for a in self.tensors if a.kind == "floating" and not self.is_gradient)
        for option in ("one_dtype", "own_dtype", "wide", "fast_strides"):
            setattr(self, option, getattr(self, option).split())
        self.leader = self.argument(self.one_dtype[0]) if self.one_dtype else self.tensors[0]
        self.outputs = _signature.outputs(formula, self.returns.split())
        self.keeps = tuple(_signature.output(name, hint) for name, hint in (self.keeps or {}).items())
        self.graded = tuple(o for o in self.outputs if not o.constant)
        self.decides = bool(self.deciding)
        self.deciding = self.deciding.split() or self.dtype_names(self.outputs[0])
        self.sizes = self.sizes or {}
        self.strides, self.needs = self.strides or {}, self.needs or {}
        self.cast = self._cast_rule()
        # the kernels' call, or the part for gradients, asks which ones are wanted; other calls give them all
        self.asks = "needs" in self.backward or (bool(self.gradients) and not self.backward)
        self.unread = self.unread.split()
        self.saves = self.saves.split() or [*(a.name for a in self.tensors), *(o.name for o in self.keeps)]
        self._kernel_calls()
        defaults = [a.default for a in self.arguments if not a.required]
        self.Arguments = namedtuple("Arguments", [a.name for a in self.arguments], defaults=defaults)
        self.Saved = namedtuple("Saved", [*self.saves, *(a.name for a in self.options)])
        self.Needs = namedtuple("Needs", [a.name for a in self.differentiable])
        self.places = [self.arguments.index(a) for a in self.differentiable]

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    # ----------------------------------------------------------------------- what the declaration says
    @property
    def class_name(self) -> str:
        return self.name.title().replace("_", "")

    def argument(self, name: str) -> _signature.Argument:
        return next(a for a in self.arguments if a.name == name)

    def known_sizes(self) -> set[str]:
        """Returns the names that shapes may use before a tensor binds them: options, and the results of ``sizes``."""
        given = {name for names in self.sizes for name in names.split()}
        return given | {a.name for a in self.options if a.kind == "int" and not a.optional}

    def in_binding_order(self) -> Iterator[_signature.Argument]:
        """Returns the tensors, each after those that bind the names in its shape: first the leader, then as in the
        signature. T + L binds L only where no tensor has it alone.
        """
        left, known = sorted(self.tensors, key=lambda a: a is not self.leader), self.known_sizes()
        while left:
            found = {}
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

    def dtype_names(self, output: _signature.Output) -> list[str]:
        """Returns the arguments that an output's dtype is promoted from."""
        others = {o.name: o for o in (*self.outputs, *self.keeps)}
        names = ([name] if name not in others else self.dtype_names(others[name]) for name in output.dtype)
        return [name for group in names for name in group]

    def dtype(self, a, output: _signature.Output) -> torch.dtype:
        """Returns the dtype of an output for these arguments."""
        if isinstance(output.dtype, torch.dtype):
            return output.dtype
        return (_parts.wide if output.wide else _parts.promoted)(
            *(getattr(a, name) for name in self.dtype_names(output))
        )

    def _cast_rule(self) -> Callable | None:
        """Returns the autocast rule as ``(op, dtype, a) -> a``."""
        if self.autocast is None or callable(self.autocast):
            return self.autocast
        if self.autocast == "formula":
            return lambda op, dtype, a: a
        names = self.one_dtype if self.autocast == "one dtype" else self.autocast.split()
        return lambda op, dtype, a: a._replace(**{name: cast(dtype, getattr(a, name))[0] for name in names})

    def _kernel_calls(self) -> None:
        tensors, options = [a.name for a in self.tensors], [a.name for a in self.options]
        always = [f"grad_{o.name}" for o in self.graded if not o.flag or self.flagged is None]
        self.forward = _shapes.words(self.forward) or [*tensors, *options, *["keep"] * bool(self.keeps)]
        backward, _, results = self.backward.partition("->")
        self.backward_results = results.split() or [a.name for a in self.differentiable]
        # only the forward has the flags that ask for outputs
        options = [name for name in options if not name.startswith("return_")]
        backward = _shapes.words(backward) or [*always, *tensors, *(o.name for o in self.keeps), *options]
        self.backward = [always[0] if token == "grad" else token for token in backward]

    # ----------------------------------------------------------------------- the registered operators
    def _register(self, space: dict):
        """Registers ``torch.ops.fastasr.<name>`` with the public function's signature. It returns every output, without
        elements where it was not asked for, and what is kept. ``<name>_backward`` takes gradients, ``saves`` and the
        options.
        """
        tensors = {a.name: f"Tensor{'?' * a.optional} {a.name}" for a in self.tensors}
        saved = [tensors.get(name, f"Tensor {name}") for name in self.saves]
        grads = [f"Tensor{'?' * (len(self.graded) > 1)} grad_{o.name}" for o in self.graded]
        options = [a.schema.partition("=")[0] for a in self.options]
        arguments = ", ".join((*grads, *saved, *options, *["bool[] needs"] * self.asks))
        backward = None
        if self.differentiable:
            backward = register(
                f"{self.name}_backward({arguments}) -> {_results(len(self.differentiable))}",
                space["_run_backward"],
                space["_fake_backward"],
                transformed=None if self.unread else partial(_parts.transformed_backward, self),
            )
        arguments = ", ".join((*(a.schema for a in self.arguments), *["bool keep=False"] * bool(self.keeps)))
        forward = register(
            f"{self.name}({arguments}) -> {_results(len(self.outputs) + len(self.keeps))}",
            space["_run"],
            space["_fake"],
            setup_context=space.get("_set_up"),
            backward=space.get("_backward"),
            autocast=self._autocast if self.cast is not None else None,
            transformed=partial(_parts.transformed_results, self),
        )
        return backward, forward

    def _autocast(self, dtype: torch.dtype, *args):
        # the dispatcher leaves out arguments that equal their default
        count = len(self.arguments)
        return *self.cast(self, dtype, self.Arguments(*args[:count])), *args[count:]

    def needed(self, needs_input_grad) -> list[bool]:
        """Says which floating tensors need a gradient; an argument that the dispatcher left out needs none."""
        return [i < len(needs_input_grad) and needs_input_grad[i] for i in self.places]

    # ----------------------------------------------------------------------- the written source
    def _compile(self) -> dict:
        """Runs the source as a module: torch.compile finds its names there, debuggers and tracebacks its lines."""
        file = f"<fastasr.ops.{self.name}>"
        linecache.cache[file] = len(self.source), None, self.source.splitlines(keepends=True), file
        module = ModuleType(f"fastasr.ops._written_{self.name}")
        sys.modules[module.__name__] = module
        space = vars(module)
        space |= self._namespace()
        exec(compile(self.source, file, "exec"), space)
        if self.differentiable:
            function = space[self.class_name]
            # what Function.apply calls in the end; the rest of it serves transforms and costs 1 us
            self.apply = space["_apply"] = super(torch.autograd.Function, function).apply
        return space

    def _namespace(self) -> dict:
        """Returns the names that the source uses."""
        space = {k: v for k, v in self.definition.__globals__.items() if not k.startswith("__")}
        space |= {f"_codes_{a.name}": a.codes for a in self.options if a.codes}
        space |= {f"_{name}": layout for name, layout in STRIDES.items()}
        space |= {f"_sizes_{i}": size for i, size in enumerate(self.sizes.values())}
        space |= {f"_shape_{o.name}": o.pattern for o in self.keeps if callable(o.pattern)}
        parts = ("family", "definition", "Arguments", "Saved", "Needs", "launch", "gradients", "flagged")
        parts = (*parts, "fast", "fits", "cast")
        space |= {f"_{name}": getattr(self, name) for name in parts}
        space |= {f"_{name}": value for name, value in vars(_parts).items() if not name.startswith("_")}
        return space | {
            "_op": self,
            "_bool": torch.bool,  # an output's dtype, whose name is Python's own
            "_part_check": self.check,
            "_declined": self._declined,
            "_empty_output": self.empty,
        }

    def _declined(self, error: RuntimeError) -> bool:
        """Says whether the kernels declined these arguments: their checks put the operator's name before the reason, or
        the dispatcher has no kernel for the tensors. Any other error is raised.
        """
        if isinstance(error, Declined | NotImplementedError):
            return True
        return re.search(rf", {self.family.name}(_forward)?: ", str(error)) is not None


op = Op


def _results(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
