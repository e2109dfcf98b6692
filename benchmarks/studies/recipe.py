# SPDX-License-Identifier: Apache-2.0
"""The recipe on real speech: the result of a long run, and the course of the same run on other kernels and models.

    python -m fastasr.benchmarks.studies.recipe RUNS  # from RUNS/main (long), RUNS/<curve> (short): JSON, picture, page
    python -m fastasr.benchmarks.studies.recipe --encoder-run RUN ...  # other encoders: their JSON, the page
    python -m fastasr.benchmarks.studies.recipe        # picture and page from the committed JSON; --check compares

RUNS/main is a finished run of ``examples/train_transducer.py``. The curves are its first steps, from one seed, on
fastasr's kernels, in eager, with the PyPI package's model swapped and as shipped, and once more on fastasr's kernels
with every parameter moved by one rounding, which shows how far rounding alone takes such a run. Those that RUNS lacks
are trained. The long run's model is exported, and both read the held-out recordings. Runs with ``--encoder`` stand
beside it with their error rates, in ``recipe_encoders.json``.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fastasr import files
from fastasr.asr import decoding
from fastasr.asr.recipe import checkpoints, recogniser, sizes, speech, training
from fastasr.asr.recipe.curves import read, smoothed
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.markdown import grid
from fastasr.benchmarks.models import recipe_step
from fastasr.benchmarks.plots import png, pyplot
from fastasr.benchmarks.rows import Row, read_all
from fastasr.benchmarks.studies import results

REFERENCE, ROUNDED = "fastasr", "rounded"
CURVES = {
    REFERENCE: {},
    "eager": {"backend": "eager"},
    "upstream": {"upstream": True},
    "no-swap": {"upstream": True, "swap": False},
    ROUNDED: {},
}
LABELS = {
    REFERENCE: "fastasr",
    "eager": "fastasr's model, `--backend eager`",
    "upstream": "upstream's model, swapped (`--upstream`)",
    "no-swap": "upstream's model as shipped, fast_rnnt (`--upstream --no-swap`)",
    ROUNDED: "fastasr, parameters moved by one rounding",
    "main": "the first steps of the long run",
}
FIRST = (10, 40, 100, 200)  # The page gives the largest difference over this many steps.
POINTS = 300  # about this many points of the long run are drawn
OTHER_ENCODERS = "recipe_encoders.json"  # beside the JSON of the run
NAMES = {
    "zipformer": "Zipformer",
    "emformer": "Emformer",
    "e_branchformer": "E-Branchformer, whole recordings",
}


# --------------------------------------------------------------------------- measured
def _moved_by_one_rounding(model: torch.nn.Module) -> None:
    """Multiplies every parameter by 1 ± one unit of rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * signs)


def train(name: str, folder: Path, steps: int, speeches, units, **options) -> None:
    """Trains a curve that does not exist yet."""
    made = training.Options(out=folder, steps=steps, checkpoint_every=steps, **CURVES[name], **options)
    trainer = training.Trainer(made, *speeches, units)
    if name == ROUNDED:
        _moved_by_one_rounding(trainer.model)
    trainer.run()


