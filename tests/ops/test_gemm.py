# SPDX-License-Identifier: Apache-2.0
"""The two matrix products: values and errors of each, operands of any strides, and the choice itself."""

import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import fastasr
from fastasr import ops, processor
from fastasr.ops import _gemm

needs_both = pytest.mark.skipif(bool(_gemm.why_not()), reason=_gemm.why_not())
PRODUCTS = ["torch", pytest.param("native", marks=needs_both)]


def operands(operation, layout):
    """Returns x (m, k), w (n, k) and a bias, as ``operation`` takes them: whole, transposed in memory, or slices."""
    m, n, k = 61, 45, 600
    shapes = {
        "forward": ((m, k), (n, k), (n,)),
        "input_grad": ((m, k), (k, n)),
        "weight_grad": ((k, m), (k, n)),
    }[operation]
    made = []
    for shape in shapes:
        if layout == "transposed" and len(shape) == 2:
            made.append(torch.randn(shape[::-1]).t())
        elif layout == "slices":
            made.append(torch.randn(*shape[:-1], 2 * shape[-1] + 1)[..., : shape[-1]])
        else:
            made.append(torch.randn(shape))
    return tuple(made)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("operation", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize("layout", ["whole", "transposed", "slices"])
def test_values(name, operation, layout):
    given = operands(operation, layout)
    theirs = _gemm._PRODUCTS["torch"][operation]
    y = _gemm._PRODUCTS[name][operation](*given)
    exact, mkl = theirs(*(t.double() for t in given)), theirs(*given)
    error, allowed = ((t - exact).square().mean().sqrt() for t in (y, mkl))
    assert error <= 1.5 * allowed + 1e-7
    assert y.is_contiguous()


@needs_both
def test_threads_and_rows_do_not_change_a_bit():
    x, w, b = torch.randn(331, 500), torch.randn(129, 500), torch.randn(129)
    native = _gemm._PRODUCTS["native"]["forward"]
    torch.set_num_threads(1)
    y = native(x, w, b)
    torch.set_num_threads(3)
    assert torch.equal(native(x, w, b), y)
    assert torch.equal(native(x[7:20], w, b), y[7:20])
    assert torch.equal(native(x.view(1, 331, 500), w, b)[0], y)


@pytest.mark.parametrize("shapes", [(1, 15), (3, 64), (64, 2), (33, 8)])
def test_sums_of_few_columns_are_as_exact_as_of_many(shapes):
    grad, x = (torch.randn(8000, n) for n in shapes)
    exact = grad.double().t() @ x.double()
    y = _gemm.weight_grad(grad, x)
    assert y.is_contiguous()
    assert (y - exact).square().mean().sqrt() < 6e-7 * exact.square().mean().sqrt()


@needs_both
@pytest.mark.parametrize("columns", [1, 9, 14, 15])
def test_few_columns_have_the_bits_of_many(monkeypatch, columns):
    monkeypatch.setenv("FASTASR_GEMM", "native")
    _gemm.forget()
    grad, x = torch.randn(2500, 61), torch.randn(2500, 40)
    y = _gemm.weight_grad(grad, x[:, :columns])
    assert y.is_contiguous()
    assert torch.equal(y, _gemm._PRODUCTS["native"]["weight_grad"](grad, x)[:, :columns])


@needs_both
@pytest.mark.parametrize("policy", ["torch", "native"])
def test_a_weight_gradient_is_added_by_the_product_of_choice(monkeypatch, policy):
    monkeypatch.setenv("FASTASR_GEMM", policy)
    _gemm.forget()
    c, grad, x = torch.randn(61, 40), torch.randn(600, 61), torch.randn(600, 40)
    exact = c.double() + grad.double().t() @ x.double()
    theirs, native = c.addmm(grad.t(), x), c.clone()
    _gemm.add_product(native, grad.t(), x)
    _gemm.add_weight_grad(c, grad, x)
    assert torch.equal(c, native if policy == "native" else theirs)
    error, allowed = ((t - exact).square().mean().sqrt() for t in (c, theirs))
    assert error <= 1.5 * allowed + 1e-7


@needs_both
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 15])
def test_few_rows(rows):
    """The error is that of torch's product, and rows, threads and strides do not change a bit."""
    x, w, b = torch.randn(rows, 1500), torch.randn(77, 1500), torch.randn(77)
    y = _gemm._few_rows(x, w, b)
    exact, mkl = F.linear(x.double(), w.double(), b.double()), F.linear(x, w, b)
    error, allowed = ((t - exact).square().mean().sqrt() for t in (y, mkl))
    assert error <= 1.5 * allowed + 1e-7
    torch.set_num_threads(3)
    assert torch.equal(_gemm._few_rows(x, w, b), y)
    assert torch.equal(_gemm._few_rows(x[-1:], w, b), y[-1:])
    wide = torch.randn(rows, 3000)[:, ::2].copy_(x)
    assert torch.equal(_gemm._few_rows(wide[None], torch.randn(77, 1600)[:, :1500].copy_(w), b)[0], y)


