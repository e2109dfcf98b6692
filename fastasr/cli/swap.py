# SPDX-License-Identifier: Apache-2.0
"""``fastasr swap`` explains, accelerates, verifies and times the model that a user's function returns, or a published
encoder with random weights."""

import copy
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import typer

import fastasr
from fastasr._nearest import nearest
from fastasr.cli.console import err, escape, fail, out, table

# A published encoder is built with this many of its layers, for recordings of this many seconds.
LAYERS, BATCH, SECONDS = 2, 2, 10


def encoder(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Returns the encoder of this name, with random weights, and inputs of it. It ends the command if it has none."""
    from fastasr.benchmarks import encoders, upstream

    try:
        found = encoders.find(name)
        model = found.model(LAYERS)
    except ValueError as error:
        fail(f"expected MODULE:FACTORY or an encoder: {error}")
    except upstream.MissingUpstream as error:
        fail(str(error))
    err().print(f"{found.about}: {LAYERS} of {found.layers} layers, random weights, {BATCH} x {SECONDS} s")
    return model, found.inputs(BATCH, SECONDS)


def load(reference: str, option: str) -> Callable[[], Any]:
    """Returns the function that ``MODULE:FACTORY`` names. It ends the command if there is none."""
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        fail(f"{option}: expected MODULE:FACTORY, got {reference!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        fail(f"{option}: cannot import {module_name!r}: {error}")
    except Exception as error:  # the user's module may raise anything during its import
        fail(f"{option}: importing {module_name!r} failed: {type(error).__name__}: {error}")
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        fail(f"{option}: {module_name!r} has no {name!r}{nearest(part, dir(found))}")
    if not callable(found):
        fail(f"{option}: {reference!r} is a {type(found).__name__}, not a function")
    return found


def call(factory: Callable[[], Any], option: str, reference: str) -> Any:
    try:
        return factory()
    except Exception as error:  # the user's function may raise anything
        fail(f"{option}: {reference}() failed: {type(error).__name__}: {error}")


def as_arguments(inputs: Any) -> tuple[tuple, dict]:
    """Returns the positional and keyword arguments of one call of the model."""
    if isinstance(inputs, dict):
        return (), inputs
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def _timings(before: torch.nn.Module, after: torch.nn.Module, inputs: Any, reps: int) -> dict[str, dict]:
    """Times the models before and after the swap in turn, in milliseconds, without gradients."""
    from fastasr.benchmarks.harness import interleave

    arguments, keywords = as_arguments(inputs)
    tensors = [*arguments, *keywords.values(), *before.parameters()]
    device = next((str(t.device) for t in tensors if isinstance(t, torch.Tensor) and t.is_cuda), "cpu")

    def forward(model: torch.nn.Module) -> Callable[[], Any]:
        def run():
            with torch.no_grad():
                return model(*arguments, **keywords)

        return run

    timed = interleave(
        {"before": forward(before), "after": forward(after)},
        reps=reps,
        warmup=2,
        sample_seconds=0.05,
        device=device,
    )
    return {
        name: {
            "median_ms": round(timing.median * 1e3, 4),
            "quartiles_ms": [round(q * 1e3, 4) for q in timing.quartiles],
        }
        for name, timing in timed.items()
    }


def _print_times(times: dict[str, dict]) -> None:
    from fastasr.benchmarks.table import duration

    shown = table("", "median:right", "quartiles:right", title="Time of one call, no gradients")
    for name, figures in times.items():
        low, high = (duration(q) for q in figures["quartiles_ms"])
        shown.add_row(f"  {name}", duration(figures["median_ms"]), f"{low} – {high}")
    out().print(shown)
    gain = times["before"]["median_ms"] / times["after"]["median_ms"]
    out().print(f"  {gain:.2f}× as fast")


def _print_report(report) -> None:
    console = out()
    for row in report.rolled_back:
        console.print(f"[bold red]restored[/] {escape(row.path)}: {escape(row.reason)}", soft_wrap=True)
    console.print(escape(report), soft_wrap=True)


def run(
    reference: str,
    input_reference: str | None,
    *,
    verify: bool,
    timed: bool,
    reps: int,
    weights: str | None,
    as_json: bool,
) -> None:
    input_factory = load(input_reference, "--input") if input_reference else None
    if ":" in reference:
        model, inputs = call(load(reference, "MODULE:FACTORY"), "MODULE:FACTORY", reference), None
    else:
        model, inputs = encoder(reference)
    if not isinstance(model, torch.nn.Module):
        fail(f"{reference}() returned a {type(model).__name__}, not a torch.nn.Module")
    if input_factory is not None:
        inputs = call(input_factory, "--input", input_reference)
    progress = err()
    result: dict[str, Any] = {"model": reference, "explain": fastasr.explain(model).to_dict()}
    if not result["explain"]["counts"]["replaced"]:
        progress.print(
            "[yellow]nothing in this model can be replaced[/]; the report says why, module by module"
        )
    before = copy.deepcopy(model) if timed and inputs is not None else None
    try:
        report = fastasr.accelerate(model, verify=inputs if verify else None, weights=weights)
    except Exception as error:  # most likely the user's model does not accept these inputs
        notes = getattr(error, "__notes__", [])
        if isinstance(error, ValueError) and not notes:
            fail(str(error))
        fail(
            "\n".join([f"the model could not be run on the inputs: {type(error).__name__}: {error}", *notes])
        )
    result["report"] = report.to_dict()
    result["verified"] = report.verified
    result["ok"] = report.ok
    if not as_json:
        _print_report(report)
    if inputs is None and (verify or timed):
        progress.print("[yellow]neither verified nor timed:[/] pass --input MODULE:FACTORY")
    if before is not None:
        with progress.status("timing before and after"):
            result["times"] = _timings(before, model, inputs, reps)
        if not as_json:
            _print_times(result["times"])
    if as_json:
        print(json.dumps(result, indent=2, default=str))
    if not report.ok:
        progress.print(
            f"[bold red]verification failed[/] for {len(report.rolled_back)} modules; they have been restored"
        )
        raise typer.Exit(1)
