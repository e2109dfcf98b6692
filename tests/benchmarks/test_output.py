# SPDX-License-Identifier: Apache-2.0
"""What is made of rows: text, plots, the HTML page, the README's table."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastasr.benchmarks import curves, page, plots, readme_table, rows, table

sys.path.insert(0, str(Path(__file__).parent))
import synthetic

PNG = b"\x89PNG\r\n"


@pytest.fixture
def made():
    return synthetic.rows()


@pytest.fixture
def checkout(tmp_path, made):
    """A README with markers and a folder of results."""
    (tmp_path / "results").mkdir()
    rows.write(tmp_path / "results" / "cpu.jsonl", made)
    readme = tmp_path / "README.md"
    readme.write_text(f"# title\n\n{readme_table.START}\nold\n{readme_table.END}\n\nafter\n")
    return tmp_path


def run_readme(checkout, *more) -> int:
    return readme_table.main([str(checkout / "README.md"), "--results", str(checkout / "results"), *more])


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


def test_the_readme_table_is_written_and_checked(checkout):
    assert run_readme(checkout, "--check") == 1
    assert run_readme(checkout) == 0
    assert run_readme(checkout, "--check") == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith("# title\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| zipformer (whole model), whole model | – | – | 1231 ms | 800 ms | 1.54× |" in text
    assert "| `swoosh_l` 4x1600x512, forward | 5 ms | 3 ms | 2.5 ms | 1 ms | 2.50× | 90 % |" in text
    assert "replacing only its linear layers brings 1.23×; the other kernels 1.25×" in text
    assert "| `swoosh_l` | 1.5 µs (7.5 µs) | 1.5 µs (7.5 µs) |" in text
    head, details = text.split("<details>")
    assert "stack 0" not in head
    assert "stack 0" in details


def test_new_rows_are_noticed(checkout, made):
    run_readme(checkout)
    made[0].median_ms = 6.0
    rows.write(checkout / "results" / "cpu.jsonl", made)
    assert run_readme(checkout, "--check") == 1


def test_without_rows_the_readme_says_so(checkout):
    (checkout / "results" / "cpu.jsonl").unlink()
    assert run_readme(checkout) == 0
    assert "No measurements yet" in (checkout / "README.md").read_text()


def test_a_readme_without_markers_is_refused(checkout, capsys):
    (checkout / "README.md").write_text("# title\n")
    assert run_readme(checkout) == 2
    assert readme_table.START in capsys.readouterr().err


def test_the_committed_readme_says_what_the_rows_say():
    readme = readme_table.ROOT / "README.md"
    if not readme.exists():
        pytest.skip("this installation has no README")
    assert readme_table.main([str(readme), "--check"]) == 0


def test_curves_over_the_length(tmp_path):
    """One picture per op with rows over the length, the newest of each; none without such rows."""
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
    rows.write(tmp_path / "rows.jsonl", made)
    assert curves.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "ema_scan_length.png").read_bytes().startswith(PNG)
    assert curves.main(["--results", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