@needs_both
@pytest.mark.parametrize(("rows", "offered"), [(1, True), (15, True), (16, False)])
def test_few_rows_are_offered_a_third_product(fresh, monkeypatch, rows, offered):
    taken = []
    monkeypatch.setattr(
        _gemm, "_timed", lambda product, *_: taken.append(product) or float(product != "few rows")
    )
    x, w = (torch.randint(-9, 9, (n, 512)).float() for n in (rows, 256))  # sums are exact
    _gemm.forward(x, w, None)
    assert ("few rows" in taken) == offered
    assert [*chosen(fresh).values()] == ["few rows" if offered else "torch"]
    _gemm.forget()
    expected = F.linear(x.double(), w.double()).float()
    assert torch.equal(_gemm.forward(x, w, None), expected)  # by the choice on disk
    assert torch.equal(_gemm.forward(x, w.t().contiguous().t(), None), expected)
    assert torch.equal(_gemm.input_grad(x, w.t()), expected)


@needs_both
@pytest.mark.parametrize("choice", ["torch", "native"])
@pytest.mark.parametrize(("stride", "padding"), [((1, 2), (0, 0)), ((2, 1), (1, 2))])
def test_gradients_of_a_convolution(monkeypatch, choice, stride, padding):
    monkeypatch.setenv("FASTASR_GEMM", choice)
    _gemm.forget()
    x, w, b = (torch.randint(-9, 9, size).float() for size in ((2, 5, 23, 12), (7, 5, 3, 3), (7,)))
    x = x.to(memory_format=torch.channels_last)
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    y = F.conv2d(*leaves, stride, padding)
    grad = torch.randint(-9, 9, y.shape).float().to(memory_format=torch.channels_last)
    expected = torch.autograd.grad(y, leaves, grad.double())
    found = _gemm.conv2d_grads(grad, x, w, stride, padding, (True, True, True))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.double(), other)  # sums of whole numbers are exact
    alone = _gemm.conv2d_grads(grad, x, w, stride, padding, (False, True, False))
    assert alone[0] is None
    assert torch.equal(alone[1], found[1])


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Starts without choices, neither made in this process nor on disk, on a machine that is idle."""
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTASR_GEMM", raising=False)
    monkeypatch.setattr(processor.Load, "is_high", lambda *_: False)
    _gemm.forget()
    yield tmp_path
    _gemm.forget()


def chosen(folder):
    """Returns key -> product of the choices in the folder's file."""
    (file,) = folder.iterdir()
    return {key: entry["product"] for key, entry in json.loads(file.read_text()).items()}


@pytest.fixture
def called(monkeypatch):
    """Lists the products as they are called."""
    names = []

    def recorded(name, f):
        return lambda *operands: names.append(name) or f(*operands)

    for name, products in _gemm._PRODUCTS.items():
        monkeypatch.setitem(products, "forward", recorded(name, products["forward"]))
    return names


