# SPDX-License-Identifier: Apache-2.0
"""Whole models as users run them: seconds by the wall clock over twenty calls, where the host may be the limit.

Each model is timed as upstream ships it, under ``torch.compile``, swapped, and swapped with its calls recorded; on
recordings of unequal length also with one recording for every batch, without padding ("row"). A row's
``median_ms`` is the wall clock's time of a call, ``busy_ms`` the time of its kernels, ``host_ms`` the time until the
call returns, ``peak_bytes`` all memory that torch holds of the device: weights, gradients, activations, graphs.
``limit`` names the speed of the machine's host: hosts differ by a factor of four.
"""

import contextlib
import copy
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fastasr
from fastasr.benchmarks import upstream
from fastasr.benchmarks.device.checks import reported
from fastasr.benchmarks.device.compilation import compiled_together
from fastasr.benchmarks.device.machine import GPU
from fastasr.benchmarks.device.timing import weighted
from fastasr.benchmarks.markdown import NONE_YET, conditions, grid, mark
from fastasr.benchmarks.models import ragged
from fastasr.benchmarks.models.fast_conformer import batch_of
from fastasr.benchmarks.models.fast_conformer import encoder as parakeet
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import Unit, duration, percent, times, units
from fastasr.benchmarks.time_limit import Expired, time_limit

CALLS, ROUNDS, WARMUP = 10, 2, 4
COMPILE_SECONDS = 120
MAX_DOUBLINGS = 10  # A sweep doubles the batch at most this often.
# The most by which gradients of recorded steps may differ from those of unrecorded ones: a recorded Zipformer adds and
# rounds by other kernels, in bfloat16. A row's ``recorded_off`` is the difference that was measured.
OFF = 0.03
COMPILED = ("compile", "reduce-overhead")
RECORDED = {"recorded", "row"}
SWAPPED = RECORDED | {"fastasr"}


@dataclass(frozen=True)
class Workload:
    """What a model is called on: ``training`` steps or inference, recordings, and the seconds of each; None for lengths
    like LibriSpeech's."""

    training: bool
    batch: int
    seconds: int | None

    @property
    def case(self) -> str:
        each = "LibriSpeech-like" if self.seconds is None else f"x {self.seconds} s"
        return f"{'training' if self.training else 'inference'}, {self.batch} {each}"

    @property
    def speech(self) -> float:
        """Returns the seconds of speech in a batch."""
        if self.seconds is None:
            return sum(ragged.seconds(ragged.LIBRISPEECH, self.batch, False))
        return self.batch * self.seconds


WORKLOADS = (
    Workload(False, 1, 10),
    Workload(False, 1, 60),
    Workload(False, 32, 15),
    Workload(True, 20, 30),
    Workload(True, 32, 15),
    Workload(False, 48, None),
    Workload(True, 48, None),
)
# What a sweep runs: training on more and more recordings, of 30 s or of lengths like LibriSpeech's
SWEPT = {
    w.case: w
    for seconds in (30, None)
    for i in range(MAX_DOUBLINGS)
    for w in [Workload(True, 1 << i, seconds)]
}


def _zipformer(dry: bool) -> torch.nn.Module:
    return upstream.drawing(upstream.zipformer("tiny" if dry else "medium", inner_compile=False))


def _features(workload: Workload) -> tuple:
    if workload.seconds is None:
        x, mask = _masked(workload)
        return x, mask.sum(1)
    return upstream.example(workload.batch, 100 * workload.seconds)


def _masked(workload: Workload) -> tuple:
    if workload.seconds is None:
        return ragged.batch_of(ragged.seconds(ragged.LIBRISPEECH, workload.batch, False))
    return batch_of(workload.batch, workload.seconds)


