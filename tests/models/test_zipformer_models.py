# SPDX-License-Identifier: Apache-2.0
"""Properties of the Zipformer classes that need no upstream package."""

import copy
import pickle

import pytest
import torch
from steps import close, moved, seeded

from fastasr.models import zipformer as models
from fastasr.models.common import convolutions
from fastasr.models.common.verdicts import Settled
from fastasr.models.zipformer.encoder import int_tuple
from fastasr.ops import balancer_gradient, whitening_gradient

TINY = {
    "downsampling_factor": (1, 2, 4),
    "encoder_dim": (24, 32, 28),
    "num_encoder_layers": (1, 2, 1),
    "encoder_unmasked_dim": (24, 24, 24),
    "query_head_dim": 8,
    "pos_head_dim": 4,
    "value_head_dim": 6,
    "num_heads": (2, 2, 4),
    "feedforward_dim": (32, 48, 48),
    "cnn_module_kernel": (7, 7, 5),
    "pos_dim": 16,
}
STREAMING = {**TINY, "causal": True, "chunk_size": (8,), "left_context_frames": (16,)}


def _encoder(config=TINY, **changes):
    """Returns an encoder none of whose parameters is at its initial 0 or 0.5."""
    seeded(0)
    return moved(models.Zipformer(**{**config, **changes}), 0.05).eval()


def test_the_front_end_reorders_the_weight_in_place_of_many_frames():
    seeded(0)
    out = torch.nn.Linear(128 * 4, 12).double()
    x = torch.randn(3, 10, 4, 128, dtype=torch.float64, requires_grad=True).permute(0, 3, 1, 2)
    operands = (x, out.weight, out.bias)
    found, wanted = convolutions.projected(out, x), out(convolutions.frames(x))
    assert found.is_contiguous()
    assert torch.allclose(found, wanted)
    grads = [torch.autograd.grad(y.square().sum(), operands) for y in (found, wanted)]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other)


def _padding(lengths, frames):
    return torch.arange(frames) >= lengths.unsqueeze(1)


@torch.inference_mode()
@pytest.mark.parametrize("config", [TINY, STREAMING], ids=["whole", "chunks"])
def test_padded_equals_unpadded_on_valid_frames(config):
    """This holds where the length is a multiple of the slowest stack's factor; otherwise padding frames are repeated
    frames.
    """
    encoder = _encoder(config)
    lengths = torch.tensor([40, 24, 8])
    x = torch.randn(40, 3, 24)
    y, y_lens = encoder(x, lengths, _padding(lengths, 40))
    for i, length in enumerate(lengths):
        alone, alone_lens = encoder(x[:length, i : i + 1], lengths[i : i + 1])
        assert alone_lens == y_lens[i]
        close(y[: y_lens[i], i], alone[:, 0], 5e-6)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [(48, 48), (8,)], ids=str)
def test_streaming_equals_chunked_forward(lengths):
    encoder = _encoder(STREAMING)
    batch, frames = len(lengths), lengths[0]
    x, lens = torch.randn(frames, batch, 24), torch.tensor(lengths)
    expected, _ = encoder(x, lens)
    states = encoder.get_init_states(batch)
    chunks = []
    for first in range(0, frames, 8):
        mask = torch.zeros(batch, 16 + 8, dtype=torch.bool)
        mask[:, : max(0, 16 - first)] = True  # left context from before the first frame
        y, y_lens, states = encoder.streaming_forward(
            x[first : first + 8], torch.full((batch,), 8), states, mask
        )
        assert y_lens.tolist() == [4] * batch
        chunks.append(y)
    close(torch.cat(chunks), expected, 5e-6)


