# SPDX-License-Identifier: Apache-2.0
"""What help and completion say about the ops: plain types, every accepted value, public names alone."""

import inspect
import pickle
import pydoc
from typing import get_args

import pytest
import torch

import fastasr
from fastasr import ops
from fastasr.testing import Make
from fastasr.testing.declared import declared, signature
from fastasr.testing.table import table

OPTIONS = [
    (name, a.name)
    for name, op in ops.OPS.items()
    for a in declared(op).options
    if a.kind == "choice" and a.name in inspect.signature(op.function).parameters
]


@pytest.mark.parametrize("name", ops.NAMES)
def test_the_signature_shows_types_alone(name):
    function = getattr(ops, name)
    assert "Annotated" not in str(inspect.signature(function))
    assert "Annotated" not in pydoc.plain(pydoc.render_doc(function))
    hints = [p.annotation for p in inspect.signature(function).parameters.values()]
    assert torch.Tensor in hints
    assert inspect.Parameter.empty not in hints


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_a_literal_lists_the_values_that_calls_accept(name, option):
    listed = get_args(inspect.signature(getattr(ops, name)).parameters[option].annotation)
    assert set(listed) == set(declared(ops.OPS[name]).argument(option).codes)
    for value in listed:
        assert any(_accepts(name, sample, {option: value}) for sample in table(name).samples), value
    with pytest.raises(ValueError, match=rf"fastasr.{name}: {option}: expected one of \('") as raised:
        getattr(ops, name)(**table(name).richest.arguments(Make()) | {option: "nonsense"})
    assert all(repr(value) in str(raised.value) for value in listed)


@pytest.mark.parametrize("name", ops.NAMES)
def test_a_module_that_holds_an_op_can_be_saved(name):
    assert pickle.loads(pickle.dumps(getattr(ops, name))) is getattr(ops, name)


def _accepts(name: str, sample, changed: dict) -> bool:
    """Says whether the op takes the call; an option may ask for other shapes than the sample has."""
    try:
        getattr(ops, name)(**sample.arguments(Make()) | changed)
    except ValueError as error:
        if "shape" not in str(error):
            raise
        return False
    return True


def test_a_declaration_lists_all_values():
    from typing import Annotated, Literal

    def halved(x: Annotated[torch.Tensor, "T"], way: Annotated[Literal["up"], {"up": 0, "down": 1}] = "up"):
        """Returns half of x."""

    with pytest.raises(ValueError, match=r"way: expected \('up', 'down'\) in its Literal, got \('up',\)"):
        signature.arguments(halved)


def test_completion_offers_public_names_alone():
    assert set(dir(ops)) == set(ops.NAMES)
    assert set(fastasr.__all__) <= set(dir(fastasr))
    assert [name for name in dir(fastasr) if name.startswith("_")] == []
    for name in dir(fastasr):
        assert getattr(fastasr, name) is not None


@pytest.mark.parametrize(
    ("module", "wrong", "right"), [(ops, "swosh_l", "swoosh_l"), (fastasr, "acelerate", "accelerate")]
)
def test_a_misspelt_name_gets_the_nearest_one(module, wrong, right):
    with pytest.raises(AttributeError, match=rf"has no attribute '{wrong}'; did you mean '{right}'\?$"):
        getattr(module, wrong)
    with pytest.raises(AttributeError, match=r"has no attribute 'xyzzy'$"):
        _ = module.xyzzy
