# SPDX-License-Identifier: Apache-2.0
"""These tests need Triton in interpreter mode, which is fixed when triton is imported: test_interpreter.py, one folder
up, runs them in a process with TRITON_INTERPRET=1. Other processes collect none of them.

The op contract, which tests/ops/test_contract_interpreted.py runs in such a process, covers what a sample can say. Here
are calls that the public ops do not make, and what the launchers promise beyond their results.
"""

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from tests.kernels.interpreter.plugin import *  # noqa: F403, its fixtures
    from tests.kernels.interpreter.plugin import _as_the_case_needs, _quiet_numpy  # noqa: F401
else:
    collect_ignore_glob = ["test_*.py"]
