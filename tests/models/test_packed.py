# SPDX-License-Identifier: Apache-2.0
"""Operations on packed frames that one call does for all recordings: values and gradients are those of the same
operation on each recording alone."""

import pytest
import torch
from steps import close, numbers

from fastasr import ops
from fastasr.models.common.ragged import Packing
from fastasr.models.fast_conformer.attention import of_recordings
from fastasr.models.zipformer.packed_weights import of_one_call
from fastasr.models.zipformer.self_attention import weighted
from fastasr.ops import _dispatch
from fastasr.ops._wrapped.swoosh_linear import with_mask

LENGTHS = [70, 0, 13, 1, 13, 140, 2]
PACKING = Packing(LENGTHS, torch.device("cpu"))
pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="the native library is not built")
of_every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=numbers(seed)).to(dtype).requires_grad_()


def recordings(rows, lengths=LENGTHS):
    return [one for one in rows.split(lengths) if len(one)]


def same(found, expected, inputs, tolerance):
    """``inputs`` get the same gradients from both."""
    close(found, expected, tolerance)
    weight = torch.randn(found.shape, generator=numbers(9)).to(found.dtype)
    grads = (torch.autograd.grad((y * weight).sum(), inputs) for y in (found, expected))
    for a, b in zip(*grads, strict=True):
        close(a, b, tolerance)


@of_every_dtype
@pytest.mark.parametrize(
    ("taps", "delay", "activation"),
    [(9, 0, "silu"), (31, 0, "swoosh_r"), (5, -1, "identity"), (4, 1, "silu")],
)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(dtype, taps, delay, activation, bias):
    h, weight = drawn(sum(LENGTHS), 1, 88, dtype=dtype), drawn(44, 1, taps, dtype=dtype, seed=1)
    parameters = [weight, drawn(44, dtype=dtype, seed=2)] if bias else [weight]
    options = {"activation": activation, "delay": delay}
    found = ops.gated_depthwise_conv(h, *parameters, starts=PACKING.starts, **options)
    expected = torch.cat([ops.gated_depthwise_conv(one, *parameters, **options) for one in recordings(h)])
    if dtype is torch.float32:
        assert torch.equal(found, expected)  # A recording's bits do not depend on the others.
    same(found, expected, [h, *parameters], TOLERANCES[dtype])


@of_every_dtype
@pytest.mark.parametrize("span", [None, (9, 20)])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_attention(dtype, span, backend):
    heads, dim, longest = 3, 20, max(LENGTHS)
    q, k, v = (drawn(sum(LENGTHS), heads, dim, dtype=dtype, seed=i) for i in range(3))
    rows = (2 * longest - 1, heads) if span is None else (sum(span) + 1, 1)
    pos = drawn(*rows, dim, dtype=dtype, seed=3)
    biases = [] if span else [drawn(heads, dim, dtype=dtype, seed=i) for i in (4, 5)]
    with _dispatch.backend(backend):
        found = of_recordings(PACKING, q, k, v, pos, *(biases or (None, None)), 0.0, span)
    expected = []
    for n, *one in zip(LENGTHS, *(t.split(LENGTHS) for t in (q, k, v)), strict=True):
        table = pos[longest - n : longest - 1 + n] if span is None else pos
        options = {} if span is None else {"pos_span": span}
        if n:
            expected.append(ops.rel_attention(*(t[None] for t in one), table, *biases, **options)[0])
    if dtype is torch.float32 and backend == "auto":
        assert torch.equal(found, torch.cat(expected))  # A recording's bits do not depend on the others.
    same(found, torch.cat(expected), [q, k, v, pos, *biases], TOLERANCES[dtype])


def test_dropout_of_attention():
    """Recordings of equal queries, keys and values drop different weights."""
    frames, heads, dim = 30, 2, 8
    q, k, v = (drawn(frames, heads, dim, seed=i).repeat(2, 1, 1) for i in range(3))
    packing = Packing([frames, frames], q.device)
    for backend in ("auto", "eager"):
        with _dispatch.backend(backend):
            y = of_recordings(packing, q, k, v, drawn(2 * frames - 1, heads, dim), None, None, 0.5)
        one, other = y.split(frames)
        assert not torch.isclose(one, other).all(-1).any()


@of_every_dtype
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_activation_with_a_mask_for_each_recording(dtype, backend):
    x, weight, bias = (drawn(*shape, dtype=dtype) for shape in ((sum(LENGTHS), 1, 40), (24, 40), (24,)))
    mask = (torch.rand(len(LENGTHS), 40, generator=numbers(3)) > 0.4).to(dtype) * 1.5
    with _dispatch.backend(backend):
        found = with_mask(x, weight, bias, "SwooshL", mask, PACKING.recording.unsqueeze(1))
    parts = zip(x.split(LENGTHS), mask, strict=True)
    expected = torch.cat(
        [with_mask(one, weight, bias, "SwooshL", m.repeat(len(one), 1, 1)) for one, m in parts]
    )
    same(found, expected, [x, weight, bias], TOLERANCES[dtype])


@of_every_dtype
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (8, 2)], ids=["whole", "chunks"])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [LENGTHS, [20, 0, 13, 1, 13]], ids=["long", "short"])
def test_zipformers_weights_and_their_sums(dtype, positions, window, penalty, lengths):
    heads, dim, longest, frames = 3, 8, max(lengths), sum(lengths)
    x = drawn(frames, 1, heads * (2 * dim + 4), dtype=dtype)
    pos = drawn(1, 2 * longest - 1, heads * 4, dtype=dtype, seed=1) if positions else None
    values = drawn(frames, 1, heads * 6, dtype=dtype, seed=2)
    projected = drawn(frames, 1, 3 * 20, dtype=dtype, seed=3)
    masks = dict(zip(("chunk_size", "left_context_chunks"), window, strict=True))
    weights = of_one_call(Packing(lengths, x.device), x, pos, heads, dim, masks, penalty, 2.0)
    found = weights.weighted(values), weights[0:1].gated(projected)
    sums, gated = [], []
    for one, v, p in zip(*(recordings(rows, lengths) for rows in (x, values, projected)), strict=True):
        rows = None if pos is None else pos[:, longest - len(one) : longest - 1 + len(one)]
        w = ops.zipformer_attention_weights(
            one, rows, heads, dim, score_penalty=penalty, score_limit=2.0, **masks
        )
        sums.append(weighted(w, v))
        gated.append(ops.nonlin_attention(w[0], p))
    inputs = [t for t in (x, pos, values, projected) if t is not None]
    both = (torch.cat([a, b], -1) for a, b in (found, (torch.cat(sums), torch.cat(gated))))
    same(*both, inputs, TOLERANCES[dtype])


def test_the_number_of_threads_changes_nothing():
    h, weight = drawn(sum(LENGTHS), 1, 128), drawn(64, 1, 9, seed=1)
    q = drawn(sum(LENGTHS), 2, 16)
    pos, bias = drawn(2 * max(LENGTHS) - 1, 2, 16, seed=2), drawn(2, 16, seed=3)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y = ops.gated_depthwise_conv(h, weight, starts=PACKING.starts)
        z = of_recordings(PACKING, q, q, q, pos, bias, bias, 0.0)
        grads = torch.autograd.grad(y.sin().sum() + z.sin().sum(), [h, weight, q, pos, bias])
        results.append((y, z, *grads))
    assert all(map(torch.equal, *results))
