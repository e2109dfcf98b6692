# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING.md's steps, taken word for word, make an op that keeps the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from fastasr.testing.checks import CHECKS

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "fastasr": "fastasr",
    "kernels": "fastasr/kernels",
    "benchmarks": "fastasr/benchmarks",
    "docs": "docs",
}
# Python finds the copy's modules before those of an installed package.
RUN = """
import sys
from importlib.machinery import PathFinder
sys.path.insert(0, {folder!r})
sys.meta_path.insert(0, PathFinder)
import pytest
from fastasr import ops
from fastasr.benchmarks import ops as benchmarks
assert ops.__file__.startswith({folder!r})
assert "scaled_sine" in ops.__all__
assert ops.scaled_sine.op.summary == "scale · sin(x) over the last dimension"
assert "scaled_sine" in benchmarks.names()
from fastasr.testing import Make, gradcheck, sized
assert gradcheck(ops.scaled_sine, **sized("scaled_sine", T=5, B=2, C=8).arguments(Make())).ok
options = ["-q", "-x", "-rp", "-p", "no:cacheprovider", "-k", "scaled_sine or every_public"]
sys.exit(pytest.main([*options, {contract!r}, {declaration!r}]))
"""


def _copied(folder: Path) -> None:
    """Returns the package with links in place of its files."""
    for source, target in FOLDERS.items():
        for path in sorted((ROOT / source).rglob("*")):
            link = folder / target / path.relative_to(ROOT / source)
            if path.is_file() and "__pycache__" not in path.parts:
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    names = folder / "fastasr" / "ops" / "__init__.py"  # which gets another import
    names.unlink()
    names.write_bytes((ROOT / "fastasr" / "ops" / "__init__.py").read_bytes())
    (folder / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")


# A step with code: the file that it names, and what it has in it.
STEP = r"^\d\. \*\*[^`]*`([^`]+)`(?:(?!^\d\.).)*?^   ```\w+\n(.*?)^   ```"
# A kernel for GPUs alone, of the forward pass alone.
DECLARED = '@op("triton", gradients=gradients_of_formula)'


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_steps_make_an_op(tmp_path, backend):
    _copied(tmp_path)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = text[text.index("## Add an op") : text.index("## How tests work")]
    steps = re.findall(STEP, text, flags=re.S | re.M)
    folders = [Path(file).parent.as_posix() for file, _ in steps]
    assert folders == ["fastasr/ops", "fastasr/testing/samples", "kernels"]
    for file, content in steps[: 3 if backend == "triton" else 2]:
        top, rest = file.split("/", 1)
        path = tmp_path / FOLDERS[top] / rest
        assert not path.exists()
        small = dedent(content).replace("BLOCK = 1024", "BLOCK = 64")  # samples have more elements
        path.write_text(small, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OP": ""}
    if backend == "triton":
        declaration = tmp_path / "fastasr" / "ops" / "scaled_sine.py"
        changed = declaration.read_text().replace('@op("")', DECLARED)
        imports = "from fastasr.ops._runtime import gradients_of_formula\n\n\n@op("
        declaration.write_text(changed.replace("\n\n@op(", imports))
        environment |= {"TRITON_INTERPRET": "1", "FASTASR_TEST_BACKEND": "triton"}
    opgen = [sys.executable, ROOT / "scripts" / "opgen", "scaled_sine", "--root", tmp_path]
    subprocess.run(opgen, check=True, capture_output=True, timeout=120)
    tests = {name: str(ROOT / "tests" / "ops" / f"test_{name}.py") for name in ("contract", "declaration")}
    run = subprocess.run(
        [sys.executable, "-c", RUN.format(folder=str(tmp_path), **tests)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    passed = re.findall(r"^PASSED \S*::(\S+)", run.stdout, flags=re.M)
    expected = [
        *(
            f"test_contract[scaled_sine-{check.name}-"
            for check in CHECKS
            if backend == "eager" or check.forced
        ),
        *["test_refuses[scaled_sine-"] * (backend == "eager"),
        "test_the_operator_has_the_declared_signature[scaled_sine]",
        "test_every_public_op_has_a_table",
    ]
    assert [start for start in expected if not any(name.startswith(start) for name in passed)] == []
