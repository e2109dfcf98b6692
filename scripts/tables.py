# SPDX-License-Identifier: Apache-2.0
"""Writes the generated tables of the README and of docs/, each between the markers of its page.

    python scripts/tables.py [--check | --add bench-report/results.jsonl]

Measured tables come from benchmarks/results, the tables of ops from the ops' declarations, the tables of frameworks
from the rules, and the lines that install them from peers.sh. The picture of a TDT's memory is drawn from its rows.
``--check`` changes nothing and ends with 1 when a page is not current. ``--add`` first puts the rows of a run into
benchmarks/results/cpu.jsonl, in the place of older rows of the same machine.
"""

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import frameworks
import instruction_sets
import recipes
import test_matrix

from fastasr import files, ops
from fastasr.benchmarks import markdown, sweep
from fastasr.benchmarks.device import verdict
from fastasr.benchmarks.device import whole_models as on_gpus
from fastasr.benchmarks.markdown import put, table, whole_models, without_padding
from fastasr.benchmarks.models import (
    encoders,
    nemotron_streaming,
    ragged,
    recipe_step,
    reduced_weights,
    transcribe,
    whisper_generate,
)
from fastasr.benchmarks.rows import Row, merge, read, read_all
from fastasr.benchmarks.studies import curves, growth, transducer_memory

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GPU_RECORDS = ROOT / "benchmarks" / "results" / "gpu.json"  # the units.json of a run on a GPU
WHOLE_RECORDS = ROOT / "benchmarks" / "results" / "whole_models.json"  # the units.json of a run of stage M
ELSEWHERE = {
    transcribe.NAME: "decoding.md",
    recipe_step.NAME: "training.md",
    reduced_weights.NAME: "precision.md",
    ragged.NAME: "swap.md",
    nemotron_streaming.NAME: "models/fast_conformer.md",
    encoders.NAME: "models/encoders.md",
    whisper_generate.NAME: "frameworks/transformers.md",
    **{f"{model}{growth.ENDING}": f"models/{model}.md" for model in growth.SIZES},
}  # pages with a table of another form


def op_page(name: str) -> Path:
    """Returns the op's page, which has the name of the op or of its file."""
    own = DOCS / "ops" / f"{name}.md"
    return own if own.exists() else own.with_stem(_file(name))


def _file(name: str) -> str:
    return ops.OPS[name].definition.__module__.rpartition(".")[2]


def measured(rows: Sequence[Row]) -> dict[Path, str]:
    """Returns page -> its measured table. A row stands on the page of its op or model, or in
    docs/benchmarks.md.
    """
    pages: dict[Path, list[Row]] = {op_page(name): [] for name in sorted(ops.NAMES)}
    pages |= {
        path: [] for path in sorted((DOCS / "models").glob("*.md")) if "bench:start" in path.read_text()
    }
    pages |= {DOCS / "benchmarks.md": []}
    for row in rows:
        page = op_page(row.name) if row.suite == "ops" else DOCS / "models" / f"{row.name}.md"
        for_memory = (row.name, row.case) == (transducer_memory.TDT.name, transducer_memory.TDT.case)
        if row.name not in ELSEWHERE and not row.case.startswith(curves.PREFIX) and not for_memory:
            pages[page if row.suite != "dispatch" and page in pages else DOCS / "benchmarks.md"].append(row)
    made = {page: table(found) for page, found in pages.items()}
    made[ROOT / "README.md"] = whole_models(rows)
    for module in (transcribe, reduced_weights, encoders, whisper_generate):
        own = [row for row in rows if row.name == module.NAME]
        made[DOCS / ELSEWHERE[module.NAME]] = module.table(own)
    made[DOCS / ELSEWHERE[ragged.NAME]] = without_padding([row for row in rows if row.name == ragged.NAME])
    return made


def by_page() -> dict[Path, list[str]]:
    """Returns page -> its ops."""
    found: dict[Path, list[str]] = {}
    for name in sorted(ops.NAMES):
        found.setdefault(op_page(name), []).append(name)
    return found


FAMILIES = {  # folders of csrc/cpu
    "attention": "Attention",
    "conv": "Convolution",
    "ema": "Moving averages",
    "rnnt": "Transducers",
    "gemm": "Linear layers",
    "rows": "Norms, activations, residuals",
    "": "Others",
}


def by_family() -> dict[str, list[str]]:
    """Returns family -> its ops, in the order of their pages. The folder of an op's C++ kernel is its family; an op
    without a kernel of its own has the one that it shares, but a linear layer is one first.
    """
    found: dict[str, list[str]] = {family: [] for family in FAMILIES.values()}
    for name in sorted(ops.NAMES, key=lambda name: (op_page(name).stem, name)):
        op = ops.OPS[name]
        folders = {"gemm"} if "linear" in name else _folders(_file(name)) or _folders(op.family.name)
        found[FAMILIES[max(folders, default="")]].append(name)
    return {family: names for family, names in found.items() if names}