@torch.inference_mode()
def test_front_end_streaming_equals_whole():
    """This holds away from the ends: there the whole pass sees zero padding where the stream sees frames or zeros."""
    embed = models.Conv2dSubsampling(20, 24, 4, 8, 16).eval()
    chunk, chunks = 16, 3
    x = torch.randn(2, chunk * chunks + 13, 20)
    whole, _ = embed(x, torch.tensor([x.shape[1]] * 2))
    cache, parts = embed.get_init_states(2), []
    for first in range(0, chunk * chunks, chunk):
        y, lens, cache = embed.streaming_forward(
            x[:, first : first + chunk + 13], torch.tensor([chunk + 13] * 2), cache
        )
        assert lens.tolist() == [chunk // 2] * 2
        parts.append(y)
    streamed = torch.cat(parts, 1)
    close(streamed, whole[:, : streamed.shape[1]], 5e-6)


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 9, 21])
def test_short_and_odd_inputs(frames):
    """There are fewer frames than taps, no multiple of a chunk or of a downsampling factor, and one sequence."""
    for config in (TINY, STREAMING):
        y, lens = _encoder(config)(torch.randn(frames, 1, 24), torch.tensor([frames]))
        assert y.shape == ((frames + 1) // 2, 1, 32)
        assert lens.tolist() == [(frames + 1) // 2]
        assert y.isfinite().all()


@torch.inference_mode()
def test_a_wholly_padded_sequence_is_finite():
    lengths = torch.tensor([12, 0])
    y, _ = _encoder()(torch.randn(12, 2, 24), lengths, _padding(lengths, 12))
    assert y.isfinite().all()


def test_training_and_inference_modes_agree_without_schedules():
    """With rates of 0 the differentiable path computes what the inference path does."""
    encoder = _encoder()
    x, lens = torch.randn(20, 2, 24), torch.tensor([20, 16])
    mask = _padding(lens, 20)
    y, _ = encoder(x, lens, mask)
    with torch.inference_mode():
        close(y.detach(), encoder(x, lens, mask)[0], 5e-6)
    y.sum().backward()
    assert all(
        p.grad is not None
        for n, p in encoder.named_parameters()
        if "layers" not in n or "bypass_scale" not in n
    )


@pytest.mark.parametrize("kind", [TINY, STREAMING], ids=["whole", "chunks"])
def test_bfloat16_autocast(kind):
    encoder = _encoder(kind)
    x, lens = torch.randn(24, 2, 24), torch.tensor([24, 16])
    expected, _ = encoder(x, lens, _padding(lens, 24))
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = encoder(x, lens, _padding(lens, 24))
        close(y.float(), expected, 0.1)
        loss = encoder.train()(x, lens, _padding(lens, 24))[0].float().sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


def test_strings_and_tuples_are_one():
    strings = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in TINY.items()
        if name != "pos_dim"
    }
    encoder = models.Zipformer(
        **strings, pos_dim=16, causal=True, chunk_size="8,-1", left_context_frames=[16, -1]
    )
    assert encoder.state_dict().keys() == _encoder(causal=True).state_dict().keys()
    assert (encoder.chunk_size, encoder.left_context_frames) == ((8, -1), (16, -1))
    assert encoder.num_heads == (2, 2, 4)
    assert int_tuple("x", 3) == (3,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_dim": (24, 32)}, "encoder_dim must have 1 or 3 values"),
        ({"num_heads": "2,two,4"}, "num_heads must be an int, ints or a string of ints"),
        ({"num_heads": (2.5,)}, "num_heads must be"),
        ({"encoder_unmasked_dim": 25}, "encoder_unmasked_dim must not exceed"),
        ({"cnn_module_kernel": 6}, "kernel_size must be odd"),
        ({"output_downsampling_factor": 4}, "output_downsampling_factor must be 2"),
        ({"pos_dim": 15}, "embed_dim must be even"),
    ],
)
def test_constructor_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        models.Zipformer(**{**TINY, **changes})


X, LENS = torch.zeros(16, 1, 24), torch.tensor([16])
WRONG_CALLS = {
    "chunk_size must be divisible": lambda: _encoder(STREAMING, chunk_size=6)(X, LENS),
    "left_context_frames must cover": lambda: _encoder(STREAMING, chunk_size=4, left_context_frames=4)(
        X, LENS
    ),
    "streaming needs left_context_frames": lambda: _encoder(
        STREAMING, left_context_frames=-1
    ).get_init_states(),
    "x must have 24 channels, got 23": lambda: _encoder().train()(X[..., :23], LENS),
    r"key_padding_mask must be \(1, 16\)": lambda: _encoder()(X, LENS, torch.zeros(2, 16, dtype=torch.bool)),
    r"attn_weights must be \(heads, 1, 16, 16\)": lambda: _layer().self_attn1(X, torch.rand(2, 1, 16, 15)),
    "chunk_size must not be 0": lambda: _CONV(torch.randn(1, 4, 6), 0),
    "cache must hold 2 frames, got 3": lambda: _CONV.streaming_forward(
        torch.randn(1, 4, 6), torch.randn(1, 4, 3)
    ),
    "Balancer: x must have 6 elements along dimension -1": lambda: models.Balancer(6, -1, prob=1.0)(
        torch.randn(2, 5, requires_grad=True)
    ),
    "at least one": models.PiecewiseLinear,
    "x must increase": lambda: models.PiecewiseLinear((0, 1), (0, 2)),
}
_CONV = models.ChunkCausalDepthwiseConv1d(4, 5)


def _layer():
    return _encoder().encoders[0].layers[0]


@pytest.mark.parametrize(("message", "call"), WRONG_CALLS.items(), ids=WRONG_CALLS)
def test_wrong_calls(message, call):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types():
    with pytest.raises(TypeError, match=r"attn_mask must be torch.bool"):
        _layer().self_attn_weights(X, torch.randn(1, 31, 16), attn_mask=torch.zeros(16, 16))
    with pytest.raises(TypeError, match="a number or a PiecewiseLinear"):
        models.PiecewiseLinear((0, 1)).max("1")


def test_copies_and_pickles():
    encoder = _encoder()
    x, lens = torch.randn(12, 1, 24), torch.tensor([12])
    expected = encoder(x, lens)[0]
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(copied(x, lens)[0], expected)


# --------------------------------------------------------------------------- regularisers
def test_regularisers_do_not_synchronise():
    """On the meta device reading a value raises."""
    x, grad = torch.randn(5, 4, 6, device="meta"), torch.randn(5, 4, 6, device="meta")
    assert balancer_gradient(grad, x, -1.0, 1.0, 0.1, 2.0, 0.04, -1).shape == x.shape
    y, white = whitening_gradient(grad, x, 2, 2.0, 0.1)
    assert (y.shape, white.shape) == (x.shape, ())


def test_whiten_reads_a_late_verdict():
    """The next call reads what a CUDA backward pass leaves behind; copies keep it."""
    whiten = models.Whiten(1, 5.0, (0.025, 0.25), 0.01)
    vars(whiten)["_verdict"] = Settled(True)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(whiten)))
    for module in (whiten, copied):
        assert module.prob == 0.25
        module(torch.randn(3, 2, 4, requires_grad=True))
        assert module.prob == 0.025


def test_a_balancer_without_gradients_returns_its_input():
    x = torch.randn(2, 5)
    assert models.Balancer(6, -1, prob=1.0)(x) is x
