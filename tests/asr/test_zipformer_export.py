# SPDX-License-Identifier: Apache-2.0
"""ONNX files of fastasr's recognisers, and of upstream's inside eager_mode, in onnxruntime against PyTorch."""

import functools
import random
import sys

import pytest
import tiny_recogniser
import torch
from steps import moved, seeded
from tiny_recogniser import RECOGNISER, STREAMING

import fastasr
from fastasr.asr import decoding, export, recogniser
from fastasr.asr.export import export_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TOLERANCE = 1e-4
CHANGES = {
    "downsampling_factor": "1,4",
    "encoder_dim": "32,24",
    "num_encoder_layers": "1,2",
    "num_heads": "2,4",
    "vocab_size": 19,
    "use_ctc": True,
}
WHOLE = RECOGNISER | tiny_recogniser.WHOLE | CHANGES
CAUSAL = {**WHOLE, **STREAMING}


def randomized(model):
    return moved(model, 0.05).eval()


def _made(origin, config):
    if origin == "ours":
        return randomized(recogniser.AsrModel(**config))
    upstream = pytest.importorskip("zipformer.modules.model", exc_type=ImportError)
    model = randomized(upstream.AsrModel(**config))
    report = fastasr.accelerate(model)
    assert report.replaced
    return model


def _exported(model, origin, folder):
    if origin == "ours":
        return export_onnx(model, folder, suffix="test")
    with fastasr.eager_mode(model):
        return export_onnx(model, folder, suffix="test")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Returns exports(origin, config) -> (model, files), made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K2_ONNX_EXPORT", "1")  # upstream's Swoosh without torch.compile

        @functools.cache
        def made(origin, causal):
            seeded(0)
            random.seed(0)
            model = _made(origin, CAUSAL if causal else WHOLE)
            return model, _exported(model, origin, tmp_path_factory.mktemp("exported"))

        yield made


@pytest.fixture
def whole(exports, origin):
    return exports(origin, False)


@pytest.fixture
def streaming(exports, origin):
    return exports(origin, True)


BOTH = pytest.mark.parametrize("origin", ["ours", "upstream"])
OURS = pytest.mark.parametrize("origin", ["ours"])


def _close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() < TOLERANCE


@BOTH
@pytest.mark.parametrize("lengths", [(100, 80), (61, 50, 40), (9,), (150, 33, 12, 150), (24,)], ids=str)
def test_whole_utterances(whole, lengths):
    """Batches and lengths differ from those that were traced; no downsampling factor divides the frames."""
    model, files = whole
    x, x_lens = torch.randn(len(lengths), max(lengths), 80), torch.tensor(lengths)
    transducer = export.OnnxTransducerModel(files["encoder"], files["decoder"], files["joiner"])
    ctc = export.OnnxCtcModel(files["ctc"])
    with torch.inference_mode():
        expected, expected_lens = model.forward_encoder(x, x_lens)
        y, y_lens = transducer.run_encoder(x, x_lens)
        assert torch.equal(y_lens, expected_lens)
        _close(y, model.joiner.encoder_proj(expected))
        log_probs, log_probs_lens = ctc(x, x_lens)
        assert torch.equal(log_probs_lens, expected_lens)
        _close(log_probs, model.ctc_output(expected))


@OURS
@pytest.mark.parametrize("frames", range(9))
def test_too_few_frames(whole, frames):
    """Sessions refuse them as the model does, alone and as a sequence of a longer batch."""
    model, files = whole
    transducer = export.OnnxTransducerModel(files["encoder"], files["decoder"], files["joiner"])
    for called in (model, transducer, export.OnnxCtcModel(files["ctc"])):
        for lengths in ((frames,), (20, frames)):
            x, x_lens = torch.randn(len(lengths), max(lengths), 80), torch.tensor(lengths)
            name = f"^{type(called).__name__}: a sequence needs 9 frames of features at least, got {frames} "
            with pytest.raises(ValueError, match=name):
                decoding.encode(called, x, x_lens)


@BOTH
@pytest.mark.parametrize("batch", [1, 4])
def test_decoder_and_joiner(whole, batch):
    model, files = whole
    onnx_model = export.OnnxTransducerModel(files["encoder"], files["decoder"], files["joiner"])
    assert (onnx_model.context_size, onnx_model.vocab_size, onnx_model.blank_id) == (2, 19, 0)
    y = torch.randint(-1, 19, (batch, 2))
    with torch.inference_mode():
        expected = model.joiner.decoder_proj(model.decoder(y, need_pad=False)).squeeze(1)
        _close(onnx_model.run_decoder(y), expected)
        frames = torch.randn(batch, 20)
        _close(onnx_model.run_joiner(frames, expected), model.joiner(frames, expected, project_input=False))


