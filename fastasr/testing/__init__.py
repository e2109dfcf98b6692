# SPDX-License-Identifier: Apache-2.0
"""Sample tables, tolerances and checks of every op: shared by the test suite, the fuzzer and ``fastasr check``.

A new op adds one file, ``fastasr/testing/samples/<op>.py`` with a ``TABLE``, from which all of these are made.
"""

from fastasr.testing.checks import CHECKS, CheckResult, check_op
from fastasr.testing.seeds import seeded
from fastasr.testing.table import Invalid, Make, OpTable, Sample, tables

__all__ = ["CHECKS", "CheckResult", "Invalid", "Make", "OpTable", "Sample", "check_op", "seeded", "tables"]
