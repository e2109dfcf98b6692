# SPDX-License-Identifier: Apache-2.0
"""The tables of cases, and a measurement from a case to its rows."""

import contextlib
import types
from dataclasses import replace

import nemo_encoder
import pytest
import torch

from fastasr import ops
from fastasr.benchmarks import dispatch, models, rows, runner, upstream
from fastasr.benchmarks import ops as op_cases
from fastasr.benchmarks.case import Settings, measure
from fastasr.benchmarks.device import whole_models
from fastasr.benchmarks.encoders import ENCODERS, Encoder
from fastasr.benchmarks.harness import Timing, in_fresh_process
from fastasr.benchmarks.markdown import HEADLINES
from fastasr.benchmarks.models import (
    encoders,
    nemotron_streaming,
    pruned_transducer,
    ragged,
    recipe_step,
    rnnt_loss,
    streaming_engine,
    tdt_loss,
    transcribe,
)
from fastasr.benchmarks.models.unit import first, product_flops, swapped
from fastasr.benchmarks.studies import transducer_memory
from fastasr.testing.samples import linear
from fastasr.testing.speed import BACKWARD, BOTH, FORWARD, Case, Cost, Unavailable, simple, upstream_member

QUICK = Settings.quick(compile=False, reps=2, sample_seconds=0.0)


@contextlib.contextmanager
def peer():
    """Skips the test when the compared package is not installed."""
    try:
        yield
    except upstream.MissingUpstream as reason:
        pytest.skip(str(reason))


def tiny(implementations: dict, **more) -> Case:
    x = torch.randn(4, 8)
    made = {name: (lambda f=f: simple(f, x)) for name, f in implementations.items()}
    costs = {FORWARD: Cost(256), BACKWARD: Cost(384), BOTH: Cost(640)}
    return Case("doubled", "4x8", "4x8", lambda device, dtype: made, lambda size: costs, copy=True, **more)


def test_every_op_has_cases():
    missing = [name for name in ops.NAMES if name not in op_cases.names()]
    assert not missing, f"no case of {missing[0]}: write CASES in fastasr/testing/samples/{missing[0]}.py"
    assert set(op_cases.names()) == set(ops.NAMES)


@pytest.mark.parametrize("name", ops.NAMES)
def test_dispatch_has_a_call_of_every_op(name):
    call = dispatch.tiny(name)
    with torch.no_grad():
        for function in call.functions.values():
            function(**call.arguments)


def test_every_case_costs_something_in_each_of_its_passes():
    for case in op_cases.cases():
        for pass_ in case.passes:
            cost = case.costs(4)[pass_]
            assert cost.bytes > 0
            assert cost.flops > 0 or case.copy, f"{case.op} {case.name}: a limit is needed"


def test_a_case_gives_rows_pass_by_pass():
    units = list(measure(tiny({"eager": lambda x: x + x, "fastasr": lambda x: 2 * x}), settings=QUICK))
    assert [unit[0].pass_ for unit in units] == [FORWARD, BACKWARD, BOTH]
    for unit in units:
        assert [row.implementation for row in unit] == ["eager", "fastasr", "copy"]
        assert unit[-1].fraction_of_limit == pytest.approx(1.0, abs=1e-3)
        assert all(row.q1_ms <= row.median_ms <= row.q3_ms for row in unit)
        assert unit[0].limit.startswith("copy ")


def test_passes_can_be_skipped():
    units = measure(tiny({"eager": torch.abs}), settings=QUICK, skip=lambda pass_: pass_ != BACKWARD)
    assert [unit[0].pass_ for unit in units] == [BACKWARD]


def test_what_cannot_be_measured_is_reported_and_the_rest_measured():
    def missing():
        raise Unavailable("not here")

    def broken(x):
        raise RuntimeError("no kernel\nlong story")

    case = tiny({"eager": torch.abs, "broken": broken})
    case.make("cpu", torch.float32)["missing"] = missing
    said = []
    units = list(measure(case, settings=QUICK, report=said.append))
    assert [row.implementation for row in units[0]] == ["eager", "copy"]
    assert any("missing left out: not here" in message for message in said)
    assert any("broken failed: RuntimeError: no kernel" in message for message in said)
    assert not any("long story" in message for message in said)


def test_linear_measures_one_gradient_at_a_time():
    inputs = next(case for case in linear.CASES if linear.INPUT_GRADIENT in case.passes)
    wanted = inputs.make("cpu", torch.float32)["eager"]().differentiable()
    assert [tuple(t.shape) for t in wanted] == [(3184, 192)]


