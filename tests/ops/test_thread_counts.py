# SPDX-License-Identifier: Apache-2.0
"""Ops use torch's threads and no others: as many as torch.set_num_threads or OMP_NUM_THREADS allow, also in a pool of
the user's threads.
"""

import json
import os
import subprocess
import sys

import pytest

# A process counts its threads. Those of torch's pool stay when their work is done, so none is missed.
COUNT = """
import json, os, sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
import torch
from fastasr.ops import _gemm
from fastasr.testing import Make, tables
from fastasr.testing.table import flat, floating, with_tensors

def run(name):
    table = tables()[name]
    sample = max(table.thorough[:3], key=lambda s: sum(t.numel() for t in floating(s.arguments(Make())).values()))
    leaves = with_tensors(sample.arguments(Make()), lambda _, t: t.requires_grad_())
    out = flat(table.function(**leaves))
    cotangent = Make(seed="cotangent").normal(*out.shape)
    torch.autograd.grad(out, list(floating(leaves).values()), cotangent, allow_unused=True)

def ops():
    for name in tables():
        run(name)
    a = torch.ones(512, 512)
    os.environ["FASTASR_GEMM"] = "native"
    _gemm.forget()
    _gemm.forward(a, a, None)

def threads():
    return len(os.listdir("/proc/self/task"))

def member(barrier, each):
    barrier.wait(60)
    if each:
        torch.set_num_threads(each)
    ops()
    barrier.wait(600)

each, pool = map(int, sys.argv[1:])
if pool:
    barrier, before = Barrier(pool), threads()
    with ThreadPoolExecutor(pool) as workers:
        list(workers.map(member, [barrier] * pool, [each] * pool))
        print(json.dumps([threads() - before - pool, torch.get_num_threads()]))
else:
    if each:
        torch.set_num_threads(each)
    before = threads()
    ops()
    print(json.dumps([threads() - before, torch.get_num_threads()]))
"""


def added(each=0, pool=0, **environment):
    """Returns how many threads all ops have started beside the callers', and torch's number of threads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", COUNT, str(each), str(pool)]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("threads", [1, 3])
def test_set_num_threads(threads):
    assert added(threads) == [threads - 1, threads]


def test_omp_num_threads():
    assert added(OMP_NUM_THREADS="2") == [1, 2]


def test_a_pool_of_the_users_threads():
    """Each of its threads that has said one thread works alone."""
    assert added(1, pool=3)[0] == 0
