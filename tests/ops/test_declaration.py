# SPDX-License-Identifier: Apache-2.0
"""The consequences of a declaration beyond the contract that every op keeps."""

import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import TorchRuntimeError
from torch.autograd import forward_ad

import fastasr
from fastasr import ops
from fastasr.ops import _gemm
from fastasr.ops._dispatch import Kernels, gpu_backends
from fastasr.ops._runtime import listed
from fastasr.testing import Make, checks, tables
from fastasr.testing.declared.shapes import Pattern
from fastasr.testing.refusals import match
from fastasr.testing.table import Sample, flat, floating

WITH_TABLES = sorted(tables())
PATTERNS = ("T B 2*C", "C 1 K | C K, K odd", "*S C", "... K", "2*T-1 K//2+1", "*S", "T, T >= 2", "1 T | B T")


def _written(pattern: Pattern, sizes: dict) -> callable:
    lines = ["def check(t, S=(), **names):", *(f"    {name} = names['{name}']" for name in sizes)]
    lines += [f"    {line}" for line in pattern.check(set(sizes), "t", "raise ValueError")]
    space = {}
    exec("\n".join(lines), space)
    return space["check"]


@pytest.mark.parametrize("text", PATTERNS)
@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=4), size=st.integers(0, 4))
def test_written_checks_match_as_by_hand(text, shape, size):
    pattern = Pattern.parse(text)
    sizes = {name: size for name in ("C", "K", "B") if name in pattern.names and text[0] in "C21"}
    sizes |= {"T": size} if "2*T" in text or "1 T" in text else {}
    by_hand = match(pattern, tuple(shape), sizes) is not None
    try:
        _written(pattern, sizes)(torch.empty(shape, device="meta"), **sizes)
    except ValueError:
        assert not by_hand
    else:
        assert by_hand


def test_a_size_times_a_name_and_an_expression_in_parentheses():
    pattern = Pattern.parse("B*P (T and 2*T-1)")
    for frames, shape in ((3, (6, 5)), (0, (6, 0))):
        assert match(pattern, shape, {"B": 3, "T": frames}) == {"B": 3, "T": frames, "P": 2}
        text = pattern.text_code({"B", "T"}, "")
        assert eval(text, {"B": 3, "T": frames, "listed": listed}) == f"(3*P, {shape[1]})"
    assert match(pattern, (6, 4), {"B": 3, "T": 3}) is None
    assert match(pattern, (7, 5), {"B": 3, "T": 3}) is None


def test_a_name_must_be_bound_before():
    with pytest.raises(ValueError, match="K//2: K: expected an earlier argument to bind it"):
        list(Pattern.parse("K//2").bind(set(), "t"))


@pytest.mark.parametrize("name", [name for name in WITH_TABLES if name in gpu_backends()])
def test_kernels_for_gpus_are_complete(name):
    samples = import_module(f"fastasr.testing.samples.{name}")
    assert getattr(samples, "ON_DEVICE", ()), (
        f"{samples.__file__}: expected ON_DEVICE, calls for `fastasr gpu`"
    )
    op = ops.OPS[name]
    for implementation in op.family.implementations:
        if implementation.backend == "triton" and find_spec("triton"):
            backward = implementation.load().backward
            missing = f"kernels/{op.family.name}.py: expected {op.family.name}_backward, or gradients= in @op"
            assert backward or op.gradients or not op.written.differentiable, missing


