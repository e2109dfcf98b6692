# SPDX-License-Identifier: Apache-2.0
"""``python -m fastasr.benchmarks.device`` checks and times every kernel on a GPU and gives a verdict per op.

The parts: ``machine`` (the GPU, and the dry run without one), ``checks`` and ``timing`` (the measurements), ``units``
(their list, a process for each), ``verdict`` (conclusions from the records).
"""
