# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the ops, the models and the dispatch cost; installed as ``fastasr.benchmarks``.

``fastasr bench`` measures and writes rows. The parts:

- ``rows``: the row, its JSON Lines file and the environment it is stamped with;
- ``harness``: interleaved timing, waiting for idle cores, peak memory;
- ``isolate``: a function in a process of its own, with a limit of time;
- ``limits``: what the machine can do (copy bandwidth, GEMM rate), measured once per run;
- ``ops``, ``models/``, ``dispatch``: the measurements;
- ``runner``: runs suites and resumes an interrupted run;
- ``plots``, ``page``, ``markdown``: pictures and pages made from the rows.
"""
