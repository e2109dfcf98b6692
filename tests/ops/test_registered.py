# SPDX-License-Identifier: Apache-2.0
"""``import fastasr`` registers the ops, whether torch is imported before or after it, and imports no more than that."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastasr import ops
from fastasr.ops import _dispatch

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *arguments) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.linspace(0.1, 0.9, 8))

    def forward(self, x_orig, x):
        return ops.bypass(x_orig, x, self.scale)


LOAD = """
{imports}
import sys
program = torch.export.load(sys.argv[1])
print(program.module()(*torch.load(sys.argv[2])).tolist())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the files of an exported program and of its inputs, and the program's output."""
    folder = tmp_path_factory.mktemp("saved")
    module, inputs = Residual(), (torch.randn(5, 8), torch.randn(5, 8))
    torch.export.save(torch.export.export(module, inputs), folder / "program.pt2")
    torch.save(inputs, folder / "inputs.pt")
    return folder / "program.pt2", folder / "inputs.pt", str(module(*inputs).tolist())


# The second asks where torch is before it imports it, as packages do to see whether there is torch.
@pytest.mark.parametrize(
    "imports",
    [
        "import torch, fastasr",
        "import fastasr, importlib.util; assert importlib.util.find_spec('torch').origin\nimport torch",
    ],
)
def test_an_exported_program_loads_in_another_process(saved, imports):
    program, inputs, output = saved
    assert python(LOAD.format(imports=imports), program, inputs).strip() == output


def test_the_import_brings_what_registration_needs_alone():
    """``torch._dynamo`` takes longer than all else of it."""
    loaded = python("import sys, fastasr; print(*sys.modules); import torch; print(*sys.modules)").split("\n")
    before, after = (set(line.split()) for line in loaded[:2])
    assert "torch" not in before
    assert "fastasr.ops" in after
    assert not {"torch._dynamo", "triton", "fastasr.swap", "fastasr.models"} & after


def test_torch_is_left_as_it_would_be_without_fastasr():
    """What waits for torch's import is gone afterwards, and torch's loader is its own."""
    python(
        "import sys\n"
        "before = list(sys.meta_path)\n"
        "import fastasr\n"
        "assert len(sys.meta_path) == len(before) + 1\n"
        "import torch\n"
        "assert sys.meta_path == before, sys.meta_path\n"
        "assert 'exec_module' not in vars(torch.__spec__.loader)\n"
    )


def test_the_mark_of_a_constant_result_is_torchs():
    assert vars(torch.compiler.assume_constant_result(lambda: None)) == vars(_dispatch._serving)
