# SPDX-License-Identifier: Apache-2.0
"""``fastasr.testing.gradcheck``: right calls of every op pass, each kind of error is found, and nothing is changed."""

from dataclasses import replace

import pytest
import torch

from fastasr import ops
from fastasr.testing import Make, gradcheck, gradients, sized
from fastasr.testing.declared import declared
from fastasr.testing.refusals import given_sizes, match
from fastasr.testing.speed import sizes_of
from fastasr.testing.table import samples_of, table

GENERIC = {"T", "B", "C"}  # of ops that declare no dimensions


def _bypass(dtype=torch.float32, **more) -> dict:
    return sized("bypass", T=12, B=3, C=8).arguments(Make(dtype)) | more


@pytest.fixture
def served(monkeypatch):
    """Puts a function in the place of bypass."""

    def serve(function) -> None:
        function.op = ops.OPS["bypass"]
        monkeypatch.setattr(ops, "bypass", function)

    return serve


# --- right calls


@pytest.mark.parametrize("name", ops.NAMES)
def test_every_op_passes(name, capsys):
    sample = table(name).richest
    report = gradcheck(getattr(ops, name), **sample.arguments(Make()))
    assert report.ok, report
    shown = capsys.readouterr().out
    assert shown.strip() == str(report)
    differentiable = {a.name for a in declared(ops.OPS[name]).differentiable}
    given = {k for k, v in sample.arguments(Make()).items() if isinstance(v, torch.Tensor)}
    assert {line.what for line in report.lines} == {
        "values",
        *(f"gradient of {a}" for a in given & differentiable),
    }


