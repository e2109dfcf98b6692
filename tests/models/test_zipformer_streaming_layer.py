# SPDX-License-Identifier: Apache-2.0
"""A chunk through a layer in one native call: it gives what the submodules give, and runs only where it may."""

import copy
from functools import partial

import pytest
import torch
from packed_layers import assert_near, check_declined, chunk_of, zipformer_layer

from fastasr.models.zipformer import native_layer
from fastasr.models.zipformer.layer import _stream_by_submodules
from fastasr.models.zipformer.packing import PRODUCTS, EncoderSizes, ZipformerSizes

_layer = partial(zipformer_layer, causal=True)


def _wide(chunk):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in chunk]


def _by_submodules(layer, chunk):
    x, pos_emb, *states, left, masked = chunk
    return _stream_by_submodules(layer, x, pos_emb, states, left, masked)


def _step(layer, chunk):
    x, pos_emb, *states, left, masked = chunk
    by_submodules = partial(_stream_by_submodules, layer)
    return native_layer.step(layer, x, pos_emb, states, left, masked, by_submodules)


def _served(layer, chunk):
    """Returns the native call's result and requires that it serves."""
    out = _step(layer, chunk)
    assert out is not None, native_layer.why_not(layer)
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    ("dim", "kernel", "frames", "streams", "left"),
    [(20, 7, 4, 2, 6), (20, 7, 1, 1, 9), (32, 3, 9, 3, 4), (32, 9, 5, 1, 0), (68, 31, 2, 2, 3)],
)
def test_a_chunk(dim, kernel, frames, streams, left):
    """Left contexts are longer and shorter than the chunk, or absent; chunks are shorter than the convolution."""
    layer = _layer(dim, kernel)
    exact = copy.deepcopy(layer).double()
    masks = torch.rand(streams, left + frames) < 0.3
    for masked in (None, masks, torch.zeros_like(masks), torch.ones_like(masks)):
        chunk = chunk_of(layer, frames, streams, left, masked)
        got = _served(layer, chunk)
        assert_near(got, _by_submodules(exact, _wide(chunk)))
        assert all(torch.equal(a, b) for a, b in zip(layer.streaming_forward(*chunk), got, strict=True))


def test_sizes_and_products_have_the_names_of_the_native_structs():
    names = [part.split() for part in torch.ops.fastasr_cpu.zipformer_chunk_names().split("|")]
    assert names == [list(EncoderSizes._fields), list(ZipformerSizes._fields), list(PRODUCTS)]


@torch.no_grad()
def test_streams_and_threads_change_no_bit():
    layer = _layer(96, 15)
    *tensors, left, _ = chunk_of(layer, 8, 3, 5)
    x, pos_emb, key, hidden, val1, val2, conv1, conv2 = tensors
    together = _served(layer, (*tensors, left, None))
    torch.set_num_threads(2)
    again = _served(layer, (*tensors, left, None))
    one = slice(1, 2)
    by_stream = (
        x[:, one],
        pos_emb,
        key[:, one],
        hidden[:, one],
        val1[:, one],
        val2[:, one],
        conv1[one],
        conv2[one],
    )
    alone = _served(layer, (*by_stream, left, None))
    for i, (a, b, c) in enumerate(zip(together, again, alone, strict=True)):
        assert torch.equal(a, b)
        assert torch.equal(a[one] if i > 4 else a[:, one], c)


def _declined(layer, chunk):
    return _step(layer, chunk) is None


def test_what_is_declined():
    layer = _layer()
    chunk = chunk_of(layer)
    x, pos_emb, *rest = chunk
    others = chunk_of(layer, frames=65), (x, pos_emb.expand(2, -1, -1), *rest)
    trained = layer.feed_forward3.out_proj
    check_declined(
        layer, chunk, _declined, lambda: layer.streaming_forward(*chunk), layer.norm, trained, others
    )
    with torch.no_grad():
        assert _declined(layer.double(), _wide(chunk))
        assert not _declined(layer.float(), chunk)


@torch.no_grad()
def test_a_submodule_that_computes_something_else_is_called():
    layer = _layer()
    chunk = chunk_of(layer)
    forward = layer.feed_forward1.forward
    layer.feed_forward1.forward = lambda x: 2.0 * forward(x)
    assert _declined(layer, chunk)
    assert native_layer.why_not(layer)["streaming_forward"].startswith(
        "feed_forward1 runs code that is neither torch's"
    )
    del layer.feed_forward1.forward
    assert not _declined(layer, chunk)
    layer.nonlin_attention.in_proj = torch.nn.Sequential(layer.nonlin_attention.in_proj).eval()
    assert _declined(layer, chunk)
    assert (
        native_layer.why_not(layer)["streaming_forward"] == "nonlin_attention.in_proj is not a plain Linear"
    )
    layer.streaming_forward(*chunk)
