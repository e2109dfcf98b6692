# SPDX-License-Identifier: Apache-2.0
"""The core needs torch alone: it works where the packages that ``fastasr.asr``, the commands and the benchmarks need
cannot be found, and ``fastasr.asr`` neither.
"""

import subprocess
import sys

import pytest

HIDDEN = ("numpy", "onnx", "onnxruntime", "soundfile", "typer", "rich", "matplotlib", "fastasr.asr")

# Without numpy, torch warns once.
HIDE = f"""
import sys, warnings

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *arguments):
        hidden = any(name == other or name.startswith(other + ".") for other in {HIDDEN})
        return None if hidden else self.finder.find_spec(name, *arguments)

sys.meta_path = [Hiding(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
import fastasr
"""

PARTS = {
    "modules": """
import importlib, pkgutil
from fastasr.ops import _dispatch

for part in ("ops", "models", "graphs", "swap", "rnnt", "compat", "testing", "kernels"):
    package = importlib.import_module(f"fastasr.{part}")
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if part != "kernels" or not _dispatch._why_no_triton():
            importlib.import_module(found.name)
""",
    "ops": """
from fastasr.testing import gradcheck

x, y, scale = torch.randn(5, 3, 8, requires_grad=True), torch.randn(5, 3, 8), torch.rand(8)
fastasr.ops.bypass(x, y, scale).sum().backward()
assert x.grad.isfinite().all()
report = gradcheck("bypass", x_orig=x, x=y, scale=scale)
assert report.ok, report
""",
    "losses": """
from fastasr import rnnt
from fastasr.compat import k2

logits, symbols = torch.randn(2, 7, 4, 5, requires_grad=True), torch.randint(1, 5, (2, 3))
rnnt.rnnt_loss(logits, symbols, 0).backward()
assert logits.grad.isfinite().all()
lm, am = torch.randn(2, 4, 5), torch.randn(2, 7, 5)
assert torch.equal(k2.rnnt_loss_simple(lm, am, symbols, 0), rnnt.rnnt_loss_simple(lm, am, symbols, 0))
""",
    "swap": """
import torchaudio.models

model = torchaudio.models.Conformer(16, 2, 32, 2, 7).eval()
report = fastasr.accelerate(model, verify=(torch.randn(2, 20, 16), torch.tensor([20, 11])))
assert report.replaced and not report.rolled_back, report
assert "without a run in float64" not in str(report), report
fastasr.why(model), fastasr.explain(model), fastasr.restore(model)
""",
    "graphs": """
from fastasr.models.fast_conformer import FastConformerEncoder
from fastasr.testing.tape import TapeRecorder

model = FastConformerEncoder(mel_bins=16, width=16, layers=2, heads=2, hidden=32, channels=8).eval()
report = fastasr.accelerate(model, graphs=fastasr.Graphs(after=1, recorder=TapeRecorder))
x = torch.randn(2, 64, 16)
with torch.no_grad():
    for _ in range(4):
        model(x)
assert any(kind.replayed for kinds in fastasr.graph_state(model).values() for kind in kinds), report
""",
    "search": """
from fastasr.models.fast_conformer import FastConformerEncoder, FastConformerTDT
from fastasr.models.transducer.parakeet_steps import generate_steps
from fastasr.models.transducer.predictors import find_predictor

encoder = FastConformerEncoder(mel_bins=16, width=16, layers=1, heads=2, hidden=32, channels=8)
model = FastConformerTDT(encoder, 8, hidden=12).eval()
predictor, lengths = find_predictor(model), torch.tensor([8, 5])
assert predictor.parts() == (model.decoder, model.joint)
with torch.no_grad():
    frames = predictor.project(model.encoder(torch.randn(2, 64, 16))[0])
    search = predictor.require_search("search")
    first = torch.full((2, 1), predictor.blank_id)
    assert len(generate_steps(predictor, search, frames, lengths, first, 40).tokens) == 2
""",
}


@pytest.mark.parametrize("part", PARTS)
def test_the_core_alone(part):
    if part == "swap":
        pytest.importorskip("torchaudio.models")
    code = HIDE + PARTS[part]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
