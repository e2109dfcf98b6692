# SPDX-License-Identifier: Apache-2.0
"""``python -m fastasr.benchmarks``: the runner without the command line's extras."""

import argparse
import sys
from pathlib import Path

import torch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastasr.benchmarks",
        description="Measures ops, models and dispatch cost; writes one JSON line per measurement.",
        epilog="The same command resumes an interrupted run: what the file holds for this commit is kept.",
    )
    parser.add_argument(
        "names", nargs="*", help="ops, models, dispatch, or single ones (default: everything)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench-report/results.jsonl"), help="JSON Lines file"
    )
    parser.add_argument(
        "--quick", action="store_true", help="measure small calls, to see that it works; figures mean nothing"
    )
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--fresh", action="store_true", help="measure again what the file already holds")
    kept.add_argument(
        "--resume", action="store_true", help="keep what the file holds for this commit (the default)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile'd formulas out")
    parser.add_argument(
        "--compile-model", action="store_true", help="also the model under torch.compile (minutes)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also the kernels of whole models' steps by time, on a GPU"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--reps", type=int, help="rounds (default 15)")
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds to wait for idle cores, each time"
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when something could not be measured, or 2 for a wrong name."""
    options = _parser().parse_args(arguments)
    from fastasr.benchmarks import runner
    from fastasr.benchmarks.table import line

    if options.quick:
        print(f"# {runner.QUICK}", file=sys.stderr, flush=True)

    if options.list:
        print("\n".join(runner.known_names()))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        summary = runner.run(
            runner.Options(
                names=tuple(options.names),
                out=options.out,
                quick=options.quick,
                fresh=options.fresh,
                compile=not (options.no_compile or options.quick),
                compile_model=options.compile_model,
                profile=options.profile,
                device=options.device,
                dtype=getattr(torch, options.dtype),
                patience=options.patience,
                reps=options.reps,
            ),
            report=lambda message: print(f"# {message}", file=sys.stderr, flush=True),
            on_rows=lambda unit: print(line(unit), flush=True),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"# {len(summary.rows)} rows in {summary.seconds:.0f} s, {summary.resumed} units were there, "
        f"in {options.out}",
        file=sys.stderr,
    )
    return 1 if summary.problems else 0


if __name__ == "__main__":
    sys.exit(main())
