# SPDX-License-Identifier: Apache-2.0
"""The signature of an op, read from the annotations of its formula.

h: Annotated[Tensor, "T B 2*C"]                      a floating tensor; shapes.py has the shapes
padding_mask: Annotated[Tensor, "B T", bool] | None  a bool tensor, or none
lengths: Annotated[Tensor, "B", int]                 a tensor of integers
boundary: Annotated[Tensor, "B 4", torch.int64]      a tensor of int64 alone
weights: Annotated[Tensor, "B T", "constant"]        bool or floating, and no gradient is wanted
bias: Annotated[Tensor, "C", "wide"]                 kernels in C++ get it in their dtype, but at least in float32
chunk_size: Annotated[int, "-1 or >= 1"]             a number with its constraint
score_limit: Annotated[float, ">= 0 and < inf"]      float likewise
padding: tuple[int, int]                             a pair of numbers
channel_dim: Annotated[int, "dimension of x"]        a dimension, from -x.dim() on
activation: Literal["silu", "relu"]                  a choice: kernels get its place, or with
            Annotated[Literal[...], {...}]           what the table says
return_cache: bool                                   a flag; ``return_...`` asks for the outputs after the first
-> Annotated[Tensor, "T B C", "h + scale"]           an output, in the promoted dtype of these arguments;
                              "wide h + scale"       and at least float32; or a dtype, whatever the arguments have
-> Annotated[Tensor, "T B C", "h", "constant"]       an output without a gradient, after those that have one
-> Annotated[Tensor, "mean: C", "wide h"]            an output with a name; by default it is y
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from fastasr.testing.declared.shapes import Pattern

TENSORS = {  # kind -> the accepted dtypes (a name of _runtime.py), and the words after "expected" in an error
    "floating": ("FLOATING", ""),  # three errors, see ``Errors.wrong_tensor``
    "constant": ("MASKS", "a bool or floating tensor"),
    bool: ("BOOL", "a bool tensor"),
    int: ("INTEGERS", "a tensor of integers"),
    torch.int64: ("INT64", "an int64 tensor"),
}
SCHEMA = {"int": "SymInt", "pair": "SymInt[2]", "float": "float", "flag": "bool", "choice": "str"}
PYTHON = {"int": "int", "pair": "tuple", "float": "float", "flag": "bool", "choice": "str"}
PLAIN = {"pair": "tuple[int, int]", "flag": "bool"}
WORDS = ((">=", "at least"), ("<=", "at most"), (">", "more than"), ("<", "less than"))


@dataclass(frozen=True)
class Argument:
    name: str
    kind: Any  # a key of TENSORS or of PYTHON
    optional: bool
    default: object
    pattern: Any = None  # the Pattern of a tensor
    wide: bool = False
    constraint: str = ""
    codes: dict = field(default_factory=dict)  # a choice -> the number that kernels get
    choices: tuple[str, ...] = ()  # in the order of the signature
    keyword_only: bool = False

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def type_name(self) -> str:
        return PYTHON[self.kind]

    @property
    def type_text(self) -> str:
        """Returns the plain type, as help and type checkers show it."""
        text = "Tensor" if self.pattern else PLAIN.get(self.kind, self.kind)
        if self.choices:
            text = f"Literal[{', '.join(map(repr, self.choices))}]"
        return f"{text} | None" if self.optional else text

    @property
    def schema(self) -> str:
        value = f'"{self.default}"' if isinstance(self.default, str) else self.default
        value = list(value) if isinstance(value, tuple) else value
        type_ = SCHEMA.get(self.kind, "Tensor") + "?" * self.optional
        return f"{type_} {self.name}" + ("" if self.required else f"={value}")

    @property
    def dimension_of(self) -> str:
        """Returns the tensor of which a number is a dimension."""
        return self.constraint.partition("dimension of ")[2]

    @property
    def condition(self) -> str:
        """Returns the constraint on a number as code: alternatives of a value, or comparisons."""
        if self.dimension_of:
            return f"-{self.dimension_of}.dim() <= {self.name} < {self.dimension_of}.dim()"
        ways = (way.split(" and ") for way in self.constraint.split(" or "))
        parts = ([f"{self.name} {p if p[0] in '<>' else f'== {p}'}" for p in way] for way in ways)
        return " or ".join(" and ".join(way) for way in parts).replace("inf", "1e999")

    @property
    def expected(self) -> str:
        """Returns the constraint in words."""
        text = self.constraint
        for sign, words in WORDS:
            text = text.replace(sign, words)
        return text


@dataclass(frozen=True)
class Output:
    name: str
    pattern: Pattern | Callable  # A kept tensor may have a function (backend, a) -> sizes instead.
    # a torch.dtype, or the names of arguments or outputs whose dtypes are promoted to the output's
    dtype: Any
    wide: bool  # If set, the output is at least float32.
    flag: str = ""  # the argument that asks for it
    constant: bool = False  # it has no gradient


def arguments(formula: Callable) -> tuple[Argument, ...]:
    hints = get_type_hints(formula, include_extras=True)
    return tuple(_argument(p, hints[p.name]) for p in inspect.signature(formula).parameters.values())


def _argument(parameter: inspect.Parameter, hint: Any) -> Argument:
    hint, optional = _without_none(hint)
    type_, *extra = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    more: dict[str, Any] = {}
    if type_ is Tensor:
        shape, *words = extra
        kind = next((word for word in words if word != "wide"), "floating")
        more |= {"pattern": Pattern.parse(shape), "wide": "wide" in words}
    elif get_origin(type_) is Literal:
        kind, values = "choice", get_args(type_)
        more["choices"] = values
        more["codes"] = extra[0] if extra else {value: place for place, value in enumerate(values)}
        if set(more["codes"]) != set(values):
            raise ValueError(
                f"{parameter.name}: expected {tuple(more['codes'])} in its Literal, got {values}"
            )
    else:
        kind = {int: "int", tuple[int, int]: "pair", float: "float", bool: "flag"}[type_]
        more["constraint"] = extra[0] if extra else ""
    more["keyword_only"] = parameter.kind is parameter.KEYWORD_ONLY
    return Argument(parameter.name, kind, optional, parameter.default, **more)


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    (hint,) = (h for h in get_args(hint) if h is not NoneType)
    return hint, True


def outputs(formula: Callable) -> tuple[Output, ...]:
    """Returns the outputs. In ``A | tuple[A, B]`` the flag ``return_...`` asks for B."""
    hints = get_type_hints(formula, include_extras=True)
    union = get_origin(hints["return"]) in (Union, UnionType)
    forms = get_args(hints["return"]) if union else (hints["return"],)
    sorted_forms = sorted((get_args(f) if get_origin(f) is tuple else (f,) for f in forms), key=len)
    flag = next((name for name in hints if name.startswith("return_")), "")
    return tuple(
        output("y", hint, flag if i >= len(sorted_forms[0]) else "")
        for i, hint in enumerate(sorted_forms[-1])
    )


def output(name: str, hint: Any, flag: str = "") -> Output:
    _, shape, dtype, *constant = get_args(hint)
    if isinstance(shape, str) and ":" in shape:
        name, _, shape = shape.partition(":")
    pattern = shape if callable(shape) else Pattern.parse(shape)
    if isinstance(dtype, torch.dtype):
        return Output(name, pattern, dtype, False, flag, bool(constant))
    names = re.findall(r"\w+", dtype)
    wide = names[0] == "wide"
    return Output(name, pattern, tuple(names[wide:]), wide, flag, bool(constant))
