# SPDX-License-Identifier: Apache-2.0
"""Calls, tolerances and checks of every op: shared by the test suite, the fuzzer, ``fastasr check`` and benchmarks.

A new op adds one file, ``fastasr/testing/samples/<op>.py``: ``TABLE`` has the calls that are checked, ``CASES`` those
that are timed.
"""

from fastasr.testing.checks import CHECKS, CheckResult, check_op
from fastasr.testing.seeds import seeded
from fastasr.testing.table import Invalid, Make, OpTable, Sample, tables

__all__ = ["CHECKS", "CheckResult", "Invalid", "Make", "OpTable", "Sample", "check_op", "seeded", "tables"]
