# SPDX-License-Identifier: Apache-2.0
"""Command line of the demo."""

import argparse
import os
import sys
from pathlib import Path

NEEDED = ("rich", "numpy", "matplotlib", "jinja2", "kaldi_native_fbank")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m fastasr.asr.demo",
        description="Accelerates upstream's Zipformer-M on real speech: swaps, verifies layer by layer, "
        "times, and writes an HTML report. About two minutes on two cores.",
    )
    made.add_argument("--audio", type=Path, metavar="DIR", help="your own recordings (wav, flac, ogg)")
    made.add_argument(
        "--compile", action="store_true", help="time torch.compile too, whose first call takes minutes"
    )
    made.add_argument(
        "--out", type=Path, default=Path("demo/report.html"), help="the report (default: %(default)s)"
    )
    made.add_argument(
        "--cache", type=Path, default=Path("demo/cache"), help="downloads (default: %(default)s)"
    )
    made.add_argument("--generated", action="store_true", help="a generated signal: no download")
    made.add_argument(
        "--size", choices=("medium", "tiny"), default="medium", help="tiny: a smoke test of seconds"
    )
    made.add_argument("--seconds", type=float, default=16.0, help="length of each of the four utterances")
    made.add_argument("--reps", type=int, default=7, help="timed rounds (default: %(default)s)")
    made.add_argument(
        "--patience", type=float, default=20.0, help="seconds to wait for idle cores (default: %(default)s)"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo. Returns the exit code: 0, 1 if verification restored a module, or 2 if the demo cannot run."""
    options = parser().parse_args(arguments)
    if options.seconds < 1 or options.reps < 1:
        print("error: --seconds and --reps must be at least 1", file=sys.stderr)
        return 2
    import importlib.util

    missing = [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: the demo needs {', '.join(missing)}: pip install 'fastasr[demo]'", file=sys.stderr)
        return 2
    from fastasr.asr.audio.recordings import NoAudio
    from fastasr.asr.demo.run import run
    from fastasr.benchmarks.upstream import MissingUpstream

    try:
        return run(options)
    except (MissingUpstream, NoAudio) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("FASTASR_DEBUG") == "1":
            raise
        print(f"error: {type(error).__name__}: {error}\n(FASTASR_DEBUG=1 shows where)", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
