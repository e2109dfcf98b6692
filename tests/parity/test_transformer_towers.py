# SPDX-License-Identifier: Apache-2.0
"""transformers' speech encoders of plain layers, beside their decoders: windows reach the op as numbers, caches get
upstream's keys, and a decoder and ``generate`` give what they gave. ``test_other_conformers.py`` has values and
gradients of the encoders alone."""

import copy

import families
import pytest
import tiny_conformers
import torch
import torch.nn.functional as F
from steps import close, moved, seeded

import fastasr
from fastasr import ops
from fastasr.ops import _gemm

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("made", "context"),
    [
        (families.voxtral_realtime(), {(8, 0)}),
        (families.voxtral_realtime(frames=14), {(-1, 0)}),
        (families.voxtral_realtime(lengths=(30, 11)), {(8, 0)}),
        (families.moonshine_streaming(), {(5, 2), (4, 0)}),
        (families.mimi(), {(8, 0)}),
        (families.mimi(samples=48), {(-1, 0)}),
    ],
    ids=["a window", "less than a window", "lengths", "windows of the layers", "mimi", "less of mimi"],
)
def test_windows_are_numbers(made, context, monkeypatch):
    """A mask of all pairs of frames would be read for every pair."""
    calls, attention = [], ops.rel_attention

    def noted(*args, **kwargs):
        calls.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr(ops, "rel_attention", noted)
    seeded("windows")
    model, run = made()
    fastasr.accelerate(model)
    with torch.no_grad():
        run(model)
    assert {kwargs["context"] for kwargs in calls} == context
    assert not any("attn_mask" in kwargs for kwargs in calls)


def test_a_row_without_a_kernel():
    """On the eager backend, too, no scores between recordings are formed."""
    model, run = families.make("qwen3-asr")
    expected = run(model)[0]
    fastasr.accelerate(model)
    shapes, softmax = [], torch.softmax
    with fastasr.backend("eager"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "softmax", lambda x, *args: shapes.append(x.shape[-1]) or softmax(x, *args))
        close(run(model)[0], expected, 1e-5)
    assert max(shapes) == 26


def pair(model):
    theirs = moved(model, 0.1).eval()
    ours = copy.deepcopy(theirs)
    return ours, theirs, fastasr.accelerate(ours)


STREAMS = {
    "voxtral realtime": ((2, 8, 60), {"use_cache": True, "use_padding_cache": True}),
    "mimi": ((2, 1, 180), {"use_streaming": True}),
}


@pytest.mark.parametrize("family", STREAMS)
def test_a_stream(family):
    """Chunks with upstream's cache, which gets the keys and values of the first from our attention."""
    seeded("stream")
    ours, theirs, _ = pair(families.FAMILIES[family]()[0])
    shape, options = STREAMS[family]
    x = torch.randn(shape)
    kept = []
    for model in (ours, theirs):
        cache = paddings = None
        found = []
        with torch.no_grad():
            for chunk in x.split(shape[2] // 3, 2):
                y = model(chunk, cache=cache, padding_cache=paddings, **options)
                cache, paddings = y.cache, y.padding_cache
                found.append(y[0])
        layers = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        kept.append([*found, *layers])
    for a, b in zip(*kept, strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("served", [True, False])
def test_mimi_by_position(served):
    """Its mask comes before its positions. Upstream adds a mask of numbers to the scores."""
    ours, theirs, _ = pair(families.make("mimi")[0])
    x, mask = torch.randn(2, 12, families.WIDTH), torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    given = mask if served else mask.float()
    found = []
    for model in (ours, theirs):
        transformer = model.encoder_transformer
        turned = transformer.rotary_emb(x, torch.arange(12)[None])
        with torch.no_grad():
            found.append(transformer.layers[0].self_attn(x, given, None, turned)[0])
    close(*found, 1e-5)
    assert bool(fastasr.why(ours).to_dict()) != served


MOONSHINE = {"pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 19, "bos_token_id": 1}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_moonshine_with_its_decoder(implementation):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 20} | MOONSHINE
    counts = "num_hidden_layers", "num_attention_heads"
    sizes |= {f"{part}_{count}": 2 for part in ("encoder", "decoder") for count in counts}
    config = transformers.MoonshineConfig(**sizes, attn_implementation=implementation)
    seeded("moonshine")
    ours, theirs, report = pair(transformers.MoonshineForConditionalGeneration(config))
    reasons = {row.path: row.reason for row in report.skipped if row.class_name == "MoonshineAttention"}
    assert reasons == {f"model.decoder.layers.{i}.self_attn": "is causal: the decoder's" for i in range(2)}
    inputs = {"input_values": torch.randn(2, 16000)}
    inputs["attention_mask"] = (torch.arange(16000) < torch.tensor([[16000], [9000]])).long()
    labels = torch.randint(2, 19, (2, 5))
    outputs = []
    for model in (ours, theirs):
        with torch.no_grad():
            y = model(**inputs, decoder_input_ids=labels, output_attentions=True)
            tokens = model.generate(**inputs, max_new_tokens=8)
        attentions = [
            *(y.encoder_attentions or ()),
            *(y.decoder_attentions or ()),
            *(y.cross_attentions or ()),
        ]
        outputs.append([tokens.double(), y.logits, *attentions])
    for a, b in zip(*outputs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 1e-5)


FRONT_ENDS = {
    **{
        f"seamless m4t {version}'s adapter": tiny_conformers.of_wav2vec2(
            f"seamless_m4t{tail}",
            f"SeamlessM4T{version}SpeechEncoder",
            f"SeamlessM4T{version}Config",
            **tiny_conformers.SEAMLESS,
            add_adapter=True,
            num_adapter_layers=1,
            feature_projection_input_dim=families.WIDTH,
        )
        for version, tail in (("", ""), ("v2", "_v2"))
    },
    "qwen3-asr": families.qwen_audio("Qwen3ASR", downsample_hidden_size=24),
    "qwen3-omni": families.qwen_audio("Qwen3OmniMoeAudio", downsample_hidden_size=24),
    **{
        name: families.FAMILIES[name]
        for name in (
            *("whisper", "qwen2.5-omni", "glm-asr", "moonshine", "moonshine streaming"),
            *("voxtral realtime", "lasr"),
        )
    },
}


def counted(function, calls):
    return lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs)


@pytest.mark.skipif(bool(_gemm.why_not()), reason=str(_gemm.why_not()))
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_front_ends_are_products(name, monkeypatch):
    monkeypatch.setenv("FASTASR_GEMM", "native")
    monkeypatch.setattr(_gemm, "_choices", {})
    monkeypatch.setattr(_gemm, "SMALL", 0)
    seeded("front end")
    model, run = FRONT_ENDS[name]()
    model.vocoder = torch.nn.ModuleList([torch.nn.Conv2d(9, 9, 4), torch.nn.Conv1d(9, 9, 4)])
    ours, theirs, report = pair(model)
    left = {row.path: row.reason for row in report.skipped if row.path.startswith("vocoder.")}
    assert set(left.values()) == {"does not shorten its input as a front end does"}
    found, calls = [], []
    for one in (theirs, ours):
        y = run(one)[0]
        torch.manual_seed(3)
        weights = [p for path, p in one.named_parameters() if "conv" in path]
        found.append([y, *torch.autograd.grad(y, weights, torch.randn(y.shape))])
        for function in ("conv1d", "conv2d"):
            monkeypatch.setattr(torch.nn.functional, function, counted(getattr(F, function), calls))
    assert len(calls) == (name in ("whisper", "glm-asr", "qwen2.5-omni"))  # the first one has stride 1
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-5)