def test_names_stand_for_suites():
    assert runner.select(()) == [name for name in runner.known_names() if name not in whole_models.MODELS]
    assert runner.select((), on_gpu=True)[-3:] == list(whole_models.MODELS)
    assert runner.select(("ops",)) == op_cases.names()
    assert runner.select(("dispatch", "bypass")) == ["bypass", "dispatch"]
    with pytest.raises(ValueError, match="nonsense"):
        runner.select(("nonsense",))


def test_headlines_are_cases_of_models(tmp_path, monkeypatch):
    name, shape, case = HEADLINES[-1]
    units = [(case, shape, FORWARD), (case, shape, BOTH), (case, "another shape", FORWARD)]
    module = types.SimpleNamespace(measured=[], QUICK={})

    def measure(*, skip, **_):
        module.measured.append([unit for unit in units if not skip(*unit)])
        return iter(())

    module.measure = measure
    for wanted, expected in (("headlines",), units[:2]), (("headlines", name), units):
        assert name in runner.select(wanted)
        monkeypatch.setattr(runner, "select", lambda *_: [name])
        monkeypatch.setitem(models.MODULES, name, module)
        runner.run(runner.Options(names=wanted, out=tmp_path / "r.jsonl", patience=0.0))
        assert module.measured.pop() == expected
        monkeypatch.undo()


def test_a_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(op_cases, "cases", lambda: [tiny({"eager": torch.abs, "fastasr": torch.abs})])
    monkeypatch.setattr(op_cases, "names", lambda: ["doubled"])
    options = runner.Options(
        names=("doubled",), out=tmp_path / "r.jsonl", compile=False, reps=2, patience=0.0
    )
    first = runner.run(options)
    assert (len(first.rows), first.resumed, first.problems) == (9, 0, [])
    again = runner.run(options)
    assert (len(again.rows), again.resumed) == (0, 3)
    more = runner.run(runner.Options(**{**vars(options), "reps": 3}))
    assert len(more.rows) == 9, "more repetitions are another measurement"
    fresh = runner.run(runner.Options(**{**vars(options), "fresh": True}))
    assert len(fresh.rows) == 9


def test_a_benchmark_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    def broken(**_):
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(dispatch, "measure", broken)
    summary = runner.run(runner.Options(names=("dispatch",), out=tmp_path / "r.jsonl", quick=True))
    assert summary.problems == ["dispatch: failed: RuntimeError: the machine is on fire"]


def test_dispatch_rows(tmp_path):
    settings = Settings.quick(reps=1, sample_seconds=0.0)
    units = list(dispatch.measure(settings=settings, only=lambda op: op == "bypass"))
    assert [unit[0].pass_ for unit in units] == list(dispatch.PASSES)
    assert {"eager", "fastasr"} <= {row.implementation for row in units[0]}


def test_upstream_that_cannot_be_imported_is_unavailable(monkeypatch):
    with pytest.raises(Unavailable, match="zipformer"):
        upstream_member("zipformer.modules.nowhere.Nothing")


