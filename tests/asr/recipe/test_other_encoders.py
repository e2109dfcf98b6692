# SPDX-License-Identifier: Apache-2.0
"""The recipe on an Emformer and on an E-Branchformer: it trains, resumes, swaps upstream's, reads, and refuses
mistakes.
"""

import json
import sys
from dataclasses import replace

import beeps
import pytest
import torch
import torch.multiprocessing
from steps import seeded
from tiny_runs import in_two_processes, losses, refused, same_checkpoints, trainer

import fastasr
from fastasr.asr import decoding
from fastasr.asr.recipe import checkpoints, recogniser, sizes, speech
from fastasr.asr.recipe.transducers import TRANSDUCERS
from fastasr.benchmarks.studies import int8_peers
from fastasr.ops import _dispatch
from fastasr.swap import weights

ENCODERS = tuple(TRANSDUCERS)
STEPS = 5  # from the fifth on the averaged model is another


@pytest.fixture(scope="session", params=ENCODERS)
def run(request, tmp_path_factory, speech_sets, single_thread):
    """Returns (encoder, folder) of a run of a few steps without a break."""
    out = tmp_path_factory.mktemp(request.param)
    with single_thread():
        trainer(out, speech_sets, steps=STEPS, encoder=request.param).run()
    return request.param, out


def test_a_run_writes_what_it_says(run):
    encoder, out = run
    assert len(losses(out)) == STEPS
    assert all(0 < loss < 100 for loss in losses(out))
    report = json.loads((out / "report.json").read_text())
    assert report["encoder"] == encoder
    assert report["held_out"]["cer"] > 0
    assert report["held_out"]["ctc_cer"] > 0
    found = checkpoints.load(out / checkpoints.NAME)
    assert sizes.encoder_of(found["arguments"]) == found["options"]["encoder"] == encoder
    assert any((found["model"][n] != found["model_avg"][n]).any() for n in found["model"])


def test_a_resumed_run_has_the_losses_of_one_without_a_break(run, tmp_path, speech_sets):
    """This also holds for a run that does not read the held-out set on its way."""
    encoder, out = run
    trainer(tmp_path, speech_sets, steps=1, encoder=encoder).run()
    trainer(tmp_path, speech_sets, steps=STEPS, encoder=encoder, evaluate_every=2).run()
    assert losses(tmp_path) == losses(out)
    same_checkpoints(out, tmp_path)


def test_the_same_run_on_other_kernels_and_upstreams_encoder(run, tmp_path, speech_sets):
    encoder, out = run
    package = "torchaudio.models" if encoder == "emformer" else "espnet2.asr.encoder.e_branchformer_encoder"
    pytest.importorskip(package, exc_type=ImportError)
    expected = losses(out)[:2]
    trainer(tmp_path / "bf16", speech_sets, steps=2, encoder=encoder, bf16=True).run()
    assert losses(tmp_path / "bf16") == pytest.approx(expected, rel=0.05)
    with fastasr.upstream_draws():  # which attention weights dropout drops
        trainer(tmp_path / "own", speech_sets, steps=2, encoder=encoder).run()
        expected = losses(tmp_path / "own")
        for name, options in {
            "eager": {"backend": "eager"},
            "swapped": {"upstream": True},
            "as shipped": {"upstream": True, "swap": False},
        }.items():
            made = trainer(tmp_path / name, speech_sets, steps=2, encoder=encoder, **options)
            assert type(made.model.encoder).__module__.startswith("fastasr.") == (name == "eager")
            made.run()
            assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-3), name


def test_upstreams_package_is_named(run, tmp_path, speech_sets, monkeypatch):
    encoder, package = run[0], {"emformer": "torchaudio", "e_branchformer": "espnet"}[run[0]]
    for name in ("torchaudio.models", "espnet2.asr.encoder.e_branchformer_encoder"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"--upstream needs the package {package}"):
        trainer(tmp_path, speech_sets, encoder=encoder, upstream=True)


@pytest.mark.parametrize("method", ["greedy", "beam", "ctc-greedy"])
def test_recordings_are_read(run, method, speech_sets):
    encoder, out = run
    loaded = recogniser.load(out)
    with torch.no_grad():  # a few steps have taught it silence: let it say more
        loaded.model.joiner.output_linear.bias[0] -= 3
        loaded.model.ctc_output[1].bias[0] -= 3
    signal = beeps.samples("abcd abcd")
    text, result = loaded.transcribe(signal, method)
    assert text
    assert result.tokens[0]
    if encoder == "e_branchformer":
        with pytest.raises(ValueError, match="reads whole recordings: it has no streams"):
            list(loaded.stream([signal], method))
        return
    streamed = list(loaded.stream(signal.split(700), method))
    assert len(streamed) > 5
    assert streamed[-1][1].tokens[0][:3] == result.tokens[0][:3]


