# SPDX-License-Identifier: Apache-2.0
"""fastasr.compat.k2: its functions, its message about missing ones, and its place under the name k2."""

import math
import sys
import types

import pytest
import torch
from steps import cotangent

from fastasr import ops, rnnt
from fastasr.compat import k2 as compat


@pytest.fixture
def installed():
    compat.install()
    yield
    compat.uninstall()


def test_it_is_imported_under_the_name_k2(installed):
    import k2
    from k2 import rnnt_loss_pruned

    assert k2 is compat
    assert rnnt_loss_pruned is compat.rnnt_loss_pruned
    compat.install()  # a second call has nothing to do
    compat.uninstall()
    assert "k2" not in sys.modules


def test_it_does_not_take_the_place_of_a_loaded_k2(monkeypatch):
    other = types.ModuleType("k2")
    monkeypatch.setitem(sys.modules, "k2", other)
    with pytest.raises(RuntimeError, match="expected that k2 is not loaded yet"):
        compat.install()
    compat.uninstall()
    assert sys.modules["k2"] is other


def test_all_of_the_transducer_api_is_there():
    own = "joiner_loss", "ctc_loss", "align", "Alignment"
    shared = {name for name in rnnt.__all__ if not name.endswith(own) and "tdt" not in name}
    assert shared <= set(compat.__all__)
    for name in compat.__all__:
        assert getattr(compat, name) is not None


def test_windows_of_one_in_a_constrained_lattice():
    """As fast_rnnt: no symbol can be emitted, so the loss of a sequence with symbols is inf. Ours raises an error."""
    logits = torch.randn(2, 4, 1, 5, requires_grad=True)
    symbols = torch.tensor([[1, 2, 3]] * 2)
    ranges = torch.tensor([0, 1, 2, 3]).view(1, 4, 1).expand(2, -1, -1)
    boundary = torch.tensor([[0, 0, 3, 4], [0, 0, 0, 4]])
    arguments = logits, symbols, ranges, 0
    for reduction in ("mean", "sum"):
        assert compat.rnnt_loss_pruned(*arguments, rnnt_type="constrained", reduction=reduction) == math.inf
    ranges = torch.cat([ranges[:1], torch.zeros_like(ranges[:1])])
    found = compat.rnnt_loss_pruned(logits, symbols, ranges, 0, boundary, "constrained", reduction="none")
    of_blanks = -logits[1, :, 0].log_softmax(-1)[:, 0].sum()
    torch.testing.assert_close(found, torch.stack([torch.tensor(math.inf), of_blanks]))
    found[1].backward()
    assert torch.isfinite(logits.grad).all()
    assert compat.rnnt_loss_pruned(*arguments, rnnt_type="constrained", zero_infinity=True) == 0
    with pytest.raises(ValueError, match="windows of at least 2 positions"):
        compat.rnnt_loss_pruned(*arguments, rnnt_type="constrained", return_grad=True)


def test_what_is_not_there_says_so():
    with pytest.raises(compat.NotProvided, match=r"k2.intersect_dense: .* needs k2 itself"):
        compat.intersect_dense  # noqa: B018
    assert not hasattr(compat, "ctc_loss")
    assert not hasattr(compat, "__path__")


def test_classes_that_are_not_there_can_be_named():
    def decode(lattice: compat.Fsa | None) -> "compat.RaggedTensor":
        return lattice

    assert compat.Fsa is compat.Fsa
    assert not isinstance(3, compat.Fsa)
    with pytest.raises(compat.NotProvided, match=r"k2.Fsa: .* needs k2 itself"):
        compat.Fsa("0 1 1 0.5\n1")
    with pytest.raises(compat.NotProvided, match=r"k2.Fsa"):
        compat.Fsa.from_dict({})


def test_with_cuda_is_a_flag_and_a_function():
    assert bool(compat.with_cuda) is compat.with_cuda() is torch.cuda.is_available()


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_swoosh(side, dtype):
    shift, offset = {"l": (4.0, 0.035), "r": (1.0, 0.313261687)}[side]
    x = (torch.randn(3, 50) * 5).to(dtype).requires_grad_()
    wide = x.detach().double()
    expected = (torch.logaddexp(torch.zeros(()), wide - shift) - 0.08 * wide - offset).to(dtype)
    derivative = (torch.sigmoid(wide - shift) - 0.08).to(dtype)
    function = getattr(compat, f"swoosh_{side}")
    y = function(x)
    torch.testing.assert_close(y, expected)
    weights = cotangent(y)
    (grad,) = torch.autograd.grad(y, x, weights)
    torch.testing.assert_close(grad, derivative * weights)
    forward = getattr(compat, f"swoosh_{side}_forward")(x)
    both = getattr(compat, f"swoosh_{side}_forward_and_deriv")(x)
    torch.testing.assert_close((forward, *both), (expected, expected, derivative))
    assert not any(t.requires_grad for t in (forward, *both))


def test_swoosh_s_dropout():
    x = torch.randn(1000)
    assert torch.equal(compat.swoosh_l(x, 0.5), ops.swoosh_l(x))
    y = compat.swoosh_l(x.requires_grad_(), dropout_prob=0.25)
    kept = y != 0
    assert math.isclose(kept.float().mean(), 0.75, abs_tol=0.08)
    torch.testing.assert_close(y[kept], ops.swoosh_l(x)[kept] / 0.75)