# Benchmark of models -> the case, shape and pass of each unit of a quick run, and the implementations that it compares
MEASURED = {
    "streaming_engine": (
        [
            ("one chunk of 16", "tiny 1 stream, left context 128", FORWARD),
            ("one chunk of 16", "tiny 2 streams, left context 128", FORWARD),
        ],
        ["upstream", *streaming_engine.PEERS],
    ),
    "mega_step": ([(f"history {count}", "B=2", FORWARD) for count in (0, 3)], ["upstream", "fastasr"]),
    "emformer": (
        [
            ("segment 4, right 1", "tiny 2x20", FORWARD),
            ("segment 4, right 1", "tiny 2x20", BOTH),
            ("one segment of 4, right 1", "tiny 1x4", FORWARD),
        ],
        ["upstream", "upstream+linear", "fastasr", "fastasr own"],
    ),
    "e_branchformer": (
        [("layer", "tiny 2x20", pass_) for pass_ in (FORWARD, BOTH)],
        ["upstream", "upstream+linear", "fastasr", "fastasr own"],
    ),
    "fast_conformer": (
        [
            (part, "tiny, 1 of its layers, 2 x 2 s", pass_)
            for part, pass_ in (("encoder", FORWARD), ("front end", FORWARD), ("encoder", BOTH))
        ],
        ["upstream", "fastasr"],
    ),
    "ragged": (
        [
            (f"{encoder}'s encoder", f"{size}, 3 short commands, {order}", pass_)
            for encoder, size, orders in (
                ("Parakeet", "tiny", ("unsorted", "sorted")),
                ("Zipformer", "tiny", ("unsorted", "sorted")),
                ("w2v-BERT", "0.6B", ("unsorted",)),
            )
            for order in orders
            for pass_ in (FORWARD, BOTH)
        ],
        ["upstream", "fastasr", "fastasr, ragged"],
    ),
    "transducer_generate": (
        [
            ("TDT", "B=2, T=20, 5 steps", FORWARD),
            ("RNNT", "B=2, T=20, 5 steps", FORWARD),
            ("a recording", "TDT tiny, 1 layers, 1 x 2 s, 5 steps", FORWARD),
        ],
        ["upstream", "fastasr"],
    ),
    "attention_search": (
        [
            (case, "1 layers of 64, 9 frames, 3 tokens", FORWARD)
            for case in (
                "FireRedASR, 3 beams",
                "ESPnet's Transformer, 10 beams",
                "ESPnet's Transformer, language model and CTC, 10 beams",
                "SpeechBrain's Transformer, 10 beams",
                "SpeechBrain's Transformer, language model and CTC, 10 beams",
                "NeMo's Transformer, greedy",
            )
        ],
        ["upstream", "fastasr"],
    ),
    "whisper_generate": (
        [("greedy", "tiny, 1 x 30 s, 3 tokens", FORWARD), ("2 beams", "tiny, 1 x 30 s, 3 tokens", FORWARD)],
        ["upstream", "fastasr", "fastasr int8"],
    ),
    "emformer_rnnt": (
        [
            ("predictor", "tiny 2x3", FORWARD),
            ("predictor", "tiny 2x3", BOTH),
            ("predictor, one step", "tiny 2x1", FORWARD),
        ],
        ["upstream", "upstream+linear", "fastasr"],
    ),
}
# beside those of a quick run
OPTIONS = {
    "mega_step": {"histories": (0, 3)},
    "ragged": {"skip": lambda case, shape, _: "w2v-BERT" in case and ", sorted" in shape},  # it is wide
}


@pytest.mark.parametrize("name", MEASURED)
def test_measurements_of_models(name):
    expected, implementations = MEASURED[name]
    module = models.MODULES[name]
    sizes = module.QUICK | OPTIONS.get(name, {})
    if name == "attention_search":
        nemo_encoder.load_decoder()
    with peer():
        units = list(module.measure(**sizes, settings=QUICK, reps=2))
    assert [(unit[0].case, unit[0].shape, unit[0].pass_) for unit in units] == expected
    for unit in units:
        assert sorted(row.implementation for row in unit) == sorted(implementations)
        assert len({(row.case, row.shape, row.pass_) for row in unit}) == 1
    if name == "mega_step":
        assert all(unit[0].bytes > 4 * 64 * 96 for unit in units)
    assert list(module.measure(**sizes | {"skip": lambda *_: True}, settings=QUICK)) == []


def test_lengths_of_ragged_batches():
    lengths = ragged.seconds(ragged.LIBRISPEECH, 1000, ordered=False)
    assert 11 < sum(lengths) / 1000 < 13
    lengths = ragged.seconds(ragged.LIBRISPEECH, 16, ordered=True)
    assert min(lengths) > 0.85 * max(lengths)


def test_published_encoders():
    pytest.importorskip("transformers")
    said = []
    sizes = {"names": ("no package", "lasr"), "shapes": ((1, 2, 1),)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODERS, "no package", replace(ENCODERS["lasr"], make=_missing))
        units = list(encoders.measure(**sizes, settings=QUICK, reps=2, report=said.append))
    assert [(unit[0].case, unit[0].pass_) for unit in units] == [("lasr", FORWARD), ("lasr", BOTH)]
    assert all({row.implementation for row in unit} == {"upstream", "fastasr"} for unit in units)
    assert "encoders: no package is left out: it is not installed" in said


