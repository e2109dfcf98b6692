# SPDX-License-Identifier: Apache-2.0
"""Runs suites, writes each unit's rows as soon as they are measured, and resumes an interrupted run."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastasr._nearest import nearest_or_all
from fastasr.benchmarks import dispatch, models, ops, rows, table, upstream
from fastasr.benchmarks.case import Report, Settings, measure
from fastasr.benchmarks.device import verdict, whole_models
from fastasr.benchmarks.device.machine import GPU, DryRun
from fastasr.benchmarks.device.units import units
from fastasr.benchmarks.environment import commit, device_name
from fastasr.benchmarks.harness import wait_until_idle
from fastasr.benchmarks.markdown import HEADLINES
from fastasr.benchmarks.models import zipformer
from fastasr.benchmarks.rows import Row
from fastasr.testing.speed import Case, sized, sizes_of

QUICK = "a quick run: its figures mean nothing"
HEADLINES_ONLY = "headlines"
MINUTES = 120.0  # for a whole model on a GPU
SMALL = (20, 2)  # frames and sequences of an op's call in a quick run


@dataclass(frozen=True)
class Options:
    """The options of a run. ``names`` are ops, "dispatch", models, the suites "ops" and "models", or "headlines", which
    are the models' rows in the README; empty means everything, and in a quick run the ops. On a GPU the models are
    those of ``fastasr gpu --stages M``, each as a whole; a quick run of them is a dry run.

    ``sizes`` are those of the ops' calls (``fastasr.testing.sized``) in the place of model sizes. ``quick`` is a
    functional run of small calls, whose figures mean nothing. ``fresh`` measures again what the file
    already has for this commit. ``compile`` adds torch.compile of the ops' formulas, ``compile_model`` of the whole
    model as well (minutes; on a GPU: to the sweep over the batch). ``profile`` adds the kernels of a whole model's
    step by time, on a GPU. ``patience`` is how many seconds to wait for idle cores before each op or model.
    """

    names: tuple[str, ...] = ()
    out: Path = Path("bench-report/results.jsonl")
    sizes: dict[str, int] = field(default_factory=dict)
    quick: bool = False
    fresh: bool = False
    compile: bool = True
    compile_model: bool = False
    profile: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    patience: float = 60.0
    reps: int | None = None

    def select(self) -> list[str]:
        """Returns the known names that ``names`` stand for, in table order.

        Raises ``ValueError`` for an unknown name, and for sizes that an op does not have.
        """
        chosen = select(self.names or (("ops",) if self.quick else ()), self.on_gpu)
        if self.sizes and (not self.names or set(chosen) - set(ops.names())):
            raise ValueError(
                "sizes are for ops: expected their names, got " + (", ".join(self.names) or "none")
            )
        for name in chosen if self.sizes else ():
            sized(name, **self.sizes)
        return chosen

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type != "cpu"

    def cases(self, name: str) -> list[Case]:
        """Returns the cases of an op."""
        if self.sizes or self.quick:
            small = dict(zip(sizes_of(name), SMALL, strict=False)) if self.quick else {}
            return [sized(name, **small | self.sizes)]
        return [case for case in ops.cases() if case.op == name]

    def settings(self) -> Settings:
        if self.quick:
            return Settings.quick(compile=self.compile, reps=self.reps or 3)
        return Settings(compile=self.compile, reps=self.reps or 15)


@dataclass
class Summary:
    """The result of a run: rows measured now, units found done, and messages about failed measurements."""

    rows: list[Row] = field(default_factory=list)
    resumed: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def known_names() -> list[str]:
    return [*ops.names(), dispatch.NAME, *models.names(), *whole_models.MODELS]


def select(names: tuple[str, ...], on_gpu: bool = False) -> list[str]:
    """Returns the known names that ``names`` stand for, in table order: suites have the models of a CPU or of a GPU.
    Raises ``ValueError`` for an unknown one.
    """
    suites = {"ops": ops.names(), "models": list(whole_models.MODELS) if on_gpu else models.names()}
    suites["all"] = [*suites["ops"], dispatch.NAME, *suites["models"]]
    suites[HEADLINES_ONLY] = [name for name, _, _ in HEADLINES]
    chosen: set[str] = set()
    for name in names or ("all",):
        if name not in suites and name not in known_names():
            raise ValueError(
                f"no benchmark is called {name!r}{nearest_or_all(name, [*known_names(), *suites])}"
            )
        chosen.update(suites.get(name, [name]))
    return [name for name in known_names() if name in chosen]


def measured_units(path: Path, device: str, reps: int) -> set[tuple]:
    """Returns suite, name, case, shape, pass, dtype and threads of the file's units from this commit and machine, with
    as many repetitions (of models and sweeps, with any number).
    """
    at, machine = commit(), device_name(device)
    return {
        (row.suite, row.name, row.case, row.shape, row.pass_, row.dtype, row.threads)
        for row in rows.read(path)
        if (row.commit, row.device_name, row.device) == (at, machine, device)
        and (row.reps >= reps or row.suite not in ("ops", "dispatch"))
    }


def _finished(options: Options) -> Callable[..., bool]:
    """Tells whether the file already holds a unit, measured at this commit with as many repetitions and threads."""
    if options.fresh:
        return lambda *unit: False
    done = measured_units(options.out, options.device, options.settings().reps)
    return lambda *unit: (*unit, torch.get_num_threads()) in done


def _model(name: str, options: Options, done: Callable[..., bool]) -> dict:
    """Returns the arguments with which a model is measured."""
    return {
        **(models.MODULES[name].QUICK if options.quick else {}),
        "skip": lambda case, shape, pass_: done("models", name, case, shape, pass_, "float32"),
    }


def _zipformer(options: Options, done: Callable[..., bool]) -> Iterator[dict]:
    """Returns the arguments of the Zipformer's runs: first the whole model, its stacks and first calls; then one long
    recording, which only the whole model takes.
    """
    for size in (zipformer.QUICK,) if options.quick else ({}, {"batch": 1, "frames": 6000, "fresh": False}):
        alone = "batch" in size and not options.quick

        def skip(case: str, shape: str, pass_: str, alone=alone) -> bool:
            if alone and case != zipformer.WHOLE:
                return True
            dtype = "bfloat16" if case == zipformer.AUTOCAST else "float32"
            case = "stack 0" if case == zipformer.STACKS else case
            return done("models", zipformer.NAME, case, shape, pass_, dtype)

        yield {**size, "skip": skip}


def _units(name: str, options: Options, summary: Summary, report: Report) -> Iterator[list[Row]]:
    """Yields the rows of everything that ``name`` stands for, unit by unit, without what is already in the file."""
    settings, finished = options.settings(), _finished(options)
    dtype = str(options.dtype).removeprefix("torch.")

    headlines = HEADLINES_ONLY in options.names and name not in options.names

    def done(suite: str, of: str, case: str, shape: str, *rest: str) -> bool:
        if headlines and (of, shape, case) not in HEADLINES:
            return True
        found = finished(suite, of, case, shape, *rest)
        summary.resumed += found
        return found

    if name == dispatch.NAME:

        def skip(op: str, shape: str, pass_: str) -> bool:
            return done("dispatch", op, dispatch.CASE, shape, pass_, "float32")

        yield from dispatch.measure(device=options.device, settings=settings, skip=skip, report=report)
    elif name in models.MODULES:
        if options.on_gpu:
            report(f"{name}: measured on the CPU only")
            return
        measured = _zipformer(options, done) if name == zipformer.NAME else [_model(name, options, done)]
        for arguments in measured:
            yield from models.MODULES[name].measure(
                **{"compile_model": options.compile_model} | arguments,
                settings=settings,
                reps=options.reps,
                report=report,
            )
    elif name in whole_models.MODELS:
        yield from _on_gpu(name, options, summary, report)
    else:
        for case in options.cases(name):

            def skip_pass(pass_: str, case=case) -> bool:
                return done("ops", case.op, case.name, case.shape, pass_, dtype)

            yield from measure(
                case,
                device=options.device,
                dtype=options.dtype,
                settings=settings,
                skip=skip_pass,
                report=report,
            )


def _on_gpu(name: str, options: Options, summary: Summary, report: Report) -> Iterator[list[Row]]:
    """Yields the rows of a whole model. Its units are those of ``fastasr gpu --stages M``, and their files come into a
    folder of the model's name."""
    from fastasr.benchmarks.device.__main__ import Book  # It prepares the server of a GPU's processes.
    from fastasr.benchmarks.device.__main__ import run as run_units

    machine = DryRun() if options.quick else GPU()
    if not (options.quick or options.on_gpu):
        report(f"{name}: measured on a GPU only")
        return
    reason = machine.why_not()
    if (device := torch.device(options.device)).index:
        reason = (
            f"whole models run on the first GPU: set CUDA_VISIBLE_DEVICES={device.index} to choose this one"
        )
    if reason:
        report(f"{name}: left out: {reason}")
        return
    kinds = {"whole model", "sweep", *(["profile"] if options.profile else [])}
    every = units(machine, options.compile_model)
    wanted = [unit for unit in every if (unit.stage, unit.op) == ("M", name) and unit.kind in kinds]
    folder, resume = options.out.parent / name, not options.fresh
    left = {unit.key for unit in Book(folder, machine, resume).left(wanted)}
    summary.resumed += len(wanted) - len(left)
    run_units(wanted, machine, folder, MINUTES, resume)
    for record in verdict.records(folder / "units.json"):
        if record["unit"] in left:
            for title, (how, message) in verdict.findings(record).items():
                if how in verdict.BAD:
                    report(f"{record['unit']}, {title}: failed: {message}")
            for text in (*verdict.notes(record), "\n".join(whole_models.profiles(record))):
                if text:
                    report(text)
            yield from (list(unit.rows) for unit in table.units(whole_models.rows_of([record])))


def run(
    options: Options, report: Report = lambda _: None, on_rows: Callable[[list[Row]], None] = lambda _: None
) -> Summary:
    """Measures and writes to ``options.out``. A benchmark that fails is reported and the next one starts."""
    chosen = options.select()
    summary = Summary()
    start = time.monotonic()

    def note(message: str) -> None:
        if "failed" in message or "left out" in message or "not measured" in message:
            summary.problems.append(message)
        report(message)

    gc.collect()
    gc.freeze()  # Collections before each measurement then skip imported objects, which would take most of their time.
    try:
        for name in chosen:
            report(name)
            if not options.quick and options.patience > 0:
                wait_until_idle(patience=options.patience, report=report)
            try:
                for unit in _units(name, options, summary, note):
                    rows.merge(options.out, unit)
                    summary.rows += unit
                    on_rows(unit)
            except upstream.MissingUpstream as error:
                note(f"{name}: left out: {error}")
            except Exception as error:  # one benchmark must not stop the others
                first = (str(error).strip().splitlines() or [""])[0]
                note(f"{name}: failed: {type(error).__name__}: {first[:200]}")
    finally:
        gc.unfreeze()
    summary.seconds = time.monotonic() - start
    return summary
