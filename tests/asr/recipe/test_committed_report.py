# SPDX-License-Identifier: Apache-2.0
"""The committed results of a run: the curves beside it, its ONNX files on the held-out set, picture and page."""

import json
import shutil

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("matplotlib")

from tiny_runs import TINY, trainer

from fastasr.asr import decoding
from fastasr.asr.recipe import checkpoints
from fastasr.benchmarks.markdown import marks
from fastasr.benchmarks.studies import recipe


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Returns a folder with the run of 6 steps."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(trained, folder / "main")
    return folder


@pytest.fixture(scope="module")
def found(runs, speech_sets, single_thread):
    """Returns the report of that run, with curves of 3 steps that it has to train."""
    upstream = pytest.importorskip("zipformer.modules.model", exc_type=ImportError)
    pytest.importorskip("fast_rnnt", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as patch, single_thread():
        patch.setenv("K2_ONNX_EXPORT", "1")  # Swoosh without torch.compile
        patch.setattr(upstream, "k2", None)
        return recipe.report(runs, speech_sets, 3, **TINY)


def test_the_curves_agree(found, runs):
    assert {name: len(losses) for name, losses in found["losses"].items()} == dict.fromkeys(
        [*recipe.CURVES, "main"], 3
    )
    one, moved = (
        checkpoints.load(runs / name / checkpoints.NAME)["model"] for name in ("fastasr", "rounded")
    )
    assert any(not torch.equal(one[name], moved[name]) for name in one)  # the losses may be equal in print
    for name, values in found["differences"].items():
        assert values["steps"] == 3
        assert values["all"]["largest"] < 1e-3, name


def test_onnx_files_read_what_the_checkpoint_reads(found, speech_sets):
    count = len(speech_sets[1])
    assert found["onnx"] == {
        "recordings": count,
        "same text": dict.fromkeys(decoding.METHODS, count),
        "different": {},
    }


def test_differences():
    losses = {"fastasr": [1.0, 2.0, 4.0], "eager": [1.0, 2.2, 4.0]}
    values = recipe.differences(losses)["eager"]
    assert values["steps"] == 3
    assert values["all"] == {"median": 0.0, "largest": pytest.approx(0.1), "above 1e-5": 1}


def test_the_page_and_the_picture(found, tmp_path, capsys):
    page, data, plot = tmp_path / "page.md", tmp_path / "recipe.json", tmp_path / "plots" / "curves.png"
    arguments = ["--results", str(data), "--page", str(page), "--plot", str(plot)]
    assert recipe.main(arguments) == 2
    data.write_text(json.dumps(found))
    page.write_text("# title\n{}\nold\n{}\nafter\n".format(*marks()))
    assert recipe.main([*arguments, "--check"]) == 1
    assert recipe.main(arguments) == 0
    assert recipe.main([*arguments, "--check"]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert f"| transducer, greedy | {found['run']['held_out']['cer']:.1%} |" in text
    assert "| 6 | " in text
    assert f"{found['onnx']['recordings']} of {found['onnx']['recordings']} recordings (greedy)" in text
    assert "as shipped" in text
    assert "old" not in text
    found["run"]["held_out"]["cer"] += 0.01
    data.write_text(json.dumps(found))
    found["run"]["held_out"]["cer"] -= 0.01
    assert recipe.main([*arguments, "--check"]) == 1
    assert recipe.main([str(tmp_path), "--speech", str(tmp_path / "none"), *arguments]) == 2
    assert "none is no folder" in capsys.readouterr().err


def test_a_run_that_has_not_ended(tmp_path, speech_sets):
    (tmp_path / "main").mkdir()
    with pytest.raises(ValueError, match="no finished run"):
        recipe.report(tmp_path, speech_sets, 3)


def test_runs_of_other_encoders_stand_beside_it(found, trained, tmp_path, speech_sets, capsys):
    page, data = tmp_path / "page.md", tmp_path / "recipe.json"
    page.write_text("\n".join(marks()) + "\n")
    data.write_text(json.dumps(found))
    arguments = ["--results", str(data), "--page", str(page), "--plot", str(tmp_path / "curves.png")]
    trainer(tmp_path / "emformer", speech_sets, steps=2, evaluate_every=1, encoder="emformer").run()
    assert recipe.main([*arguments, "--encoder-run", str(tmp_path / "emformer"), "--commit", "abc"]) == 0
    made = json.loads((tmp_path / recipe.OTHER_ENCODERS).read_text())["emformer"]
    assert (made["run"]["step"], made["size"], made["commit"], made["threads"]) == (2, "tiny", "abc", 1)
    assert [step for step, _ in made["loss"]] == [1, 2]
    assert recipe.main([*arguments, "--check"]) == 0
    text, run = page.read_text(), made["run"]
    parameters, wrong = f"{run['parameters'] / 1e6:.2f} M", f"{run['held_out']['cer']:.1%}"
    assert f"| Emformer | abc | {parameters} | 2 | 0 | {wrong} | " in text
    assert f"| 2 | | {made['run']['scores'][-1][1]:.1%} |" in text
    assert recipe.main([*arguments, "--encoder-run", str(tmp_path)]) == 2
    assert "is no finished run" in capsys.readouterr().err
    assert recipe.main([*arguments, "--encoder-run", str(trained)]) == 2
    assert "is a run of the Zipformer" in capsys.readouterr().err
