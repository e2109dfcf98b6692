# SPDX-License-Identifier: Apache-2.0
"""NeMo's Conformer swapped: the front end, masks of every attention context, streaming's caches, and what is declined.
``tests/parity/test_conformer.py`` compares module by module."""

import copy

import nemo_encoder
import pytest
import torch
from steps import close, moved, numbers, same_step, seeded

import fastasr

SIZES = {
    "feat_in": 16,
    "n_layers": 2,
    "d_model": 24,
    "n_heads": 3,
    "ff_expansion_factor": 2,
    "conv_kernel_size": 5,
    "subsampling": "dw_striding",
    "subsampling_factor": 8,
    "subsampling_conv_channels": 8,
}
RATES = ("dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att")
SWAPPED = {"ConformerConvolution", "ConformerFeedForward", "ConvSubsampling", "RelPositionMultiHeadAttention"}


def encoder(dropout=0.0, **options):
    seeded("encoder")  # each call the same weights
    made = nemo_encoder.load().ConformerEncoder(**{**SIZES, **dict.fromkeys(RATES, dropout), **options})
    return moved(made, 0.03).eval()


def batch(lengths=(75, 50, 9)):
    x = torch.randn(len(lengths), SIZES["feat_in"], max(lengths), generator=numbers("batch"))
    return {"audio_signal": x, "length": torch.tensor(lengths)}


def pair(**options):
    theirs = encoder(**options)
    ours = copy.deepcopy(theirs)
    return ours, theirs, fastasr.accelerate(ours)


def swapped(report):
    return {row.class_name for row in report.replaced} - {"Linear"}


class ByPosition(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, lengths):
        return self.model(audio_signal=x, length=lengths)


LOCAL = {"self_attention_model": "rel_pos_local_attn", "att_context_size": [3, 3]}
OPTIONS = {
    "full": {},
    "window": {"att_context_size": [4, 2]},
    "chunks": {"att_context_size": [4, 1], "att_context_style": "chunked_limited"},
    "tied biases": {"untie_biases": False},
    "sdpa": {"use_pytorch_sdpa": True},
    "sdpa, window": {"use_pytorch_sdpa": True, "att_context_size": [4, 2]},
    "no scale, no biases": {"xscaling": False, "use_bias": False},
    "layer norm": {"conv_norm_type": "layer_norm"},
    "group norm": {"conv_norm_type": "group_norm2"},
    "instance norm": {"conv_norm_type": "instance_norm"},
    "fused batch norm": {"conv_norm_type": "fused_batch_norm"},
    "few positions": {"pos_emb_max_len": 8},
    # Upstream splits batches of long recordings; here one pass serves them.
    "no splits": {"subsampling_conv_chunking_factor": 2},
    "causal": {"conv_context_size": "causal", "conv_norm_type": "layer_norm"},
    "unequal": {"conv_context_size": [3, 1]},
    "local": LOCAL,
    "local, long": {**LOCAL, "att_context_size": [12, 12]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options):
    ours, theirs, report = pair(**options)
    local = {"RelPositionMultiHeadAttentionLongformer"} if "self_attention_model" in options else set()
    assert swapped(report) == (SWAPPED - {"RelPositionMultiHeadAttention"} | local if local else SWAPPED)
    one_frame = [] if "instance_norm" in options.values() else [(1,)]  # of which torch takes no statistics
    for lengths in ((75, 50, 9), (80,), (17, 0), *one_frame):
        with torch.no_grad():
            (found, count), (expected, there) = ours(**batch(lengths)), theirs(**batch(lengths))
        close(found, expected)
        assert torch.equal(count, there)
        assert count.dtype == there.dtype


STEPS = {
    "full": {},
    "window": {"att_context_size": [4, 2]},
    "local": LOCAL,
    "layer norm": {"conv_norm_type": "layer_norm", "conv_context_size": "causal"},
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_a_training_step(options):
    nets = pair(dropout=0.1, stochastic_depth_drop_prob=0.3, **options)[:2]
    nets = [ByPosition(net).train().double() for net in nets]
    call = batch()["audio_signal"].double(), batch()["length"]
    with fastasr.upstream_draws():
        same_step(*nets, *call, tolerance=1e-9, seed=4, share=1.0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_front_end(training):
    ours, theirs, _ = pair()
    x, lengths = batch()["audio_signal"].transpose(1, 2).double(), batch()["length"]
    nets = [net.double().train(training).pre_encode for net in (ours, theirs)]
    same_step(*nets, x, lengths, tolerance=1e-10)
    assert torch.equal(*(net(x, lengths)[1] for net in nets))


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
@pytest.mark.parametrize("sdpa", [False, True], ids=["eager", "sdpa"])
def test_streaming_caches(sdpa, norm, monkeypatch):
    """Chunk by chunk the outputs and caches are upstream's, and upstream's attention and convolution do not run."""
    options = {"att_context_size": [4, 1], "att_context_style": "chunked_limited", "use_pytorch_sdpa": sdpa}
    nets = pair(**options, conv_norm_type=norm, conv_context_size="causal", causal_downsampling=True)[:2]
    x = batch((64, 40))["audio_signal"]
    found = []
    for net in nets:
        caches, outputs = net.get_initial_cache_state(batch_size=2), []
        for begin in range(0, 64, 16):
            if begin == 16 and net is nets[0]:
                for name in ("self_attn", "conv"):
                    monkeypatch.setattr(type(getattr(net.layers[0], name)), "forward", None)
            names = ("cache_last_channel", "cache_last_time", "cache_last_channel_len")
            chunk = {"audio_signal": x[..., begin : begin + 16], "length": torch.tensor([16, 16])}
            with torch.no_grad():
                out = net(**chunk, **dict(zip(names, caches, strict=True)))
            outputs += out
            caches = out[2:]
        found.append(outputs)
        monkeypatch.undo()
    for a, b in zip(*found, strict=True):
        close(a, b)
    assert found[0][-1].tolist() == [4, 4]  # the caches are full


DECLINED = {
    "vggnet": ({"subsampling": "vggnet"}, "pre_encode", "computes vggnet, expected dw_striding"),
    "causal": (
        {"causal_downsampling": True},
        "pre_encode",
        "computes causal dw_striding, expected dw_striding",
    ),
    "global tokens": (
        {**LOCAL, "global_tokens": 1},
        "layers.0.self_attn",
        "global_tokens is 1, expected 0: they attend by another formula",
    ),
    "unequal contexts": (
        {**LOCAL, "att_context_size": [3, 2]},
        "layers.0.self_attn",
        "att_context_size is [3, 2], expected equal ones: else upstream shifts the positions",
    ),
    "no positions": ({"self_attention_model": "abs_pos"}, "layers.0.self_attn", "has no relative positions"),
}


@pytest.mark.parametrize(("options", "path", "reason"), DECLINED.values(), ids=DECLINED)
def test_what_is_declined(options, path, reason):
    model = encoder(**options)
    report = fastasr.explain(model)
    assert report[path].status == "skipped"
    assert reason in report[path].reason