@pytest.mark.parametrize("ctc", [False, True])
def test_a_streamed_emformer_is_the_whole_one(ctc):
    """Where the recording ends with a segment, they agree to rounding; a batch gives each sequence what
    it gets alone.
    """
    seeded(0)
    model = sizes.build(sizes.config("tiny", 7, speech.BINS, encoder="emformer")).eval()
    segment = sizes.SIZES["emformer"]["tiny"]["segment_length"]
    x = torch.randn(5 * 4 * segment, speech.BINS)
    whole, lengths = decoding.encode(model, x.unsqueeze(0), torch.tensor([len(x)]), ctc=ctc)
    assert lengths.tolist() == [5 * segment]
    stream = model.stream(ctc)
    chunks = decoding.FeatureChunks(stream.chunk_size, stream.right_context)
    parts = [c for part in x.split(13) for c in chunks.accept(part)] + chunks.finish()
    streamed = torch.cat([stream(chunk.unsqueeze(0)) for chunk in parts], dim=1)
    torch.testing.assert_close(streamed, whole, rtol=1e-4, atol=1e-4)
    longer = torch.nn.functional.pad(x, (0, 0, 0, 4 * segment), value=decoding.chunks.SILENCE)
    both = torch.stack([torch.randn_like(longer), longer])
    batch, lengths = decoding.encode(model, both, torch.tensor([len(longer), len(x)]), ctc=ctc)
    torch.testing.assert_close(batch[1, : lengths[1]], whole[0], rtol=1e-4, atol=1e-4)


def test_what_only_a_zipformer_can_is_refused(run, tmp_path):
    encoder, out = run
    name = "an Emformer" if encoder == "emformer" else "an E-Branchformer"
    said = refused("transcribe", "--model", out, "--export", tmp_path / "onnx")
    assert f"holds {name}: ONNX files are those of streaming Zipformers" in said
    assert not (tmp_path / "onnx").exists()
    beeps.write_wav(tmp_path / "spoken.wav", beeps.samples("abcd"))
    said = refused("live", tmp_path / "spoken.wav", "--model", out)
    assert f"holds {name}: the streaming engine is for Zipformers" in said
    if encoder == "e_branchformer":
        said = refused("transcribe", tmp_path / "spoken.wav", "--model", out, "--stream")
        assert "reads whole recordings" in said


def test_a_run_of_another_encoder_is_not_resumed(run, trained, speech_sets):
    with pytest.raises(ValueError, match=f"holds a run with encoder {run[0]}, not zipformer"):
        trainer(run[1], speech_sets, steps=8).run()
    with pytest.raises(ValueError, match=f"holds a run with encoder zipformer, not {run[0]}"):
        trainer(trained, speech_sets, steps=8, encoder=run[0]).run()


def test_a_checkpoint_from_before_there_were_other_encoders(trained, tmp_path, speech_sets):
    state = checkpoints.load(trained / checkpoints.NAME)
    del state["options"]["encoder"]
    checkpoints.save(tmp_path / checkpoints.NAME, state)
    assert trainer(tmp_path, speech_sets, steps=6).run()["cer"] > 0


def test_encoders_and_sizes_by_name():
    with pytest.raises(
        ValueError, match="encoder must be one of zipformer, emformer, e_branchformer, got 'lstm'"
    ):
        sizes.config("tiny", 30, 40, encoder="lstm")
    for encoder in (sizes.ZIPFORMER, *ENCODERS):
        with pytest.raises(ValueError, match="size must be one of tiny, small"):
            sizes.config("huge", 30, 40, encoder=encoder)


@pytest.mark.long  # short runs have a Zipformer's in test_training.py
@pytest.mark.parametrize(("encoder", "kind"), [("emformer", "fsdp"), ("e_branchformer", "ddp")])
def test_two_processes_have_the_losses_of_one(tmp_path, speech_sets, encoder, kind):
    if encoder == "e_branchformer":  # its convolutions see padding, as ESPnet's: no sequence may have any
        shortest = min(len(f) for u in speech_sets[0] for f in u.features)
        cut = [replace(u, features=[f[:shortest] for f in u.features]) for u in speech_sets[0]]
        speech_sets = cut, speech_sets[1]
    trainer(tmp_path / "one", speech_sets, steps=4, plain=True, encoder=encoder).run()
    in_two_processes(tmp_path, kind, speech_sets, encoder)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="the native library is not built")
def test_int8_reads_what_float32_reads(run, trained, speech_sets, monkeypatch):
    """A model of few steps says few letters, which int8 hardly changes. No weight is too small here."""
    monkeypatch.setattr(weights, "SMALL", 0)
    runs = [run[1], trained]
    chained = int8_peers.joined(speech_sets[0], 20)
    assert all(20 < u.seconds < 23 for u in chained)
    assert " ".join(u.text for u in speech_sets[0]).startswith(chained[0].text)
    found = int8_peers.accuracy(runs, [*speech_sets[1], chained[0]])
    for out in runs:
        streams = run[0] == "emformer" or out is trained
        reduced, rows = found["runs"][out.name]["weights"]["int8"], found["runs"][out.name]["rows"]
        assert reduced["reduced"] > 10
        assert reduced["bytes"] < 0.7
        ways = ["whole", "as streams"] if streams else ["whole"]
        assert [(row["read"], row["long"]) for row in rows] == [
            (way, long) for way in ways for long in (False, True)
        ]
        for row in rows:
            assert row["recordings"] == (1 if row["long"] else len(speech_sets[1]))
            assert row["characters"] > 0
            exact = row["rates"]["float32"]["cer"]
            assert all(abs(row["rates"][kind]["cer"] - exact) <= 0.1 * exact for kind in ("bf16", "int8"))
