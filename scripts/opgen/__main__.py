# SPDX-License-Identifier: Apache-2.0
"""Writes the ops' files from their declarations.

These are ``fastasr/ops/_written/<op>.py``, the imports of ``fastasr/ops/__init__.py``, and
``csrc/bindings/written/<op>.h`` for each op whose binding includes it.

python scripts/opgen               # all ops; files of ops that are gone are deleted
python scripts/opgen bypass        # one
python scripts/opgen --check       # writes nothing; exits with 1 if a file is not as it would be written
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from opgen.files import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and exit with 1 if a file would change"
    )
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    sys.exit(main(**vars(parser.parse_args())))
