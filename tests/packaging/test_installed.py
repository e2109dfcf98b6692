# SPDX-License-Identifier: Apache-2.0
"""The installed wheel, outside the sources: with everything, without the native library, without Triton."""

import json

import pytest
from fresh import ROOT

from fastasr.ops import _dispatch

pytestmark = [pytest.mark.packaging]

# It runs every op forward and backward, and prints where the package is and the table of backends.
RUN = """
import json, sys
import torch
{before}
import fastasr
from fastasr import ops
from fastasr.ops import _dispatch

x = torch.randn(5, 2, 8, requires_grad=True)
weight, bias = torch.randn(3, 8, requires_grad=True), torch.randn(3, requires_grad=True)
channel = torch.rand(8, requires_grad=True)
calls = {{
    "swoosh_l": lambda: ops.swoosh_l(x),
    "swoosh_r": lambda: ops.swoosh_r(x),
    "swoosh_linear": lambda: ops.swoosh_linear(x, weight, bias, "SwooshL", 0.2, 0, True),
    "bias_norm": lambda: ops.bias_norm(x, channel, torch.zeros(())),
    "bypass": lambda: ops.bypass(x, 2 * x, channel),
    "linear": lambda: ops.linear(x, weight, bias),
}}
assert set(calls) <= set(ops.NAMES), ops.NAMES
for call in calls.values():
    y = call()
    y.backward(torch.randn_like(y))
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
expected = torch.logaddexp(torch.zeros(()), x - 4) - 0.08 * x - 0.035
torch.testing.assert_close(ops.swoosh_l(x), expected)
chosen = _dispatch.explain_choice("swoosh", "cpu", torch.float32)
print(json.dumps({{
    "file": fastasr.__file__,
    "version": fastasr.__version__,
    "reason": _dispatch.why_not_native(),
    "chosen": chosen,
    "table": _dispatch.table(),
}}))
"""


def result(environment, before="", **variables) -> dict:
    return json.loads(environment.python(RUN.format(before=before), **variables).splitlines()[-1])


def rows(found: dict, backend: str) -> list[dict]:
    return [row for row in found["table"] if row["backend"] == backend]


def test_every_op_runs_on_its_kernels(installed):
    found = result(installed)
    assert found["file"].startswith(str(installed.folder)), "the wheel's package, not the repository's"
    assert found["version"] == "0.1.0"
    assert found["reason"] == ""
    assert found["chosen"] == ["cpu", ""]
    kernels = rows(found, "cpu")
    families = _dispatch.FAMILIES.values()
    assert {row["op"] for row in kernels} == {
        op for family in families for op in family.ops if "cpu" in (i.backend for i in family.implementations)
    }
    assert all(row["available"] for row in kernels)
    assert {row["op"] for row in found["table"]} == {row["op"] for row in rows(found, "eager")}


def test_every_op_keeps_the_contract(installed):
    """Each op on one sample, values and gradients."""
    installed.python(
        "import torch\n"
        "from fastasr.testing import checks, tables\n"
        "for table in tables().values():\n"
        "    checks.parity(table, table.thorough[0], torch.float32, 'cpu')\n"
    )


# A recogniser decodes, streams, is exported and trained; the recordings and its sizes come from the tests.
RECOGNISE = """
import sys
import torch
sys.path.insert(0, {tests!r})
import beeps
from tiny_recogniser import RECOGNISER, STREAMING
from fastasr.asr import decoding, streaming
from fastasr.asr.export import export_onnx
from fastasr.asr.recogniser import AsrModel
from fastasr.models import zipformer
from fastasr.asr.recipe import checkpoints, speech, training
from pathlib import Path

options = RECOGNISER | STREAMING | {{"feature_dim": 80, "vocab_size": 12, "use_ctc": True}}
model = AsrModel(**options).eval()
x = torch.randn(2, 120, 80)
found = decoding.greedy_search(model, *decoding.encode(model, x, torch.tensor([120, 77])))
assert len(found.tokens) == 2
encoder = streaming.StreamingEncoder.from_model(model, 8, 16)
with streaming.StreamingRecogniser(model, encoder, "greedy") as recogniser:
    stream = recogniser.open()
    recogniser.push(stream, torch.randn(9000))
    assert recogniser.advance()
    recogniser.finish(stream)
assert all(Path(file).is_file() for file in export_onnx(model, Path("onnx")).values())
sets = speech.load(None, beeps.folder(Path("beeps")), speeds=(1.0,), say=lambda text: None)
tiny = training.Options(out=Path("run"), size="tiny", max_duration=8.0, warmup=5, steps=2)
training.Trainer(tiny, *sets, training.learn_units("char", sets[0]), None, say=lambda text: None).run()
assert checkpoints.load(Path("run") / checkpoints.NAME)["step"] == 2
assert {folder!r} in zipformer.__file__
"""


