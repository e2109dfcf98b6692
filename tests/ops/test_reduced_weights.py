# SPDX-License-Identifier: Apache-2.0
"""Products on copies of weights in fewer bits: their formulas, and the life of a copy."""

import gc
import math
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from steps import numbers, relative

from fastasr import ops
from fastasr.ops import _dispatch, _gemm, _reduced_weights

pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="the native library is not built")
# Products of x in 7 bits, where the processor adds two of them in 16, have twice the error of 8.
EIGHT_BITS = _dispatch.native_build_info().get("simd_set") not in ("avx2", "avx512")


@pytest.fixture
def layer():
    generator = numbers(1)
    layer = torch.nn.Linear(72, 100)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    yield layer
    _reduced_weights.drop(layer.weight)


def product(layer, x):
    with torch.no_grad():
        return ops.linear(x, layer.weight, layer.bias)


def expected(layer, x, format):
    w, x = layer.weight.detach().double(), x.double()
    if format == "bf16":
        w, x = (t.bfloat16().double() for t in (w, x))
    else:
        scale = w.abs().amax(1, keepdim=True) / 127
        w = (w / scale).round() * scale
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        step = (high - low) / (255 if EIGHT_BITS else 127)
        zero = (-low / step).round()
        x = ((x / step).round() + zero - zero) * step
    return F.linear(x, w, layer.bias.detach().double())


@pytest.mark.skipif(
    not {"bf16", "amx"} & set(_dispatch.native_build_info().get("simd_set", "").split("_")),
    reason="the kernels of this instruction set have no instruction for bf16",
)
def test_bf16_gains_where_its_products_are_faster():
    """The library compares instructions. Where they gain, a product takes half the time, elsewhere as much or more."""
    torch.set_num_threads(1)
    x, w = torch.ones(64, 192), torch.ones(512, 192)
    products = [
        partial(_reduced_weights.Copy(w, "bf16").product, x, None),
        partial(_gemm._PRODUCTS["native"]["forward"], x, w, None),
    ]
    least = [math.inf, math.inf]
    for _ in range(100):
        for i, run in enumerate(products):
            began = time.thread_time()
            run()
            least[i] = min(least[i], time.thread_time() - began)
    assert _dispatch.native_build_info()["bf16_gains"] == (least[0] < 0.75 * least[1]), least


@pytest.mark.parametrize("format", ["int8", "bf16"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (40,), (2, 3, 4)])
def test_formula(layer, format, shape):
    x = torch.randn(*shape, 72, generator=numbers(2)) + 0.5
    exact = product(layer, x)
    _reduced_weights.keep(layer.weight, format)
    y = product(layer, x)
    assert y.shape == exact.shape
    assert y.dtype == torch.float32
    # an input on the border of two levels may take the other one
    assert relative(y, expected(layer, x, format)) < (2e-3 if format == "int8" else 1e-5)
    assert 1e-4 < relative(y, exact.double()) < 0.03


