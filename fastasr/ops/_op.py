# SPDX-License-Identifier: Apache-2.0
"""The declaration of an op: ``@op(...)`` on its formula in eager PyTorch.

At run time the decorator only records the declaration. ``make op OP=<name>`` reads the formula's signature and writes
``_written/<name>.py`` from it: the public function with its checks and their messages, the calls of the kernels, the
registered operator with its fake, autograd and autocast rule. An irregular part is a function in the op's own file.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from fastasr.ops._dispatch import FLOATING, KernelFamily, cuda_kernels, native_kernels, triton_kernels

F = TypeVar("F", bound=Callable)

OPS: dict[str, "Op"] = {}
# The named tuples of an op's written file, which imports the op's own file: its names are the fields.
Arguments = Any
Saved = Any
Needs = Any

KERNELS = {"cpu": native_kernels, "cuda": cuda_kernels, "triton": triton_kernels}


@dataclass(frozen=True)
class Written:
    """The parts of an op's written file that functions for all ops use."""

    check: Callable[..., None]
    run_kernels: Callable
    fake: Callable
    result_dtypes: Callable[[Any], tuple[torch.dtype, ...]]
    Arguments: Any  # named tuples of the arguments, and of what is saved for the backward pass
    Saved: Any = None
    results: tuple[str, ...] = ()  # the outputs, and the kept tensors behind them
    deciding: tuple[str, ...] = ()  # the arguments whose dtypes choose the kernels
    autocast: Any = None  # the rule (op, dtype, a) -> a, or the names of the arguments that are cast
    dense: bool = True  # whether results are contiguous
    strided: tuple[str, ...] = ()  # the results of kernels whose strides are declared

    apply: Callable | None = None  # the node of autograd, called by kernels, direct and the arguments
    differentiate: Any = None  # a function, where there is a node
    differentiable: tuple[str, ...] = ()  # the arguments that have a gradient
    # the outputs that have one -> the flag that asks for it
    graded: dict[str, str] = field(default_factory=dict)
    saves: tuple[str, ...] = ()  # the tensors in Saved, before the options
    kept: tuple[str, ...] = ()
    released: tuple[str, ...] = ()  # the arguments whose memory is released before the backward pass
    asks: bool = False  # whether the backward pass asks which gradients are wanted
    materialize: bool = True  # whether autograd makes zeros for outputs that have no gradient


