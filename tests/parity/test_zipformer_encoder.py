# SPDX-License-Identifier: Apache-2.0
"""The whole encoder against the ``zipformer`` package: module trees, states, inference, streaming, training."""

import copy
import random

import pytest
import torch
from steps import as_near, close, draws, moved, same_step, same_tree, seeded, set_batch_count
from upstream_precision import computing_in

pytest.importorskip("zipformer", reason="upstream's package is not installed")

import tiny_encoders as tiny
from zipformer.modules import subsampling as their_subsampling
from zipformer.modules import zipformer as theirs
from zipformer.utils import make_pad_mask

from fastasr.models import zipformer as ours


def _twins(config, **changes):
    """Returns both encoders with one set of parameters, in eval mode."""
    seeded(0)
    their_encoder = moved(theirs.Zipformer(**{**config, **changes}), 0.05, 3).eval()
    our_encoder = ours.Zipformer(**{**config, **changes}).eval()
    our_encoder.load_state_dict(their_encoder.state_dict(), strict=True)
    return our_encoder, their_encoder


@pytest.mark.parametrize("kind", [*tiny.CONFIGS, "front end"])
def test_same_modules_same_initial_state_same_draws(kind):
    made = []
    for upstream in (False, True):
        seeded(5)
        if kind == "front end":
            module = their_subsampling if upstream else ours
            made.append((module.Conv2dSubsampling(20, 24, 4, 8, 16), draws()))
        else:
            made.append(((theirs if upstream else ours).Zipformer(**tiny.CONFIGS[kind]), draws()))
    assert made[0][1] == made[1][1]
    same_tree(made[0][0], made[1][0])


@pytest.mark.parametrize("lengths", [(37, 30, 12), (41,), (9, 3), (2,), (1,)], ids=str)
@pytest.mark.parametrize("config", tiny.CONFIGS.values(), ids=tiny.CONFIGS)
def test_inference(config, lengths):
    """Batches are padded or B = 1, with fewer frames than the convolutions have taps, and any chunk size
    that is drawn.
    """
    our_encoder, their_encoder = _twins(config)
    x, lens, mask = tiny.batch(lengths)
    with torch.inference_mode():
        for seed in range(3):
            random.seed(seed)
            expected, expected_lens = their_encoder(x, lens, mask)
            state = random.getstate()
            random.seed(seed)
            y, y_lens = our_encoder(x, lens, mask)
            assert random.getstate() == state
            assert torch.equal(y_lens, expected_lens)
            close(y, expected, 5e-6)
    with_gradients = []
    for model in (our_encoder, their_encoder):
        random.seed(0)
        with_gradients.append(model(x, lens)[0])
    close(*with_gradients, 5e-6)


@pytest.mark.parametrize("scheduled", [None, 0.0, 5000.0])
@pytest.mark.parametrize("config", tiny.CONFIGS.values(), ids=tiny.CONFIGS)
def test_training_step(config, scheduled):
    """Loss, every gradient and every draw agree, with dropout, skipped layers and all regularisers at work."""
    models = [set_batch_count(m.double().train(), scheduled) for m in _twins(config)]
    for seed in range(2):
        _same_steps(models, tiny.batch(dtype=torch.float64), seed, 1e-7)


@pytest.mark.parametrize("config", tiny.CONFIGS.values(), ids=tiny.CONFIGS)
def test_training_step_fp32(config):
    models = [set_batch_count(m.train(), 2000.0) for m in _twins(config)]
    for seed in range(2):
        _same_steps(models, tiny.batch(), seed, 1e-3)


def _same_steps(models, inputs, seed, tolerance):
    """Compares values, draws, and gradients: sums that cancel by the size of gradients at large."""
    with computing_in(inputs[0].dtype):
        same_step(*models, *inputs, tolerance=tolerance, seed=seed, share=1e-4)


def test_front_end_and_encoder_train_together():
    seeded(0)
    their_embed = moved(their_subsampling.Conv2dSubsampling(20, 24, 4, 8, 16, dropout=0.5), 0.05, 3)
    our_embed = ours.Conv2dSubsampling(20, 24, 4, 8, 16, dropout=0.5)
    our_embed.load_state_dict(their_embed.state_dict())
    our_encoder, their_encoder = _twins(tiny.SMALL)
    ours_then_theirs = [_Recogniser(our_embed, our_encoder), _Recogniser(their_embed, their_encoder)]
    for model in ours_then_theirs:
        set_batch_count(model.double().train(), 500.0)
    x, lens, _ = tiny.batch((60, 52), channels=20, dtype=torch.float64)
    for seed in range(3):
        _same_steps(ours_then_theirs, (x.transpose(0, 1), lens), seed, 1e-7)


class _Recogniser(torch.nn.Module):
    def __init__(self, embed, encoder):
        super().__init__()
        self.encoder_embed, self.encoder = embed, encoder

    def forward(self, x, x_lens):
        x, x_lens = self.encoder_embed(x, x_lens)
        return self.encoder(x.transpose(0, 1), x_lens, make_pad_mask(x_lens))