@pytest.mark.long
@pytest.mark.parametrize("name", ops.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_sample_passes(name, dtype):
    for sample in table(name).samples:
        report = gradients.examine(name, sample.arguments(Make(dtype)))
        assert report.ok, f"{sample.name}: {report}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    report = gradcheck("bypass", **_bypass(dtype))
    assert report.ok
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert report.backend == "the cpu kernels"
    with ops._dispatch.backend("eager"):
        assert gradcheck("bypass", **_bypass(dtype)).backend == "eager (backend 'eager' is forced)"


def test_it_changes_nothing():
    arguments = _bypass()
    arguments["x"] = arguments["x"].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    copies = {name: t.detach().clone() for name, t in arguments.items()}
    before = torch.get_rng_state()
    with torch.no_grad():
        assert gradcheck("bypass", **arguments).ok
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    for name, t in arguments.items():
        assert torch.equal(t.detach(), copies[name])
        assert t.grad is None
    assert not arguments["scale"].requires_grad


def test_dropout_draws_alike_in_all_calls():
    call = sized("swoosh_linear", T=6, B=2, K=16, N=8).arguments(Make())
    assert gradcheck("swoosh_linear", **call, dropout_p=0.5, training=True, dropout_shared_dim=0).ok


def test_a_penalty_is_no_slope():
    call = sized("zipformer_attention_weights", T=20, B=2).arguments(Make())
    lines = gradcheck("zipformer_attention_weights", **call, score_penalty=0.02, score_limit=0.5).lines
    assert all(line.ok for line in lines)
    assert {line.differences for line in lines} == {None}


def test_gradients_of_values_that_are_not_finite_are_left_out():
    call = _bypass()
    call["x"][0, 0, 0] = float("inf")
    report = gradcheck("bypass", **call)
    assert report.ok
    assert report.lines[0].verdict == "ok"
    assert {line.verdict for line in report.lines[1:]} == {"left out: some values are not finite"}


# --- wrong ones


class _Scaled(torch.autograd.Function):
    """x, with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


def _verdicts(report) -> dict[str, str]:
    assert not report.ok
    return {line.what: line.verdict for line in report.lines if not line.ok}


def test_wrong_values_are_found(served):
    formula = table("bypass").definition
    served(lambda x_orig, x, scale: formula(x_orig, x, scale) + 1e-5)
    assert _verdicts(gradcheck("bypass", **_bypass())) == {"values": "FAILED: less exact than eager"}


def test_a_wrong_gradient_is_found(served):
    formula = table("bypass").definition
    served(lambda x_orig, x, scale: formula(_Scaled.apply(x_orig), x, scale))
    report = gradcheck("bypass", **_bypass())
    assert _verdicts(report) == {"gradient of x_orig": "FAILED: less exact than eager"}
    assert "gradient of x_orig" in str(report)


def test_a_missing_gradient_and_another_dtype_are_found(served):
    formula = table("bypass").definition
    served(lambda x_orig, x, scale: formula(x_orig.detach(), x, scale).double())
    assert _verdicts(gradcheck("bypass", **_bypass())) == {
        "values": "FAILED: torch.float64; eager gives torch.float32",
        "gradient of x_orig": "FAILED: there is none",
    }


def test_values_that_are_not_finite_are_found(served):
    formula = table("bypass").definition
    served(lambda x_orig, x, scale: formula(x_orig, x, scale).masked_fill(x > 2, float("nan")))
    call = _bypass()
    call["x"][0, 0, 0] = 3.0
    assert (
        _verdicts(gradcheck("bypass", **call))["values"] == "FAILED: infinities or NaNs differ from eager's"
    )


def test_a_formula_whose_gradient_is_not_its_slope_is_found(served, monkeypatch):
    formula = table("bypass").definition

    def wrong(x_orig, x, scale):
        return formula(x_orig, x, _Scaled.apply(scale))

    served(wrong)
    of_op = replace(table("bypass"), definition=wrong)
    monkeypatch.setattr(gradients, "table", lambda op: of_op)
    found = _verdicts(gradcheck("bypass", **_bypass()))
    assert found == {"gradient of scale": "FAILED: the formula's gradient is not its slope"}


def test_one_unlucky_draw_is_judged_by_the_median(monkeypatch):
    right, first = gradients._compared, iter([True])

    def unlucky(*tensors):
        comparison = right(*tensors)
        return replace(comparison, rms=1.0) if next(first, False) else comparison

    monkeypatch.setattr(gradients, "_compared", unlucky)
    report = gradcheck("bypass", **_bypass())
    assert report.ok
    assert report.lines[0].verdict == "ok, by the median of several draws"


# --- refusals


def test_wrong_arguments_are_refused():
    with pytest.raises(
        ValueError, match=r"op: expected an op or its name, got 'bypas'; did you mean 'bypass'\?"
    ):
        gradcheck("bypas")
    with pytest.raises(ValueError, match="op: expected an op or its name, got <built-in"):
        gradcheck(torch.add)
    with pytest.raises(ValueError, match=r"fastasr\.bypass: scale: expected shape"):
        gradcheck("bypass", **_bypass(scale=torch.ones(5)))
    with pytest.raises(TypeError, match="scale"):
        gradcheck("bypass", x_orig=torch.ones(3), x=torch.ones(3))


# --- calls at any sizes


@pytest.mark.parametrize("name", ops.NAMES)
def test_sizes_are_the_declared_ones(name):
    op, sizes = declared(ops.OPS[name]), sizes_of(name)
    known = {n for a in op.tensors for n in a.pattern.names} | {a.name for a in op.options}
    known |= {n for names in op.sizes for n in names.split()}
    assert set(sizes) <= known | GENERIC
    first, second = list(sizes)[:2]
    case = sized(name, **{first: 21, second: 3})
    arguments = case.arguments(Make())
    assert case.op == name
    assert case.name.startswith(f"{first}=21,{second}=3")
    bound = _bound(op, arguments)
    wanted = sizes | {first: 21, second: 3}
    assert {n: bound[n] for n in wanted if n in bound} == {n: wanted[n] for n in wanted if n in bound}
    assert {first, second} <= bound.keys() | GENERIC
    assert samples_of(getattr(ops, name)) is samples_of(name)


def _bound(op, arguments: dict) -> dict:
    """Returns the sizes that a call's tensors and options have, by their declared names."""
    known = {a.name: arguments[a.name] for a in op.options if a.kind == "int" and a.name in arguments}
    if op.sizes:
        known |= given_sizes(op, op.op.written.Arguments(**arguments))
    for a in op.in_binding_order():
        if arguments.get(a.name) is not None:
            known |= match(a.pattern, tuple(arguments[a.name].shape), known)
    return known


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"sizes: expected some of T, B, C, got 'Q'$"):
        sized("bypass", Q=3)
    with pytest.raises(ValueError, match="T: expected a positive int, got 0"):
        sized("bypass", T=0)
    with pytest.raises(ValueError, match="E: expected a multiple of num_heads = 4, got 50"):
        sized("zipformer_attention", E=50)
