# SPDX-License-Identifier: Apache-2.0
"""Conformers of ESPnet, NeMo, SpeechBrain, torchaudio and transformers: each swapped module has upstream's values,
gradients and draws, in training and in eval, and a whole model has upstream's outputs."""

import pytest
import torch
from steps import close, moved, same_step, seeded, swapped
from tiny_conformers import (
    WIDTH,
    call,
    espnet_conformer,
    fastspeech2_conformer,
    nemo_conformer,
    speechbrain_conformer,
    torchaudio_conformer,
    wav2vec2_conformer,
)

import fastasr
from fastasr.swap import binding

MODELS = {
    "nemo": (nemo_conformer, {"ConformerConvolution", "ConformerFeedForward"}),
    "speechbrain": (speechbrain_conformer, {"ConvolutionModule", "PositionalwiseFeedForward"}),
    "espnet": (espnet_conformer, {"ConvolutionModule", "PositionwiseFeedForward"}),
    "torchaudio": (torchaudio_conformer, {"_ConvolutionModule", "_FeedForwardModule"}),
    "wav2vec2": (wav2vec2_conformer, {"Wav2Vec2ConformerConvolutionModule", "Wav2Vec2ConformerFeedForward"}),
    "fastspeech2": (fastspeech2_conformer, {"FastSpeech2ConformerConvolutionModule"}),
}


def model(name, **options):
    """Returns the model in float64 with parameters and statistics away from their first values."""
    seeded(0)
    made = moved(MODELS[name][0](**options), 0.1).double()
    for key, buffer in made.named_buffers():
        if key.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif key.endswith("running_mean"):
            buffer.normal_()
    return made


def modules(net, name):
    return {path: m for path, m in net.named_modules() if type(m).__name__ in MODELS[name][1]}


def pair(name, training, **options):
    theirs = model(name, **options).train(training)
    return swapped(theirs), theirs


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_modules(name, training):
    ours, theirs = pair(name, training)
    x = torch.randn(3, 21, WIDTH, dtype=torch.float64)
    swapped = modules(ours, name)
    assert {type(m).__name__ for m in swapped.values()} == MODELS[name][1]
    for path, module in swapped.items():
        same_step(module, theirs.get_submodule(path), x, tolerance=1e-10, share=1.0)
        close(module.buffers(), theirs.get_submodule(path).buffers(), 1e-10, path)


class Chunks(torch.nn.Module):
    """Calls SpeechBrain's convolution module with dynamic chunks."""

    def __init__(self, module, chunk_size):
        super().__init__()
        dynamic = pytest.importorskip("speechbrain.utils.dynamic_chunk_training")
        self.module, self.config = module, chunk_size and dynamic.DynChunkTrainConfig(chunk_size)

    def forward(self, x):
        hidden = torch.arange(x.shape[1])[:, None] >= torch.tensor([21, 13, 1])[:, None, None]
        return self.module(x, hidden, dynchunktrain_config=self.config)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "chunk_size", [None, 1, 4, 7, 30], ids=lambda size: f"chunks of {size}" if size else "causal"
)
def test_speechbrain_chunks_and_causal_convolutions(chunk_size, training, monkeypatch):
    ours, theirs = pair("speechbrain", training, causal=chunk_size is None)
    made = [Chunks(net.layers[0].convolution_module, chunk_size) for net in (ours, theirs)]
    x = torch.randn(3, 21, WIDTH, dtype=torch.float64)
    same_step(*made, x, tolerance=1e-10, share=1.0)
    monkeypatch.setattr(type(made[1].module), "forward", None)  # ours does not need it
    made[0](x)