@BOTH
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks(streaming, batch):
    """Every chunk of three is compared, and every state after them."""
    model, files = streaming
    transducer = export.OnnxStreamingTransducerModel(files["encoder"], files["decoder"], files["joiner"])
    ctc = export.OnnxStreamingCtcModel(files["ctc"])
    wrapper = export.StreamingEncoderWrapper(model.encoder, model.encoder_embed).eval()
    for onnx_model in (transducer, ctc):
        onnx_model.reset_states(batch)
    states = wrapper.get_init_states(batch)
    assert transducer.segment == 2 * 8 + 13
    assert transducer.offset == 16
    x = torch.randn(batch, 16 * 3 + 13, 80)
    with torch.inference_mode():
        for first in range(0, 48, 16):
            chunk = x[:, first : first + 29]
            expected, _, states = wrapper(chunk, torch.full((batch,), 29), states)
            _close(transducer.run_encoder(chunk), model.joiner.encoder_proj(expected))
            _close(ctc(chunk), model.ctc_output(expected))
            for state, expected_state in zip(transducer.states, states, strict=True):
                _close(torch.from_numpy(state), expected_state)
    assert transducer.states[-1].tolist() == [24] * batch


def _fields(path):
    return {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}


@BOTH
def test_metadata(whole, streaming):
    _, files = whole
    author = {"version": "1", "model_author": "k2-fsa"}
    assert _fields(files["encoder"]) == {
        "model_type": "zipformer2",
        **author,
        "comment": "non-streaming zipformer2",
    }
    assert _fields(files["ctc"])["model_type"] == "zipformer2_ctc"
    assert _fields(files["decoder"]) == {
        "context_size": "2",
        "vocab_size": "19",
        "blank_id": "0",
        "unk_id": "0",
    }
    assert _fields(files["joiner"]) == {"joiner_dim": "20"}
    _, files = streaming
    for name, comment in (("encoder", "streaming zipformer2"), ("ctc", "streaming ctc zipformer2")):
        assert _fields(files[name]) == {
            "model_type": "zipformer2",
            **author,
            "comment": comment,
            "decode_chunk_len": "16",
            "T": "29",
            "num_encoder_layers": "1,2",
            "encoder_dims": "32,24",
            "cnn_module_kernels": "7,5",
            "left_context_len": "16,4",
            "query_head_dims": "6,6",
            "value_head_dims": "4,4",
            "num_heads": "2,4",
        }
    assert files["encoder"].name == "encoder-test.onnx"


def test_features_of_forty_channels(tmp_path):
    """Without ``feature_dim`` the files take what the front end takes."""
    model = recogniser.AsrModel(**{**WHOLE, "use_transducer": False, "feature_dim": 40}).eval()
    (x, _) = onnx.load(str(export_onnx(model, tmp_path)["ctc"])).graph.input
    assert x.type.tensor_type.shape.dim[2].dim_value == 40


@OURS
def test_upstreams_runtimes_load_our_files(whole, streaming):
    upstream = pytest.importorskip("zipformer.modules.model", exc_type=ImportError)
    x, x_lens = torch.randn(2, 70, 80), torch.tensor([70, 55])
    _, files = whole
    paths = [str(files[name]) for name in ("encoder", "decoder", "joiner")]
    pairs = [(m.OnnxTransducerModel(*paths), m.OnnxCtcModel(str(files["ctc"]))) for m in (export, upstream)]
    for transducer, ctc in pairs:
        assert transducer.context_size == 2
        assert torch.equal(transducer.run_encoder(x, x_lens)[0], pairs[0][0].run_encoder(x, x_lens)[0])
        assert torch.equal(ctc(x, x_lens)[0], pairs[0][1](x, x_lens)[0])
    _, files = streaming
    paths = [str(files[name]) for name in ("encoder", "decoder", "joiner")]
    models = [m.OnnxStreamingTransducerModel(*paths) for m in (export, upstream)]
    ctcs = [m.OnnxStreamingCtcModel(str(files["ctc"])) for m in (export, upstream)]
    for chunk in torch.randn(2, 1, 29, 80):
        torch.testing.assert_close(*(model.run_encoder(chunk) for model in models), rtol=0, atol=0)
        torch.testing.assert_close(*(model(chunk) for model in ctcs), rtol=0, atol=0)


