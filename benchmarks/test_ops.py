# SPDX-License-Identifier: Apache-2.0
"""The ops and whole models under pytest-benchmark: ``pytest benchmarks --benchmark-group-by=group``.

It gives a quick look while working on a kernel: ``pytest benchmarks -k "bypass and not compile"``. Each case has eager,
``torch.compile``, the packages beside them and fastasr, in each of its passes. Rows, limits and interleaving come from
``fastasr bench`` only.
"""

import pytest
import torch

from fastasr.benchmarks import case as cases
from fastasr.benchmarks import models, ops

pytest.importorskip("pytest_benchmark")
FRAMES, BATCH = 500, 4  # of a whole model's features: 5 s


def _measured() -> list:
    """Returns a parameter for each case, pass and implementation. A model is built when it is measured."""
    sized = [module.sized for module in models.MODULES.values() if hasattr(module, "sized")]
    return [
        pytest.param(case, pass_, name, id=f"{case.op}-{case.name}-{pass_}-{name}")
        for case in (*ops.cases(), *(make(FRAMES, BATCH) for make in sized))
        for pass_ in case.passes
        for name in case.make("meta", torch.float32)
    ]


@pytest.mark.parametrize(("case", "pass_", "name"), _measured())
def test_speed(benchmark, case, pass_, name):
    torch.manual_seed(0)
    torch._dynamo.reset()  # graphs of an earlier shape would make this one's dynamic
    try:
        implementation = case.make("cpu", torch.float32)[name]()
    except cases.Unavailable as reason:
        pytest.skip(str(reason))
    variant = cases.variant(implementation, pass_)
    benchmark.group = f"{case.op} {case.name}, {pass_}"
    if variant.prepare is None:
        variant.run()  # compiles
        benchmark(variant.run)
    else:
        benchmark.pedantic(variant.run, setup=lambda: ((variant.prepare(),), {}), rounds=30, warmup_rounds=3)
