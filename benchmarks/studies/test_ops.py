# SPDX-License-Identifier: Apache-2.0
"""The ops under pytest-benchmark: ``pytest benchmarks --benchmark-group-by=group``.

It gives a quick look while working on a kernel. Rows, limits and interleaving come from ``fastasr bench`` only.
"""

import pytest
import torch

from fastasr.benchmarks import case as cases
from fastasr.benchmarks import ops

pytest.importorskip("pytest_benchmark")
MEASURED = [
    pytest.param(case, pass_, name, id=f"{case.op}-{case.name}-{pass_}-{name}")
    for case in ops.cases()
    for pass_ in case.passes
    for name in case.make("meta", torch.float32)
    if name != "compile"
]


@pytest.mark.parametrize(("case", "pass_", "name"), MEASURED)
def test_op(benchmark, case, pass_, name):
    torch.manual_seed(0)
    try:
        implementation = case.make("cpu", torch.float32)[name]()
    except cases.Unavailable as reason:
        pytest.skip(str(reason))
    variant = cases.variant(implementation, pass_)
    benchmark.group = f"{case.op} {case.name}, {pass_}"
    if variant.prepare is None:
        benchmark(variant.run)
    else:
        benchmark.pedantic(variant.run, setup=lambda: ((variant.prepare(),), {}), rounds=30, warmup_rounds=3)