def test_a_compile_that_fails_is_in_the_table(monkeypatch):
    def failing(*inputs, **named):
        raise RuntimeError("graph break\nlong story")

    monkeypatch.setattr(
        torch, "compile", lambda model: type("Failing", (), {"__call__": failing, "train": lambda s: s})()
    )
    monkeypatch.setitem(ENCODERS, "tiny", Encoder("tiny", 1, 8, 4, lambda layers: torch.nn.Linear(4, 2), _x))
    said = []
    (unit, *more) = encoders.measure(
        names=("tiny",), shapes=((1, 2, 1),), compile_model=True, settings=QUICK, reps=2, report=said.append
    )
    assert len(more) == 1
    assert [(row.implementation, row.note) for row in unit] == [
        ("upstream", "compile: RuntimeError: graph break"),
        ("fastasr", ""),
    ]
    table = encoders.table(unit)
    assert "| fails |" in table
    assert "- tiny, compile: RuntimeError: graph break" in table
    assert any("left out: compile: RuntimeError: graph break" in message for message in said)


def _x(x, valid):
    return {"input": x}


def _missing(layers):
    raise upstream.MissingUpstream("it is not installed")


@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_of_every_published_encoder(name):
    """A swap may not stop a training step of the whole encoder, which may change outputs of its parts in place."""
    found = ENCODERS[name]
    with peer():
        model = swapped(found.model(1)).train()
    first(model(**found.inputs(2, 0.5))).sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_nemotron_streaming(monkeypatch):
    monkeypatch.setattr(nemotron_streaming, "product_limit", lambda flops: (0.0, "as fast as can be"))
    with peer():
        units = list(nemotron_streaming.measure(**nemotron_streaming.QUICK, settings=QUICK, reps=2))
    (unit,) = units
    implementations = [row.implementation for row in unit]
    assert (implementations[:2], implementations[-1]) == (["upstream", "fastasr"], "fastasr int8")
    assert unit[0].limit.startswith(nemotron_streaming.READING)
    assert unit[0].bytes > 4 * 32 * 64 * 4  # the feed-forward weights alone
    assert " | – | – | 2.00× | 50 % | 25 % |" in nemotron_streaming.table(
        [
            replace(row, median_ms=ms, fraction_of_limit=1 / ms)
            for row, ms in zip(unit[:2], (4, 2), strict=True)
        ]
    )
    assert list(nemotron_streaming.measure(settings=QUICK, skip=lambda *_: True)) == []


def test_a_step_of_the_recipe():
    """It also measures the peak of one implementation, in its own process."""
    pytest.importorskip("kaldialign", reason="the recipe needs the extra fastasr[asr]")
    calls = {"size": "tiny", "durations": (5.0,), "inner_compile": False, "settings": QUICK}
    with peer():
        units = list(recipe_step.measure(**calls, reps=1))
    names = ["fastasr", "upstream", "swapped", "eager"]
    assert [row.implementation for row in units[0]] == names
    text = recipe_step.table(units[0])
    assert "| tiny, batches of 5 s | upstream |" in text
    assert recipe_step.table([]).startswith("No measurements yet")
    assert list(recipe_step.measure(**calls, skip=lambda *unit: True)) == []


@pytest.mark.long
def test_the_peak_memory_of_the_recipe(tmp_path):
    pytest.importorskip("kaldialign", reason="the recipe needs the extra fastasr[asr]")
    torch.save(recipe_step._made_up(), tmp_path / "speech.pt")
    assert in_fresh_process(recipe_step.__name__, "fastasr", "tiny", 5.0, tmp_path) > 0


def test_transcribing():
    pytest.importorskip("onnxruntime")
    calls = {"size": "tiny", "seconds": 1, "chunks": (16,), "inner_compile": False, "settings": QUICK}
    with peer():
        units = list(transcribe.measure(**calls, reps=1))
    assert [unit[0].case for unit in units] == ["encoder, whole", "whole", "stream, chunks of 16"]
    for unit in units:
        engine = ["engine"] if unit[0].case.startswith("stream") else []
        assert [row.implementation for row in unit] == ["upstream", "fastasr", "onnxruntime", *engine]
    text = transcribe.table([row for unit in units for row in unit])
    factor = units[0][1].median_ms / 1e3
    assert f"({factor:.3f}) |" in text
    assert list(transcribe.measure(**calls, skip=lambda *unit: True)) == []


