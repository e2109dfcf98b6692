# SPDX-License-Identifier: Apache-2.0
"""Train a small transducer with CTC from scratch, on Debian's telephone prompts: a Zipformer, or another encoder.

    python examples/train_transducer.py --out exp --steps 6000       # again: goes on where it was killed
    python examples/train_transducer.py --out exp-eager --steps 6000 --backend eager
    python examples/train_transducer.py --out exp-upstream --steps 6000 --upstream [--no-swap]
    python examples/train_transducer.py --out exp-emformer --encoder emformer         # or e_branchformer
    torchrun --nproc-per-node 2 examples/train_transducer.py --out exp --steps 6000 [--parallel fsdp]
    python examples/train_transducer.py --plot curves.png exp/log.csv exp-eager/log.csv

Writes to --out: last.pt (checkpoint with the averaged model), log.csv (a row per step), tokens.txt, report.json
(held-out character and word error rates). ``examples/transcribe.py`` reads recordings with it.
"""

import argparse
import contextlib
import sys
from pathlib import Path


def parser():
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--out", type=Path, default=Path("exp"), help="the run (default: %(default)s)")
    made.add_argument("--steps", type=int, default=6000)
    made.add_argument(
        "--encoder",
        default="zipformer",
        choices=("zipformer", "emformer", "e_branchformer"),
        help="E-Branchformers read whole recordings, the others stream (default: %(default)s)",
    )
    made.add_argument("--size", default="small", choices=("small", "tiny"))
    made.add_argument("--units", default="char", help='"char" or "bpe:N" (default: %(default)s)')
    made.add_argument("--max-duration", type=float, default=15.0, help="seconds of a batch, padding included")
    made.add_argument("--base-lr", type=float, help="of Eden (default: the encoder's own)")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--warmup", type=int, default=100, help="steps (default: %(default)s)")
    made.add_argument(
        "--schedule-speed", type=float, default=40.0, help="of dropout and skipping, in steps' worth"
    )
    made.add_argument("--average-over", type=int, default=400, help="steps of the averaged model")
    made.add_argument("--checkpoint-every", type=int, default=1, help="steps (default: %(default)s)")
    made.add_argument("--evaluate-every", type=int, default=0, help="steps; at the end in any case")
    made.add_argument("--backend", default="", choices=("", "eager"), help="eager: without fastasr's kernels")
    made.add_argument(
        "--upstream",
        action="store_true",
        help="zipformer's model, or torchaudio's or ESPnet's encoder, swapped",
    )
    made.add_argument(
        "--no-swap", action="store_true", help="with --upstream: as shipped; Zipformer: fast_rnnt as k2"
    )
    made.add_argument("--plain", action="store_true", help="no dropout, skipping, balancers: to compare runs")
    made.add_argument("--no-augment", action="store_true", help="no SpecAugment, one speed")
    made.add_argument("--mask-after", type=int, default=500, help="steps before SpecAugment begins")
    made.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    made.add_argument("--device", default=None, help="cpu or cuda (default: what there is)")
    made.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp"), help="under torchrun")
    made.add_argument(
        "--speech", type=Path, help="a folder of recordings with .txt beside them, or a manifest"
    )
    made.add_argument("--held-out", help="the share of recordings to hold out, or another folder or manifest")
    made.add_argument(
        "--cache", type=Path, default=Path("demo/cache"), help="downloads (default: %(default)s)"
    )
    made.add_argument("--limit", type=int, help="use so many recordings only")
    made.add_argument(
        "--plot", nargs="+", metavar=("PICTURE", "LOG"), help="draw the losses of logs; no training"
    )
    return made


def plot(arguments):
    from fastasr.asr.recipe import curves

    picture, *logs = arguments
    if not logs:
        raise ValueError("--plot needs a picture and at least one log")
    named = [(Path(log).parent.name or Path(log).stem, log) for log in logs]
    labels = [name if [n for n, _ in named].count(name) == 1 else log for name, log in named]
    curves.plot(dict(zip(labels, logs, strict=True)), picture)
    print(f"wrote {picture}")


@contextlib.contextmanager
def progress_bar(steps, shown):
    """Returns a function of a log's row that moves the bar."""
    if not shown:
        yield lambda row: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=steps, epoch=0, loss=float("nan"))
        mean = None

        def show(row):
            nonlocal mean
            mean = row["loss"] if mean is None else 0.95 * mean + 0.05 * row["loss"]
            progress.update(task, completed=row["step"], epoch=row["epoch"], loss=mean)

        yield show


def train(options):
    import torch

    from fastasr.asr.recipe import parallel, sizes, speech, training

    device = sizes.on(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    world = parallel.start(options.parallel, device)

    def say(text):
        if world.first:
            print(text, flush=True)

    try:
        speeds = (1.0,) if options.no_augment else (1.0, 0.9, 1.1)
        utterances, held_out = speech.load(
            options.cache, options.speech, speeds, say, options.limit, held_out=options.held_out
        )
        units = training.learn_units(options.units, utterances)
        names = (
            "out",
            "steps",
            "encoder",
            "size",
            "max_duration",
            "seed",
            "base_lr",
            "warmup",
            "average_over",
            "schedule_speed",
            "mask_after",
        )
        names += ("checkpoint_every", "evaluate_every", "plain", "bf16", "backend", "upstream")
        chosen = training.Options(
            **{name: getattr(options, name) for name in names},
            augment=not options.no_augment,
            swap=not options.no_swap,
        )
        with progress_bar(options.steps, world.first and sys.stderr.isatty()) as show:
            trainer = training.Trainer(chosen, utterances, held_out, units, world, say, show)
            minutes = sum(u.seconds for u in utterances) / 60
            say(
                f"{len(utterances)} utterances ({minutes:.1f} minutes), {len(held_out)} held out, {len(units)} tokens, "
                f"{sizes.parameters_of(trainer.model) / 1e6:.2f} million parameters"
            )
            result = trainer.run()
        if result:
            units.table.to_file(options.out / "tokens.txt")
            say(f"held-out CER {result['cer']:.1%}, WER {result['wer']:.1%}; CTC {result['ctc_cer']:.1%}")
            for reference, text in result["examples"]:
                say(f"  said   {reference}\n  heard  {text}")
    finally:
        parallel.stop()


def main(arguments=None):
    options = parser().parse_args(arguments)
    try:
        if options.plot:
            plot(options.plot)
        else:
            train(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
