# SPDX-License-Identifier: Apache-2.0
"""The losses under forward-mode differentiation and torch.func: slopes, plain autograd's gradients and loops give the
same; what acts on gradients alone is refused."""

import pytest
import torch
from problems import random_problem
from steps import cotangent
from torch.autograd import forward_ad

from fastasr import rnnt
from fastasr.compat import torchaudio

P = random_problem(7)
CLASSES = P.am.shape[2]
TAIL = P.symbols, P.blank, P.boundary
LENGTHS = P.boundary[:, 3], P.boundary[:, 2]
DURATIONS = 0, 1, 2
RANGES = rnnt.get_rnnt_prune_ranges(
    *rnnt.rnnt_loss_simple(P.lm, P.am, *TAIL, return_grad=True)[1], P.boundary, min(3, P.lm.shape[1])
)
WEIGHT = cotangent(torch.empty(CLASSES, CLASSES, dtype=torch.float64), "weight")
TDT_WEIGHT = cotangent(torch.empty(CLASSES + len(DURATIONS), CLASSES, dtype=torch.float64), "weight")
PRUNED = P.am.unsqueeze(2) + P.lm[:, : RANGES.shape[2]].unsqueeze(1)
DURATION_LOGITS = cotangent(P.full[..., :1].expand(-1, -1, -1, len(DURATIONS)), "durations")

LOSSES = {
    "simple": (lambda lm, am: rnnt.rnnt_loss_simple(lm, am, *TAIL), P.lm, P.am),
    "smoothed": (
        lambda lm, am: rnnt.rnnt_loss_smoothed(lm, am, *TAIL[:2], 0.25, 0.1, P.boundary),
        P.lm,
        P.am,
    ),
    "logits": (lambda x: rnnt.rnnt_loss(x, *TAIL, "constrained", 0.1), P.full),
    "pruned": (lambda x: rnnt.rnnt_loss_pruned(x, P.symbols, RANGES, P.blank, P.boundary), PRUNED),
    "HAT": (
        lambda x: rnnt.rnnt_loss_pruned(x, P.symbols, RANGES, P.blank, P.boundary, use_hat_loss=True),
        PRUNED,
    ),
    "torchaudio": (lambda x: torchaudio.rnnt_loss(x, P.symbols, *LENGTHS, P.blank), P.full),
    "joiner": (lambda am, lm, w: rnnt.joiner_loss(am, lm, w, None, *TAIL), P.am, P.lm, WEIGHT),
    "float32": (
        lambda am, lm, w: rnnt.joiner_loss(am.float(), lm.float(), w.float(), None, *TAIL),
        *(P.am, P.lm, WEIGHT),
    ),
    "pruned joiner": (
        lambda am, lm, w: rnnt.pruned_joiner_loss(am, lm, w, None, P.symbols, RANGES, P.blank, P.boundary),
        *(P.am, P.lm, WEIGHT),
    ),
    "TDT": (
        lambda x, d: rnnt.tdt_loss(x, d, P.symbols, *LENGTHS, P.blank, DURATIONS),
        *(P.full, DURATION_LOGITS),
    ),
    "TDT joiner": (
        lambda am, lm, w: rnnt.tdt_joiner_loss(am, lm, w, None, P.symbols, *LENGTHS, P.blank, DURATIONS),
        *(P.am, P.lm, TDT_WEIGHT),
    ),
}
REFUSED = {
    "FastEmit": (lambda x: rnnt.rnnt_loss(x, *TAIL, fastemit_lambda=0.1), P.full),
    "clamp": (lambda x: torchaudio.rnnt_loss(x, P.symbols, *LENGTHS, P.blank, clamp=0.1), P.full),
    "in place": (
        lambda x: torchaudio.rnnt_loss(x * 1.0, P.symbols, *LENGTHS, P.blank, in_place=True),
        P.full,
    ),
    "parts": (lambda x: rnnt.joint_mutual_information_recursion([x[:, :-1]] * 2, [x] * 2).sum(), P.full[0]),
}


def _dual(loss, inputs, tangents):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(*map(forward_ad.make_dual, inputs, tangents)))


@pytest.mark.parametrize("name", LOSSES)
def test_as_without(name):
    loss, *inputs = LOSSES[name]
    inputs = tuple(inputs)
    tangents = tuple(cotangent(x, i) for i, x in enumerate(inputs))
    step = 1e-3 if name == "float32" else 1e-6
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if name == "float32" else {"rtol": 1e-6, "atol": 1e-8}
    with torch.no_grad():
        ends = (
            loss(*(x + sign * step * d for x, d in zip(inputs, tangents, strict=True))) for sign in (1, -1)
        )
        expected = loss(*inputs), torch.sub(*ends) / (2 * step)
        torch.testing.assert_close(tuple(_dual(loss, inputs, tangents)), expected, **tolerance)
    torch.testing.assert_close(torch.func.jvp(loss, inputs, tangents), expected, **tolerance)

    leaves = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.func.grad(loss, tuple(range(len(inputs))))(*inputs)
    small = {"rtol": 1e-4, "atol": 1e-5} if name == "float32" else {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(found, gradients, **small)

    batches = [torch.stack([x, x + d]) for x, d in zip(inputs, tangents, strict=True)]
    one_by_one = torch.stack([loss(*one) for one in zip(*batches, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(*batches), one_by_one, **small)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    loss, x = REFUSED[name]
    with pytest.raises(RuntimeError, match=r"fastasr\.rnnt.*forward-mode differentiation"):
        _dual(loss, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match=r"fastasr\.rnnt.*torch\.func\.grad"):
        torch.func.grad(loss)(x)