@pytest.mark.parametrize("format", ["int8", "bf16"])
@pytest.mark.parametrize("kind", ["SwooshL", "SwooshR"])
def test_the_product_activates_its_input(layer, format, kind):
    x = 3 * torch.randn(5, 7, 72, generator=numbers(6))
    swoosh = ops.swoosh_l if kind == "SwooshL" else ops.swoosh_r
    _reduced_weights.keep(layer.weight, format)
    with torch.no_grad():
        y = ops.swoosh_linear(x, layer.weight, layer.bias, kind)
        torch.testing.assert_close(y, ops.linear(swoosh(x), layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
        strided = ops.swoosh_linear(x.transpose(0, 1), layer.weight, layer.bias, kind)
        assert torch.equal(strided, y.transpose(0, 1))


def test_rows_are_independent(layer):
    _reduced_weights.keep(layer.weight, "int8")
    x = torch.randn(33, 72, generator=numbers(3))
    together = product(layer, x)
    assert torch.equal(together, torch.cat([product(layer, row[None]) for row in x]))
    assert torch.equal(together, product(layer, torch.cat([x, 1000 * x]))[:33])


def test_strided_rows_and_no_bias(layer):
    _reduced_weights.keep(layer.weight, "int8")
    wide = torch.randn(6, 144, generator=numbers(4))
    with torch.no_grad():
        assert torch.equal(
            ops.linear(wide[:, 72:], layer.weight), ops.linear(wide[:, 72:].clone(), layer.weight)
        )
        assert torch.equal(
            ops.linear(wide[:, ::2], layer.weight), ops.linear(wide[:, ::2].clone(), layer.weight)
        )


def test_other_dtypes_and_other_weights_are_exact(layer):
    _reduced_weights.keep(layer.weight, "int8")
    x = torch.randn(4, 72, generator=numbers(5))
    half = layer.weight.detach()[:50]
    with torch.no_grad():
        assert torch.equal(ops.linear(x, half), F.linear(x, half))
        assert torch.equal(ops.linear(x[:, :0], half[:, :0]), F.linear(x[:, :0], half[:, :0]))
        assert ops.linear(x.double(), layer.weight.double()).dtype == torch.float64
    assert product(layer, x[:0]).shape == (0, 100)


def test_fused_ops_read_the_copy(layer):
    x = torch.randn(9, 72, generator=numbers(6))
    with torch.no_grad():
        exact = ops.linear_activation(x, layer.weight, layer.bias, activation="silu")
        _reduced_weights.keep(layer.weight, "int8")
        y = ops.linear_activation(x, layer.weight, layer.bias, activation="silu")
    assert 0 < relative(y, exact.double()) < 0.03
    assert torch.allclose(y, F.silu(product(layer, x)), atol=1e-5)


def test_parameter_made_in_inference_mode():
    with torch.inference_mode():
        layer = torch.nn.Linear(72, 100)
        x = torch.randn(9, 72, generator=numbers(8))
        exact = product(layer, x)
        _reduced_weights.keep(layer.weight, "int8")
        assert 0 < relative(product(layer, x), exact.double()) < 0.03
        layer.weight.mul_(-2)  # which torch does not count
        assert 0 < relative(product(layer, x), F.linear(x, layer.weight, layer.bias).double()) < 0.03
        _reduced_weights.drop(layer.weight)


def test_copy_follows_its_parameter(layer):
    x = torch.randn(9, 72, generator=numbers(7))
    _reduced_weights.keep(layer.weight, "int8")
    for change in (
        lambda: layer.weight.mul_(-3),
        lambda: setattr(layer.weight, "data", layer.weight.data.clone() + 1),
        lambda: layer.load_state_dict({"weight": torch.ones(100, 72), "bias": torch.zeros(100)}),
    ):
        with torch.no_grad():
            change()
        truth = F.linear(x.double(), layer.weight.detach().double(), layer.bias.detach().double())
        assert relative(product(layer, x), truth) < 0.03
        assert not torch.equal(product(layer, x), F.linear(x, layer.weight, layer.bias).detach())


@pytest.mark.parametrize("change", [lambda w: w.data, lambda w: w.data.clone()], ids=["in place", "moved"])
def test_threads_share_a_new_copy(layer, change):
    """All threads that meet a changed parameter at once read what one thread would."""
    x = torch.randn(9, 72, generator=numbers(12))
    _reduced_weights.keep(layer.weight, "int8")
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            with torch.no_grad():
                layer.weight.mul_(-1.5)
                layer.weight.data = change(layer.weight)
            found = list(pool.map(lambda _: product(layer, x), range(8)))
            _reduced_weights.keep(layer.weight, "int8")
            assert all(torch.equal(y, product(layer, x)) for y in found)


def test_view_of_a_pointwise_convolution():
    conv = torch.nn.Conv1d(72, 100, 1)
    x = torch.randn(9, 72, generator=numbers(8))
    with torch.no_grad():
        exact = ops.linear(x, conv.weight[..., 0], conv.bias)
        _reduced_weights.keep(conv.weight, "int8")
        assert 0 < relative(ops.linear(x, conv.weight[..., 0], conv.bias), exact.double()) < 0.03
    assert _reduced_weights.drop(conv.weight)


def test_copy_dies_with_its_parameter():
    layer = torch.nn.Linear(72, 100)
    copy = weakref.ref(_reduced_weights.keep(layer.weight, "bf16"))
    assert copy() in _reduced_weights.copies.values()
    del layer
    gc.collect()
    assert copy() is None


def test_suspended_and_dropped(layer):
    x = torch.randn(9, 72, generator=numbers(9))
    exact = product(layer, x)
    _reduced_weights.keep(layer.weight, "int8")
    with _reduced_weights.suspended(), ThreadPoolExecutor(1) as other:
        assert torch.equal(product(layer, x), exact)
        assert not torch.equal(other.submit(product, layer, x).result(), exact)  # for one thread alone
    assert not torch.equal(product(layer, x), exact)
    assert _reduced_weights.drop(layer.weight)
    assert not _reduced_weights.drop(layer.weight)
    assert torch.equal(product(layer, x), exact)


def test_not_finite(layer):
    x = torch.randn(4, 72, generator=numbers(10))
    x[2, 5] = float("nan")
    with torch.no_grad():
        layer.weight[7, 3] = float("inf")
    _reduced_weights.keep(layer.weight, "int8")
    bad = ~torch.isfinite(product(layer, x))
    assert bad[2].all()
    assert bad[:, 7].all()
    assert bad.sum() == 100 + 3


def test_packed_of_another_size_is_declined(layer):
    for packed in (torch.zeros(64), torch.zeros(64, dtype=torch.uint8)):
        with pytest.raises((ValueError, RuntimeError), match="another size"):
            torch.ops.fastasr_cpu.reduced_linear(torch.ones(2, 72), packed, None, 100, 2, 0)
    with pytest.raises((ValueError, RuntimeError), match="float32 matrix"):
        torch.ops.fastasr_cpu.reduced_pack(layer.weight.detach().double(), 2)
