# SPDX-License-Identifier: Apache-2.0
"""Every native operator belongs to the declaration of an op, or says in C++ why it needs none."""

import re
from pathlib import Path

import pytest
import torch

from fastasr.ops import _dispatch

ROOT = Path(__file__).parents[2]
BINDINGS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "csrc" / "bindings").glob("*.cpp")}
TEXTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "fastasr" / "ops").glob("*.py"))

pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="needs the native library")


def _registered() -> set[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return {name.partition("::")[2] for name in names if name.startswith("fastasr_cpu::")}


def _undeclared() -> dict[str, str]:
    """Returns operator -> the reason, as FASTASR_UNDECLARED gives it."""
    reasons = {}
    for text in BINDINGS.values():
        for block in re.findall(r"^FASTASR_UNDECLARED\((.*?)\)\n\n", text, re.M | re.S):
            reason, operators = re.match(r'\s*((?:"[^"]*"\s*)+),(.*)', block, re.S).groups()
            reason = "".join(re.findall(r'"([^"]*)"', reason))
            reasons |= dict.fromkeys(re.findall(r"FASTASR_TYPED\((\w+)\)", operators), reason)
    return reasons


REASONS = _undeclared()


@pytest.fixture
def loaded(monkeypatch):
    """The operators that the declared ops load as their kernels."""
    names, registered = set(), _dispatch.registered
    monkeypatch.setattr(_dispatch, "registered", lambda on, name: names.add(name) or registered(on, name))
    for family in _dispatch.FAMILIES.values():
        for implementation in family.implementations:
            if implementation.backend == "cpu":
                implementation.load()
    return names


@pytest.mark.parametrize("operator", sorted(_registered()))
def test_an_operator_is_declared_or_says_why_not(operator, loaded):
    if operator in REASONS:
        assert len(REASONS[operator].split()) >= 5, f"{operator}: expected a reason"
        return
    named = re.search(rf'fastasr_cpu\.{operator}\b|"{operator}"', TEXTS)
    assert named or operator in loaded, (
        f"{operator}: expected a declaration in fastasr/ops whose kernels call it, or FASTASR_UNDECLARED with a reason"
    )


def test_reasons_are_given_for_operators_that_exist():
    assert set(REASONS) <= set(_registered())


def test_a_written_struct_serves_the_call_of_every_header():
    text = "\n".join(BINDINGS.values())
    for header in (ROOT / "csrc" / "bindings" / "written").glob("*.h"):
        schemas = re.findall(r"kName = \"(\w+)\"", header.read_text(encoding="utf-8"))
        assert all(f"written<{name}>" in text for name in schemas), header.name
