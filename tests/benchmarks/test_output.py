# SPDX-License-Identifier: Apache-2.0
"""Output made from rows: text, plots, the HTML page, tables in Markdown."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic

from fastasr.benchmarks import markdown, page, plots, rows, table
from fastasr.benchmarks.device import verdict, whole_models
from fastasr.benchmarks.studies import curves

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n"


@pytest.fixture
def made():
    return synthetic.rows()


@pytest.fixture
def readme(tmp_path):
    """Writes a page with markers."""
    path = tmp_path / "README.md"
    path.write_text("# title\n\n{}\nold\n{}\n\nafter\n".format(*markdown.marks()))
    return path


def test_units_and_ratios(made):
    unit = table.units(made)[0]
    assert unit.ratio("upstream") == 2.5
    assert unit.ratio("nothing") is None
    assert table.implementations([unit]) == ["eager", "compile", "upstream", "fastasr", "copy"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1231.4, "1231 ms"),
        (13.62, "13.6 ms"),
        (0.1331, "0.133 ms"),
        (0.0015, "1.5 µs"),
        (18204, "18.2 s"),
        (None, "–"),
    ],
)
def test_durations(value, text):
    assert table.duration(value) == text


def test_a_unit_as_a_line(made):
    assert table.line(made[:5]).startswith("swoosh_l 4x1600x512 forward: eager 5 ms, compile 3 ms")
    assert table.line(made[:5]).endswith("(2.50×)")


def test_plots_are_written(made, tmp_path):
    paths = plots.write(made, tmp_path)
    assert sorted(p.stem for p in paths) == ["dispatch_swoosh_l", "linear", "swoosh_l", "zipformer"]
    assert all(p.read_bytes().startswith(PNG) for p in paths)


def test_the_page_is_one_file(made, tmp_path):
    path = page.write(made, tmp_path / "deep" / "index.html", notes=["<upstream> left out"])
    text = path.read_text()
    HTMLParser().feed(text)
    assert text.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:|#)', text), "nothing is loaded from elsewhere"
    assert "A CPU (2 cores)" in text
    assert "0123456789" in text
    assert "&lt;upstream&gt; left out" in text
    assert "2.50×" in text


def test_a_table_is_put_between_the_markers_and_checked(readme, made):
    assert markdown.put(readme, markdown.table(made), check=True) == 1
    assert "old" in readme.read_text()
    assert markdown.put(readme, markdown.table(made), check=False) == 0
    assert markdown.put(readme, markdown.table(made), check=True) == 0
    text = readme.read_text()
    assert text.startswith("# title\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| zipformer (whole model), whole model | – | – | 1231 ms | 800 ms | 1.54× |" in text
    assert "| `swoosh_l` 4x1600x512, forward | 5 ms | 3 ms | 2.5 ms | 1 ms | 2.50× | 90 % |" in text
    assert "its linear layers brings 1.23×; the other kernels bring 1.25×" in text
    assert "| `swoosh_l` | 1.5 µs (7.5 µs) | 1.5 µs (7.5 µs) |" in text
    assert "stack 0" in text


def test_new_rows_are_noticed(readme, made):
    markdown.put(readme, markdown.table(made), check=False)
    made[0].median_ms = 6.0
    assert markdown.put(readme, markdown.table(made), check=True) == 1


def test_rows_older_than_their_code_are_marked(readme, made):
    markdown.put(readme, markdown.table(made), check=False)
    assert markdown.OLD not in readme.read_text()
    for row in made[:5]:
        row.code = "another"
    marked = markdown.table(made)
    assert "| `swoosh_l` 4x1600x512, forward † | 5 ms |" in marked
    assert "| `swoosh_l` 4x1600x512, backward | 5 ms |" in marked
    assert "repetitions. †: measured with an earlier version of this code." in marked
    assert markdown.put(readme, marked, check=True) == 0, "a mark alone is no difference"
    markdown.put(readme, marked, check=False)
    assert markdown.OLD in readme.read_text()


def test_speech_of_recordings_of_all_lengths():
    """A row of a workload with lengths like LibriSpeech's, in the table of docs/graphs.md."""
    records = verdict.records(ROOT / "benchmarks" / "results" / "whole_models.json")
    workload = whole_models.Workload(False, 48, None)
    for row in (row for r in records for m in r["messages"] for row in m.get("rows", ())):
        row.update(
            case=workload.case, median_ms=1e3, implementation="row", limit="copy 2.0 µs, 8 x 8 linear 7 µs"
        )
    text = whole_models.details(records)
    assert 400 < workload.speech < 800
    assert f"| {workload.speech:,.0f} s |" in text
    assert "costs this machine's host 2.0 to 2.0 us for a copy, 7 to 7 us for a 8 x 8 linear." in text


def test_without_rows_the_table_says_so():
    assert markdown.table([]) == markdown.whole_models([]) == markdown.NONE_YET


def test_a_page_without_markers_is_refused(readme):
    readme.write_text("# title\n")
    with pytest.raises(ValueError, match=re.escape(markdown.marks()[0])):
        markdown.put(readme, "", check=False)


def test_the_table_of_whole_models_takes_the_machine_and_the_day_with_most_of_them(made):
    (name, shape, case), training = (
        next(key for key in markdown.HEADLINES if key[0] == name)
        for name in ("zipformer", "zipformer_training")
    )
    model = [dataclasses.replace(r, shape=shape) for r in made if (r.name, r.case) == (name, case)]
    other = [dataclasses.replace(r, device_name="another", median_ms=1.0) for r in model]
    fewer = [dataclasses.replace(r, commit="fewer", date="2999", median_ms=2.0) for r in model]
    more = dataclasses.replace(model[0], name=training[0], shape=training[1], case=training[2])
    text = markdown.whole_models([*other, *fewer, *made, *model, more])
    assert f"| {name} ({shape}), {case} | 1231 ms | – | 800 ms | 1.54× | – |" in text
    assert not [word for word in ("another", "fewer", "swoosh") if word in text]
    assert "commit fewer" in markdown.whole_models([*fewer, *model])


def test_every_headline_is_a_committed_row():
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    found = {(row.name, row.shape, row.case) for row in rows.read_all(results.glob("*.jsonl"))}
    assert set(markdown.HEADLINES) - found == set()


def test_curves_over_the_length(tmp_path):
    """There is one picture per op with rows over the length, from the newest rows, and none without such rows."""
    made = synthetic.lengths("ema_scan", (64, 1024, 256))
    found = curves.lengths([*made, *synthetic.rows()])
    assert list(found) == ["ema_scan"]
    assert [curves.length(row) for row in found["ema_scan"]] == [64] * 4 + [256] * 4 + [1024] * 4
    picture = curves.figure("ema_scan", found["ema_scan"])
    assert [panel.get_title(loc="left") for panel in picture.axes] == [
        "forward, ms",
        "forward+backward, ms",
        "peak memory of forward+backward, MiB",
    ]
    line = next(line for line in picture.axes[0].lines if line.get_label() == "fastasr")
    assert list(line.get_xdata()) == [64, 256, 1024]
    model = [
        dataclasses.replace(
            row, name="fast_conformer", case="encoder", shape=f"110M, 2 of its layers, 1 x {s} s"
        )
        for s in (15, 600)
        for row in made[:4]
    ]
    assert [curves.length(row) for row in curves.lengths(model)["fast_conformer"]] == [15] * 4 + [600] * 4
    assert "1 x L s" in curves.figure("fast_conformer", model).get_suptitle()
    rows.write(tmp_path / "rows.jsonl", made)
    assert curves.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "ema_scan_length.png").read_bytes().startswith(PNG)
    assert curves.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
