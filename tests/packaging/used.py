# SPDX-License-Identifier: Apache-2.0
"""What users do with the package, run in a fresh environment by the tests of the installed wheel: every op forward and
backward, every module's import, streams, searches, ONNX files, a training run and the demo. Each part asserts.
"""

import importlib
import os
import pkgutil
from pathlib import Path

import torch

import fastasr
from fastasr import ops, testing

CAUSAL = {
    "downsampling_factor": "1,2", "encoder_dim": "24,32", "num_encoder_layers": "1,1", "encoder_unmasked_dim": "24,24",
    "query_head_dim": "8", "pos_head_dim": "4", "value_head_dim": "6", "num_heads": "2,2", "feedforward_dim": "32,48",
    "cnn_module_kernel": "9,7", "pos_dim": 16, "vocab_size": 12, "decoder_dim": 16, "joiner_dim": 20, "use_ctc": True,
    "causal": True, "chunk_size": "8", "left_context_frames": "16",
}  # fmt: skip


def every_module():
    found = [module.name for module in pkgutil.walk_packages(fastasr.__path__, "fastasr.")]
    for name in found:
        if not name.endswith("__main__"):
            assert importlib.import_module(name).__file__.startswith(str(Path(fastasr.__file__).parent)), name
    assert {"fastasr.kernels", "fastasr.benchmarks", "fastasr.recipe", "fastasr.demo"} <= set(found)


def every_op():
    """Compares values and gradients of the ops' small samples with their definitions."""
    tables = testing.tables()
    assert set(tables) | set(ops.GRADIENTS) == set(ops.NAMES)
    for table in tables.values():
        assert table.thorough
        for sample in table.thorough:
            testing.checks.parity(table, sample, torch.float32, "cpu")
    x = torch.randn(9, 2, 6)
    assert ops.balancer_gradient(x, x, -0.1, 0.1, 0.2, 0.5, 0.04, -1).shape == x.shape


@torch.inference_mode()
def a_stream_its_searches_and_onnx_files():
    from fastasr import decoding
    from fastasr.export import export_onnx
    from fastasr.models import zipformer
    from fastasr.streaming import StreamingEncoder

    torch.manual_seed(0)
    model = zipformer.AsrModel(**CAUSAL).eval()
    with StreamingEncoder.from_model(model, 8, 16) as engine:
        y, lengths = engine.step(torch.randn(1, 29, 80), [engine.open()])
    assert (y.shape, lengths.tolist()) == ((1, 4, 32), [4])
    transducer, ctc = decoding.GreedySearch(model), decoding.CtcGreedySearch()
    for search, frames in ((transducer, y), (ctc, model.ctc_output(y))):
        assert len(search.result(search.advance(search.start(1), frames)).tokens) == 1
    files = export_onnx(model, Path("onnx"))
    runtime = zipformer.OnnxStreamingCtcModel(files["ctc"])
    runtime.reset_states(1)
    assert runtime(torch.randn(1, 29, 80)).shape == (1, 4, 12)


def a_training_run_of_the_recipe():
    from fastasr.recipe import checkpoints, speech, training

    torch.manual_seed(0)
    spoken = [speech.Utterance(f"{i}", [torch.randn(120 + 10 * i, speech.BINS)], "a b c") for i in range(8)]
    options = training.Options(out=Path("run"), size="tiny", max_duration=8.0, warmup=5, steps=2)
    units = training.learn_units("char", spoken)
    assert training.Trainer(options, spoken, spoken[:1], units, say=lambda text: None).run()["cer"] > 0
    assert checkpoints.load(Path("run") / checkpoints.NAME)["step"] == 2


def the_demo():
    from fastasr.demo.__main__ import main

    options = ["--generated", "--size", "tiny", "--seconds", "1.5", "--no-compile", "--reps", "1"]
    assert main([*options, "--out", "report.html"]) == 0
    assert "BiasNorm" in Path("report.html").read_text(encoding="utf-8")


PARTS = (
    every_module, every_op, a_stream_its_searches_and_onnx_files, a_training_run_of_the_recipe, the_demo,
)  # fmt: skip
for part in PARTS:
    if part.__name__ != os.environ.get("LEFT_OUT"):
        part()
        print("done:", part.__name__)
