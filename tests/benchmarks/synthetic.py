# SPDX-License-Identifier: Apache-2.0
"""Rows as a run would write them, with invented figures."""

from fastasr.benchmarks.rows import Row

OPS = {"eager": 5.0, "compile": 3.0, "upstream": 2.5, "fastasr": 1.0, "copy": 0.9}
MODEL = {"upstream": 1231.0, "upstream+linear": 1000.0, "fastasr": 800.0}


def row(name="bypass", case="8x4", pass_="forward", implementation="fastasr", median=0.5, **more) -> Row:
    fields = {"suite": "ops", "shape": case, "dtype": "float32", "device": "cpu", "reps": 15}
    times = {"median_ms": median, "q1_ms": 0.95 * median, "q3_ms": 1.1 * median}
    given = {"name": name, "case": case, "pass_": pass_, "implementation": implementation}
    return Row.measured(**{**fields, **times, **given, **more})


def _row(suite, *given, **more) -> Row:
    made = row(*given, suite=suite, **more)
    made.commit, made.date, made.device_name = "0123456789", "2026-01-02T03:04:05Z", "A CPU (2 cores)"
    return made


def rows() -> list[Row]:
    """Returns two ops, a model with a stack, and dispatch."""
    limit = {"fraction_of_limit": 0.9, "limit": "copy 46.0 GB/s", "peak_bytes": 2**20, "load": 0.05}
    made = [
        _row("ops", "swoosh_l", "4x1600x512", pass_, name, median, **limit)
        for pass_ in ("forward", "backward", "forward+backward")
        for name, median in OPS.items()
    ]
    made += [
        _row("ops", "linear", "3184x192->512", "input gradient", name, median)
        for name, median in (("eager", 3.0), ("fastasr", 1.3))
    ]
    for case in ("whole model", "stack 0", "first call"):
        made += [_row("models", "zipformer", case, "forward", name, ms) for name, ms in MODEL.items()]
    made += [
        _row("dispatch", "swoosh_l", "tiny tensor", pass_, name, median)
        for pass_ in ("inference mode", "forward+backward")
        for name, median in (("eager", 0.0075), ("operator", 0.0017), ("fastasr", 0.0015))
    ]
    return made


def lengths(op: str, found: tuple[int, ...]) -> list[Row]:
    """Returns rows over the length, two implementations in two passes."""
    return [
        _row("ops", op, f"length {n}", pass_, name, 0.01 * factor * n, peak_bytes=factor * n * 1024)
        for n in found
        for pass_ in ("forward", "forward+backward")
        for name, factor in (("upstream", 10), ("fastasr", 1))
    ]
