# SPDX-License-Identifier: Apache-2.0
"""Calls, tolerances and checks of every op: shared by the test suite, the fuzzer, ``fastasr check`` and benchmarks.

``gradcheck(op, **arguments)`` checks values and gradients of a call of your own; ``sized(op, T=375, ...)`` makes a call
at sizes of your own. A new op adds one file, ``fastasr/testing/samples/<op>.py``: ``TABLE`` has the calls to
check, ``CASES`` the calls to time, ``sized`` makes a call at any sizes.
"""

from fastasr.testing.checks import CHECKS, CheckResult, check_op
from fastasr.testing.gradients import GradientReport, gradcheck
from fastasr.testing.seeds import seeded
from fastasr.testing.speed import sized
from fastasr.testing.table import Invalid, Make, OpTable, Sample, tables

__all__ = [
    "CHECKS",
    "CheckResult",
    "GradientReport",
    "Invalid",
    "Make",
    "OpTable",
    "Sample",
    "check_op",
    "gradcheck",
    "seeded",
    "sized",
    "tables",
]