def test_a_recogniser_decodes_streams_is_exported_and_trained(installed):
    for name in ("kaldi_native_fbank", "kaldialign", "onnxruntime", "rich"):
        pytest.importorskip(name)
    installed.python(RECOGNISE.format(tests=str(ROOT / "tests"), folder=str(installed.folder)))


DEMO = """
import contextlib, io
from fastasr.asr.demo.__main__ import main

errors = io.StringIO()
with contextlib.redirect_stderr(errors):
    code = main("--generated --size tiny --seconds 1.5 --reps 1 --patience 0 --out report.html".split())
assert (code, errors.getvalue()) == (0, "")
"""


def test_the_demo_in_miniature(installed):
    for name in ("zipformer", "kaldi_native_fbank", "matplotlib", "jinja2", "rich"):
        pytest.importorskip(name)
    printed = installed.python(DEMO)
    said = ("generating a speech-like signal", "random weights", "modules verified", "fastasr", "written")
    for words in said:
        assert words in printed
    page = (installed.folder / "elsewhere" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "BiasNorm" in page
    assert "torch.compile was left out" in page


def test_without_the_native_library(installed_pure):
    found = result(installed_pure)
    assert "not built" in found["reason"]
    assert found["chosen"][0] == "eager"
    assert "not built" in found["chosen"][1]
    swoosh = [row for row in rows(found, "cpu") if row["op"] == "swoosh_l"]
    assert [row["available"] for row in swoosh] == [False]
    assert "not built" in swoosh[0]["reason"]


def test_with_a_native_library_that_does_not_load(installed_pure, tmp_path):
    """A binary for another system is reported, and eager serves."""
    library = installed_pure.packages / "fastasr/libfastasr.so"
    library.write_bytes(b"\x7fELF nonsense")
    try:
        found = result(installed_pure)
    finally:
        library.unlink()
    assert "did not load" in found["reason"]
    assert found["chosen"][0] == "eager"


def test_without_triton(installed):
    found = result(installed, before="sys.modules['triton'] = None")
    assert found["chosen"] == ["cpu", ""]
    triton = rows(found, "triton")
    assert triton
    assert not any(row["available"] for row in triton)
    assert all("triton" in row["reason"] for row in triton)


def test_without_either(installed_pure):
    found = result(installed_pure, before="sys.modules['triton'] = None")
    assert found["chosen"][0] == "eager"
    assert {row["backend"] for row in found["table"] if row["available"]} == {"eager"}


def test_forced_eager(installed):
    assert result(installed, FASTASR_BACKEND="eager")["chosen"] == ["eager", "backend 'eager' is forced"]


def test_the_command_is_installed(installed):
    assert "0.1.0" in installed.command("--version")
    listed = installed.command("ops")
    for name in ("swoosh_l", "bias_norm", "bypass"):
        assert name in listed
    assert "Python" in installed.command("env") or "python" in installed.command("env")


def test_the_verdict_on_a_gpu_runs_from_the_wheel(installed, tmp_path):
    """A unit of each kind: a check, a timing, a sanitizer, and the tests, which a wheel does not hold."""
    said = installed.command("gpu", "--dry-run", "--only", "swoosh_l", "--out", str(tmp_path))
    assert "0 left, exit code 0" in said
    assert "| swoosh_l | right, as fast |" in (tmp_path / "verdict.md").read_text()


def test_subpackages_import(installed):
    installed.python(
        "import fastasr, importlib\n"
        "for name in ('kernels', 'benchmarks', 'swap', 'models', 'rnnt', 'compat.k2', 'testing', 'cli'):\n"
        "    module = importlib.import_module(f'fastasr.{name}')\n"
        f"    assert module.__file__.startswith({str(installed.folder)!r}), module.__file__\n"
    )


def test_import_is_light(installed):
    """``import fastasr`` loads neither the swap engine nor the command line nor the benchmarks."""
    loaded = installed.python("import sys, fastasr; print(*sys.modules)").split()
    heavy = ("fastasr.cli", "fastasr.benchmarks", "fastasr.swap", "fastasr.testing", "typer", "matplotlib")
    assert not [name for name in loaded if name.startswith(heavy)]