@needs_both
@pytest.mark.parametrize(("seconds", "taken"), [(0.96, "native"), (0.98, "torch"), (1.2, "torch")])
def test_the_faster_by_three_percent_is_taken_and_remembered(fresh, called, monkeypatch, seconds, taken):
    def timed(product, operation, operands):
        _gemm._PRODUCTS[product][operation](*operands)
        return seconds if product == "native" else 1.0

    monkeypatch.setattr(_gemm, "_timed", timed)
    x, w = torch.randn(64, 64), torch.randn(64, 64)
    _gemm.forward(x, w, None)
    assert called.count("torch") > 1
    assert called.count("native") > 1
    assert [*chosen(fresh).values()] == [taken]
    for forget in (lambda: None, _gemm.forget):  # remembered by the process, then read from the file
        called.clear()
        forget()
        _gemm.forward(x, w, None)
        assert called == [taken]


@needs_both
@pytest.mark.parametrize(("seconds", "taken"), [(0.85, "native"), (0.95, "torch")])
def test_a_long_product_is_chosen_by_few_runs(fresh, called, monkeypatch, seconds, taken):
    """fastasr's first run, into fresh memory, does not count."""
    times = {"torch": iter([1.0]), "native": iter([9.0, seconds])}
    monkeypatch.setattr(_gemm, "_BUDGET_S", 0.0)
    monkeypatch.setattr(_gemm, "_timed", lambda product, *_: next(times[product]))
    _gemm.forward(torch.randn(64, 64), torch.randn(64, 64), None)
    assert called == [taken]


@needs_both
@pytest.mark.parametrize(
    "content",
    [
        '{"%s": {"product": ' + "[" * 400 + "]" * 400 + ', "under_load": true, "times": 1, "at": 1.0}}',
        '{"other": ' + "[" * 900 + "]" * 900 + "}",
        *('{"%s": "torch"}', '{"%s": {"product": "torch"}}', '{"%s": [1]}', "[1]", "3", '{"%s":'),
        '{"%s": {"product": "onednn", "under_load": false, "times": 1, "at": 1.0}}',
        '{"%s": {"product": ["torch"], "under_load": false, "times": 1, "at": 1.0}}',
        '{"%s": {"product": "torch", "under_load": "no", "times": 1, "at": 1.0}}',
        '{"%s": {"product": "torch", "under_load": true, "times": -1, "at": 1.0}}',
        '{"%s": {"product": "torch", "under_load": true, "times": 1, "at": NaN}}',
        '{"%s": {"product": "torch", "under_load": true, "times": 1, "at": 1e400}}',
        '{"%s": {"product": "torch", "under_load": true, "times": 1, "at": 1.0, "by": ""}}',
    ],
)
def test_a_file_that_says_something_else_is_measured_again(fresh, called, monkeypatch, content):
    x, w = torch.randn(64, 64), torch.randn(64, 64)
    monkeypatch.setattr(processor, "crowd", lambda threads: 0)
    _gemm.forward(x, w, None)
    (file,) = fresh.iterdir()
    (key,) = json.loads(file.read_text())
    file.write_text(content.replace("%s", key))
    _gemm.forget()
    called.clear()
    _gemm.forward(x, w, None)
    assert called.count("native") > 1
    assert set(chosen(fresh)) == {key}
    assert set(chosen(fresh).values()) <= {"torch", "native"}


@needs_both
def test_forced_choices(fresh, called, monkeypatch):
    x, w = torch.randn(64, 64), torch.randn(64, 64)
    for name in ("torch", "native"):
        monkeypatch.setenv("FASTASR_GEMM", name)
        _gemm.forget()
        _gemm.forward(x, w, None)
    assert called == ["torch", "native"]
    monkeypatch.setenv("FASTASR_GEMM", "fastest")
    _gemm.forget()
    with pytest.raises(ValueError, match="FASTASR_GEMM: expected auto, torch or native, got 'fastest'"):
        _gemm.forward(x, w, None)
    assert not list(fresh.iterdir())


