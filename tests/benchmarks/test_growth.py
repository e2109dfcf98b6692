# SPDX-License-Identifier: Apache-2.0
"""The study of time and memory over length and batch, in miniature."""

import pytest

from fastasr.benchmarks import rows
from fastasr.benchmarks.studies import growth


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Returns the files as options. What fits into memory anyway is measured in this process, which is quicker."""
    fresh = growth.in_fresh_process
    quicker = {True: fresh, False: lambda point, limit: growth.run(point)}
    monkeypatch.setattr(growth, "in_fresh_process", lambda p, limit: quicker[p.memory > 0](p, limit))
    pytest.importorskip("matplotlib")
    return ["--results", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "growth.png")]


@pytest.mark.long
def test_memory_grows_with_the_length(files, tmp_path, capsys):
    """The encoder is tiny: time-by-time weights would make the longer one's memory grow sixteen times."""
    pytest.importorskip("zipformer.modules.zipformer", exc_type=ImportError)
    arguments = ["zipformer", "--size", "tiny", "--memory", "0", *files]
    assert growth.main([*arguments, "--seconds", "120", "30"]) == 0
    assert "tiny, whole, 1 x 30 s, forward, upstream: " in capsys.readouterr().out
    found = rows.read(tmp_path / "rows.jsonl")
    assert [row.shape for row in found] == ["1 x 30 s"] * 2 + ["1 x 120 s"] * 2
    ours = [row for row in found if row.implementation == "fastasr"]
    assert all(row.peak_bytes > 0 for row in found)
    assert growth.growth(ours) < 1.5
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert growth.main([*arguments, "--seconds", "30", "120"]) == 0  # resumes: nothing is left
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "growth.png")]
    assert "| tiny, whole, 1 x 30 s | " in growth.table(found)


@pytest.mark.long
def test_training_steps_until_the_memory_is_not_enough(files, tmp_path, capsys):
    pytest.importorskip("transformers")
    arguments = ["fast_conformer", "--training", "--layers", "1", "--size", "tiny", "--seconds", "2", *files]
    assert growth.main([*arguments, "--memory", "0", "--batches", "1", "2"]) == 0
    assert growth.main([*arguments, "--memory", "1", "--batches", "1", "2", "3000"]) == 0
    found = rows.read(tmp_path / "rows.jsonl")
    assert [(row.implementation, row.shape) for row in found] == [
        (name, f"{batch} x 2 s") for batch in (1, 2) for name in ("upstream", "fastasr")
    ]
    said = capsys.readouterr().out
    assert "3000 x 2 s, upstream: out of memory (1 GiB)" in said
    assert "3000 x 2 s, fastasr: out of memory (1 GiB)" in said
    assert {row.pass_ for row in found} == {"forward+backward"}
    assert growth.table(found).count("training step") == 2


def test_refusals(files, capsys):
    assert growth.main(["zipformer", "--seconds", *files[2:], "--results", "none.jsonl"]) == 1
    with pytest.raises(SystemExit):
        growth.main(["zipformer", "--size", "110M", *files])
    assert "expected one of medium, tiny, got '110M'" in capsys.readouterr().err


def test_a_failed_process_says_why():
    with pytest.raises(
        RuntimeError, match="growth: fast_conformer, none, 2 of its layers, 1 x 1 s, fastasr: "
    ):
        growth.in_fresh_process(growth.Point("fast_conformer", "none", 1, 1.0))
