# SPDX-License-Identifier: Apache-2.0
"""The written files of the ops are those that their declarations give."""

import subprocess
import sys
from pathlib import Path

from fastasr import ops


def test_the_function_of_an_op_hides_the_module_of_its_name(first):
    code = f"import sys; import {first}; from fastasr import ops; print(*sorted(sys.modules)); "
    code += "assert all(callable(getattr(ops, name)) for name in ops.NAMES)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    unread = {"fastasr.testing", "torch._dynamo", "fastasr.testing.declared"}
    assert unread.isdisjoint(done.stdout.split())


def test_every_public_function_has_a_file():
    files = {Path(function.__code__.co_filename) for function in map(ops.__dict__.get, ops.NAMES)}
    assert all(path.exists() and path.parent.name in ("_written", "_wrapped") for path in files)