@needs_both
@pytest.mark.parametrize("winner", ["torch", "native"])
@pytest.mark.parametrize("frozen", ["", "x", "weight"])
def test_torch_has_its_own_node_where_its_products_win(fresh, monkeypatch, winner, frozen):
    monkeypatch.setattr(_gemm, "_timed", lambda product, *_: float(product != winner))
    x, w, b = torch.randn(2, 40, 192), torch.randn(192, 192), torch.randn(192)
    wanted = [t.requires_grad_() for name, t in (("x", x), ("weight", w), ("bias", b)) if name != frozen]

    def run():
        y = ops.linear(x, w, b)
        return type(y.grad_fn).__name__, torch.autograd.grad(y, wanted, torch.ones_like(y))

    first, expected = run()
    assert first == "LinearBackward"  # nothing is known yet
    for forget in (lambda: None, _gemm.forget):  # remembered by the process, then read from the file
        forget()
        second, found = run()
        assert (second == first) == (winner == "native")
        assert all(map(torch.equal, found, expected))


@needs_both
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_large_matrices_of_a_batch_are_products_of_their_own(fresh, monkeypatch, batch, large):
    monkeypatch.setenv("FASTASR_GEMM", "native")
    a, b = torch.randn(batch, 70, 37).transpose(1, 2), torch.randn(70, batch, 45).transpose(0, 1)
    monkeypatch.setattr(_gemm, "_LARGE", a.shape[1] * a.shape[2] * b.shape[2] - large)
    sizes, native = [], _gemm._PRODUCTS["native"]["input_grad"]

    def recorded(one, other):
        sizes.append((*one.shape, other.shape[1]))
        return native(one, other)

    monkeypatch.setitem(_gemm._PRODUCTS["native"], "input_grad", recorded)
    y = _gemm.batched(a, b)
    assert sizes == [(37, 70, 45)] * batch * large
    assert y.shape == (batch, 37, 45)
    torch.testing.assert_close(y.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@needs_both
@pytest.mark.parametrize("winner", ["torch", "native"])
def test_a_training_step_of_medium_size_is_measured_as_a_whole(fresh, monkeypatch, winner):
    """Where torch has the forward product and not all others, the whole step decides."""
    timed, packed = [], []

    def seconds(product, operation, operands):
        timed.append(operation)
        _gemm._PRODUCTS[product][operation](*operands)
        wins = winner if operation == "step" else "native" if operation == "weight_grad" else "torch"
        return float(product != wins)

    monkeypatch.setattr(_gemm, "_timed", seconds)
    x, w, b = torch.randn(2, 40, 192), torch.randn(192, 192).requires_grad_(), torch.randn(192)

    def node():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(0) or t, lambda t: t):
            y = ops.linear(x, w, b)
        y.sum().backward()
        return type(y.grad_fn).__name__

    first, second, third = node(), node(), node()
    assert first == "LinearBackward"  # the forward product was not chosen yet
    assert (second == first) == (third == first) == (winner == "native")
    assert timed.count("step") > 1
    assert len(packed) <= 3 * 3, "the caller's hooks saw tensors of the measurement"
    assert any(key.startswith("step ") for key in chosen(fresh))


@needs_both
@pytest.mark.parametrize("bias", [True, False])
def test_both_steps_run_both_passes(fresh, bias):
    x, w, b = torch.randn(2, 40, 192), torch.randn(192, 192), torch.randn(192) if bias else None
    y = F.linear(x, w, b)
    expected = y.flatten(0, 1).t() @ x.flatten(0, 1)
    for name in ("torch", "native"):
        torch.testing.assert_close(_gemm._PRODUCTS[name]["step"](x, w, b), expected, rtol=1e-4, atol=1e-2)


@needs_both
def test_what_torch_serves_is_remembered_and_still_checked(fresh):
    """A call like an earlier one goes to torch at once. What torch would not refuse is refused as at first."""
    x, w, b = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3)
    expected = F.linear(x, w, b)
    chosen = ops.linear.op.family.chosen
    for _ in range(2):
        assert torch.equal(ops.linear(x, w, b), expected)
        assert [wins for key, wins in chosen.items() if key[0] == x.numel()] == [True]
        for wrong in (b[:1], b[:, None]):
            with pytest.raises(ValueError, match=r"linear: bias: "):
                ops.linear(x, w, wrong)
        for wrong in (w.to_sparse(), w.double()):
            with pytest.raises(TypeError, match=r"linear: weight: "):
                ops.linear(x, wrong, b)
        with pytest.raises(TypeError, match=r"linear: x: "):
            ops.linear(x.tolist(), w, b)
        with torch.autocast("cpu"):
            assert ops.linear(x, w, b).dtype == torch.bfloat16
    _gemm.forget()
    assert not chosen
    ops.linear(x, w, b)
    with fastasr.backend("eager"):
        assert not any(chosen.values())