# Name -> a function that makes upstream's model and its inputs for a workload
MODELS: dict[str, tuple[Callable, Callable]] = {
    "zipformer_m": (_zipformer, _features),
    "fast_conformer_110m": (lambda dry: parakeet("tiny" if dry else "110M", 2 if dry else 17), _masked),
    "fast_conformer_600m": (lambda dry: parakeet("tiny" if dry else "0.6B", 2 if dry else 24), _masked),
}
COMPILES = {
    "zipformer_m": (False,),
    "fast_conformer_110m": (False, True),
    "fast_conformer_600m": (False, True),
}


class _Way:
    """One way to run a model on a workload: ``step()`` is what is timed."""

    def __init__(self, machine: GPU, model: torch.nn.Module, call: Callable, inputs: tuple, training: bool):
        self.machine = machine
        self.model = model
        self.call = call
        self.inputs = inputs
        self.training = training
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def output(self) -> Tensor:
        dry = self.machine.dry
        with (
            torch.set_grad_enabled(self.training),
            # upstream's Zipformer trains under autocast on a GPU alone
            torch.autocast(self.machine.device, torch.bfloat16, enabled=not dry),
            # A tape does not repeat all of our kernels for the CPU.
            fastasr.backend("eager") if dry else contextlib.nullcontext(),
        ):
            return self.call(*self.inputs)[0]

    def step(self) -> None:
        if not self.training:
            self.output()
            return
        for p in self.parameters:
            p.grad = None
        weighted(self.output().float()).backward()

    def seeded(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        self.step()

    def gradients(self) -> list:
        """Returns the gradients of a step from the same beginning: Whiten's shares follow what earlier steps found."""
        for module in self.model.modules():
            if hasattr(module, "max_prob"):
                module.prob = module.max_prob
                vars(module).pop("_verdict", None)
        self.seeded()
        return [None if p.grad is None else p.grad.float() for p in self.parameters]


def _made(
    machine: GPU, shipped: torch.nn.Module, key: str, training: bool, inputs: tuple = ()
) -> tuple[torch.nn.Module, Callable, str]:
    """Returns a model to run one way, what to call, and why a recorded one's calls are not recorded, or ""."""
    model = copy.deepcopy(shipped).to(machine.device).train(training)
    if key == "compile":
        return model, torch.compile(model), ""
    if key == "reduce-overhead":
        return model, torch.compile(model, mode="reduce-overhead"), ""
    if key == "upstream":
        return model, model, ""
    room: dict = {}
    if key == "row":
        room = {"frames": _frames(inputs), "recordings": len(inputs[0]), "longest": inputs[0].shape[1]}
    graphs = fastasr.Graphs(recorder=machine.recorder, **room) if key in RECORDED else False
    report = fastasr.accelerate(model, ragged=key == "row", graphs=graphs)
    reasons = dict.fromkeys(reason for reason in (report.graphs or {}).values() if reason)
    return model, model, "; ".join(reasons)


def _frames(inputs: tuple) -> int:
    """Returns the frames that exist in a batch of features and lengths, or features and a mask."""
    return int(inputs[1].sum())


def _ways(
    name: str, workload: Workload, compiled: Sequence[str] = (), only: Sequence[str] = ()
) -> tuple[str, ...]:
    """Returns the ways to run a model on a workload, with those of ``compiled`` that can run it: those of ``only``, if
    it names any."""
    last = () if workload.seconds is not None else ("row",)
    if last or workload.training not in COMPILES[name]:
        compiled = ()
    every = ("upstream", *compiled, "fastasr", "recorded", *last)
    return tuple(way for way in every if not only or way in only)


def _why_not_replayed(model: torch.nn.Module, why_not: str = "") -> str:
    """Returns why a recorded model's calls are no replays, or "": ``why_not`` where it has no graphs. A module that
    memory does not suffice to record runs unrecorded, or its parts are recorded: this ends a sweep."""
    kinds = [kind for its in fastasr.graph_state(model).values() for kind in its]
    reasons = [kind.reason for kind in kinds if kind.reason]
    ended = [reason for reason in reasons if reason.startswith(torch.OutOfMemoryError.__name__)]
    replayed = any(kind.replayed for kind in kinds) and not ended
    return "" if replayed else "; ".join(ended or reasons) or why_not or "no call is recorded"


def time_whole(
    tell: Callable, machine: GPU, name: str, workload: Workload, only: tuple[str, ...] = ()
) -> None:
    """Times a model on a workload, and checks that recorded steps are the unrecorded ones."""
    reported(tell, "timing", partial(_time_whole, tell, machine, name, workload, only))


def _time_whole(tell: Callable, machine: GPU, name: str, workload: Workload, only: tuple[str, ...]) -> None:
    build, inputs_of = MODELS[name]
    torch.manual_seed(0)
    shipped = build(machine.dry)
    inputs = _inputs(machine, inputs_of, workload)
    limit = yardstick(machine)
    made, memory, walls, hosts, failed = {}, {}, {}, {}, []

    def row_of(key: str) -> dict:
        """Times one more round of calls. Returns the row of all rounds so far."""
        way = made[key]
        way.step()
        wall, host = _clock(machine, way.step)
        walls.setdefault(key, []).append(wall)
        hosts.setdefault(key, []).append(host)
        return Row.measured(
            suite="models", name=name, case=workload.case, shape="x".join(map(str, inputs[0].shape)),
            dtype="bfloat16", device=machine.device, pass_="forward+backward" if workload.training else "forward",
            implementation=key, median_ms=statistics.median(walls[key]), q1_ms=min(walls[key]),
            q3_ms=max(walls[key]), reps=CALLS * len(walls[key]), host_ms=statistics.median(hosts[key]),
            busy_ms=machine.busy_milliseconds(way.step), limit=limit,
            peak_bytes=None if machine.dry else memory[key],
        ).to_dict()  # fmt: skip

    for key in _ways(name, workload, () if machine.dry else COMPILED, only):
        model = call = way = None  # What was left out holds no memory.
        before = _held(machine)
        model, call, why_not = _made(machine, shipped, key, workload.training, inputs)
        way = _Way(machine, model, call, inputs, workload.training)
        try:
            with time_limit(COMPILE_SECONDS) if key in COMPILED else contextlib.nullcontext():
                if key == "fastasr":
                    compiled_together(machine, way.seeded)
                for _ in range(WARMUP):
                    way.step()
                machine.synchronize()
        except (Exception, Expired) as error:
            message = f"{type(error).__name__}: {error}"[:300]
            tell({"left_out": key, "pass": workload.case, "message": message})
            if key not in COMPILED and not isinstance(error, torch.OutOfMemoryError):
                failed.append(f"{key}: {message}")
            continue
        if key in RECORDED:
            state = fastasr.graph_state(model)
            tell({"graphs": {path: [vars(kind) for kind in kinds] for path, kinds in state.items()}})
            if reason := _why_not_replayed(model, why_not):
                tell({"left_out": key, "pass": workload.case, "message": reason[:300]})
                continue
        made[key], memory[key] = way, _held(machine, way.step) - before
        tell({"rows": [row_of(key)]})  # Later ways may end this process, or the time.
    try:
        tell(_differences(made, workload))
    except AssertionError as error:
        failed.append(str(error))
    for _ in range(0 if machine.dry else ROUNDS - 1):
        tell({"rows": [row_of(key) for key in made]})
    assert not failed, "; ".join(failed)


def _inputs(machine: GPU, inputs_of: Callable, workload: Workload) -> tuple:
    small = Workload(workload.training, 2, 2)
    return tuple(t.to(machine.device) for t in inputs_of(small if machine.dry else workload))


def sweep(
    tell: Callable,
    machine: GPU,
    name: str,
    seconds: int | None = 30,
    compiled: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> None:
    """Times training steps on 1, 2, 4, ... recordings of so many seconds, or of lengths like LibriSpeech's, each way
    until the device's memory ends; also ``compiled``, "compile" or "reduce-overhead" or both, if it takes the model."""
    ways = _ways(name, Workload(True, 1, seconds), compiled, only)
    reported(tell, "sweep", partial(_sweep, tell, machine, name, seconds, ways))


def _sweep(tell: Callable, machine: GPU, name: str, seconds: int | None, ways: tuple[str, ...]) -> None:
    build, inputs_of = MODELS[name]
    torch.manual_seed(0)
    shipped, host = build(machine.dry), yardstick(machine)
    workloads = [w for w in SWEPT.values() if w.seconds == seconds][: 2 if machine.dry else None]
    for key in ways:
        model = None
        for workload in workloads:
            try:
                inputs = _inputs(machine, inputs_of, workload)
                if model is None or key in RECORDED:  # Graphs of smaller batches would hold memory.
                    model = way = None
                    _held(machine)
                    model, call, none = _made(machine, shipped, key, True, inputs)
                way = _Way(machine, model, call, inputs, True)
                with time_limit(COMPILE_SECONDS) if key in COMPILED else contextlib.nullcontext():
                    if key == "fastasr" and workload is workloads[0]:
                        compiled_together(machine, way.seeded)
                    for _ in range(WARMUP):
                        way.step()
                why_not = _why_not_replayed(model, none) if key in RECORDED else ""
                wall, queued = _clock(machine, way.step)
                held = _held(machine, way.step)
            except (torch.OutOfMemoryError, Expired) as error:
                why_not = str(error)
            if why_not:
                tell({"left_out": key, "pass": workload.case, "message": why_not[:200]})
                break
            row = Row.measured(
                suite="models", name=name, case=f"sweep, {workload.case}", shape="x".join(map(str, inputs[0].shape)),
                dtype="bfloat16", device=machine.device, pass_="forward+backward", implementation=key,
                median_ms=wall, q1_ms=wall, q3_ms=wall, reps=CALLS, host_ms=queued, limit=host,
                peak_bytes=None if machine.dry else held,
            )  # fmt: skip
            tell({"rows": [row.to_dict()]})
        model = way = call = None
        _held(machine)


def _held(machine: GPU, step: Callable = lambda: None) -> int:
    """Returns the bytes that torch holds of the device after a step: weights, gradients, activations, graphs."""
    if machine.dry:
        return 0
    torch.cuda.empty_cache()
    step()
    machine.synchronize()
    return torch.cuda.memory_reserved()


def _clock(machine: GPU, step: Callable) -> tuple[float, float]:
    """Returns milliseconds a call: by the wall clock, and until the calls return."""
    calls = 1 if machine.dry else CALLS
    machine.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    host = time.perf_counter() - begin
    machine.synchronize()
    return (time.perf_counter() - begin) / calls * 1e3, host / calls * 1e3


def _differences(made: dict[str, _Way], workload: Workload) -> dict:
    """Returns how far recorded steps are from unrecorded ones: outputs, or gradients by their norms. A row's outputs
    are those of frames that exist; its gradients are others, because its statistics leave padding out."""
    if not {"fastasr", "recorded"} <= made.keys():
        return {}
    of_row = {}
    if workload.training:
        ours, recorded = made["fastasr"].gradients(), made["recorded"].gradients()
    else:
        outputs = {key: made[key].output().float() for key in made.keys() & SWAPPED}
        ours, recorded = [outputs["fastasr"]], [outputs["recorded"]]
        if "row" in outputs:
            of_row = _difference_of_row(outputs["row"], ours[0], made["row"].inputs)
    assert [g is None for g in ours] == [g is None for g in recorded], "other parameters have gradients"
    pairs = [(a, b) for a, b in zip(ours, recorded, strict=True) if a is not None]
    whole = sum((a.double() - b.double()).square().sum() for a, b in pairs) / sum(
        a.double().square().sum() for a, _ in pairs
    )
    off = whole.sqrt().item()
    equal = sum(torch.equal(a, b) for a, b in pairs)
    assert off <= OFF, f"recorded steps are off by {off:.2%} of the norm"
    return {"recorded_off": off, "equal_tensors": equal, "tensors": len(pairs), **of_row}


def _difference_of_row(y: Tensor, padded: Tensor, inputs: tuple) -> dict:
    """Returns how far a row's outputs, which are 0 in padding, are from the padded batch's."""
    exists = y.any(-1)
    share, expected = exists.float().mean().item(), _frames(inputs) / inputs[0][..., 0].numel()
    most = OFF + len(inputs[0]) / exists.numel()  # a frame of each recording
    assert abs(share - expected) <= most, f"a row gives {share:.1%} of the frames, and {expected:.1%} exist"
    off = ((y - padded)[exists].norm() / padded[exists].norm()).item()
    assert off <= OFF, f"outputs of a row are off by {off:.2%} of the norm"
    return {"row_off": off}


def yardstick(machine: GPU) -> str:
    """Returns the speed of the host, in words: microseconds to queue a copy and a small product."""
    x, y = (torch.zeros(8, 8, dtype=torch.float32, device=machine.device) for _ in range(2))
    found = []
    for step in (lambda: x.copy_(y), lambda: torch.nn.functional.linear(x, y)):
        step()
        machine.synchronize()
        begin = time.perf_counter()
        for _ in range(500):
            step()
        found.append((time.perf_counter() - begin) / 500 * 1e6)
        machine.synchronize()
    return f"copy {found[0]:.1f} µs, 8 x 8 linear {found[1]:.1f} µs"


def profile(tell: Callable, machine: GPU, name: str, workload: Workload, only: tuple[str, ...] = ()) -> None:
    """Tells the kernels of a model's step by time: as upstream ships it, swapped, recorded. The profiler sees the
    kernels inside of a CUDA graph too."""

    def measure() -> None:
        build, inputs_of = MODELS[name]
        torch.manual_seed(0)
        shipped, inputs, found = build(machine.dry), _inputs(machine, inputs_of, workload), {}
        try:
            for key in _ways(name, workload, only=only):
                model, call, why_not = _made(machine, shipped, key, workload.training, inputs)
                way = _Way(machine, model, call, inputs, workload.training)
                if key == "fastasr":
                    compiled_together(machine, way.seeded)
                for _ in range(WARMUP):
                    way.seeded()
                if key in RECORDED and (reason := _why_not_replayed(model, why_not)):
                    tell({"left_out": key, "pass": workload.case, "message": reason[:300]})
                    continue
                found[key] = machine.kernels_by_time(way.seeded)
        finally:
            tell({"kernels": found, "of": f"{name}, {workload.case}"})

    reported(tell, "profile", measure)


SHOWN = {  # implementation -> its column
    "upstream": "upstream",
    "compile": "`torch.compile`",
    "reduce-overhead": "its CUDA graphs",
    "fastasr": "fastasr",
    "recorded": "**fastasr, recorded**",
    "row": "**fastasr, one recording**",
}
TITLES = {
    "zipformer_m": "Zipformer-M",
    "fast_conformer_110m": "FastConformer 110M",
    "fast_conformer_600m": "FastConformer 0.6B",
}
SHOWN_KERNELS = 15  # A table of kernels has this many of each way, the longest.


def rows_of(records: Iterable[dict]) -> list[Row]:
    """Returns the rows that the units of the records told: of those of a unit that are alike, the last."""
    rows: list[Row] = []
    for record in records:
        told = (Row.from_dict(row) for message in record["messages"] for row in message.get("rows", ()))
        rows += {(row.unit, row.implementation): row for row in told}.values()
    return rows


def _units(records: Iterable[dict]) -> list[Unit]:
    """Returns the units of whole models in the order of ``MODELS`` and ``WORKLOADS``."""
    order = [(name, w.case) for name in MODELS for w in WORKLOADS]
    known = [u for u in units(rows_of(records)) if (u.first.name, u.first.case) in order]
    return sorted(known, key=lambda u: order.index((u.first.name, u.first.case)))


def _label(row: Row) -> str:
    return f"{TITLES[row.name]}, {row.case}{mark(row)}"


def summary(records: Iterable[dict]) -> str:
    """Returns the README's table: the wall clock of a call for each way to run a model, how many times upstream's our
    recorded one is, and the share of it that its kernels take."""
    found = _units(records)
    if not found:
        return NONE_YET
    columns = [key for key in SHOWN if any(unit.row(key) for unit in found)]
    lines = []
    for unit in found:
        ours = unit.row("recorded")
        gain = unit.median("upstream") / ours.median_ms if ours and unit.median("upstream") else None
        busy = ours.busy_ms / ours.median_ms if ours and ours.busy_ms else None
        times_of = [duration(unit.median(key)) for key in columns]
        lines.append((_label(unit.first), *times_of, times(gain), percent(busy)))
    head = ("", *(SHOWN[key] for key in columns), "gain", "share in kernels")
    return "\n".join([*grid(head, lines, len(columns) + 2), "", _where(found)])


TRAINED_WITH = {"zipformer": "icefall", "fast_conformer": "NeMo or transformers"}


def training(records: Sequence[dict]) -> str:
    """Returns the README's lines on the gain of a training step in bfloat16: a line for each measured step, recorded or
    not, with its memory and what bounds it.

    records: records of whole models and of ops; the latter measure a Zipformer-M without graphs.
    """
    busy = {
        (record["op"], message["of"]): message["busy_ms"]
        for record in records
        for message in record["messages"]
        if "busy_ms" in message
    }
    lines = []
    for unit in units(rows_of(records)):
        name = unit.first.name
        if name == "zipformer_training" or (name in TITLES and unit.first.case.startswith("training")):
            theirs = unit.row("upstream") or unit.row("eager")
            for key, words in (("fastasr", "not recorded"), ("recorded", "recorded")):
                if theirs and (ours := unit.row(key)):
                    lines.append(_gain(theirs, ours, ours.busy_ms or busy[name, key], words))
    return "\n".join(lines) or NONE_YET


def _gain(theirs: Row, ours: Row, kernels: float, words: str) -> str:
    package = next(package for name, package in TRAINED_WITH.items() if ours.name.startswith(name))
    bound = "kernels" if kernels > ours.median_ms / 2 else "host"
    found = [
        f"- {TITLES.get(ours.name, TITLES['zipformer_m'])} with {package}, {words}: {duration(theirs.median_ms)} → "
        f"{duration(ours.median_ms)} ({times(theirs.median_ms / ours.median_ms)})"
    ]
    if ours.peak_bytes and theirs.peak_bytes:
        found.append(f"{theirs.peak_bytes / 1e9:.1f} → {ours.peak_bytes / 1e9:.1f} GB")
    found.append(
        f"bound by the {bound}, of it {duration(kernels)} in kernels ({ours.device_name}{mark(ours)})"
    )
    return ", ".join(found)


def details(records: Sequence[dict]) -> str:
    """Returns the tables of docs/graphs.md: wall clock, host, kernels and memory of every way to run a model; and the
    longest kernels of the steps that were profiled."""
    found = _units(records)
    if not found:
        return NONE_YET
    workloads = {w.case: w for w in WORKLOADS}
    lines = []
    for unit in found:
        for key, column in SHOWN.items():
            row = unit.row(key)
            if row is not None:
                w = workloads[row.case]
                speech = f"{w.speech / row.median_ms * 1e3:,.0f} s"
                memory = f"{row.peak_bytes / 1e9:.1f} GB" if row.peak_bytes is not None else "–"
                spent = [duration(ms) for ms in (row.median_ms, row.host_ms, row.busy_ms)]
                lines.append((_label(row), column, *spent, memory, speech))
    head = ("", "", "wall clock", "host", "kernels", "memory", "speech per second")
    of_steps = (line for record in records for line in profiles(record))
    return "\n".join([*grid(head, lines, 5), "", _where(found), *_swept(records), *of_steps])


def _swept(records: Iterable[dict]) -> list[str]:
    """Returns the table of the sweeps: seconds of speech per second and memory, by batch; nothing without sweeps."""
    swept = [(row, w) for row in rows_of(records) if (w := SWEPT.get(row.case.removeprefix("sweep, ")))]
    if not swept:
        return []
    order, cells = [*SWEPT.values()], {}
    for row, w in swept:
        held = f", {row.peak_bytes / 1e9:.1f} GB" if row.peak_bytes is not None else ""
        speech = f"{w.speech / row.median_ms * 1e3:,.0f} s{held}"
        cells.setdefault((row.name, order.index(w)), {})[row.implementation] = speech
    columns = [key for key in SHOWN if any(key in found for found in cells.values())]
    lines = [
        (f"{TITLES[name]}, {order[i].case}", *(found.get(key, "–") for key in columns))
        for (name, i), found in sorted(cells.items())
    ]
    head = ("speech per second and memory", *(SHOWN[key] for key in columns))
    return ["", *grid(head, lines, len(columns)), "", conditions([row for row, _ in swept])]


def profiles(record: dict) -> Iterator[str]:
    """Yields the lines of the tables of a record's profiles: the longest kernels of each way to run a model, beside
    each other. Names of kernels are cut."""
    for message in record["messages"]:
        if not any(message.get("kernels", {}).values()):
            continue
        of = {key: message["kernels"][key] for key in SHOWN if key in message["kernels"]}
        sums, lines = [], {}
        for key, found in of.items():
            total, launches = sum(ms for *_, ms in found), sum(count for _, count, _ in found)
            sums.append(f"{SHOWN[key]} {total:.1f} ms in {launches:,} launches")
            for name, count, ms in found:
                counts, spent = lines.setdefault(name[:100], {}).get(key, (0, 0.0))
                lines[name[:100]][key] = counts + count, spent + ms
        shown = {name[:100] for found in of.values() for name, *_ in found[:SHOWN_KERNELS]}
        longest = sorted(shown, key=lambda name: -max(ms for _, ms in lines[name].values()))
        where = f"({record['device_name']}, commit {record['commit']})"
        yield from ("", f"Kernels of a step of {message['of']}: {'; '.join(sums)} {where}.", "")
        cells = ((lines[name].get(key) for key in of) for name in longest)
        table = [
            (f"`{name}`".replace("|", "\\|"), *(text for cell in its for text in _spent(cell)))
            for name, its in zip(longest, cells, strict=True)
        ]
        yield from grid(
            ("kernel", *(c for key in of for c in (f"{SHOWN[key]}, launches", "ms"))), table, 2 * len(of)
        )


def _spent(cell: tuple[int, float] | None) -> tuple[str, str]:
    return ("–", "–") if cell is None else (f"{cell[0]:,}", f"{cell[1]:.2f}")


def _where(found: Sequence[Unit]) -> str:
    rows = [row for unit in found for row in unit.rows]
    costs: dict[str, list[str]] = {}
    for call, us in re.findall(r"(\w[^,:]*) (\S+) [uµ]s", ", ".join(row.limit for row in rows if row.limit)):
        costs.setdefault(call, []).append(us)
    ranges = (f"{min(us, key=float)} to {max(us, key=float)} us for a {call}" for call, us in costs.items())
    return f"{conditions(rows)} A call of torch costs this machine's host {', '.join(ranges)}."
