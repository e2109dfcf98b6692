# SPDX-License-Identifier: Apache-2.0
"""Products of float32 are exact to float32, or in TF32 where torch's setting allows it, forward and backward."""

import pytest
import torch
from steps import numbers
from triton._C.libtriton import ir

import fastasr
from fastasr.kernels._launch import PRECISE, ROUNDED, dot_options
from fastasr.testing import Make, tables
from fastasr.testing.table import flat, floating
from tests.kernels.interpreter import repair

OPS = (
    *(
        "conv_subsampling",
        "layer_norm_lstm",
        "rel_attention",
        "rnnt_joiner",
        "segment_attention",
        "tdt_joiner",
        "toeplitz_attention",
    ),
    *("zipformer_attention", "zipformer_attention_weights"),
)
SAMPLES = [
    pytest.param(tables()[op], sample, id=f"{op}-{sample.name}".replace(" ", "_"))
    for op in OPS
    for sample in tables()[op].thorough[:2]
    if sample.exact
]


@pytest.fixture(params=["ieee", "tf32"])
def setting(request, monkeypatch):
    torch.backends.cuda.matmul.fp32_precision = request.param
    monkeypatch.setattr(repair, "PRECISIONS", set())
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = "none"


def _results(f, arguments, dtype) -> list[torch.Tensor]:
    """Returns values and gradients."""
    arguments = {
        name: v.detach().to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for name, v in arguments.items()
    }
    tensors = {name: t.requires_grad_() for name, t in floating(arguments).items()}
    y = flat(f(**arguments | tensors))
    y = torch.where(y.isfinite(), y, 0)
    weights = torch.randn(y.shape, generator=numbers("weights"), dtype=torch.float64)
    grads = torch.autograd.grad(y, list(tensors.values()), weights.to(y.dtype), allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize(("table", "sample"), SAMPLES)
def test_products_of_float32(table, sample, setting):
    arguments = sample.arguments(Make(torch.float32))
    with fastasr.backend("triton"):
        found = _results(table.function, arguments, torch.float32)
    assert {getattr(ir.INPUT_PRECISION, setting.upper())} == repair.PRECISIONS
    wide = _results(table.definition, arguments, torch.float64)
    pairs = [(a, b) for a, b in zip(found, wide, strict=True) if b.numel()]
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs]
    # 13 bits less of each operand; a norm of few numbers and the tails of softmax enlarge what they are given
    low, high = {"ieee": (0, 2e-5), "tf32": (2e-5, 0.1)}[setting]
    assert low < max(errors) < high, errors


def test_the_setting_of_torch():
    matmul = torch.backends.cuda.matmul
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert dot_options(torch.float32) == (ROUNDED if allowed else PRECISE)
            assert dot_options(torch.bfloat16) == PRECISE
    finally:
        matmul.fp32_precision = "none"