@pytest.mark.parametrize("lengths", [(32, 32), (8,), (24, 24, 24)], ids=str)
def test_streaming(lengths):
    """Every chunk's output and all states agree."""
    our_encoder, their_encoder = _twins(tiny.STREAMING)
    x, _, _ = tiny.batch(lengths)
    states, their_states = (m.get_init_states(batch_size=len(lengths)) for m in (our_encoder, their_encoder))
    assert [s.shape for s in states] == [s.shape for s in their_states]
    with torch.inference_mode():
        for first in range(0, lengths[0], 8):
            chunk, lens = x[first : first + 8], torch.full((len(lengths),), 8)
            mask = torch.cat([torch.arange(16)[None] < 16 - first, torch.zeros(1, 8, dtype=torch.bool)], 1)
            mask = mask.expand(len(lengths), -1)
            expected, expected_lens, their_states = their_encoder.streaming_forward(
                chunk, lens, their_states, mask
            )
            y, y_lens, states = our_encoder.streaming_forward(chunk, lens, states, mask)
            assert torch.equal(y_lens, expected_lens)
            close(y, expected, 5e-6)
            for i, (state, their_state) in enumerate(zip(states, their_states, strict=True)):
                close(state, their_state, 5e-6, i)


def test_front_end_streaming():
    seeded(0)
    their_embed = moved(their_subsampling.Conv2dSubsampling(20, 24, 4, 8, 16), 0.05, 3).eval()
    our_embed = ours.Conv2dSubsampling(20, 24, 4, 8, 16).eval()
    our_embed.load_state_dict(their_embed.state_dict())
    exact_embed = copy.deepcopy(their_embed).double()
    cache, their_cache, exact_cache = (m.get_init_states(2) for m in (our_embed, their_embed, exact_embed))
    assert cache.shape == their_cache.shape
    x = tiny.batch((16 * 3 + 13,) * 2, channels=20)[0].transpose(0, 1)
    with torch.inference_mode():
        for first in range(0, 48, 16):
            chunk, lens = x[:, first : first + 29], torch.full((2,), 29)
            expected, expected_lens, their_cache = their_embed.streaming_forward(chunk, lens, their_cache)
            y, y_lens, cache = our_embed.streaming_forward(chunk, lens, cache)
            exact, _, exact_cache = exact_embed.streaming_forward(chunk.double(), lens, exact_cache.double())
            assert torch.equal(y_lens, expected_lens)
            as_near(y, expected, exact)
            as_near(cache, their_cache, exact_cache)


def test_batch_count_reaches_the_same_schedules():
    our_encoder, their_encoder = _twins(tiny.SMALL)
    for model in (our_encoder, their_encoder):
        set_batch_count(model.train(), 700.0)

    def rates(model):
        return {
            name: (float(module), module.name)
            for name, module in model.named_modules()
            if type(module).__name__ == "ScheduledFloat"
        }

    found = rates(our_encoder)
    assert found == rates(their_encoder)
    assert len(found) > 100


def test_training_after_deepcopy():
    """Model averaging keeps a deep copy; schedules shared within a layer stay shared."""
    model = copy.deepcopy(set_batch_count(_twins(tiny.SMALL)[0], 300.0)).train()
    layer = model.encoders[0].layers[0]
    rate = layer.feed_forward1.out_proj.dropout_p
    assert rate is layer.feed_forward3.out_proj.dropout_p
    assert rate is not model.encoders[0].layers[1].feed_forward1.out_proj.dropout_p
    x, lens, mask = tiny.batch()
    model(x, lens, mask)[0].sum().backward()


@pytest.mark.long
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", ["S", "M"])
def test_published_sizes(size, causal):
    common = {
        "downsampling_factor": "1,2,4,8,4,2",
        "query_head_dim": 32,
        "value_head_dim": 12,
        "pos_head_dim": 4,
        "num_heads": "4,4,4,8,4,4",
        "pos_dim": 48,
        "cnn_module_kernel": "31,31,15,15,15,31",
    }
    sizes = {
        "S": {
            "encoder_dim": "192,256,256,256,256,256",
            "num_encoder_layers": "2,2,2,2,2,2",
            "encoder_unmasked_dim": 192,
            "feedforward_dim": "512,768,768,768,768,768",
        },
        "M": {
            "encoder_dim": "192,256,384,512,384,256",
            "num_encoder_layers": "2,2,3,4,3,2",
            "encoder_unmasked_dim": "192,192,256,256,256,192",
            "feedforward_dim": "512,768,1024,1536,1024,768",
        },
    }
    streams = {"chunk_size": "32", "left_context_frames": "128"} if causal else {}
    config = {**common, **sizes[size], **streams, "causal": causal}

    def tuples(value):
        return tuple(map(int, value.split(","))) if isinstance(value, str) else value

    upstream_config = {name: tuples(value) for name, value in config.items()}
    seeded(0)
    their_encoder = theirs.Zipformer(**upstream_config)
    seeded(0)
    our_encoder = ours.Zipformer(**config)
    for name, value in their_encoder.state_dict().items():
        assert torch.equal(value, our_encoder.state_dict()[name]), name
    inputs = tiny.batch((150, 97), channels=192)
    with torch.inference_mode():
        y, expected = (m.eval()(*inputs)[0] for m in (our_encoder, their_encoder))
    close(y, expected, 2e-5)
    models = [set_batch_count(m.train(), 2000.0) for m in (our_encoder, their_encoder)]
    _same_steps(models, inputs, 1, 2e-3)
