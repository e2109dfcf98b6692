# SPDX-License-Identifier: Apache-2.0
"""scripts/sources.py finds the files that decide a test's result, and few others."""

import json
import subprocess
import sys

import pytest
import sources
from sources import ROOT

pytestmark = pytest.mark.needs("fastasr", "kernels", "benchmarks", "csrc", "scripts", "tests/ops")

BYPASS, LINEAR, SWAP = "fastasr/ops/bypass.py", "fastasr/ops/linear.py", "fastasr/swap/engine.py"
MEGA, EMFORMER = "fastasr/models/mega/decoder.py", "fastasr/models/emformer/layer.py"
CONFORMER = "csrc/cpu/attention/rel_attention.cpp"
NEEDED_BY = {  # what a Python file needs, and what it does not need
    "import fastasr\nx.bypass(fastasr.backend)": ("fastasr/ops/_dispatch.py", BYPASS),
    "import fastasr\nfastasr.accelerate(espnet)": (SWAP, EMFORMER),
    "import fastasr\ngetattr(fastasr, 'restore')": (SWAP, BYPASS),
    "from fastasr import verify\nimport espnet2.asr": (MEGA, EMFORMER),
    "import fastasr\nfastasr.accelerate(torchaudio.models.Conformer)": (CONFORMER, EMFORMER),
    "import fastasr as f\nf.models.mega.MEGA": (MEGA, SWAP),
    "place = 'fastasr.models.mega'": (MEGA, SWAP),
    "from fastasr import ops as o\no.bypass.op": (BYPASS, LINEAR),
    "from fastasr import ops\nops.linear(bypass)": (LINEAR, BYPASS),
    "from fastasr import ops\ngetattr(ops, some.bypass)": (BYPASS, LINEAR),
    "from fastasr.ops import swoosh_l": ("csrc/cpu/rows/swoosh.simd.cpp", BYPASS),
    "import torch\ntorch.ops.fastasr.bypass_backward.default": ("csrc/cpu/rows/bypass.simd.cpp", LINEAR),
    "torch.ops.fastasr_cpu.mega_stack": ("csrc/bindings/mega_step.cpp", BYPASS),
    "call('bypass')": (BYPASS, LINEAR),
    "from fastasr.benchmarks.models import mega": (
        "benchmarks/models/mega.py",
        "benchmarks/models/emformer.py",
    ),
    "from fastasr.benchmarks import models\nmodels.MODULES": ("benchmarks/models/emformer.py", "setup.py"),
    "from fastasr.testing import checks": (
        "fastasr/testing/tolerance.py",
        "fastasr/testing/samples/bypass.py",
    ),
    "from fastasr import testing\ntesting.tables()": ("fastasr/testing/samples/bypass.py", MEGA),
}


def names(paths):
    return {str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT)}


@pytest.mark.parametrize("text", NEEDED_BY)
def test_what_a_file_needs(text, tmp_path):
    file = tmp_path / "file.py"
    file.write_text(text)
    needed, other = NEEDED_BY[text]
    found = names(sources.closure(file))
    assert needed in found
    assert other not in found


def test_a_test_alone_needs_what_it_imports_itself(tmp_path):
    file = tmp_path / "test_file.py"
    file.write_text(
        "from fastasr import ops\ndef test_a():\n    import fastasr.models.mega\ndef test_b(): ops.bypass"
    )
    assert sources.tests_with_imports(file) == {"test_a"}
    a, b = (names(sources.closure(file, test=test)) for test in ("test_a", "others"))
    assert {MEGA, BYPASS} <= a
    assert {MEGA, BYPASS} & b == {BYPASS}


def test_the_contract_of_an_op_needs_its_own_code():
    needed = {
        *(BYPASS, "kernels/bypass.py", "csrc/bindings/rows.cpp", "csrc/cpu/rows/bypass.simd.cpp"),
        *("csrc/bindings/dispatch.cpp", "csrc/cpu/simd/simd.cpp", "fastasr/testing/checks.py"),
        *("fastasr/testing/samples/bypass.py", "tests/conftest.py", "tests/steps.py"),
    }
    own = (BYPASS, "fastasr/testing/samples/bypass.py")
    found = names(sources.closure(*(ROOT / name for name in ("tests/ops/test_contract.py", *own))))
    assert needed <= found
    assert not [n for n in found if n.startswith(("fastasr/swap", "fastasr/models", "csrc/cpu/attention"))]


def test_modules_that_python_loads_are_found():
    """Every op and every rule of the swap is loaded, and needed only where it is used: these are added here."""
    entries = (
        "asr.streaming",
        "asr.export",
        "asr.recipe.training",
        "asr.demo.run",
        "cli.app",
        "benchmarks.runner",
    )
    code = "import importlib, json, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(f'fastasr.{name}')\n"
    code += "    print(json.dumps([m for m in sys.modules if m.startswith('fastasr')]))"
    run = subprocess.run([sys.executable, "-c", code, *entries], capture_output=True, text=True, check=True)
    added = {*sources.ops().values(), *sources.RULES.rglob("*.py")}
    for name, line in zip(entries, run.stdout.splitlines(), strict=True):
        added.add(sources.modules()[f"fastasr.{name}"])
        loaded = {sources.modules()[m] for m in json.loads(line) if m in sources.modules()}
        assert names(loaded - sources.closure(*added)) == set(), name