@dataclass(eq=False, repr=False)
class Op:
    """A declaration. Calling it on the formula records it and returns the formula.

    In the fields that are functions ``a`` holds the arguments by name, ``saved`` the tensors that ``saves`` names and
    the options, and ``needs`` a bool per argument, or None where kernels give all gradients at once. Each such
    function has a name in the op's file, which the written file imports.
    """

    kernels: str | KernelFamily  # backends by name, the preferred first; or a family that several ops share
    _: KW_ONLY

    # dtypes and strides
    one_dtype: str = ""  # these arguments must have the first one's dtype; autocast casts them
    # Another autocast rule: names cast these arguments, a function (op, dtype, a) -> a casts by itself, and "formula"
    # does what eager does.
    autocast: str | Callable = ""
    # Strides by name. For an argument, a gradient "grad_y", or all gradients "grad": "any", "channels", "rows",
    # "matrix", "vector" or "int64". For an output: an argument whose strides it has, or a function (shape, dtype=,
    # device=) that allocates what kernels return. All others are contiguous.
    strides: dict[str, str | Callable] | None = None

    # The calls of the kernels are names, literals, "keep", "grad" and expressions in parentheses. By default they get
    # all tensors, then all options, as in the signature.
    forward: str = ""
    # "... -> x y _" names the results; "x=y" is the gradient of both; "*needs" and "needs.x" say which ones are wanted
    backward: str = ""
    # (op, kernels, a, dtype of the first output, keep) -> outputs and keeps
    launch: Callable | None = None
    # (op, kernels, grads, saved, needs) -> gradients of the floating tensors. Where it takes grads of type
    # Sequence[Tensor | None], autograd makes no zeros for outputs that have no gradient.
    gradients: Callable | None = None

    # conditions on several arguments, and those that the signature cannot express
    sizes: dict[str, Callable] | None = None  # {names: function of a}: sizes for the shapes after the first
    check: Callable | None = None  # (op, a); the native kernels check the same, or ``fast`` does

    # the backward pass
    # Kernels return these besides the outputs: {name: Annotated[Tensor, shape, dtype]}. Where the shape depends on the
    # backend it is a function (backend, a) -> sizes. None: an output, which ``gradients`` reads. All tensors, these,
    # and the outputs that ``backward`` names are saved. Where ``backward`` reads the shape of a tensor ("x.shape[1]"),
    # the memory of the floating tensors that it does not name is released.
    keeps: dict[str, Any] | None = None

    # The shortest path, to the native kernels: (native, keep, *arguments) -> outputs and keeps; by default ``forward``,
    # and False if there is no such path. It raises NotImplementedError for calls that it leaves to the checked path.
    fast: Callable | bool = True

    name: str = field(init=False)
    summary: str = field(init=False)  # the first sentence of the formula's docstring
    definition: Callable = field(init=False)
    family: KernelFamily = field(init=False)
    written: Written = field(init=False)  # once the written file is imported
    function: Callable = field(init=False)  # the public one, likewise
    operator: Any = field(init=False)  # torch.ops.fastasr.<name>, likewise
    backward_operator: Any = field(init=False, default=None)

    def __call__(self, formula: F) -> F:
        self.name, self.definition = formula.__name__, formula
        first = " ".join((formula.__doc__ or "").partition("\n\n")[0].split())
        self.summary = first.partition(". ")[0].removeprefix("Returns ").rstrip(".")
        if isinstance(self.kernels, KernelFamily):
            self.family = self.kernels
        else:
            found = tuple(KERNELS[backend](self.name) for backend in self.kernels.split())
            self.family = KernelFamily(self.name, (self.name,), found)
        if self.name not in self.family.ops:
            self.family.ops += (self.name,)
        OPS[self.name] = self
        return formula

    def serve(self, function: F, written: Written | None = None, definition: Callable | None = None) -> F:
        """Makes ``function`` the public one, with the op as ``.op`` and the formula as ``.definition``."""
        self.function, self.written = function, written or self.written
        vars(function).update(op=self, definition=definition or self.definition)
        return function

    # ----------------------------------------------------------------------- wrong arguments
    def fail(self, name: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"fastasr.{self.name}: {name}: expected {expected}, got {got}")

    def wrong_tensor(self, name: str, value: Any, expected: str = "") -> NoReturn:
        """Raises; by default a floating tensor is expected, and three errors tell its faults apart."""
        if not expected and not isinstance(value, Tensor):
            self.fail(name, "a torch.Tensor", type(value).__name__, TypeError)
        if not expected and value.dtype not in FLOATING:
            self.fail(name, f"dtype {_listed(FLOATING)}", _listed([value.dtype]), TypeError)
        if not expected:
            self.fail(name, "a strided tensor", f"layout {value.layout}", TypeError)
        got: object = type(value).__name__
        if isinstance(value, Tensor):
            got = value.dtype if value.layout is torch.strided else value.layout
        self.fail(name, f"{expected}, strided", got, TypeError)

    def wrong_shape(self, name: str, value: Tensor, expected: str) -> NoReturn:
        self.fail(name, f"shape {expected}", tuple(value.shape))

    def wrong_device(self, name: str, value: Tensor, other: str, leader: Tensor) -> NoReturn:
        self.fail(name, f"device {leader.device} (that of {other})", value.device)

    def wrong_dtype(self, name: str, value: Tensor, other: str, first: Tensor) -> NoReturn:
        self.fail(name, f"dtype {first.dtype} (that of {other})", value.dtype, TypeError)

    def wrong_dimension(self, name: str, value: int, of: Tensor) -> NoReturn:
        self.fail(name, f"a dimension in [{-of.dim()}, {of.dim() - 1}]", value)

    def wrong_choice(self, name: str, value: object, choices: Collection[str]) -> NoReturn:
        if isinstance(value, str):
            self.fail(name, f"one of {tuple(choices)}", repr(value))
        self.fail(name, "a str", type(value).__name__, TypeError)

    # These raise unless the value only looks wrong, as a traced number or an int for a float does.
    def wrong_int(self, name: str, value: object) -> None:
        if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
            self.fail(name, "an int", type(value).__name__, TypeError)

    def wrong_float(self, name: str, value: object) -> None:
        if not isinstance(value, int | torch.SymInt | float | torch.SymFloat) or isinstance(value, bool):
            self.fail(name, "a float", type(value).__name__, TypeError)

    def wrong_flag(self, name: str, value: object) -> None:
        if not isinstance(value, bool):
            self.fail(name, "a bool", type(value).__name__, TypeError)

    def wrong_pair(self, name: str, value: object) -> None:
        if not isinstance(value, tuple | list) or len(value) != 2:
            self.fail(name, "a pair of ints", repr(value), TypeError)
        for part in value:
            self.wrong_int(name, part)


op = Op


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
