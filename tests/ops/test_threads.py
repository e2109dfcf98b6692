# SPDX-License-Identifier: Apache-2.0
"""Every op gives the same results however it is called: from several threads at once, and with another number of
threads in the backward pass than in the forward pass."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from fastasr.testing import Make, tables
from fastasr.testing.table import flat, floating, with_tensors
from fastasr.testing.tolerance import compare, judged

THREADS = 4


def calls(name):
    """Returns a small and the largest of the op's samples without draws, which would share torch's generator."""
    table = tables()[name]
    chosen = [s for s in table.samples if s.exact and not s.arguments(Make()).get("training")]
    size = {s.name: sum(t.numel() for t in floating(s.arguments(Make())).values()) for s in chosen}
    return table, (chosen[0], max(chosen, key=lambda s: size[s.name]))


def leaves_of(sample, seed=0):
    return with_tensors(sample.arguments(Make(seed=seed)), lambda _, t: t.requires_grad_())


def results(table, sample, seed):
    leaves = leaves_of(sample, seed)
    out = flat(table.function(**leaves))
    cotangent = Make(seed="cotangent").normal(*out.shape)
    return [out.detach(), *torch.autograd.grad(out, list(floating(leaves).values()), cotangent)]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", tables())
def test_four_threads_at_once(name):
    table, samples = calls(name)
    barrier = Barrier(THREADS)

    def run(sample, seed):
        barrier.wait(60)
        return [results(table, sample, seed) for _ in range(3)]

    with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(1) as alone:
        for sample in samples:
            # also from a thread of its own, which has the same number of threads to share its work with
            expected = [alone.submit(results, table, sample, seed).result() for seed in range(THREADS)]
            found = pool.map(run, [sample] * THREADS, range(THREADS))
            for serial, repeated in zip(expected, found, strict=True):
                assert all(same(one, serial) for one in repeated), sample.name


def gradients(function, arguments, forward, backward, dtype=torch.float32):
    """Returns the gradients of a call whose passes have these numbers of threads."""
    leaves = with_tensors(arguments, lambda _, t: t.detach().to(dtype).requires_grad_())
    torch.set_num_threads(forward)
    out = flat(function(**leaves))
    cotangent = Make(seed="cotangent").normal(*out.shape).to(dtype)
    torch.set_num_threads(backward)
    return torch.autograd.grad(out, list(floating(leaves).values()), cotangent)


@pytest.mark.parametrize("name", tables())
def test_other_number_of_threads_in_the_backward_pass(name):
    """A vendor's matrix product may round otherwise: then the gradients are as near to float64 as eager's."""
    table, samples = calls(name)

    def one_draw(draw, single):
        given = sample.arguments(Make(seed=draw))
        found = gradients(table.function, given, forward, backward)
        eager = gradients(table.definition, given, 1, 1)
        exact = gradients(table.definition, given, 1, 1, torch.float64)
        for argument, *each in zip(floating(given), found, eager, exact, strict=True):
            yield argument, compare(*each)

    for sample in samples:
        for forward, backward in ((2, 1), (1, 3)):
            given = sample.arguments(Make())
            expected = gradients(table.function, given, forward, forward)
            found = gradients(table.function, given, forward, backward)
            if not same(found, expected):
                assert not table.thread_invariant, sample.name
                assert judged(one_draw, 1) == {}, sample.name