@pytest.mark.parametrize("name", WITH_TABLES)
def test_only_the_kernels_own_answer_is_a_way_out(name, monkeypatch):
    op, table = ops.OPS[name], tables()[name]
    arguments = table.thorough[0].arguments(Make())
    expected = checks.flat(table.definition(**arguments))
    if op.family.native is None or op.fast is False:
        pytest.skip("no shortest path to native kernels here")

    def raising(error):
        def forward(*_):
            raise error

        return Kernels("cpu", forward, forward)

    monkeypatch.setattr(_gemm, "SMALL", 0)  # or a small linear is one call of torch
    monkeypatch.setenv("FASTASR_GEMM", "native")  # or the run's seed chooses torch's product for it
    monkeypatch.setattr(_gemm, "_choices", {})  # which hold those of earlier calls
    monkeypatch.setattr(op.family, "chosen", {})
    monkeypatch.setattr(op.family, "native", raising(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        table.function(**arguments)
    for error in (ValueError("x is not contiguous"), NotImplementedError("no kernel for these tensors")):
        monkeypatch.setattr(op.family, "native", raising(error))
        torch.testing.assert_close(checks.flat(table.function(**arguments)), expected)


@pytest.mark.parametrize("name", ops.OPS)
def test_the_operator_has_the_declared_signature(name):
    op, function = ops.OPS[name], getattr(ops, name)
    assert function.op is op
    parameters = inspect.signature(op.definition).parameters.values()
    schema = op.operator._schema.arguments
    assert [p.name for p in parameters] == [a.name for a in schema if a.name != "keep"]
    for p, a in zip(parameters, schema, strict=False):
        default = list(p.default) if isinstance(p.default, tuple) else p.default
        assert a.default_value == (None if p.default is p.empty else default)


def test_it_compiles_inside_another_function():
    x = torch.randn(3, 4)
    compiled = torch.compile(lambda x: ops.bypass(x, 2 * x, x[0]) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ops.bypass(x, 2 * x, x[0]) + 1)


@pytest.mark.parametrize("name", WITH_TABLES)
def test_the_operator_differentiates_the_formula_where_no_kernel_serves(name):
    table = tables()[name]
    with fastasr.backend("eager"):
        checks.gradcheck(table, table.thorough[0], torch.float64, "cpu")


@pytest.mark.long
@pytest.mark.parametrize("name", WITH_TABLES)
def test_a_transform_in_a_compiled_function(name):
    table = tables()[name]
    arguments, others = (table.thorough[0].arguments(Make(torch.float64, seed=seed)) for seed in (0, 1))
    names = list(floating(arguments))
    given, tangents = (tuple(call[name] for name in names) for call in (arguments, others))

    def function(*tensors):
        return flat(table.function(**arguments | dict(zip(names, tensors, strict=True))))

    def jvp(*tensors):
        return torch.func.jvp(function, tensors, tangents)

    torch._dynamo.reset()
    compiled = torch.compile(jvp, fullgraph=True, backend="aot_eager")
    if name == "tdt_lattice":  # its formula reads the durations
        with pytest.raises(TorchRuntimeError, match=f"fastasr.{name}: not possible under forward-mode"):
            compiled(*given)
    else:
        torch.testing.assert_close(compiled(*given), jvp(*given), equal_nan=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_dual_tensors_and_compiled_functions(backend):
    x, tangent = torch.randn(2, 3, 4)

    def slope(function):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent

    torch._dynamo.reset()
    expected = slope(ops.swoosh_r.definition)
    compiled = torch.compile(lambda x: ops.swoosh_r(x), fullgraph=True, backend=backend)
    compiled(x)
    torch.testing.assert_close(slope(compiled), expected)
    compiled = torch.compile(lambda: slope(ops.swoosh_r), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(), expected)


def test_every_gradient_by_hand_knows_transforms():
    """``_transforms.Function`` serves transforms or refuses them; generated code asks for them itself."""
    torchs = re.compile(
        r"^class .*\bautograd\.Function\)|^from torch\.autograd.* import .*\bFunction\b", re.M
    )
    files = (p for p in Path(fastasr.__file__).parent.rglob("*.py") if p.parent.name != "_written")
    assert {path.name for path in files if torchs.search(path.read_text())} == {
        "_runtime.py",
        "_transforms.py",
    }


def test_a_size_that_only_the_formula_refuses_is_found():
    sample = Sample("two", lambda m: {"a": m.normal(2, 3), "b": m.normal(2, 3)})
    table = SimpleNamespace(definition=lambda a, b: a + b, function=lambda a, b: a)
    with pytest.raises(AssertionError, match="a: 3 in dimension 0 is not refused"):
        checks.sizes(table, sample, torch.float32, "cpu")
