# SPDX-License-Identifier: Apache-2.0
"""The typer application: options and help; the work is in the module of each command's name."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="fastasr",
    help="Fused, verified, reversible kernels for speech models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _version(wanted: bool) -> None:
    if wanted:
        import fastasr

        typer.echo(f"fastasr {fastasr.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


@app.command()
def env(json: Json = False) -> None:
    """List versions, devices and the native library, and say what is missing and why."""
    from fastasr.cli import env as command

    command.run(as_json=json)


@app.command()
def ops(
    ops: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP]...", help="Names of ops, for their devices, dtypes and reasons."),
    ] = None,
    json: Json = False,
) -> None:
    """Every op and its backends: available here or not, and why not."""
    from fastasr.cli import ops as command

    command.run(ops or [], as_json=json)


@app.command()
def check(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Names of ops; without one, every op.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="T=375,B=16,...", help="Compare values and gradients at these sizes, in one dtype."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --shape: float32 (the default), bfloat16, float16 or float64.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    json: Json = False,
) -> None:
    """Test the ops on this machine: values against float64, gradients, strides, memory, errors.

    --shape compares values and gradients at your own sizes instead. Sizes that you do not give are those of a model;
    a wrong name gets the list. Ends with 1 when any check fails.
    """
    from fastasr.cli import check as command
    from fastasr.cli.console import refuse_without

    if shape is None:
        refuse_without("--shape", dtype=dtype)
        command.run(ops or [], device, as_json=json)
    else:
        command.run_at(ops or [], shape, dtype or "float32", device, as_json=json)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OP|MODEL|dispatch|ops|models|headlines]...",
            help="What to measure; default: everything.",
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="T=375,B=16,...", help="Measure the named ops at these sizes alone.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results.jsonl, the plots and index.html.", file_okay=False)
    ] = Path("bench-report"),
    quick: Annotated[
        bool, typer.Option(help="Measure small calls, to see that it works; figures mean nothing.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh/--resume", help="Measure again what the folder has for this commit, or keep it."
        ),
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="OP|MODEL|all", help="Measure this over all sizes and draw its map of ratios."),
    ] = None,
    frames: Annotated[str | None, typer.Option(help="Frames of a sweep, as 1,100,1500.")] = None,
    batches: Annotated[str | None, typer.Option(help="Sequences of a sweep, as 1,4.")] = None,
    threads: Annotated[str | None, typer.Option(help="Threads of a sweep, as 1,2.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Limit of a cell of a sweep (default: 60).")
    ] = None,
    compile_ops: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Measure torch.compile'd formulas as well (by default, but not in a sweep or a quick run).",
        ),
    ] = None,
    compile_model: Annotated[
        bool, typer.Option("--compile-model", help="Measure the model under torch.compile too (minutes).")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also the kernels of whole models' steps by time, on a GPU.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16 (default: float32, and bfloat16 in a sweep)."),
    ] = None,
    reps: Annotated[int | None, typer.Option(min=1, help="Rounds of interleaved repetitions.")] = None,
    patience: Annotated[
        float | None, typer.Option(min=0, help="Seconds to wait for idle cores, each time (default: 60).")
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw plots and the HTML page.")] = True,
) -> None:
    """Measure ops, models and the cost of a call: rows, table, plots, one HTML page.

    --shape measures an op at your own sizes; those that you do not give are those of a model, and a wrong name gets
    the list. The same command resumes an interrupted run.
    """
    from fastasr.cli import bench as command
    from fastasr.cli.console import fail, refuse_without

    if sweep:
        single = {
            "[OP|MODEL]...": names,
            "--shape": shape,
            "--patience": patience,
            "--compile-model": compile_model,
            "--profile": profile,
        }
        for option, given in single.items():
            if given:
                fail(f"{option}: it cannot go with --sweep")
        sizes = {"frames": frames, "batches": batches, "threads": threads, "dtypes": dtype}
        command.run_sweep(
            sweep,
            out,
            sizes,
            quick=quick,
            fresh=fresh,
            compile_ops=bool(compile_ops),
            device=device,
            reps=reps,
            seconds=seconds or 60.0,
            plots=plots,
        )
        return
    refuse_without("--sweep", frames=frames, batches=batches, threads=threads, seconds=seconds)
    command.run(
        names or [],
        out,
        shape=shape,
        quick=quick,
        fresh=fresh,
        compile_ops=not quick if compile_ops is None else compile_ops,
        compile_model=compile_model,
        profile=profile,
        device=device,
        dtype=dtype or "float32",
        reps=reps,
        patience=60.0 if patience is None else patience,
        plots=plots,
    )


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def gpu(context: typer.Context) -> None:
    """Check and time every kernel on this machine's GPU; write a verdict. Its options: fastasr gpu --help."""
    from fastasr.benchmarks.device.__main__ import main
    from fastasr.cli.console import fail, no_gpu

    asks = {"-h", "--help", "--dry-run"} & set(context.args)
    if not asks and (reason := no_gpu()):
        fail(f"{reason}; `fastasr check` tests the kernels for the CPU")
    raise typer.Exit(main(context.args))