# --------------------------------------------------------------------------- int8
@pytest.fixture(scope="module", params=["whole", "streaming"])
def quantised(request, tmp_path_factory):
    seeded(0)
    random.seed(0)
    model = randomized(recogniser.AsrModel(**(CAUSAL if request.param == "streaming" else WHOLE)))
    return model, export_onnx(model, tmp_path_factory.mktemp("quantised"), suffix="test", int8=True)


def test_int8_files(quantised):
    """Each file has a smaller one beside it with the same inputs, outputs and metadata, and nearly the same results."""
    import onnxruntime

    _, files = quantised
    assert sorted(files) == sorted(
        f"{n}{e}" for n in ("encoder", "decoder", "joiner", "ctc") for e in ("", ".int8")
    )
    for name in ("encoder", "decoder", "joiner", "ctc"):
        whole, small = files[name], files[f"{name}.int8"]
        assert small.name == f"{name}-test.int8.onnx"
        assert _fields(small).items() >= _fields(whole).items()
        sessions = [onnxruntime.InferenceSession(str(path)) for path in (whole, small)]
        seeded(1)
        feed = {}
        for i in sessions[0].get_inputs():
            shape = [2 if d == "N" else 100 if d == "T" else d for d in i.shape]
            if "int64" in i.type:
                feed[i.name] = (
                    torch.full(shape, 90) if i.name == "x_lens" else torch.zeros(shape).long()
                ).numpy()
            else:
                feed[i.name] = torch.randn(shape).numpy()
        expected, got = (torch.from_numpy(session.run(None, feed)[0]) for session in sessions)
        assert got.shape == expected.shape
        assert (got - expected).norm() <= 0.1 * expected.norm()
        if name in ("encoder", "ctc"):
            assert not torch.equal(got, expected)
            assert small.stat().st_size < whole.stat().st_size
    assert not list(files["encoder"].parent.glob("*.unfinished"))


def test_int8_of_a_reduced_range(tmp_path):
    """The weights have 7 bits."""
    import onnx
    from onnx import numpy_helper

    seeded(0)
    model = randomized(recogniser.AsrModel(**WHOLE))
    largest = {}
    for reduce_range in (False, True):
        files = export_onnx(model, tmp_path, int8=True, reduce_range=reduce_range)
        weights = [numpy_helper.to_array(t) for t in onnx.load(files["encoder.int8"]).graph.initializer]
        largest[reduce_range] = max(abs(w.astype(int)).max() for w in weights if w.dtype == "int8")
    assert largest == {False: 127, True: 64}
    with pytest.raises(ValueError, match="expected int8=True, got False"):
        export_onnx(model, tmp_path, reduce_range=True)


def test_int8_without_onnxruntime(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    model = randomized(recogniser.AsrModel(**WHOLE))
    with pytest.raises(ImportError, match=r"int8=True needs onnx and onnxruntime .*fastasr\[asr\]"):
        export_onnx(model, tmp_path, int8=True)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- what is refused
def test_models_that_cannot_be_exported(tmp_path):
    model = randomized(recogniser.AsrModel(**WHOLE))
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        export_onnx(model.train(), tmp_path)
    with pytest.raises(ValueError, match="float32"):
        export_onnx(model.eval().double(), tmp_path)
    with pytest.raises(ValueError, match="without encoder_embed"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path)
    many = recogniser.AsrModel(**{**CAUSAL, "chunk_size": "8,16"}).eval()
    with pytest.raises(ValueError, match="one chunk_size"):
        export_onnx(many, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_swapped_model_outside_eager_mode(tmp_path):
    upstream = pytest.importorskip("zipformer.modules.model", exc_type=ImportError)
    model = randomized(upstream.AsrModel(**WHOLE))
    fastasr.accelerate(model)
    with pytest.raises(RuntimeError, match="eager_mode"):
        export_onnx(model, tmp_path)


@OURS
def test_files_that_cannot_be_loaded(tmp_path, whole):
    with pytest.raises(FileNotFoundError, match="no ONNX model"):
        export.OnnxCtcModel(tmp_path / "missing.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be loaded"):
        export.OnnxCtcModel(tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match="lacks the metadata T, decode_chunk_len"):
        export.OnnxStreamingCtcModel(whole[1]["ctc"])


@OURS
def test_a_chunk_of_another_length(streaming):
    with pytest.raises(ValueError, match=r"\(batch, 29, channels\)"):
        export.OnnxStreamingCtcModel(streaming[1]["ctc"])(torch.zeros(1, 28, 80))
