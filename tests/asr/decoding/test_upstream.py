# SPDX-License-Identifier: Apache-2.0
"""Searches against those of the package ``zipformer``, and PyTorch models against their ONNX files."""

import copy
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest
import torch
from test_decoding import CONFIG, LENGTHS, encoder_out, model  # noqa: F401 (fixtures)

from fastasr.asr import decoding, export
from fastasr.asr.export import export_onnx
from fastasr.asr.recogniser import AsrModel


@pytest.fixture(scope="module")
def search():
    return pytest.importorskip("zipformer.decode.search", exc_type=ImportError)


def test_greedy_search(search, model, encoder_out):  # noqa: F811
    expected = search.greedy_search(model, encoder_out, torch.tensor(LENGTHS), return_timestamps=True)
    found = decoding.greedy_search(model, encoder_out, torch.tensor(LENGTHS))
    assert found.tokens == expected.hyps
    assert found.timestamps == expected.timestamps
    assert sum(map(len, found.tokens)) > 5


def test_greedy_search_with_several_tokens_per_frame(search, model, encoder_out):  # noqa: F811
    with pytest.warns(UserWarning, match="max_sym_per_frame"):
        expected = search.greedy_search(
            model, encoder_out[:1], torch.tensor(LENGTHS[:1]), max_sym_per_frame=3, return_timestamps=True
        )
    found = decoding.greedy_search(model, encoder_out[:1], max_sym_per_frame=3)
    # upstream begins its list of tokens with blanks instead of nothing, and the network's context with nothing
    assert found.tokens == expected.hyps
    assert found.timestamps == expected.timestamps


@pytest.mark.parametrize(
    "options", [{}, {"beam": 2, "temperature": 1.5, "blank_penalty": 0.7}], ids=["4", "2, warm"]
)
def test_modified_beam_search(search, model, encoder_out, options):  # noqa: F811
    lengths = torch.tensor(LENGTHS)
    with torch.inference_mode():
        expected = search.modified_beam_search(model, encoder_out, lengths, return_timestamps=True, **options)
    found = decoding.modified_beam_search(model, encoder_out, lengths, **options)
    assert found.tokens == expected.hyps
    assert found.timestamps == expected.timestamps


def test_streaming_searches(search, model, encoder_out):  # noqa: F811
    """Upstream's streams get fastasr's first context: their own has blanks where fastasr's has nothing."""
    from zipformer.decode.stream import Hypothesis, HypothesisList

    with torch.inference_mode():
        projected = model.joiner.encoder_proj(encoder_out)
        model.device = torch.device("cpu")
        streams = [SimpleNamespace(hyp=[], decoder_out=None) for _ in LENGTHS]
        search.streaming_greedy_search(model, projected, streams)
        beams = []
        for _ in LENGTHS:
            hyps = HypothesisList()
            hyps.add(Hypothesis(ys=[-1, 0], log_prob=torch.zeros(1)))
            beams.append(SimpleNamespace(hyps=hyps))
        search.streaming_modified_beam_search(model, projected, beams)
    del model.device
    assert decoding.greedy_search(model, encoder_out).tokens == [s.hyp[2:] for s in streams]
    found = decoding.modified_beam_search(model, encoder_out).tokens
    assert found == [s.hyps.get_most_probable(length_norm=True).ys[2:] for s in beams]


def test_ctc_searches(search, model, encoder_out):  # noqa: F811
    lengths = torch.tensor(LENGTHS)
    with torch.inference_mode():
        log_probs = model.ctc_output(encoder_out)
    assert decoding.ctc_greedy_search(log_probs, lengths).tokens == search.ctc_greedy_search(
        log_probs, lengths
    )
    with ThreadPool(1) as pool:
        expected = search.ctc_prefix_beam_search(log_probs, lengths, beam=4, process_pool=pool)
    assert decoding.ctc_prefix_beam_search(log_probs, lengths, beam=4).tokens == expected


def test_onnx_models_say_what_pytorch_says(model, tmp_path):  # noqa: F811
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.ctc_output[1].bias[0] -= 20  # blank, which is all that the model predicts in noise
    files = export_onnx(model, tmp_path)
    transducer = export.OnnxStreamingTransducerModel(files["encoder"], files["decoder"], files["joiner"])
    x = torch.randn(2, 16 * 6 + 13, 80)
    streams = [
        (model, False),
        (transducer, False),
        (model, True),
        (export.OnnxStreamingCtcModel(files["ctc"]), True),
    ]
    results = []
    for recogniser, ctc in streams:
        encoder = decoding.ChunkEncoder(recogniser, batch_size=2, ctc=ctc)
        searches = (
            [decoding.CtcGreedySearch(), decoding.CtcPrefixBeamSearch()]
            if ctc
            else [decoding.GreedySearch(recogniser), decoding.ModifiedBeamSearch(recogniser)]
        )
        states = [s.start(2) for s in searches]
        for first in range(0, 96, 16):
            y = encoder(x[:, first : first + 29])
            states = [s.advance(state, y) for s, state in zip(searches, states, strict=True)]
        results.append([s.result(state) for s, state in zip(searches, states, strict=True)])
    for torchs, onnxs in (results[:2], results[2:]):
        for one, other in zip(torchs, onnxs, strict=True):
            assert one.tokens == other.tokens
            assert one.timestamps == other.timestamps
            assert any(one.tokens)


def test_onnx_models_of_whole_utterances(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    whole = AsrModel(**{**CONFIG, "causal": False, "chunk_size": -1, "left_context_frames": -1}).eval()
    with torch.no_grad():
        whole.joiner.output_linear.weight.normal_(std=1.0)
        whole.ctc_output[1].weight.normal_(std=0.5)
    files = export_onnx(whole, tmp_path)
    x, lengths = torch.randn(3, 120, 80), torch.tensor([120, 77, 51])
    transducer = export.OnnxTransducerModel(files["encoder"], files["decoder"], files["joiner"])
    for method in (decoding.greedy_search, decoding.modified_beam_search):
        one, other = (method(m, *decoding.encode(m, x, lengths)) for m in (whole, transducer))
        assert one.tokens == other.tokens
        assert any(one.tokens)
    onnx_ctc = export.OnnxCtcModel(files["ctc"])
    for method in (decoding.ctc_greedy_search, decoding.ctc_prefix_beam_search):
        one, other = (method(*decoding.encode(m, x, lengths, ctc=True)) for m in (whole, onnx_ctc))
        assert one.tokens == other.tokens