def _folders(stem: str) -> set[str]:
    """Returns the folders of csrc/cpu with a kernel of this name."""
    return {file.parent.name for file in (ROOT / "csrc" / "cpu").glob(f"*/{stem}.*")} & FAMILIES.keys()


def op_families() -> str:
    """Returns the README's table: a line per family, with links to the ops' pages."""
    lines = (
        (family, ", ".join(f"[`{name}`](docs/ops/{op_page(name).name})" for name in names))
        for family, names in by_family().items()
    )
    return "\n".join(markdown.grid(("family", "ops"), lines))


NEW_PAGE = """# {op}

```
fastasr.ops.{op}{signature}
```

{summary}.

## At your own shapes

<!-- recipe:start -->
<!-- recipe:end -->

## Measured

<!-- bench:start -->
<!-- bench:end -->
"""


def new_page(op: str) -> str:
    """Returns the beginning of an op's page."""
    signature = inspect.signature(getattr(ops, op))
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    signature = signature.replace(parameters=plain, return_annotation=signature.empty)
    return NEW_PAGE.format(op=op, signature=signature, summary=ops.OPS[op].summary)


KERNELS = {"cpu": "C++", "triton": "Triton", "cuda": "CUDA"}


def op_rows() -> str:
    """Returns a line per op, by family: name, what it computes, what its kernels are written in, its page."""
    lines = []
    for family, names in by_family().items():
        lines.append((f"**{family}**", "", "", ""))
        for name in names:
            page, op = op_page(name), ops.OPS[name]
            made = dict.fromkeys(KERNELS[i.backend] for i in op.family.implementations)
            link = f"[{page.stem}](ops/{page.name})"
            lines.append((f"`{name}`", op.summary.replace("``", ""), ", ".join(made), link))
    return "\n".join(markdown.grid(("op", "computes", "kernels", "page"), lines))


def peers() -> str:
    """Returns the lines that install each framework, without the head of their file."""
    lines = (ROOT / "scripts" / "peers.sh").read_text(encoding="utf-8").partition("\n\n")[2]
    return f"```bash\n# needs: an index of packages for pip\n{lines}```"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--check", action="store_true", help="compare only")
    ways.add_argument("--add", metavar="FILE", help="put these rows into benchmarks/results/cpu.jsonl first")
    options = parser.parse_args(arguments)
    check = options.check
    if options.add:
        if not (new := read(options.add)):
            parser.error(f"{options.add} has no rows")
        merge(ROOT / "benchmarks" / "results" / "cpu.jsonl", new)
    if missing := [page for page in map(op_page, ops.NAMES) if not page.exists()]:
        if check:
            print(f"missing: {', '.join(map(str, missing))}; run python scripts/tables.py", file=sys.stderr)
            return 1
        for page in missing:
            files.write(page, new_page(page.stem))
    everything = read_all(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))
    swept = [row for row in everything if row.suite == sweep.SUITE]
    rows = [row for row in everything if row.suite != sweep.SUITE]
    found = [put(page, block, check) for page, block in measured(rows).items()]
    found += [put(page, recipes.recipes(names), check, "recipe") for page, names in by_page().items()]
    found += [put(ROOT / "README.md", op_families(), check, "ops")]
    found += [put(DOCS / "index.md", op_rows(), check, "ops")]
    found += [put(DOCS / "frameworks" / "classes.md", frameworks.table(), check, "rules")]
    found += [put(DOCS / "benchmarks.md", sweep.table(swept), check, "sweeps")]
    found += [put(DOCS / "testing.md", test_matrix.table(), check, "matrix")]
    found += [put(DOCS / "install.md", peers(), check, "peers")]
    found += [put(DOCS / "testing.md", instruction_sets.table(), check, "sets")]
    tables = {nemotron_streaming.NAME: (nemotron_streaming.table, "chunks")}
    tables |= {f"{model}{growth.ENDING}": (growth.table, "growth") for model in growth.SIZES}
    for name, (made, mark) in tables.items():
        own = [row for row in rows if row.name == name]
        found += [put(DOCS / ELSEWHERE[name], made(own), check, mark)]
    found += [put(DOCS / "rnnt.md", transducer_memory.table(rows), check, "memory")]
    if not check and transducer_memory.memory_rows(rows, transducer_memory.TDT):
        transducer_memory.main(["--tdt"])
    on_gpu = verdict.records(GPU_RECORDS)
    found += [put(DOCS / "gpu-queue.md", verdict.tables(on_gpu), check)]
    found += [put(ROOT / "README.md", verdict.sentence(on_gpu), check, "gpu")]
    whole = verdict.records(WHOLE_RECORDS)
    found += [put(ROOT / "README.md", on_gpus.summary(whole), check, "whole")]
    found += [put(ROOT / "README.md", on_gpus.training([*on_gpu, *whole]), check, "training")]
    found += [put(DOCS / "graphs.md", on_gpus.details(whole), check, "whole")]
    return max(found)


if __name__ == "__main__":
    sys.exit(main())
