# SPDX-License-Identifier: Apache-2.0
"""The command ``fastasr``: env, ops, check, bench, gpu, swap, export, transcribe (needs the extra ``cli``)."""

import os
import sys
from typing import NoReturn

INSTALL = "pip install 'fastasr[cli]'"


def main() -> None:
    """Runs the command `fastasr`. Errors go to stderr without a traceback; FASTASR_DEBUG=1 shows it."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        _end(f"fastasr: the command line needs {error.name}: {INSTALL}")
    from fastasr.cli.app import app

    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("FASTASR_DEBUG") == "1":
            raise
        _end(f"error: {type(error).__name__}: {error}\n(FASTASR_DEBUG=1 shows where)")


def _end(reason: str) -> NoReturn:
    """Ends the process with the code for a command that cannot run; ``sys.exit(reason)`` would end with 1."""
    print(reason, file=sys.stderr)
    sys.exit(2)