def test_the_loss_of_a_pruned_transducer(tmp_path):
    table = tmp_path / "rows.jsonl"
    with peer():
        units = list(pruned_transducer.measure(cases=pruned_transducer.TINY, settings=QUICK, reps=2))
    assert [row.implementation for row in units[0]] == ["upstream", "fastasr", "fastasr, logits again"]
    assert [row.implementation for row in units[1]] == ["upstream", "fastasr", "fastasr, logits again"]
    assert not pruned_transducer.keeps_logits(*pruned_transducer.PARTS[-1][1:])
    for unit in units:  # a process that has run other tests may need no new memory for these
        rows.merge(table, [replace(row, peak_bytes=row.peak_bytes or 2**20) for row in unit])
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    assert transducer_memory.main(["--results", str(tmp_path), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert transducer_memory.main(["--results", str(tmp_path / "none"), "--out", str(picture)]) == 1


def test_both_losses_of_a_pruned_transducer_are_one_number():
    problem = pruned_transducer._Problem(2, 12, 4, 3, 16, 20)
    with peer():
        expected = problem.upstream(upstream.module("fast_rnnt"), True)
    torch.testing.assert_close(problem.fused(None, True), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(problem.fused(False, True), expected, rtol=1e-5, atol=1e-5)


def test_the_loss_of_a_transducer_with_durations():
    pytest.importorskip("transformers")
    (unit,) = tdt_loss.measure(cases=tdt_loss.TINY, settings=QUICK, reps=2)
    assert [row.implementation for row in unit] == ["upstream", "fastasr"]
    problem = tdt_loss.Problem(*tdt_loss.TINY[tdt_loss.CASE][0])
    torch.testing.assert_close(problem.fused(), problem.upstream(), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_the_memory_of_a_transducer_with_durations(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    cases = {tdt_loss.MEMORY: ((1, 12, 4, 16, 20), (1, 12, 8, 16, 20), (1, 12, 8, 16, 40))}
    units = tdt_loss.measure(cases=cases, settings=QUICK)
    # a process that has run other tests may need no new memory for these
    rows = [replace(row, peak_bytes=row.peak_bytes or 2**20) for unit in units for row in unit]
    found = transducer_memory.memory_rows(rows, transducer_memory.TDT)
    assert sorted({(transducer_memory.joined(r), transducer_memory.outputs(r)) for r in found}) == [
        *((60, 20), (108, 20), (108, 40))
    ]
    assert [
        axes.get_title(loc="left") for axes in transducer_memory.figure(found, transducer_memory.TDT).axes
    ] == [*("V = 20", "V = 40")]
    text = transducer_memory.table(rows)
    assert text.startswith("![TDT's joiner and loss")
    assert text.count("\n| 1x12x") == 3
    assert "MiB |" in text


def test_the_exact_loss_of_a_transducer():
    problem = rnnt_loss.Problem(*rnnt_loss.TINY[rnnt_loss.LOGITS][0])
    logits = problem.logits()
    torch.testing.assert_close(problem.fused(), problem.fused(logits), rtol=1e-5, atol=1e-5)
    with peer():
        expected = problem.upstream()
    torch.testing.assert_close(problem.fused(), expected, rtol=1e-5, atol=1e-5)
    for unit in rnnt_loss.measure(cases=rnnt_loss.TINY, settings=QUICK, reps=2):
        assert [row.implementation for row in unit] == ["upstream", "fastasr"]


def test_a_convolution_in_groups_counts_its_own_products():
    conv = torch.nn.Conv2d(6, 6, (3, 5), padding=(1, 2), groups=6)
    x = torch.randn(2, 6, 7, 9, requires_grad=True)
    forward = 2 * (2 * 6 * 7 * 9) * 15
    assert product_flops(lambda: conv(x)) == forward
    assert product_flops(lambda: conv(x).sum().backward()) == 3 * forward
    assert product_flops(lambda: conv(x.detach()).sum().backward()) == 2 * forward


@pytest.mark.parametrize(("medians", "kept"), [((2.0,), [2.0]), ((0.9, 1.5), [1.5]), ((0.9, 0.8), [0.8])])
def test_a_pass_in_doubt_is_measured_again_for_longer(monkeypatch, medians, kept):
    """``medians`` are those of eager in one measurement after the other; ours takes 1 s in each."""
    asked, left = [], list(medians)

    def interleave(variants, *, reps, sample_seconds, **_):
        asked.append((reps, sample_seconds))
        return {"eager": Timing([left.pop(0)]), "fastasr": Timing([1.0])}

    monkeypatch.setattr("fastasr.benchmarks.case.interleave", interleave)
    settings = replace(QUICK, sample_seconds=0.5, memory=False, limits=False, doubted=0.97)
    doubled = tiny({"eager": lambda x: 2 * x, "fastasr": lambda x: x + x})
    (found,) = measure(doubled, passes=[FORWARD], settings=settings)
    assert [row.median_ms / 1e3 for row in found if row.implementation == "eager"] == kept
    assert asked == [(2, 0.5), (8, 2.0)][: len(medians)]
