# SPDX-License-Identifier: Apache-2.0
"""Properties of transducer losses that hold whatever computes them: invariances, identities, gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import TYPES, random_problem
from steps import seeded

import fastasr
from fastasr import rnnt
from fastasr.rnnt import joiner, lengths, rows

SEEDS = range(8)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_shifted_scores_change_nothing(rnnt_type):
    """A constant per frame or per position is normalised away, in the smoothed loss as well."""
    for seed in SEEDS:
        p = random_problem(seed)
        head = p.symbols, p.blank
        am, lm = p.am + torch.randn(*p.am.shape[:2], 1) * 5, p.lm + torch.randn(*p.lm.shape[:2], 1) * 5
        tail = {"boundary": p.boundary, "rnnt_type": rnnt_type, "reduction": "none"}
        close(rnnt.rnnt_loss_simple(lm, am, *head, **tail), rnnt.rnnt_loss_simple(p.lm, p.am, *head, **tail))
        scales = 0.2, 0.3
        close(
            rnnt.rnnt_loss_smoothed(lm, am, *head, *scales, **tail),
            rnnt.rnnt_loss_smoothed(p.lm, p.am, *head, *scales, **tail),
        )
        shifted = p.full + torch.randn(*p.full.shape[:3], 1)
        close(rnnt.rnnt_loss(shifted, *head, **tail), rnnt.rnnt_loss(p.full, *head, **tail))


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_simple_is_the_joint_loss_of_added_scores(rnnt_type):
    for seed in SEEDS:
        p = random_problem(seed)
        tail = p.symbols, p.blank, p.boundary, rnnt_type, 0.25
        joint = rnnt.rnnt_loss(p.am.unsqueeze(2) + p.lm.unsqueeze(1), *tail)
        close(rnnt.rnnt_loss_simple(p.lm, p.am, *tail), joint)
        close(rnnt.rnnt_loss_smoothed(p.lm, p.am, p.symbols, p.blank, 0.0, 0.0, *tail[2:]), joint)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_windows_of_everything_prune_nothing(rnnt_type):
    for seed in SEEDS:
        p = random_problem(seed)
        _, occupation = rnnt.rnnt_loss_simple(
            p.lm, p.am, p.symbols, p.blank, p.boundary, rnnt_type, return_grad=True
        )
        ranges = rnnt.get_rnnt_prune_ranges(*occupation, p.boundary, p.symbols.shape[1] + 1)
        tail = p.blank, p.boundary, rnnt_type, 0.25
        close(
            rnnt.rnnt_loss_pruned(p.full, p.symbols, ranges, *tail), rnnt.rnnt_loss(p.full, p.symbols, *tail)
        )
        weight = torch.randn(9, p.am.shape[2], dtype=torch.float64)
        operands = p.am, p.lm, weight, None, p.symbols
        for hat in (False, True):
            pruned = rnnt.pruned_joiner_loss(*operands, ranges, *tail, use_hat_loss=hat)
            close(pruned, rnnt.joiner_loss(*operands, *tail, use_hat_loss=hat))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_few_rows_by_eager_products_agree_with_the_kernels(monkeypatch, activation):
    """What lies behind a boundary is not read, neither forward nor backward."""
    for seed in SEEDS:
        p = random_problem(seed)
        operands = [t.float() for t in (p.am, p.lm, torch.randn(9, p.am.shape[2]))]
        if p.boundary is not None:
            frames, positions = (torch.arange(t.shape[1]) for t in operands[:2])
            operands[0][frames >= p.boundary[:, 3:]] = math.nan
            operands[1][positions > p.boundary[:, 2:3]] = math.nan
        leaves = [t.requires_grad_() for t in (*operands, torch.randn(9))]
        tail = {"boundary": p.boundary, "activation": activation, "reduction": "none", "zero_infinity": True}
        found = []
        for number in (joiner.SMALL, 0):
            monkeypatch.setattr(joiner, "SMALL", number)
            with monkeypatch.context() as patched:
                if number:  # the kernels are out of reach
                    patched.delattr(joiner, "logprobs_of_joiner")
                loss = rnnt.joiner_loss(*leaves, p.symbols, p.blank, **tail, fastemit_lambda=0.1)
            cotangent = torch.linspace(0.5, 1.5, len(loss))
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves, cotangent)))
            monkeypatch.undo()
        close(*found, 1e-5)


def test_dropout_drops_its_share_and_follows_torchs_generator():
    p = random_problem(3)
    am, lm, weight = (torch.randn(*shape, 64).double() for shape in (p.am.shape[:2], p.lm.shape[:2], (9,)))
    losses = []
    for seed, dropout in ((0, 0.0), (1, 0.3), (1, 0.3), (2, 0.3)):
        seeded(seed)
        losses.append(
            rnnt.joiner_loss(am, lm, weight, None, p.symbols, p.blank, p.boundary, dropout_p=dropout)
        )
    assert losses[1] == losses[2]
    assert len(set(map(float, losses))) == 3
    close(losses[0], rnnt.joiner_loss(am, lm, weight, None, p.symbols, p.blank, p.boundary))


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_occupations_sum_to_what_a_path_has(rnnt_type):
    """The sum is S_b for symbols. With blanks there is one arc per frame, T_b in all; a regular path has T_b blanks
    besides its symbols.
    """
    for seed in SEEDS:
        p = random_problem(seed)
        _, (px, py) = rnnt.rnnt_loss(p.full, p.symbols, p.blank, p.boundary, rnnt_type, return_grad=True)
        length, frames = p.boundary[:, 2].double(), p.boundary[:, 3].double()
        close(px.sum((1, 2)), length)
        close(py.sum((1, 2)), frames if rnnt_type == "regular" else frames - length)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_what_pads_a_sequence_has_no_part(rnnt_type):
    for seed in SEEDS:
        p = random_problem(seed)
        tail = {"boundary": p.boundary, "rnnt_type": rnnt_type, "reduction": "none", "delay_penalty": 0.25}
        loss = rnnt.rnnt_loss(p.full, p.symbols, p.blank, **tail)
        simple = rnnt.rnnt_loss_simple(p.lm, p.am, p.symbols, p.blank, **tail)
        padded = p.symbols.masked_fill(torch.arange(p.symbols.shape[1]) >= p.boundary[:, 2:3], -1)
        close(rnnt.rnnt_loss(p.full, padded, p.blank, **tail), loss, 0)
        for b, (_, _, length, frames) in enumerate(p.boundary.tolist()):
            cut = p.symbols[b : b + 1, :length], p.blank, None, rnnt_type, 0.25
            close(rnnt.rnnt_loss(p.full[b : b + 1, :frames, : length + 1], *cut), loss[b])
            close(
                rnnt.rnnt_loss_simple(p.lm[b : b + 1, : length + 1], p.am[b : b + 1, :frames], *cut),
                simple[b],
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    p = random_problem(3)
    lm, am = p.lm.to(dtype), p.am.to(dtype)
    tail = p.symbols, p.blank, p.boundary
    for name, head in {"rnnt_loss_simple": (lm, am), "rnnt_loss": (p.full.to(dtype),)}.items():
        leaves = [x.clone().requires_grad_() for x in head]
        loss = getattr(rnnt, name)(*leaves, *tail)
        assert loss.dtype is torch.float32
        loss.backward()
        exact = [x.double().requires_grad_() for x in head]
        reference = getattr(rnnt, name)(*exact, *tail)
        reference.backward()
        close(loss.double(), reference, 1e-5)
        for leaf, wanted in zip(leaves, exact, strict=True):
            assert leaf.grad.dtype is dtype
            bound = max(1e-5, torch.finfo(dtype).eps)
            torch.testing.assert_close(leaf.grad.double(), wanted.grad, rtol=bound, atol=bound)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_gradients(rnnt_type):
    p = random_problem(5)
    p.lm.requires_grad_()
    p.am.requires_grad_()
    tail = p.symbols, p.blank

    def smoothed(lm, am, lm_scale, am_scale):
        return rnnt.rnnt_loss_smoothed(lm, am, *tail, lm_scale, am_scale, p.boundary, rnnt_type, 0.1, "none")

    for scales in ((0.0, 0.0), (0.3, 0.0), (0.2, 0.3)):
        assert torch.autograd.gradcheck(
            lambda a, b, s=scales: smoothed(a, b, *s), (p.lm, p.am), fast_mode=True
        )
    logits = p.full.detach().requires_grad_()
    full = lambda x: rnnt.rnnt_loss(x, *tail, p.boundary, rnnt_type, 0.1, "none")  # noqa: E731
    assert torch.autograd.gradcheck(full, logits, fast_mode=True)
    ranges = torch.arange(p.symbols.shape[1] + 1).expand(*p.am.shape[:2], -1)
    for hat in (False, True):
        pruned = lambda x, h=hat: rnnt.rnnt_loss_pruned(  # noqa: E731
            x, p.symbols, ranges, p.blank, p.boundary, rnnt_type, 0.1, "none", h
        )
        assert torch.autograd.gradcheck(pruned, logits, fast_mode=True)


def test_occupations_survive_the_backward_pass():
    """fast_rnnt scales the occupations in place."""
    p = random_problem(2)
    lm = p.lm.requires_grad_()
    loss, occupation = rnnt.rnnt_loss_simple(lm, p.am, p.symbols, p.blank, p.boundary, return_grad=True)
    before = [x.clone() for x in occupation]
    (loss * 17).backward()
    assert all(torch.equal(x, y) for x, y in zip(occupation, before, strict=True))
    assert not any(x.requires_grad for x in occupation)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_fastemit_scales_gradients_of_symbols(rnnt_type):
    p = random_problem(4)
    logits = p.full.requires_grad_()
    ranges = torch.arange(p.symbols.shape[1] + 1).expand(*p.am.shape[:2], -1)
    rest = {"boundary": p.boundary, "rnnt_type": rnnt_type, "reduction": "sum"}

    def gradient(**more):
        loss = rnnt.rnnt_loss(logits, p.symbols, p.blank, **rest, **more)
        pruned = rnnt.rnnt_loss_pruned(logits, p.symbols, ranges, p.blank, **rest, **more)
        close(pruned, loss)
        first, second = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, pruned))
        close(first, second)
        return loss.detach(), first

    plain, grad = gradient()
    loss, with_fastemit = gradient(fastemit_lambda=0.5)
    close(loss, plain, 0)
    # logits' gradient is linear in the gradient of (px, py): what λ adds is the symbols' part of it
    _, (px, _) = rnnt.rnnt_loss(logits, p.symbols, p.blank, **rest, return_grad=True)
    px = px[..., : p.am.shape[1]].transpose(1, 2)
    symbols = logits.detach()[:, :, :-1].requires_grad_()
    picked = symbols.log_softmax(-1).gather(3, p.symbols[:, None, :, None].expand(-1, p.am.shape[1], -1, 1))
    (part,) = torch.autograd.grad(-(picked.squeeze(-1) * px).sum(), symbols)
    close(with_fastemit - grad, torch.nn.functional.pad(part * 0.5, (0, 0, 0, 1)))


def test_wide_scores_do_not_overflow():
    p = random_problem(1, dtype=torch.float32)
    loss = rnnt.rnnt_loss_simple(p.lm * 1e4, p.am * 1e4, p.symbols, p.blank, p.boundary)
    assert math.isfinite(loss)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ragged_boundaries(data):
    """Each sequence agrees with the same sequence alone for any boundary within the shapes: empty transcripts, no
    frames and unreachable ends included.
    """
    batch = data.draw(st.integers(0, 3))
    length = data.draw(st.integers(0, 4))
    frames = data.draw(st.integers(0, 5))
    classes = data.draw(st.integers(1, 4))
    rnnt_type = data.draw(st.sampled_from(TYPES))
    rows = []
    for _ in range(batch):
        s, t = data.draw(st.integers(0, length)), data.draw(st.integers(0, frames))
        rows.append([data.draw(st.integers(0, s)), data.draw(st.integers(0, t)), s, t])
    boundary = torch.tensor(rows, dtype=torch.int64).view(batch, 4)
    logits = torch.randn(batch, frames, length + 1, classes, dtype=torch.float64).requires_grad_()
    symbols = torch.randint(0, classes, (batch, length))
    loss = rnnt.rnnt_loss(logits, symbols, 0, boundary, rnnt_type, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isfinite(grad).all()
    for b, (s0, t0, s1, t1) in enumerate(rows):
        reachable = t1 - t0 >= s1 - s0 if rnnt_type != "regular" else t1 > t0 or s1 == s0
        assert bool(torch.isfinite(loss[b])) == reachable
        if not reachable:
            assert loss[b] == math.inf
            assert not grad[b].any()
            continue
        alone = rnnt.rnnt_loss(
            logits[b : b + 1, t0:t1, s0 : s1 + 1], symbols[b : b + 1, s0:s1], 0, None, rnnt_type
        )
        close(loss[b], alone)
    pruned = rnnt.rnnt_loss_pruned(
        logits,
        symbols,
        torch.arange(length + 1).expand(batch, frames, -1),
        0,
        boundary,
        rnnt_type,
        reduction="none",
    )
    close(pruned, loss)


def test_cells_that_the_joiner_leaves_out_do_not_show():
    """Gradients in float32 are as close to float64's as those of all cells."""
    batch, frames, length, channels, outputs = 2, 60, 12, 24, 40
    tensors = [
        torch.randn(*shape, dtype=torch.float64)
        for shape in (
            (batch, frames, channels),
            (batch, length + 1, channels),
            (outputs, channels),
            (outputs,),
        )
    ]
    symbols = torch.randint(1, outputs, (batch, length))
    starts = torch.arange(frames) * (length - 3) // (frames - 1)
    ranges = (starts.unsqueeze(1) + torch.arange(4)).expand(batch, -1, -1)

    def gradients(dtype, fused):
        am, lm, weight, bias = leaves = [t.to(dtype).requires_grad_() for t in tensors]
        if fused:
            loss = rnnt.pruned_joiner_loss(am, lm, weight, bias, symbols, ranges, 0, reduction="sum")
        else:
            hidden = torch.tanh(sum(rnnt.do_rnnt_pruning(am, lm, ranges)))
            logits = torch.nn.functional.linear(hidden, weight, bias)
            loss = rnnt.rnnt_loss_pruned(logits, symbols, ranges, 0, reduction="sum")
        return torch.autograd.grad(loss, leaves)

    exact = gradients(torch.float64, False)
    for found, plain, wanted in zip(
        gradients(torch.float32, True), gradients(torch.float32, False), exact, strict=True
    ):
        error, allowed = (float((g.double() - wanted).norm() / wanted.norm()) for g in (found, plain))
        assert error <= max(1.5 * allowed, 5e-7)