@app.command()
def swap(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY|ENCODER",
            help="Function that returns the model, or the name of a published encoder.",
        ),
    ],
    input_factory: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="MODULE:FACTORY",
            help="Function that returns the inputs: a tensor, a tuple of arguments or a dict of them.",
        ),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Run every swapped module both ways on the inputs.")] = True,
    time: Annotated[bool, typer.Option(help="Time the model before and after.")] = True,
    reps: Annotated[int, typer.Option(min=1, help="Timed calls before and after, interleaved.")] = 5,
    weights: Annotated[
        str | None, typer.Option(metavar="int8|bf16", help="Run linear layers on weights in this format.")
    ] = None,
    json: Json = False,
) -> None:
    """Swap faster kernels into a model; show what was done, that it is right, and what it gains.

    The current folder is searched for MODULE. Ends with 1 when verification fails; the modules that
    disagree have then been restored. Without --input the model is swapped and reported, but neither
    verified nor timed. ENCODER, as w2v-bert-2, is built at its real width with random weights and two
    of its layers, and has inputs; a wrong name gets the list.
    """
    from fastasr.cli import swap as command

    command.run(factory, input_factory, verify=verify, timed=time, reps=reps, weights=weights, as_json=json)


@app.command()
def export(
    factory: Annotated[
        str, typer.Argument(metavar="MODULE:FACTORY", help="Function that returns the recogniser.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the files.", file_okay=False)],
    suffix: Annotated[str, typer.Option(help="Goes into the files' names: encoder-SUFFIX.onnx.")] = "",
    int8: Annotated[bool, typer.Option("--int8", help="Write dynamically quantised files as well.")] = False,
    reduce_range: Annotated[
        bool, typer.Option("--reduce-range", help="Quantise to 7 bits, for x86 processors without VNNI.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a Zipformer recogniser as ONNX files for onnxruntime and sherpa-onnx.

    The current folder is searched for MODULE. The model must be in eval mode; a swapped one is exported by
    upstream's own code.
    """
    from fastasr.cli import export as command

    command.run(factory, folder, suffix=suffix, int8=int8, reduce_range=reduce_range, as_json=json)


@app.command()
def transcribe(
    folder: Annotated[
        Path,
        typer.Argument(metavar="MODEL_DIR", help="Folder of a Parakeet of transformers.", file_okay=False),
    ],
    recordings: Annotated[
        list[Path], typer.Argument(metavar="RECORDING...", help="Sound files: wav, flac, ogg, mp3.")
    ],
    target: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for each recording's .txt, .srt and .json.", file_okay=False),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    swap: Annotated[bool, typer.Option(help="Swap fastasr's kernels into the model.")] = True,
    beam: Annotated[
        int | None, typer.Option(help="Search with so many hypotheses; without it the search is greedy.")
    ] = None,
    json: Json = False,
) -> None:
    """Write down recordings with a model from a local folder; show time and memory.

    The encoder sees a recording as a whole: memory grows with its length, not with the square.
    """
    from fastasr.cli import transcribe as command

    command.run(
        folder, recordings, target=target, device=device, dtype=dtype, swap=swap, beam=beam, as_json=json
    )