def test_speechbrain_stream():
    """Chunk by chunk as upstream, and as the whole recording with the mask of chunks and their convolution."""
    dynamic = pytest.importorskip("speechbrain.utils.dynamic_chunk_training")
    from speechbrain.lobes.models.transformer.TransformerASR import make_transformer_src_mask
    from speechbrain.nnet.attention import RelPosEncXL

    config, frames = dynamic.DynChunkTrainConfig(4, 2), 22
    nets = [net.float() for net in pair("speechbrain", training=False)]
    positions, x = RelPosEncXL(WIDTH), torch.randn(2, frames, WIDTH)
    contexts = [net.make_streaming_context(config) for net in nets]
    wholes, streams = [], ([], [])
    with torch.no_grad():
        for net in nets:
            mask = make_transformer_src_mask(x, dynchunktrain_config=config)
            wholes.append(net(x, src_mask=mask, pos_embs=positions(x), dynchunktrain_config=config)[0])
        for begin in range(0, frames, 4):
            chunk = x[:, begin : begin + 4]
            table = positions(torch.zeros(1, min(begin, 8) + chunk.shape[1], WIDTH))
            for net, context, found in zip(nets, contexts, streams, strict=True):
                found.append(net.forward_streaming(chunk, context, pos_embs=table)[0])
    ours, theirs = (torch.cat(found, 1) for found in streams)
    for found, expected in ((ours, theirs), (wholes[0], wholes[1]), (ours, wholes[0])):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_group_norm_and_order():
    for options in ({"use_group_norm": True}, {"convolution_first": True}):
        ours, theirs = pair("torchaudio", training=True, dropout=0.0, **options)
        x, lengths = torch.randn(3, 21, WIDTH, dtype=torch.float64), torch.tensor([21, 13, 5])
        close(call("torchaudio", ours, x, lengths), call("torchaudio", theirs, x, lengths), 1e-10)


def test_another_module_in_the_sequence_is_declined():
    net = model("torchaudio").eval()
    net.conformer_layers[0].ffn1.sequential[2] = torch.nn.ReLU()
    report = fastasr.accelerate(net)
    reasons = [row.reason for row in report.skipped if row.path == "conformer_layers.0.ffn1"]
    assert reasons == ["submodule sequential.2 is a ReLU, expected SiLU"]


ATTENTION = {
    "espnet": "encoders.0.self_attn",
    "fastspeech2": "conformer_layers.0.self_attn",
    "nemo": "layers.0.self_attn",
    "speechbrain": "layers.0.mha_layer",
    "wav2vec2": "layers.0.self_attn",
}
LENGTHS = {"no mask": None, "all valid": (21, 21, 21), "padded": (21, 13, 1)}


def attention(name, module, x, lengths):
    """Calls an attention module as its encoder does, on x (B, T, width), and returns its output."""
    frames = x.shape[1]
    table = torch.linspace(-1, 1, (2 * frames - 1) * WIDTH, dtype=x.dtype).sin().view(1, -1, WIDTH)
    seen = None if lengths is None else torch.arange(frames) < torch.tensor(lengths)[:, None]
    if name == "wav2vec2":
        mask = None if seen is None else seen[:, None, None].expand(-1, 1, frames, -1)
        return module(x, mask, relative_position_embeddings=table)[0]
    if name == "fastspeech2":
        return module(x, None if seen is None else seen[:, None].int(), table)[0]
    if name == "espnet":
        return module(x, x, x, table, torch.ones(1, 1, frames) if seen is None else seen[:, None])
    if name == "nemo":
        return module(x, x, x, None if seen is None else ~(seen[:, None] & seen[:, :, None]), table)
    return module(x, x, x, table, None if seen is None else ~seen)[0]


class Attention(torch.nn.Module):
    def __init__(self, name, module, lengths):
        super().__init__()
        self.module, self.call = module, lambda x: attention(name, module, x, lengths)

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, training, lengths):
    """In training with upstream's draws of the dropout."""
    ours, theirs = pair(name, training)
    assert binding.bound_forward(ours.get_submodule(ATTENTION[name])) is not None
    x, tolerance = torch.randn(3, 21, WIDTH, dtype=torch.float64), 1e-10
    if name == "speechbrain":
        ours, theirs, x, tolerance = ours.float(), theirs.float(), x.float(), 2e-5
    made = [Attention(name, net.get_submodule(ATTENTION[name]), lengths) for net in (ours, theirs)]
    with fastasr.upstream_draws():
        same_step(*made, x, tolerance=tolerance, share=1.0)
    for net in made:
        net.train(training).module.get_submodule(
            "dropout_att" if name == "speechbrain" else "dropout"
        ).p = 0.0
    same_step(*made, x, tolerance=tolerance, share=1.0)
