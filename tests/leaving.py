# SPDX-License-Identifier: Apache-2.0
"""Cases of calls that leave the fast path: each computes what upstream does, is logged once, and ``fastasr.why`` names
the reason. ``unreached`` finds the places in the source that no case reaches."""

import ast
import contextlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten

import fastasr
from fastasr import _left

PACKAGE = Path(fastasr.__file__).parent
CONFORMERS = {
    str(path.relative_to(PACKAGE))
    for path in (PACKAGE / "swap/forwards").glob("*.py")
    if path.stem != "nemo_transducer"
}


@dataclass
class Case:
    """``call`` leaves and ``upstream`` gives the expected result. ``key`` is the method in ``fastasr.why(obj)``, and
    ``reason`` a part of its reason. ``known``: whether, or in which other words, that is known before any call.
    """

    obj: object
    call: Callable
    upstream: Callable
    key: str
    reason: str
    known: bool | str = False
    level: int = logging.WARNING
    around: Callable = contextlib.nullcontext
    tolerance: float = 1e-4


def beside(ours, theirs, run, key, reason, gradients=False, **more):
    """Returns the case of ``run(model)`` for a model beside upstream's."""
    run = run if gradients else torch.no_grad()(run)
    return Case(ours, lambda: run(ours), lambda: run(theirs), key, reason, **more)


def leaves(result):
    """Returns the tensors of a result."""
    found = tree_flatten(dict(result) if hasattr(result, "keys") else result)[0]
    return [t for t in found if isinstance(t, torch.Tensor)]


def same(found, expected, tolerance):
    found, expected = leaves(found), leaves(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, check_dtype=False)


def check(case, caplog):
    caplog.set_level(logging.INFO, "fastasr")
    with case.around():
        before = fastasr.why(case.obj).to_dict().get(case.key, "")
        if case.known:
            assert (case.reason if case.known is True else case.known) in before
        else:
            assert before in ("", "not called yet")
        expected = case.upstream()
        caplog.clear()
        for _ in range(2):
            same(case.call(), expected, case.tolerance)
    records = [r for r in caplog.records if r.name == "fastasr" and case.reason in r.getMessage()]
    assert [r.levelno for r in records] == [case.level], caplog.text
    found = fastasr.why(case.obj)
    (row,) = [row for row in found.rows if row.key == case.key]
    assert case.reason in row.left
    assert row.calls >= 2
    assert found[case.key] == (row.now or row.left)
    assert case.reason in str(found)


def places():
    """Returns (file, first line, last line) of every call of ``_left.note`` in the package."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "_left.note":
                found.add((str(path), node.lineno, node.end_lineno))
    return found


def unreached(cases, monkeypatch, conformers):
    """Returns the places that no call of the cases reaches, of the Conformers' blocks or of all other code."""
    reached, note = set(), _left.note

    def noted(*args, **kwargs):
        frame = sys._getframe(1)
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return note(*args, **kwargs)

    monkeypatch.setattr(_left, "note", noted)
    for case in cases:
        with case.around():
            case.call()
    found = [
        Path(file).relative_to(PACKAGE)
        for file, first, last in places()
        if not any(name == file and first <= line <= last for name, line in reached)
    ]
    return {str(path) for path in found if (str(path) in CONFORMERS) == conformers}
