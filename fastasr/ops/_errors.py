# SPDX-License-Identifier: Apache-2.0
"""An op's messages about wrong arguments: each names the op, the argument, the expected value and the given one."""

import torch
from torch import Tensor

from fastasr.ops._dispatch import FLOATING
from fastasr.ops._signature import TENSORS

INT = int, torch.SymInt
TYPES = {
    "int": (INT, "an int"),
    "pair": (INT, "an int"),
    "float": ((*INT, float, torch.SymFloat), "a float"),
    "flag": (bool, "a bool"),
    "choice": ((), "a str"),
}


def _listed(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


class Errors:
    """The part of :class:`fastasr.ops._op.Op` that the written checks call."""

    def fail(self, name: str, expected: str, got: object, error: type[Exception] = ValueError):
        raise error(f"fastasr.{self.name}: {name}: expected {expected}, got {got}")

    def wrong_tensor(self, name: str, value: object):
        kind = self.argument(name).kind
        if kind == "floating" and not isinstance(value, Tensor):
            self.fail(name, "a torch.Tensor", type(value).__name__, TypeError)
        if kind == "floating" and value.dtype not in FLOATING:
            self.fail(name, f"dtype {_listed(FLOATING)}", _listed([value.dtype]), TypeError)
        if kind == "floating":
            self.fail(name, "a strided tensor", f"layout {value.layout}", TypeError)
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = value.dtype if value.layout is torch.strided else value.layout
        self.fail(name, f"{TENSORS[kind][1]}, strided", got, TypeError)

    def wrong_shape(self, name: str, value: Tensor, sizes: dict):
        pattern = self.argument(name).pattern
        like = next(a.name for a in self.tensors if a.pattern == pattern)
        of = f" (that of {like})" if pattern.whole and like != name else ""
        self.fail(name, f"shape {pattern.text(sizes)}{of}", tuple(value.shape))

    def wrong_device(self, name: str, value: Tensor, leader: Tensor):
        self.fail(name, f"device {leader.device} (that of {self.leader.name})", value.device)

    def wrong_dtype(self, name: str, value: Tensor, first: Tensor):
        self.fail(name, f"dtype {first.dtype} (that of {self.one_dtype[0]})", value.dtype, TypeError)

    def wrong_company(self, name: str, partner: str):
        self.fail(name, f"it together with {partner}", f"no {partner}")

    def wrong_dimension(self, name: str, value: int, of: Tensor):
        self.fail(name, f"a dimension in [{-of.dim()}, {of.dim() - 1}]", value)

    def wrong_option(self, name: str, value: object):
        """Raises, unless the value only looks wrong, as a traced number or an int for a float does."""
        a = self.argument(name)
        if a.kind == "choice" and isinstance(value, str):
            self.fail(name, f"one of {tuple(a.codes)}", repr(value))
        if a.kind == "pair" and (not isinstance(value, tuple | list) or len(value) != 2):
            self.fail(name, "a pair of ints", repr(value), TypeError)
        types, what = TYPES[a.kind]
        for part in value if a.kind == "pair" else (value,):
            if not isinstance(part, types) or (isinstance(part, bool) and a.kind != "flag"):
                self.fail(name, what, type(part).__name__, TypeError)
