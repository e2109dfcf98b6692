# SPDX-License-Identifier: Apache-2.0
"""Rows: stamp, round trip, replacement of units, bad files."""

import json

import pytest
import torch
from synthetic import row

from fastasr.benchmarks import environment, rows
from fastasr.benchmarks.rows import Row


def test_a_row_is_stamped_with_its_environment():
    stamped = row().to_dict()
    assert stamped["torch"] == torch.__version__
    assert stamped["threads"] == torch.get_num_threads()
    assert stamped["commit"]
    assert stamped["device_name"]
    assert stamped["date"].endswith("Z")


def test_a_row_knows_whether_its_code_has_changed():
    assert row().code == environment.code("ops", "bypass")
    assert row().code != row(name="linear").code
    assert len(row().code) == 12
    assert not row().old
    later = row()
    later.code = "another"
    assert later.old
    model = environment.code("models", "fast_conformer")
    assert model
    assert model == environment.code("models", "fast_conformer_growth")
    assert environment.code("models", "tdt_loss") not in ("", model)


def test_comments_do_not_make_a_row_old(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)

    def code(python: str, cpp: str) -> str:
        for path, text in (("fastasr/ops/bypass.py", python), ("csrc/cpu/rows/bypass.h", cpp)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return environment.code.__wrapped__("ops", "bypass")

    was = code("def f(x):\n    return x  # as it is\n", '// a\nauto a = "// kept";  // b\n')
    assert was == code('"""A page."""\n\ndef f(x):\n    return (x)\n', 'auto a = "// kept";\n/* b\n */\n')
    assert was != code("def f(x):\n    return -x\n", 'auto a = "// kept";')
    assert was != code("def f(x):\n    return x\n", 'auto a = "// other";')


def test_rows_survive_the_file(tmp_path):
    written = [row(), row(implementation="copy", median=0.25, bytes=256, limit="copy 46.0 GB/s")]
    rows.write(tmp_path / "r.jsonl", written)
    assert rows.read(tmp_path / "r.jsonl") == written
    assert all("pass" in json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines())


def test_a_unit_is_replaced_whole(tmp_path):
    path = tmp_path / "r.jsonl"
    rows.merge(path, [row(), row(implementation="eager", median=2.0)])
    rows.merge(path, [row(pass_="backward")])
    rows.merge(path, [row(median=0.3)])
    found = [(r.pass_, r.implementation, r.median_ms) for r in rows.read(path)]
    assert found == [("backward", "fastasr", 0.5), ("forward", "fastasr", 0.3)]
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


def test_another_machine_is_another_unit():
    other = row()
    other.device_name = "another machine"
    assert other.unit != row().unit
    assert row(commit="x").unit == row().unit


def test_an_absent_file_has_no_rows(tmp_path):
    assert rows.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("line", ["{", '{"suite": "ops"}', "[1]", '"text"'])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    rows.write(path, [row()])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        rows.read(path)


def test_unknown_fields_are_dropped():
    assert not hasattr(Row.from_dict({**row().to_dict(), "later": 1}), "later")


@pytest.mark.parametrize(("flags", "widest"), [("avx2 avx512f amx_tile", "AMX"), ("avx2 avx512f", "AVX-512")])
def test_a_cpus_name_says_what_it_has(monkeypatch, flags, widest):
    facts = {"model name": "Fast", "cpu family": "6", "model": "207", "flags": flags}
    monkeypatch.setattr(environment.processor, "fields", lambda: facts)
    assert environment.cpu_name.__wrapped__() == f"Fast, family 6 model 207, {widest}"
