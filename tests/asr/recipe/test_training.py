# SPDX-License-Identifier: Apache-2.0
"""Training: it learns, resumes exactly, runs in two processes, in bfloat16, in eager and with upstream's model."""

import copy
import json
from dataclasses import replace

import beeps
import pytest
import torch
import torch.multiprocessing
from tiny_runs import TINY, in_two_processes, losses, same_checkpoints, trainer

from fastasr.asr.recipe import checkpoints, recogniser, sizes, training
from fastasr.ops import _dispatch, _reduced_weights


def test_a_run_writes_what_it_says(trained):
    simple = losses(trained, "simple")  # the pruned loss counts more and more at first
    assert len(simple) == 6
    assert simple[-1] < simple[0]
    report = json.loads((trained / "report.json").read_text())
    assert report["step"] == 6
    assert report["held_out"]["cer"] > 0
    assert report["held_out_utterances"] >= 1
    found = checkpoints.load(trained / checkpoints.NAME)
    assert found["step"] == 6
    assert found["model"].keys() == found["model_avg"].keys()
    model = sizes.build(found["arguments"])
    model.load_state_dict(found["model"], strict=True)


def test_a_resumed_run_has_the_losses_of_one_without_a_break(trained, tmp_path, speech_sets):
    trainer(tmp_path, speech_sets, steps=2).run()
    # as after a kill while the third step's files were written: a row too many, half a checkpoint beside the last
    with (tmp_path / "log.csv").open("a") as file:
        file.write("3,0,9.9\n")
    (tmp_path / "last.pt.unfinished").write_bytes(b"half")
    trainer(tmp_path, speech_sets, steps=6).run()
    assert losses(tmp_path) == losses(trained)
    same_checkpoints(trained, tmp_path)


@pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="the native library is not built")
def test_copies_of_another_models_weights_change_no_bit(trained, tmp_path, speech_sets):
    layer = torch.nn.Linear(72, 100)
    _reduced_weights.keep(layer.weight, "int8")
    trainer(tmp_path, speech_sets, steps=6).run()
    same_checkpoints(trained, tmp_path)


def test_scores_on_the_way_are_kept(tmp_path, speech_sets):
    """Scores survive a kill after the second step."""
    trainer(tmp_path, speech_sets, steps=2, evaluate_every=1).run()
    trainer(tmp_path, speech_sets, steps=4, evaluate_every=2).run()
    scores = json.loads((tmp_path / "report.json").read_text())["scores"]
    assert [step for step, *_ in scores] == [1, 4]
    assert all(len(score) == 3 and score[1] > 0 for score in scores)


def test_a_finished_run_is_not_trained_on(trained, speech_sets):
    before = (trained / "log.csv").read_text()
    assert trainer(trained, speech_sets, steps=6).run()["cer"] > 0
    assert (trained / "log.csv").read_text() == before


@pytest.mark.parametrize(("name", "value"), [("seed", 7), ("max_duration", 5.0)])
def test_another_run_is_not_resumed(trained, speech_sets, name, value):
    with pytest.raises(ValueError, match=f"holds a run with {name}"):
        trainer(trained, speech_sets, steps=8, **{name: value}).run()


def test_a_signal_ends_the_run_after_its_step(tmp_path, speech_sets):
    import os
    import signal

    made = trainer(tmp_path, speech_sets, steps=6, checkpoint_every=100)
    made.show = lambda row: row["step"] == 2 and os.kill(os.getpid(), signal.SIGTERM)
    assert made.run() is None
    assert checkpoints.load(tmp_path / checkpoints.NAME)["step"] == 2


def test_transcripts_that_cannot_be_learned(tmp_path, speech_sets):
    utterances, held_out = speech_sets
    empty = [replace(utterances[0], text="")]
    for wrong, message in (
        (empty, "transcript is empty"),
        ([replace(utterances[0], text="é")], "outside the token"),
    ):
        units = training.learn_units("char", utterances)
        with pytest.raises(ValueError, match=message):
            training.Trainer(training.Options(out=tmp_path, **TINY), wrong, held_out, units)
    with pytest.raises(ValueError, match="long enough"):
        training.Trainer(
            training.Options(out=tmp_path, **TINY), [replace(utterances[0], text="ab" * 500)], held_out, units
        )


