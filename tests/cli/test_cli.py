# SPDX-License-Identifier: Apache-2.0
"""Every command: what it prints, what it returns, how it fails."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastasr
from fastasr import cli, ops, testing
from fastasr.benchmarks import ops as op_cases
from fastasr.benchmarks import runner
from fastasr.cli import env
from fastasr.cli.app import app
from fastasr.ops import _dispatch, _gemm
from fastasr.testing import checks

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def run(monkeypatch):
    """Runs a command in this folder, so that its modules can be imported."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str):
        return CliRunner().invoke(app, list(arguments))

    return call


# --- help and failures


@pytest.mark.parametrize("command", ["env", "ops", "check", "bench", "gpu", "swap", "export", "transcribe"])
def test_every_command_has_help(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--help" in result.stdout
    assert command in run("--help").stdout


def test_version(run):
    assert run("--version").stdout.strip() == f"fastasr {fastasr.__version__}"


def test_the_installed_command_ends_without_a_traceback():
    command = [sys.executable, "-m", "fastasr.cli", "bench", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no benchmark is called 'nonsense'")
    assert done.stdout == ""


def test_commands_run_without_standard_output(monkeypatch):
    """A process that begins with a closed standard output has None there."""
    monkeypatch.setattr(sys, "stdout", None)
    env.run(as_json=False)


@pytest.fixture
def ended(monkeypatch, capsys):
    """Returns what the command that the package installs says when it cannot run."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fastasr", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        return capsys.readouterr().err

    return call


def test_without_the_extra_the_command_names_it(ended, monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert ended("env") == "fastasr: the command line needs typer: pip install 'fastasr[cli]'\n"


def test_an_unexpected_error_shows_its_traceback_on_request(ended, monkeypatch):
    def broken():
        raise RuntimeError("no name")

    monkeypatch.setattr(env, "cpu_name", broken)
    monkeypatch.setenv("FASTASR_DEBUG", "")
    assert ended("env").startswith("error: RuntimeError: no name")
    monkeypatch.setenv("FASTASR_DEBUG", "1")
    with pytest.raises(RuntimeError, match="no name"):
        cli.main()


# --- env and ops


def test_env(run):
    text = run("env").stdout
    assert torch.__version__ in text
    assert fastasr.__version__ in text
    found = json.loads(run("env", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["torch threads"] == torch.get_num_threads()
    assert found["native"]["loaded"] == (not _dispatch.why_not_native())
    assert found["triton"]["usable"] or found["triton"]["reason"]


def test_env_counts_choices_made_under_load(run, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path))
    nothing = json.loads(run("env", "--json").stdout)["matrix products"]
    assert (nothing["choices kept"], nothing["made under load"]) == (0, 0)
    for number, under_load in enumerate([True, False, True]):
        _gemm._remember(f"forward {number}", _gemm._Choice("torch", under_load, 1, 1.8e9))
    found = json.loads(run("env", "--json").stdout)["matrix products"]
    assert (found["choices kept"], found["made under load"]) == (3, 2)
    assert Path(found["file"]).parent == tmp_path
    assert "2, measured again once the machine is idle" in run("env").stdout


def test_env_names_what_is_missing(run, monkeypatch):
    known = env._version
    monkeypatch.setattr(env, "_version", lambda name: None if name == "soundfile" else known(name))
    monkeypatch.setattr(_dispatch, "why_not_native", lambda: "the native library is not built")
    text = run("env").stdout
    assert "soundfile not installed: pip install 'fastasr[asr]'" in text
    assert "no: the native library is not built" in text


def test_ops_shows_every_op_with_every_backend(run):
    rows = json.loads(run("ops", "--json").stdout)
    assert {row["op"] for row in rows} == set(ops.NAMES)
    assert all(row["available"] or row["reason"] for row in rows)
    text = run("ops").stdout
    assert all(name in text for name in ops.NAMES)
    assert [row["reason"] for row in rows if row["reason"] not in text] == []
    assert max(map(len, text.splitlines())) <= 80
    assert sum(line.startswith(f"{name} ") for line in text.splitlines() for name in ops.NAMES) == len(
        ops.NAMES
    )


def test_ops_shows_the_details_of_some(run, monkeypatch):
    rows = json.loads(run("ops", "bypass", "linear", "--json").stdout)
    assert {row["op"] for row in rows} == {"bypass", "linear"}
    text = run("ops", "bypass", "linear").stdout
    assert text.splitlines()[0] == "bypass"
    assert "linear" in text.splitlines()
    assert text.count("eager   yes") == 2
    assert "devices: any; dtypes: float32, bfloat16, float16, float64" in text
    assert "now     cpu tensors of float32 get " in text
    monkeypatch.setattr(_dispatch, "why_not_native", lambda: "the native library is not built")
    missing = {row["reason"] for row in json.loads(run("ops", "bypass", "--json").stdout)}
    text = " ".join(run("ops", "bypass").stdout.split())
    assert all(reason in text for reason in missing)
    assert max(map(len, run("ops", *ops.NAMES).stdout.splitlines())) <= 80


# --- check


def result_of(op: str, passed: bool) -> testing.CheckResult:
    return testing.CheckResult(op, "parity", "small", "float32", passed, "" if passed else "off by [2]")


def test_check_passes(run, monkeypatch):
    monkeypatch.setattr(testing, "check_op", lambda name, device, progress: [result_of(name, True)])
    result = run("check")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ops.NAMES)


def test_check_fails_with_one(run, monkeypatch):
    monkeypatch.setattr(
        testing, "check_op", lambda name, device, progress: [result_of(name, name != "bypass")]
    )
    result = run("check")
    assert result.exit_code == 1
    assert "failed: bypass, parity, small, float32: off by [2]" in result.stderr
    assert run("check", "linear").exit_code == 0
    several = json.loads(run("check", "linear", "bypass", "linear", "--json").stdout)
    assert [row["op"] for row in several] == ["linear", "bypass"]
    assert json.loads(run("check", "bypass", "--json").stdout)[0]["message"] == "off by [2]"


def test_check_runs_the_real_checks(run, monkeypatch):
    monkeypatch.setattr(checks, "CHECKS", checks.CHECKS[:2])
    result = run("check", "bypass", "--json")
    assert result.exit_code == 0, result.stderr
    assert {row["check"] for row in json.loads(result.stdout)} >= {"parity", "refuses"}


def test_check_knows_every_op_of_the_readme(run, monkeypatch):
    families = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- ops:start -->")[1]
    listed = re.findall(r"\[`(\w+)`\]\(docs/ops", families.split("<!-- ops:end -->")[0])
    assert set(listed) == set(ops.NAMES)
    first = checks.CHECKS[0]
    monkeypatch.setattr(checks, "CHECKS", (replace(first, dtypes=first.dtypes[:1], thorough_only=True),))
    monkeypatch.setattr(checks, "refuses", lambda table, device: ())
    monkeypatch.setattr(checks, "parity", None)  # which takes all samples
    result = run("check", *listed, "--json")
    assert result.exit_code == 0, result.stderr
    assert {row["op"] for row in json.loads(result.stdout)} == set(listed)


def test_check_at_a_shape(run):
    result = run("check", "gated_depthwise_conv", "bypass", "--shape", "T=9,B=2,C=8", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr
    assert "gated_depthwise_conv: bfloat16 on cpu" in result.stdout
    assert re.search(r"gradient of x_orig .* ok\n", result.stdout)
    found = json.loads(run("check", "bypass", "--shape", "T=9", "--json").stdout)
    assert [(report["op"], report["dtype"], report["ok"]) for report in found] == [
        ("bypass", "float32", True)
    ]


def test_check_at_a_shape_ends_with_one(run, monkeypatch):
    right = ops.bypass.definition
    wrong = lambda x_orig, x, scale: 1.001 * right(x_orig, x, scale)  # noqa: E731
    wrong.op = ops.OPS["bypass"]
    monkeypatch.setattr(ops, "bypass", wrong)
    result = run("check", "bypass", "--shape", "T=9")
    assert result.exit_code == 1
    assert "FAILED: less exact than eager" in result.stdout


# --- what is refused

REFUSED = {
    "ops": [(("bypas",), "no op is called 'bypas'; did you mean 'bypass'?")],
    "check": [
        (("bypass", "bypas"), "no op is called 'bypas'; did you mean 'bypass'?"),
        (("xyzzy",), "no op is called 'xyzzy'; there are: add_norm, "),
        (("bypass", "--device", "nowhere"), "--device: expected cpu, cuda or cuda:1, ..., got 'nowhere'"),
        (("bypass", "--shape", "T9"), "--shape: expected sizes as T=375,B=16,C=512, got 'T9'"),
        (("bypass", "--shape", "Q=9"), "expected some of T, B, C, got 'Q'"),
        (("--shape", "T=9"), "--shape: name the op that it is for"),
        (("bypass", "--dtype", "float16"), "--dtype: it needs --shape"),
        (("bypass", "--shape", "T=9", "--dtype", "int8"), "--dtype: expected one of float32, bfloat16"),
        (("conv_spatial_gate", "--shape", "T=9,K=4"), "K odd, got (1536, 1, 4)"),
    ],
    "bench": [
        (("zipfomer",), "no benchmark is called 'zipfomer'; did you mean 'zipformer'?"),
        (("--sweep", "zipfomer"), "no sweep is called 'zipfomer'; did you mean 'zipformer'?"),
        (("bypass", "--dtype", "int8"), "--dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        (("bypass", "--device", "nowhere"), "--device: expected cpu, cuda or cuda:1, ..., got 'nowhere'"),
        (("bypass", "--frames", "3"), "--frames: it needs --sweep"),
        (("--seconds", "3"), "--seconds: it needs --sweep"),
        (("bypass", "--sweep", "bypass"), "[OP|MODEL]...: it cannot go with --sweep"),
        (("--sweep", "bypass", "--shape", "T=3"), "--shape: it cannot go with --sweep"),
        (("--sweep", "bypass", "--compile-model"), "--compile-model: it cannot go with --sweep"),
        (("--sweep", "bypass", "--frames", "1,no"), "--frames: expected positive numbers with commas"),
        (("--sweep", "bypass", "--dtype", "int8"), "--dtype: expected some of float32, bfloat16, float16"),
        (("bypass", "--shape", "H=3"), "expected some of T, B, C, got 'H'"),
        (("bypass", "--shape", "3"), "--shape: expected sizes as T=375,B=16,C=512, got '3'"),
        (("--shape", "T=3"), "sizes are for ops: expected their names, got none"),
        (("zipformer", "--shape", "T=3"), "sizes are for ops: expected their names, got zipformer"),
        (("bypass", "--out", "/dev/null/out"), "--out: /dev/null/out cannot be written to: Not a directory"),
    ],
    "export": [
        (("models_for_cli:recognizer", "out"), "did you mean 'recogniser'?"),
        (("models_for_cli:model", "out"), "expected an AsrModel"),
        (("models_for_cli:recogniser", "/dev/null/out"), "Not a directory: '/dev/null/out'"),
    ],
    "swap": [
        (("nocolon",), "expected MODULE:FACTORY or an encoder: no encoder is called 'nocolon'; there are: "),
        (("w2v-bert",), "did you mean 'w2v-bert-2'?"),
        (("no_such_module:f",), "cannot import 'no_such_module'"),
        (("models_for_cli:modl",), "'models_for_cli' has no 'modl'; did you mean 'model'?"),
        (("models_for_cli:not_callable",), "is a int, not a function"),
        (("models_for_cli:broken_model",), "RuntimeError: no checkpoint here"),
        (("models_for_cli:not_a_model",), "returned a int, not a torch.nn.Module"),
        (
            ("models_for_cli:model", "--input", "models_for_cli:wrong_inputs"),
            "could not be run on the inputs",
        ),
        (
            ("models_for_cli:model", "--input", "models_for_cli:wrong_inputs"),
            "The model is as it was before the call.",
        ),
    ],
}


@pytest.mark.parametrize(
    ("command", "arguments", "said"), [(name, *each) for name in REFUSED for each in REFUSED[name]]
)
def test_what_is_refused(run, command, arguments, said):
    result = run(command, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert not (HERE / "out").exists()


@pytest.mark.parametrize("arguments", [("check", "bypass"), ("bench", "bypass"), ("gpu",)])
@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        (None, "is built for the CPU only; to use one, install a torch for CUDA"),
        ("13.0", "built for CUDA 13.0, sees no CUDA device; see whether nvidia-smi lists one"),
    ],
)
def test_all_commands_say_alike_that_there_is_no_gpu(run, monkeypatch, arguments, cuda, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    result = run(*arguments, *["--device", "cuda"] * (arguments != ("gpu",)))
    assert result.exit_code == 2
    assert f"no GPU here: torch {torch.__version__}" in result.stderr
    assert said in result.stderr
    found = json.loads(run("env", "--json").stdout)["cuda"]
    assert found["reason"] in result.stderr


# --- bench


def test_bench_writes_rows_plots_and_a_page(run, tmp_path):
    command = ("bench", "bypass", "--quick", "--reps", "1", "--out", str(tmp_path))
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"results.jsonl", "bypass.png", "index.html"}
    assert "T=20,B=2,C=192" in result.stdout
    assert "torch.compile" not in result.stdout
    assert result.stderr.startswith("a quick run: its figures mean nothing\n")
    assert "3 units were there already" in run(*command).stderr


def test_bench_at_a_shape(run, tmp_path):
    command = (
        "bench",
        "residual_norm",
        "gated_residual_norm",
        "--shape",
        "T=7,B=2,C=24",
        "--quick",
        "--reps",
        "1",
    )
    result = run(*command, "--dtype", "bfloat16", "--no-plots", "--out", str(tmp_path))
    assert result.exit_code == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rows} == {"residual_norm", "gated_residual_norm"}
    assert {(row["case"], row["shape"], row["dtype"]) for row in rows} == {
        ("T=7,B=2,C=24", "7x2x24", "bfloat16")
    }
    assert "T=7,B=2,C=24" in result.stdout


def test_a_quick_run_measures_every_op_in_one_small_call():
    options = runner.Options(quick=True)
    assert options.select() == ops_with_cases()
    for name in ops_with_cases():
        (case,) = options.cases(name)
        tensors = [v for v in case.arguments(testing.Make()).values() if isinstance(v, torch.Tensor)]
        assert sum(t.numel() for t in tensors) < 4_000_000, name


def ops_with_cases() -> list[str]:
    return op_cases.names()


def test_bench_sweeps(run, tmp_path):
    pytest.importorskip("matplotlib")
    sizes = ("--quick", "--frames", "3", "--threads", "1")
    command = ("bench", "--sweep", "bypass", *sizes, "--out", str(tmp_path))
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"sweep.jsonl", "sweep_bypass.png"}
    assert "cells below 0.97×; the worst: 3 x 1, " in result.stdout
    again = run(*command, "--resume")
    assert again.stdout == result.stdout
    assert "bypass 3 x 1" not in again.stderr, "nothing is measured again"


# --- export
def test_export_writes_files(run, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    result = run("export", "models_for_cli:recogniser", str(tmp_path), "--suffix", "tiny", "--int8", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {f"{name}{kind}" for name in ("encoder", "decoder", "joiner") for kind in ("", ".int8")} <= set(
        found
    )
    for values in found.values():
        assert (tmp_path / values["file"]).stat().st_size == values["bytes"]
    assert found["encoder.int8"]["bytes"] < found["encoder"]["bytes"]


# --- swap

SMALL = ("swap", "models_for_cli:model", "--input", "models_for_cli:inputs")


def test_swap_explains_swaps_verifies_and_times(run):
    result = run(*SMALL, "--reps", "1")
    assert result.exit_code == 0, result.stderr
    assert "3 replaced" in result.stdout
    assert "3 verified" in result.stdout
    assert "before" in result.stdout
    assert "× as fast" in result.stdout


def test_swap_as_json(run):
    result = run(*SMALL, "--json", "--no-time")
    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["verified"]
    assert found["explain"]["counts"]["replaced"] == found["report"]["counts"]["replaced"] == 3
    assert "times" not in found


def test_swap_in_int8(run, monkeypatch):
    result = run(*SMALL, "--weights", "int8", "--json", "--no-time")
    (row,) = json.loads(result.stdout)["report"]["weights"]["rows"]
    assert (row["path"], row["format"]) == ("linear", "float32")
    assert "too small" in row["reason"]
    monkeypatch.setattr("fastasr.swap.weights.SMALL", 0)
    result = run(*SMALL, "--weights", "int8", "--reps", "1")
    assert result.exit_code == 0, result.stderr
    assert "1 of 1 weights in int8" in result.stdout
    assert "the outputs change by" in " ".join(result.stdout.split())
    assert "× as fast" in result.stdout
    result = run(*SMALL, "--weights", "int4")
    assert result.exit_code == 2
    assert "expected None or one of bf16, int8, got 'int4'" in result.stderr


def test_swap_takes_inputs_by_name(run):
    result = run(
        "swap", "models_for_cli:model", "--input", "models_for_cli:inputs_by_name", "--json", "--reps", "1"
    )
    assert result.exit_code == 0, result.stderr
    assert set(json.loads(result.stdout)["times"]) == {"before", "after"}


@pytest.mark.parametrize(
    ("package", "model", "inputs", "replaced"),
    [
        (
            "torchaudio.models",
            "torchaudio_rnnt",
            "torchaudio_batch",
            {"Emformer", "_EmformerLayer", "_CustomLSTM", "Linear"},
        ),
        ("torchaudio.models", "torchaudio_emformer", "torchaudio_frames", {"Emformer", "_EmformerLayer"}),
        (
            "espnet2.asr.encoder.e_branchformer_encoder",
            "espnet_e_branchformer",
            "features",
            {
                "EBranchformerEncoderLayer",
                "RelPositionMultiHeadedAttention",
                "ConvolutionalGatingMLP",
                "ConvolutionalSpatialGatingUnit",
                "PositionwiseFeedForward",
            },
        ),
        (
            "espnet2.asr_transducer.decoder.mega_decoder",
            "espnet_mega_decoder",
            "labels",
            {"MEGADecoder", "MEGA", "MultiHeadDampedEMA", "RelativePositionBias"},
        ),
        (
            "transformers",
            "transformers_parakeet",
            "features_and_mask",
            {"ParakeetEncoderAttention", "ParakeetEncoderSubsamplingConv2D"},
        ),
        (
            "speechbrain",
            "speechbrain_conformer",
            "hidden_states",
            {"RelPosMHAXL", "ConvolutionModule", "PositionalwiseFeedForward"},
        ),
        (
            "zipformer.modules.zipformer",
            "zipformer",
            "frames",
            {"ZipformerEncoderLayer", "BiasNorm", "ConvolutionModule"},
        ),
    ],
)
def test_swap_of_upstreams_models(run, monkeypatch, package, model, inputs, replaced):
    """It runs the commands of examples/upstream_models.py and of the page on swapping."""
    pytest.importorskip(package, exc_type=ImportError)
    monkeypatch.syspath_prepend(str(HERE.parents[1] / "examples"))
    names = f"upstream_models:{model}", "--input", f"upstream_models:{inputs}"
    result = run("swap", *names, "--json", "--reps", "1")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["verified"]
    rows = [row for row in found["report"]["rows"] if row["status"] == "replaced"]
    assert replaced <= {row["class_name"] for row in rows}
    assert all(row["errors"] for row in rows if row["class_name"] in replaced)  # reached and compared
    assert set(found["times"]) == {"before", "after"}


def test_swap_of_a_published_encoder(run):
    pytest.importorskip("transformers")
    result = run("swap", "lasr", "--json", "--reps", "1")
    assert result.exit_code == 0, result.stderr
    assert "2 of 17 layers, random weights" in result.stderr
    found = json.loads(result.stdout)
    assert found["verified"]
    assert found["times"]["before"]["median_ms"] > 0


def test_swap_without_inputs_says_what_it_left_out(run):
    result = run("swap", "models_for_cli:model")
    assert result.exit_code == 0
    assert "neither verified nor timed" in result.stderr


def test_a_model_with_nothing_to_replace(run):
    result = run("swap", "models_for_cli:unknown_model")
    assert result.exit_code == 0
    assert "nothing in this model can be replaced" in result.stderr


def test_a_failing_verification_ends_with_one(run, monkeypatch):
    """verify finds a wrong kernel, restores its module and names it."""
    right = ops.bias_norm
    monkeypatch.setattr(ops, "bias_norm", lambda *a, **k: right(*a, **k) * 1.01)
    result = run(*SMALL, "--no-time")
    assert result.exit_code == 1, result.stdout
    assert "restored norm" in result.stdout
    assert "verification failed for 1 module" in result.stderr


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "25000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.25),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cores_that_a_container_grants(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert env._granted(tmp_path) == (cores or len(os.sched_getaffinity(0)))


def test_env_warns_of_more_threads_than_cores(monkeypatch, capsys):
    monkeypatch.setattr(env, "_granted", lambda: 0.5)
    monkeypatch.setattr(env.torch, "get_num_threads", lambda: 2)
    env.run(as_json=False)
    assert "2, more than there are cores: set OMP_NUM_THREADS" in capsys.readouterr().out
    monkeypatch.setattr(env.torch, "get_num_threads", lambda: 1)
    env.run(as_json=False)
    assert "more than there are cores" not in capsys.readouterr().out