def _summary(curve: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Returns the relative differences of two curves, step by step: the median, the largest, and how many exceed 1e-5,
    as they may where two windows of the pruned lattice tie and rounding decides.
    """
    found = [abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True)]
    return {
        "median": statistics.median(found),
        "largest": max(found),
        "above 1e-5": sum(d > 1e-5 for d in found),
    }


def differences(losses: dict[str, list[float]]) -> dict[str, dict]:
    """Returns the relative differences of each curve from the reference: of the losses, and the largest of the first
    steps.
    """
    reference = losses[REFERENCE]
    found = {}
    for name, curve in losses.items():
        if name != REFERENCE:
            steps = min(len(curve), len(reference))
            found[name] = {
                "steps": steps,
                "largest": {
                    str(n): _summary(curve[:n], reference[:n])["largest"] for n in FIRST if n <= steps
                },
                "all": _summary(curve[:steps], reference[:steps]),
            }
    return found


def agreement(run: Path, held_out) -> dict:
    """Counts the held-out recordings whose text is the same from the checkpoint and from its ONNX files, by search
    method.
    """
    with tempfile.TemporaryDirectory() as folder:
        recogniser.export(run, folder)
        readers = recogniser.load(run), recogniser.load(folder)
        different = {m: recogniser.disagreements(*readers, held_out, m) for m in decoding.METHODS}
    return {
        "recordings": len(held_out),
        "same text": {m: len(held_out) - len(found) for m, found in different.items()},
        "different": {m: found for m, found in different.items() if found},
    }


def _finished(run: Path) -> dict:
    if not (run / "report.json").is_file():
        raise ValueError(f"{run} is no finished run: it has no report.json")
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def _loss(columns: dict[str, list[float]]) -> list[list[float]]:
    """Returns about ``POINTS`` pairs of a step and the running mean of the loss."""
    loss = smoothed(columns["loss"])
    every = max(1, len(loss) // POINTS)
    return [[int(columns["step"][i]), round(loss[i], 5)] for i in range(every - 1, len(loss), every)]


def encoder_report(run: Path, commit: str | None = None) -> dict:
    """Returns the committed figures of a finished run with another encoder than the Zipformer."""
    found = _finished(run)
    options = checkpoints.load(run / checkpoints.NAME)["options"]
    if options.get("encoder", sizes.ZIPFORMER) == sizes.ZIPFORMER:
        raise ValueError(f"{run} is a run of the Zipformer: give RUNS")
    return {
        "run": found,
        "size": options["size"],
        "loss": _loss(read(run / "log.csv")),
        **stamp(),
        **({"commit": commit} if commit else {}),
    }


def report(runs: Path, speeches, steps: int, commit: str | None = None, **options) -> dict:
    """Returns all committed figures from the runs in a folder, which were trained at ``commit`` or at the
    present one.
    """
    main = runs / "main"
    run = _finished(main)
    units = training.learn_units("char", speeches[0])
    for name in CURVES:
        if not (runs / name / "log.csv").is_file():
            train(name, runs / name, steps, speeches, units, **options)
    columns = read(main / "log.csv")
    losses = {name: read(runs / name / "log.csv")["loss"][:steps] for name in CURVES}
    losses["main"] = columns["loss"][:steps]
    return {
        "run": run,
        "size": checkpoints.load(main / checkpoints.NAME)["options"]["size"],
        "loss": _loss(columns),
        "onnx": agreement(main, speeches[1]),
        "differences": differences(losses),
        "losses": losses,
        **stamp(),
        **({"commit": commit} if commit else {}),
    }


# --------------------------------------------------------------------------- shown
def _scientific(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def block(found: dict, rows: Sequence[Row], others: dict[str, dict]) -> str:
    """Returns the part of the page that follows from the JSON, that of other encoders and the rows of
    ``recipe_step``.
    """
    steps = recipe_step.table([row for row in rows if row.name == recipe_step.NAME])
    encoders = [_encoders({sizes.ZIPFORMER: found, **others})] if others else []
    return "\n\n".join([_run(found), *encoders, "A step of training:", steps])


def _encoders(runs: dict[str, dict]) -> str:
    """Returns a line per encoder with the error rates along the way."""
    lines = []
    for encoder, found in runs.items():
        run, held = found["run"], found["run"]["held_out"]
        rates = [f"{held[name]:.1%}" for name in ("cer", "wer", "ctc_cer", "ctc_wer")]
        sizes_of = f"{run['parameters'] / 1e6:.2f} M", run["step"], f"{run['minutes']:.0f}"
        lines.append([NAMES[encoder], found["commit"], *sizes_of, *rates])
    heads = "encoder", "at", "parameters", "steps", "minutes", "transducer: characters", "words"
    title = "Encoders side by side, on the same recordings and held-out set:"
    shown = [title, "", *grid((*heads, "CTC: characters", "words"), lines, 7), ""]
    scores = {e: {step: cer for step, cer, _ in found["run"].get("scores", [])} for e, found in runs.items()}
    steps = sorted(set().union(*scores.values()))
    lines = [
        [step, *(f"{by_step[step]:.1%}" if step in by_step else "" for by_step in scores.values())]
        for step in steps
    ]
    heads = "characters wrong after step", *(NAMES[encoder] for encoder in runs)
    return "\n".join([*shown, *grid(heads, lines, len(heads))])


def _run(found: dict) -> str:
    run, held = found["run"], found["run"]["held_out"]
    onnx = found["onnx"]
    same, wrong = onnx["same text"], ("characters wrong", "words wrong")
    by_search = [
        [name, f"{held[f'{kind}cer']:.1%}", f"{held[f'{kind}wer']:.1%}"]
        for name, kind in (("transducer, greedy", ""), ("CTC, greedy", "ctc_"))
    ]
    scores = [[step, f"{cer:.1%}", f"{wer:.1%}"] for step, cer, wer in run.get("scores", [])]
    lines = [
        f"**{run['step']} steps** ({run['epoch']} epochs of {run['training_utterances']} recordings, three speeds) of "
        f"the size `{found['size']}`, {run['parameters'] / 1e6:.2f} million parameters, took {run['minutes']:.0f} "
        f"minutes on {run['threads']} thread{'s' * (run['threads'] > 1)} of {found['device_name']}, "
        f"torch {found['torch']}, commit {found['commit']}.",
        "",
        "![losses of the first steps, how far they are apart, and the long run](plots/recipe_curves.png)",
        "",
        *grid((f"of {run['held_out_utterances']} held-out recordings", *wrong), by_search, 2),
        "",
        *grid(("step", *wrong), scores, 3),
        "",
        "The ONNX files, streaming, read the text that the checkpoint reads in "
        + ", ".join(f"{same[m]} of {onnx['recordings']} recordings ({m})" for m in decoding.METHODS)
        + ".",
        "",
        "Relative difference of a step's loss from that of fastasr, same seed:",
        "",
    ]
    differences = []
    for name, values in found["differences"].items():
        figures = values["all"]["median"], *(values["largest"].get(str(n)) for n in FIRST)
        differences.append([LABELS[name], *("" if f is None else _scientific(f) for f in figures)])
    heads = "", "median", *(f"largest of the first {n}" for n in FIRST)
    return "\n".join([*lines, *grid(heads, differences, len(heads) - 1)])


def figure(found: dict):
    """Draws the first steps of every curve, how far they are apart, and the long run."""
    plt = pyplot()
    picture, panels = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    reference = found["losses"][REFERENCE]
    for name, curve in found["losses"].items():
        label = LABELS[name].replace("`", "").split(" (")[0]
        steps = range(1, len(curve) + 1)
        panels[0].plot(steps, curve, linewidth=0.9, label=label)
        apart = [max(abs(a - b) / b, 1e-9) for a, b in zip(curve, reference, strict=False)]
        if name != REFERENCE:
            panels[1].plot(range(1, len(apart) + 1), apart, linewidth=0.9, label=label)
        else:
            panels[1].plot([], [])  # the next has its colour in both panels
    panels[0].set_title("loss per frame of output, same seed", fontsize=9, loc="left")
    panels[1].set_title("relative difference from fastasr", fontsize=9, loc="left")
    panels[1].set_yscale("log")
    panels[0].legend(frameon=False, fontsize=7)
    panels[2].plot(*zip(*found["loss"], strict=True), linewidth=1, color="C0", label="loss, running mean")
    scores = found["run"].get("scores", [])
    errors = panels[2].twinx()
    if scores:
        errors.plot([s for s, *_ in scores], [100 * c for _, c, _ in scores], "o-", ms=3, color="C3")
    errors.set_ylabel("held-out CER, %", color="C3", fontsize=8)
    errors.set_ylim(bottom=0)
    panels[2].set_yscale("log")
    panels[2].set_title("the long run: training loss, held-out CER", fontsize=9, loc="left")
    for panel in panels:
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top"]].set_visible(False)
    return picture


def _others(path: Path, runs: Sequence[Path], commit: str | None) -> dict[str, dict]:
    """Returns the committed figures of other encoders, with those of ``runs``."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for run in runs:
        made = encoder_report(run, commit)
        found[made["run"]["encoder"]] = made
    if runs:
        files.write(path, json.dumps(found) + "\n")
    return {encoder: found[encoder] for encoder in sizes.ENCODERS if encoder in found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, see ``results.run``."""
    made = results.parser("recipe", __doc__, "training.md")
    made.add_argument("runs", nargs="?", type=Path, help="folder of runs")
    made.add_argument(
        "--encoder-run", type=Path, action="append", default=[], metavar="RUN", help="of another encoder"
    )
    made.add_argument("--steps", type=int, default=200, help="of the curves (default: %(default)s)")
    made.add_argument("--commit", help="at which the runs were trained, if not the present one")
    made.add_argument("--speech", type=Path, help="recordings the runs were trained on, if not the prompts")
    made.add_argument(
        "--cache", type=Path, default=Path("demo/cache"), help="downloads (default: %(default)s)"
    )
    made.add_argument("--plot", type=Path, default=results.ROOT / "docs/plots/recipe_curves.png")
    options = made.parse_args(arguments)

    def measured(_: dict) -> dict:
        return report(options.runs, speech.load(options.cache, options.speech), options.steps, options.commit)

    def blocks(found: dict) -> dict[str, str]:
        others = _others(options.results.with_name(OTHER_ENCODERS), options.encoder_run, options.commit)
        return {"bench": block(found, read_all(sorted(options.results.parent.glob("*.jsonl"))), others)}

    code = results.run(options, measured if options.runs else None, blocks)
    if code == 0 and not options.check:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        files.write(options.plot, png(figure(json.loads(options.results.read_text(encoding="utf-8")))))
    return code


if __name__ == "__main__":
    sys.exit(main())