def test_bfloat16_and_eager(trained, tmp_path, speech_sets):
    """bfloat16 comes near, eager kernels nearer."""
    trainer(tmp_path / "bf16", speech_sets, steps=2, bf16=True).run()
    trainer(tmp_path / "eager", speech_sets, steps=2, backend="eager").run()
    expected = losses(trained)[:2]
    assert losses(tmp_path / "bf16") == pytest.approx(expected, rel=0.05)
    assert losses(tmp_path / "eager") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("swap", [True, False], ids=["swapped", "as shipped"])
def test_upstreams_model(trained, tmp_path, speech_sets, swap, monkeypatch):
    upstream = pytest.importorskip("zipformer.modules.model", exc_type=ImportError)
    if not swap:
        pytest.importorskip("fast_rnnt", exc_type=ImportError)
    monkeypatch.setenv("K2_ONNX_EXPORT", "1")  # Swoosh without torch.compile
    monkeypatch.setattr(upstream, "k2", None)
    trainer(tmp_path, speech_sets, steps=2, upstream=True, swap=swap).run()
    assert losses(tmp_path) == pytest.approx(losses(trained)[:2], rel=1e-3)


# --------------------------------------------------------------------------- two processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(tmp_path, speech_sets, kind):
    """One process goes on from their checkpoint too."""
    trainer(tmp_path / "one", speech_sets, steps=6, plain=True).run()
    in_two_processes(tmp_path, kind, speech_sets)
    expected = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(expected[:4], rel=1e-3)
    trainer(tmp_path / "two", speech_sets, steps=6, plain=True).run()
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=2e-3)


# --------------------------------------------------------------------------- with what was trained
@pytest.fixture(scope="session")
def readers(trained, tmp_path_factory):
    """Returns the trained model and its ONNX files."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("readers")
    loaded = recogniser.load(trained)
    with torch.no_grad():  # six steps have taught it silence: let it say more
        loaded.model.joiner.output_linear.bias[0] -= 3
        loaded.model.ctc_output[1].bias[0] -= 3
    state = checkpoints.load(trained / checkpoints.NAME)
    state["model_avg"] = loaded.model.state_dict()
    checkpoints.save(folder / "louder.pt", state)
    recogniser.export(folder / "louder.pt", folder / "onnx")
    with pytest.raises(ValueError, match="exported already"):
        recogniser.export(folder / "onnx", folder / "again")
    return loaded, recogniser.load(folder / "onnx")


def test_the_held_out_set_is_read_as_one_text(readers, speech_sets):
    loaded, exported = readers
    _, held_out = speech_sets
    assert recogniser.disagreements(loaded, exported, held_out) == []
    other = recogniser.Recogniser(copy.deepcopy(loaded.model), loaded.units, loaded.rate, loaded.bins)
    with torch.no_grad():
        other.model.joiner.output_linear.bias[3] += 20  # reads little else
    found = recogniser.disagreements(loaded, other, held_out)
    assert [name for name, *_ in found] == [u.name for u in held_out]


def test_onnx_files_that_do_not_belong_together(readers, trained, tmp_path):
    folder = tmp_path / "onnx"
    recogniser.export(trained, folder)
    assert recogniser.load(folder).rate == 8000
    whole = (folder / "tokens.txt").read_text()
    (folder / "tokens.txt").write_text(whole + "more 900\n")
    with pytest.raises(ValueError, match="they are of another model"):
        recogniser.load(folder)
    (folder / "tokens.txt").write_text(whole)
    (folder / "ctc.onnx").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be loaded"):
        recogniser.load(folder)
    for damaged in ("", "{}", '{"rate": "x", "bins": 40}'):
        (folder / recogniser.DESCRIPTION).write_text(damaged)
        with pytest.raises(ValueError, match=r"recogniser.json is damaged"):
            recogniser.load(folder)


@pytest.mark.parametrize("method", ["greedy", "beam", "ctc-greedy", "ctc-beam"])
def test_checkpoint_and_onnx_files_read_recordings(readers, method):
    signal = beeps.samples("abcd abcd abcd")
    streams = [list(r.stream(signal.split(700), method)) for r in readers]
    assert [text for text, _ in streams[0]] == [text for text, _ in streams[1]]
    assert streams[0][-1][1].tokens == streams[1][-1][1].tokens
    assert streams[0][-1][1].tokens[0]
    assert len(streams[0]) > 5
    loaded, exported = readers
    whole = loaded.transcribe(signal, method)
    assert whole[1].tokens[0][:3] == streams[0][-1][1].tokens[0][:3]
    assert exported.transcribe(signal, method)[0] == streams[1][-1][0]
