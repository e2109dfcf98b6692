# SPDX-License-Identifier: Apache-2.0
"""The written checks in C++: what they accept has the shapes that the declaration says, and any accepted strides give
the result of contiguous tensors.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastasr.ops import _dispatch
from fastasr.ops._op import OPS
from fastasr.ops._runtime import NOT_MINE
from fastasr.testing import Make
from fastasr.testing.declared import declared
from fastasr.testing.table import table

HEADERS = (Path(__file__).parents[2] / "csrc" / "bindings" / "written").glob("*.h")

pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="needs the native library")


def _names(op) -> list[str]:
    """Returns the arguments of the kernels' forward call; a pair is two numbers there."""
    arguments = {a.name: a for a in op.arguments}
    names = []
    for token in op.forward:
        chosen = re.fullmatch(r"\((\w+) or \w+\)", token)
        name = chosen[1] if chosen else token.removeprefix("*")
        names += [name] * (2 if name in arguments and arguments[name].kind == "pair" else 1)
    return names


def _calls(name: str, monkeypatch) -> list[list]:
    """Returns the arguments with which the op calls its forward kernel, for its small samples."""
    calls, kernels = [], OPS[name].family.native
    spy = replace(kernels, forward=lambda *arguments: calls.append(arguments) or kernels.forward(*arguments))
    monkeypatch.setattr(OPS[name].family, "native", spy)
    with torch.no_grad():
        for sample in table(name).samples:
            if not sample.large:
                table(name).function(**sample.arguments(Make(seed=1)))
    assert calls, "no sample takes the direct path"
    return [list(call) for call in calls]


def _changed(t: Tensor):
    """Yields tensors of other shapes, dtypes and strides."""
    for dim, size in enumerate(t.shape):
        yield t.narrow(dim, 0, size // 2).contiguous()
        yield torch.cat([t, t[(slice(None),) * dim + (slice(0, 1),)]], dim)
    yield from (t.unsqueeze(0), t.unsqueeze(-1), t.flatten())
    yield from (t.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.bool))
    yield from (t.expand(2, *t.shape), torch.stack((t, t), -1)[..., 0])
    if t.dim() > 1:
        yield from (t.transpose(0, -1), t.transpose(0, -1).contiguous().transpose(0, -1))


def _declared_call(op, names: list[str], call: list) -> dict:
    """Returns a kernel's arguments as the op takes them."""
    found = {}
    for name, value in zip(names, call, strict=True):
        argument = next((a for a in op.arguments if a.name == name), None)
        if argument is None:
            continue
        if argument.kind == "pair":
            found[name] = (*found.get(name, ()), value)
        elif argument.codes:
            found[name] = next(choice for choice, code in argument.codes.items() if code == value)
        else:
            found[name] = None if argument.kind == "int" and argument.optional and value == 0 else value
    return found


@pytest.mark.parametrize("name", sorted(header.stem for header in HEADERS))
def test_what_the_native_checks_accept_fits_the_declaration(name, monkeypatch):
    op, forward = declared(OPS[name]), OPS[name].family.native.forward
    names, refused, accepted = _names(op), 0, 0
    for call in _calls(name, monkeypatch):
        for i, t in enumerate(call):
            if not isinstance(t, Tensor):
                continue
            for other in _changed(t):
                wrong = [*call[:i], other, *call[i + 1 :]]
                try:
                    found = forward(*wrong)
                except NOT_MINE:
                    refused += 1
                    continue
                accepted += 1
                given = _declared_call(op, names, wrong)
                OPS[name].written.check(*(given.get(a.name, a.default) for a in op.arguments))
                dense = [x.contiguous() if isinstance(x, Tensor) else x for x in wrong]
                torch.testing.assert_close(found, forward(*dense), rtol=0, atol=0, equal_nan=True)
    assert refused > accepted > 0


def test_a_declined_call_is_a_value_error_where_torch_has_other_errors(monkeypatch):
    """torch 2.15 makes RuntimeErrors of all exceptions of kernels."""

    def raising(text):
        raise RuntimeError(text)

    monkeypatch.setattr(_dispatch, "_declines_by_type", lambda: False)
    monkeypatch.setattr(_dispatch.torch.ops.fastasr_cpu.swoosh_forward.default, "_op", raising, raising=False)
    operator = _dispatch.registered("cpu", "swoosh_forward")
    with pytest.raises(ValueError, match="x has another dtype"):
        operator("fastasr, swoosh_forward: x has another dtype")
    with pytest.raises(RuntimeError, match="no memory"):
        operator("fastasr: no memory for 8 bytes")
