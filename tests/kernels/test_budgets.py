# SPDX-License-Identifier: Apache-2.0
"""Kernel configurations compile and stay within ``budgets.toml``: on every architecture those that changed since they
were measured, a random twentieth of the others on one each, and in the long tests all. SEED repeats the choice. Without
a section for this Triton, they are compared with that of the nearest version, in what holds for each version: spills
and the device's shared memory.

Compiling needs Triton but no GPU. It runs in a process of its own, where Triton is not in interpreter mode.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.kernels import budgets
from tests.kernels.configurations.configuration import ARCHITECTURES, SHARED

pytest.importorskip("triton")

SECTIONS = budgets.read()
MOST = ("registers", "spills", "shared", "narrow", "repeated")  # may not grow
MOST_SPILLED = 48  # bytes of local memory per thread
BROAD = re.compile(r"rel_attention (queries|keys), (d=96|d=128|padding, context, cap), .*bf16")
MOST_OF_BROAD = 272
GROWTH = 1.05  # the instruction count may grow by this factor
UPDATE = "run python tests/kernels/update_budgets.py"


def _rows(sections: Iterable[str]) -> list:
    return [
        pytest.param(
            {name: row[architecture] for name, row in SECTIONS[section].items()},
            architecture,
            id=f"{section}, sm_{architecture}",
        )
        for section in sections
        for architecture in ARCHITECTURES
    ]


def _version(section: str) -> int:
    major, minor = map(int, re.findall(r"\d+", section))
    return 100 * major + minor


each_architecture = pytest.mark.parametrize(("rows", "architecture"), _rows(SECTIONS))


@pytest.fixture(scope="module", params=["changed", pytest.param("all", marks=pytest.mark.long)])
def compiled(request) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    seed = os.environ.get("SEED") or str(random.SystemRandom().randrange(10**6))
    which = ["--all"] if request.param == "all" else ["--seed", seed]
    command = [sys.executable, str(Path(__file__).with_name("update_budgets.py")), "--json", *which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=6000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) | {"seed": seed}


def _nearest(names: Iterable[str], name: str) -> str:
    """Returns the name of the section whose version is nearest to that of ``name``."""
    return min(names, key=lambda other: abs(_version(other) - _version(name)))


def _over(values: dict, budget: dict) -> list[str]:
    """Returns the measures that break the budget."""
    over = [key for key in MOST if key in budget and values[key] > budget[key]]
    if values["wide"] < budget.get("wide", 0):
        over.append("wide")
    if values["instructions"] > budget.get("instructions", math.inf) * GROWTH:
        over.append("instructions")
    return over


def _table(rows: list[tuple[str, dict, dict]]) -> str:
    """Returns measured and budgeted values side by side, offenders marked."""
    lines = []
    for name, values, budget in rows:
        over = _over(values, budget)
        cells = [
            f"{key} {values[key]} (budget {budget.get(key)}){' <--' if key in over else ''}" for key in values
        ]
        lines.append(f"{name}: {', '.join(cells)}")
    return "\n".join(lines)


def test_the_file_names_sm_89_where_it_differs_from_sm_86(tmp_path, monkeypatch):
    monkeypatch.setattr(budgets, "FILE", tmp_path / "budgets.toml")
    budgets.FILE.write_text("# head\n")
    few, more = (dict.fromkeys(budgets.MEASURES, n) for n in (1, 2))
    rows = {"a": {"hash": "1", 86: few, 89: few}, "b": {"hash": "2", 86: few, 89: more, 90: few}}
    budgets.write("triton 3.7", rows)
    assert budgets.FILE.read_text().count("sm_89") == 1
    assert budgets.read() == {"triton 3.7": rows}


def test_within_budget(compiled):
    section = _nearest(SECTIONS, compiled["section"])
    rows = []
    for name, measured in compiled["measured"].items():
        for key, values in measured.items():
            budget = SECTIONS[section].get(name, {}).get(int(key) if key != "hash" else None)
            if budget and section != compiled["section"]:  # registers and instructions are other ones
                budget = {"spills": budget["spills"], "shared": SHARED[int(key)]}
            if budget:
                rows.append((f"{name}, sm_{key}", values, budget))
    assert rows
    broken = [row for row in rows if _over(row[1], row[2])]
    assert not broken, f"\n{_table(broken)}\nSEED={compiled['seed']}. If meant: {UPDATE}"


def test_budgets_cover_every_configuration(compiled):
    assert set(SECTIONS[_nearest(SECTIONS, compiled["section"])]) == set(compiled["hashes"]), UPDATE


@each_architecture
def test_budgets_have_no_spills(rows, architecture):
    """No kernel but those of broad heads runs out of its 255 registers. In those named the assembler takes fewer and
    spills at most 48 bytes, so that more programs may be resident; to forbid it would cost a third or half of the
    resident warps. Broad heads in blocks of 64 channels would not spill, and take two to six times the instructions."""
    known = {
        "add_two_norms backward, C=512, fp32": (100,),
        "balancer_gradient change, 192 channels, padded, fp32": (86, 100, 120),
        "balancer_gradient change, channels in the middle, padded, fp32": (80, 86),
        "depthwise_conv2d weight gradient, fp32": (120,),
        "rel_attention forward, padding, dropout, fp32": (86,),
        "rel_attention forward, padding, key bias, fp32": (90,),
        "rel_attention forward, padding, mask, fp32": (80,),
        "rel_attention forward, padding, mask, tf32": (120,),
        "rel_attention forward, padding, span, fp32": (86,),
        "rel_attention keys, padding, context, cap, fp32": (86, 120),
        "rel_attention keys, padding, dropout, fp32": (120,),
        "rel_attention keys, padding, mask, tf32": (100,),
        "rel_attention keys, padding, span, fp32": (80, 120),
        "rel_attention keys, recordings, fp32": (80,),
        "rel_attention offsets, span, fp32": (90,),
        "rel_attention queries, padding, gated bias, fp32": (100,),
        "rel_attention statistics, padding, context, cap, fp32": (86,),
        "rel_attention statistics, padding, context, fp32": (86,),
        "rel_attention statistics, padding, dropout, fp32": (86,),
        "rel_attention statistics, padding, mask, fp32": (86,),
        "rnnt_joiner context gradient, D=512, fp32": (120,),
        "rnnt_joiner context gradient, a later chunk, D=512, fp32": (120,),
        "segment_attention forward, fp32": (80, 100, 120),
        "segment_attention keys, memory, dropout, lengths, history, fp32": (80, 90),
        "segment_attention keys, memory, dropout, lengths, history, tf32": (86, 90),
        "toeplitz_attention forward, d=128, V=1024, fp32": (86,),
        "zipformer_attention forward, odd sizes, tf32": (120,),
        "zipformer_attention forward, recordings, chunks, bf16": (120,),
        "zipformer_attention forward, recordings, fp32": (120,),
        "zipformer_attention forward, tf32": (120,),
        "zipformer_attention keys, chunks, padding, mask, fp32": (90,),
        "zipformer_attention keys, chunks, padding, mask, tf32": (80,),
        "zipformer_attention keys, fp32": (120,),
        "zipformer_attention keys, recordings, V=144, equal, fp32": (120,),
        "zipformer_attention keys, recordings, chunks, bf16": (120,),
        "zipformer_attention keys, recordings, penalty, equal, fp32": (120,),
        "zipformer_attention queries, odd sizes, tf32": (120,),
        "zipformer_attention queries, tf32": (86,),
        "zipformer_attention_weights forward, 50 keys, tf32": (90,),
        "zipformer_attention_weights forward, recordings, bf16": (100, 120),
        "zipformer_attention_weights queries, chunks, padding, mask, fp32": (120,),
        "zipformer_attention_weights queries, penalty, tf32": (90,),
        "zipformer_attention_weights queries, recordings, fp32": (100, 120),
    }
    place = budgets.LIKE.get(architecture, architecture)
    spilled = {
        name: row["spills"]
        for name, row in rows.items()
        if row["spills"]
        and not (BROAD.match(name) and row["spills"] <= MOST_OF_BROAD)
        and (row["registers"] == 255 or row["spills"] > MOST_SPILLED or place not in known.get(name, ()))
    }
    assert not spilled, f"bytes of local memory per thread: {spilled}"


@each_architecture
def test_budgets_fit_shared_memory(rows, architecture):
    large = {name: row["shared"] for name, row in rows.items() if row["shared"] > SHARED[architecture]}
    assert not large, f"bytes of shared memory: {large}"


@each_architecture
def test_budgets_repeat_no_work(rows, architecture):
    """Warps compute a product or its exponentials twice in these kernels alone, by the ends of their names."""
    known = {
        # products of 16 x 16 need two of four warps; the others repeat them on tensor cores that would be idle
        "layer_norm_lstm": ("bf16", "tf32"),
        # two warps spill 104 bytes
        "segment_attention keys": ("tf32",),
        # on sm_90, forward with dropout
        "toeplitz_attention forward": ("bf16", "fp16"),
        # the sums over 32 columns alone: two warps on 32 rows take longer, four on 64 columns spill;
        # with TF32 over 16 columns, as 32 spill with a mask
        "zipformer_attention keys": ("bf16", "fp16", "tf32"),
    }
    found = {
        name: row["repeated"]
        for name, row in rows.items()
        if row["repeated"] > 1
        and not BROAD.match(name)  # four warps would spill 500 bytes
        and not any(name.startswith(start) and name.endswith(ends) for start, ends in known.items())
    }
    assert found == {}


@each_architecture
def test_budgets_have_128_bit_accesses(rows, architecture):
    """This holds at sizes that allow it (those with one column or tail elements do not). Diagonals of dS begin at any
    column. The joiner's scores and durations, rel_attention's statistics and the forward pass of weighted values read
    by asynchronous copies alone, which are not counted, and write few numbers per row.
    Rows of a lattice are T + 1 long and start where a boundary says; the joiner's parts are as long as a chunk. Where
    depthwise convolutions have many taps (kernels/_sliding_taps.py), a thread has two or four channels, and 8 to 16
    frames or taps of them in registers: a warp still reads 128 or 256 neighbouring bytes, and few for each product.
    Limits are those of one parameter of any alignment. A parameter's sample is one number for each thread. The second
    row of a table of bounds begins anywhere, one of pieces is short, and groups of a recording's frames begin anywhere.
    A folded norm has a row of few taps a channel. A thread has four channels of a joiner's frame with few rows. A warp
    has 128 neighbouring keys of toeplitz_attention's slopes; with wider vectors it would meet more of the bias.
    """
    others = (
        "one column",
        "C=1,",
        "parts, 16",
        "odd sizes",
        "joiner scores",
        "joiner durations",
        "joiner normalise",
        "joiner frame gradient, few rows, D=512, bf16",
        "statistics",
        "diagonals",
        "toeplitz_attention slopes",
        "lattice",
        "bounds",
        "pieces",
        "gated_depthwise_conv groups",
        "gated_depthwise_conv folded norm",
        "zipformer_attention tables of rates",
        "weighted values forward",
        "decided limit",
        "casts, compare",
    )
    others += "gated_depthwise_conv weight gradient", "depthwise_conv2d weight gradient"
    others += tuple(f"depthwise_conv2d {name}" for name in ("forward", "input gradient"))
    others += tuple(
        f"gated_depthwise_conv {name}, {form}"
        for name in ("forward", "output gradient", "input gradient")
        for form in ("chunks", "recordings in chunks")
    )
    for name, row in rows.items():
        if not any(word in name for word in others):
            assert row["wide"] > 0, f"{name}: no 128-bit access"