@pytest.mark.parametrize("op", [ops.linear, ops.linear_activation, ops.swoosh_linear])
def test_a_weight_without_inputs_is_refused_at_any_size(op):
    name = op.__name__
    with pytest.raises(ValueError, match=rf"fastasr\.{name}: "):
        op(torch.randn(64, 64), torch.randn(64, 0))


def outcome(function, *arguments):
    try:
        return function(*arguments).dtype
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)


def test_what_has_no_kernels_goes_to_torch_and_is_still_checked(monkeypatch):
    """So it is on CUDA. torch refuses most of what is wrong; the checks refuse the rest, with their message."""
    wrapped = sys.modules["fastasr.ops._wrapped.linear"]
    checked, calls = wrapped.checked, []
    monkeypatch.setattr(wrapped, "checked", lambda *given: calls.append(given) or checked(*given))
    x, w, b = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(3)
    meta = {"device": "meta"}
    wrong = [
        (x[0, 0, 0], w, b), (x.long(), w, b), (x.cfloat(), w.cfloat(), b.cfloat()), (x[0].to_sparse(), w, b),
        (x.tolist(), w, b), (x, w[0], b[:1]), (x, w[None], b), (x, w[:, 1:], b), (x, w.double(), b),
        (x, w.to_sparse(), b), (x, w.to(**meta), None), (x, w, b[:1]), (x, w, b[:, None]), (x, w, b[0]),
        (x, w, b.double()), (x, w, b.long()), (x, w, b.to(**meta)), (x.mT, torch.randn(3, 5), b.double()),
        (x, w.long(), b), (x, w, "bias"),
        (x, None, b),
    ]  # fmt: skip
    with fastasr.backend("eager"):
        for bias in (b, None):
            for given in (
                (x, w, bias),
                (x[0, 0], w, bias),
                (x[:0], w, bias),
                (x.mT, torch.randn(3, 5), bias),
            ):
                assert torch.equal(ops.linear(*given), F.linear(*given))
            with torch.autocast("cpu"):
                assert torch.equal(ops.linear(x.bfloat16(), w, bias), F.linear(x, w, bias))
        assert torch.equal(torch.vmap(ops.linear, (0, None, None))(x, w, b), F.linear(x, w, b))
        traced = make_fx(ops.linear)(x, w, b)
        assert torch.equal(traced(-x, w, b), F.linear(-x, w, b))
        assert not calls
        for given in wrong:
            with pytest.raises((TypeError, ValueError)) as expected:
                checked(*given)
            with pytest.raises(type(expected.value), match=re.escape(str(expected.value))):
                ops.linear(*given)
            with torch.autocast("cpu"):  # which allows other dtypes
                assert outcome(ops.linear, *given) == outcome(checked, *given)


@pytest.mark.parametrize("activation", ["gelu", "identity", "relu", "silu", "tanh"])
def test_a_bias_behind_torchs_product(activation, monkeypatch):
    """The kernel of an activation adds it in inference; the bits are those of a call with gradients."""
    monkeypatch.setenv("FASTASR_GEMM", "torch")
    monkeypatch.setattr(_gemm, "_choices", {})
    x, weight, bias = torch.randn(4, 128, 128), torch.randn(128, 128) / 11, torch.randn(128)
    expected = ops.linear_activation(x.clone().requires_grad_(), weight, bias, activation)
    assert _gemm.leaves_bias(x, weight, bias)
    assert not _gemm.leaves_bias(x[:3], weight, bias)
    assert not _gemm.leaves_bias(x, weight, None)
    with torch.no_grad():
        assert torch.equal(ops.linear_activation(x, weight, bias, activation), expected)
    act = {"identity": lambda z: z}.get(activation) or getattr(F, activation)
    exact = act(F.linear(x.double(), weight.double(), bias.double()))
    torch.testing.assert_close(expected.double(), exact, rtol=0, atol=1e-5)
