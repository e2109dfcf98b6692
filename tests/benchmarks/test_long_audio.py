# SPDX-License-Identifier: Apache-2.0
"""The report on long recordings, in miniature."""

import pytest

from fastasr.benchmarks import rows
from fastasr.benchmarks.studies import long_audio, training_memory


def test_memory_grows_with_the_length(tmp_path, capsys):
    """The encoder is tiny: time-by-time weights would make the longer one's memory grow sixteen times."""
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "rows.jsonl", tmp_path / "long.png"
    arguments = ["--size", "tiny", "--results", str(table), "--out", str(picture)]
    assert long_audio.main([*arguments, "--minutes", "0.5", "2"]) == 0
    assert "2 min:" in capsys.readouterr().out
    found = rows.read(table)
    assert [row.shape for row in found] == ["1x3000x80", "1x12000x80"]
    assert all(row.peak_bytes > 0 for row in found)
    assert long_audio.growth(found) < 1.5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert long_audio.main([*arguments, "--minutes"]) == 0  # draws the picture again, from the rows
    assert long_audio.main(["--results", str(tmp_path / "none"), "--out", str(picture), "--minutes"]) == 1


def test_parakeet(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    table, picture = tmp_path / "rows.jsonl", tmp_path / "long.png"
    arguments = ["--parakeet", "1", "--size", "tiny", "--results", str(table), "--out", str(picture)]
    assert long_audio.main([*arguments, "--minutes", "0.5"]) == 0
    (row,) = rows.read(table)
    assert (row.name, row.case) == ("fast_conformer_long_audio", "tiny, 1 layers")
    assert row.peak_bytes > 0


def test_memory_of_a_training_step(tmp_path, capsys):
    pytest.importorskip("transformers")
    file = tmp_path / "rows.jsonl"
    assert training_memory.main(["--shape", "tiny", "1", "2", "20", "--results", str(file)]) == 0
    found = rows.read(file)
    assert [row.implementation for row in found] == ["upstream", "fastasr"]
    assert all(row.peak_bytes > 0 for row in found)
    assert capsys.readouterr().out.startswith("| tiny, 1 of its layers, 2 x 20 s | ")


def test_a_failed_process_says_why():
    with pytest.raises(RuntimeError, match="long_audio: 0 minutes: "):
        long_audio.measure("tiny", 0.0)