@pytest.mark.parametrize("fused", [True, False], ids=["logits", "log-probabilities"])
def test_the_forced_formula_has_gradients_of_gradients(fused):
    p = random_problem(3)
    tail = p.symbols, p.boundary[:, 3], p.boundary[:, 2], p.blank

    def losses(logits):
        return lengths.rnnt_losses("rnnt_loss", logits, *tail, fused_log_softmax=fused)

    kernels = losses(p.full)
    with fastasr.backend("eager"):
        close(losses(p.full), kernels)
        assert torch.autograd.gradgradcheck(losses, p.full.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("hat", [False, True])
def test_the_forced_formula_of_rows(hat):
    p = random_problem(5)
    symbols = p.symbols.unsqueeze(1).expand(-1, p.am.shape[1], -1)
    logits = p.full[:, :, 1:].requires_grad_()

    def row_logprobs(logits):
        return rows.row_logprobs(logits, symbols, p.blank, hat)

    kernels = row_logprobs(logits)
    with fastasr.backend("eager"):
        close(row_logprobs(logits), kernels)
        assert torch.autograd.gradcheck(row_logprobs, logits, fast_mode=True)
        assert torch.autograd.gradgradcheck(row_logprobs, logits, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hat", [False, True])
def test_rows_whose_classes_are_apart_in_memory(hat, dtype):
    """Kernels do not read these: torch does their work in slices."""
    p = random_problem(6)
    symbols = F.pad(p.symbols, (0, 1), value=p.blank).unsqueeze(1).expand(-1, p.am.shape[1], -1)
    logits = p.full.to(dtype)
    apart = logits.transpose(1, 3).contiguous().transpose(1, 3)
    assert rows._kernels(logits)
    assert not rows._kernels(apart)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype.itemsize < 8 else {}
    found, expected = (rows.forward(x, symbols, p.blank, hat) for x in (logits, apart))
    torch.testing.assert_close(found, expected, **tolerance)
    gx, gy = (torch.randn_like(found[0]) for _ in range(2))
    found, expected = (rows.backward(gx, gy, x, symbols, expected[2], p.blank, hat) for x in (logits, apart))
    torch.testing.assert_close(found, expected, **(tolerance if dtype.itemsize > 2 else {}))
