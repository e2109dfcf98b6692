# SPDX-License-Identifier: Apache-2.0
"""``python -m fastasr.benchmarks.device``: what a GPU makes of every kernel, as a verdict per op.

The parts: ``machine`` (the GPU, and the dry run without one), ``checks`` and ``timing`` (what is run), ``units`` (the
list of it all), ``isolate`` (one process per unit), ``verdict`` (what the records say).
"""
