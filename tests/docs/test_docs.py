# SPDX-License-Identifier: Apache-2.0
"""Links in the documentation lead somewhere, and its tables agree with the committed rows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tables

from fastasr import ops
from fastasr.benchmarks.device import verdict
from fastasr.benchmarks.studies import breakdown, int8_peers, recipe, streaming_accuracy, streaming_load

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    p
    for p in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md"))
    if p.is_file()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(
        r"`((?:fastasr|csrc|kernels|benchmarks|tests|scripts|docs|examples)/[\w./]+\.\w+)`", text
    ):
        if Path(name).stem != "scaled_sine":  # CONTRIBUTING invents this op
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("script", ["tables.py", "architecture.py"])
def test_what_is_generated_is_current(script):
    command = [sys.executable, ROOT / "scripts" / script, "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}run python scripts/{script}"


def test_a_file_without_rows_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tables.main(["--add", str(tmp_path / "results.jsonl")])
    assert "results.jsonl has no rows" in capsys.readouterr().err


def test_the_training_page_says_what_the_committed_run_says():
    assert recipe.main(["--check"]) == 0, "run python -m fastasr.benchmarks.studies.recipe"
    assert streaming_accuracy.main(["--check"]) == 0, (
        "run python -m fastasr.benchmarks.studies.streaming_accuracy"
    )


def test_the_load_page_says_what_the_committed_load_test_says():
    assert streaming_load.main(["--check"]) == 0, (
        "run python -m fastasr.benchmarks.studies.streaming_load --plot"
    )


def test_pages_say_what_the_studies_found():
    for study in (breakdown, int8_peers):
        assert study.main(["--check"]) == 0, f"run python -m {study.__name__} --page-only"


def test_the_readme_is_short_and_lists_every_op():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    written = re.sub(r"<!-- (\w+):start -->.*?<!-- \1:end -->\n", "", text, flags=re.DOTALL)
    assert len(written.splitlines()) <= 125
    assert [name for name in ops.NAMES if f"`{name}`" not in text] == []


def test_the_readme_names_the_architectures_that_kernels_are_compiled_for():
    status = re.search(
        r"\*\*Status\.\*\*.*?\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )[0]
    triton, cuda = (re.findall(r"sm_\d+", part) for part in status.split("(Triton)"))
    budgets = (ROOT / "tests" / "kernels" / "budgets.toml").read_text(encoding="utf-8")
    assert set(triton) == set(re.findall(r"sm_\d+", budgets))
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    listed = re.search(r'FASTASR_CUDA_ARCHITECTURES "([^"]+)" CACHE', cmake)[1]
    assert cuda == [f"sm_{number}" for number in re.findall(r"\d+", listed)]


def test_no_page_says_that_kernels_have_not_run_where_a_gpu_checked_them():
    records = verdict.records(ROOT / "benchmarks" / "results" / "gpu.json")
    checked = {name for name, subject in verdict.subjects(records).items() if subject.found} & {*ops.NAMES}
    own = {op: ROOT / "docs" / "ops" / f"{op}.md" for op in checked}
    files = {
        op: page.with_stem(ops.OPS[op].definition.__module__.rpartition(".")[2]) for op, page in own.items()
    }
    pages = {own[op] if own[op].exists() else files[op] for op in checked}
    assert len(pages) > 20
    doubting = re.compile(r"not (yet )?run on (any )?(hardware|GPU)|No GPU has run", re.IGNORECASE)
    assert not [page.name for page in pages if doubting.search(" ".join(page.read_text().split()))]


def test_every_environment_variable_is_documented():
    documented = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    used = set()
    for folder in ("fastasr", "kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(
                re.findall(r"environ(?:\.get\(|\[)\s*\"(FASTASR_\w+)\"", path.read_text(encoding="utf-8"))
            )
    used |= set(
        re.findall(r"\"(FASTASR_\w+|MAX_JOBS|CMAKE_ARGS)\"", (ROOT / "setup.py").read_text(encoding="utf-8"))
    )
    assert {n for n in used if n not in documented and f'"{n}"' not in documented} == set()
