# SPDX-License-Identifier: Apache-2.0
r"""Log-probabilities of the additive joiner, whose logits are l = am[b, t] + lm[b, s], without holding the logits.

With N[b,s,t] = log Σ_c e^(am[b,t,c] + lm[b,s,c]), which is one matrix product of the two exponentials,

    px[b,s,t] = am[b,t,y] + lm[b,s,y] − N[b,s,t],  y = symbols[b,s];    py[b,s,t] = the same with y = blank.

Smoothing (Kuang et al., "Pruned RNN-T", 2022, section 3.1) interpolates between these and each model alone, with weight
λ for lm − log Σ_c e^lm and α for am + u − log Σ_c e^(am + u), where the unigram e^u is the mean over (b, s) of
softmax(lm):

    px = (1−λ) am_y + (1−α) lm_y + α u_y − (1−λ−α) N − λ N_lm − α N_am.

Backward, with gx, gy the gradients, h = gx + gy (over all s), and w = −(1−λ−α) h e^−N: dam = e^am ⊙ Σ_s w e^lm,
and dlm = e^lm ⊙ Σ_t w e^am, two matrix products; the other terms are sums of gx and gy. The unigram is one more row
of e^lm.

Bytes: am and lm are read once and 3 B S T numbers are written; of size (B, T, C) only one slice of frames exists at a
time. Of packed frames am (1, N, C) a slice is gathered, on a CPU without padding. The exponentials are shifted by their
rows' maxima, and the smallest normal number is added to each sum: where the two models' best classes have nothing in
common, N is bounded below by that number, as it is upstream.
Upstream: ``get_rnnt_logprobs``, ``get_rnnt_logprobs_smoothed`` of k2.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastasr.ops import _gemm
from fastasr.ops._register import register
from fastasr.rnnt._frames import Packed, Padded

# Bytes of exponentials at a time. At 400 frames, 61 positions and 5000 classes 2 MB hold 104 frames; with fewer frames
# the matrix products are thin.
_SLICE_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}


def _slices(am: Tensor, frames: Padded, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Yields the (sequences, frames) whose exponentials are computed at a time. If products are batched, a slice
    holds all sequences, and one sequence if not: then no slice holds padding of packed frames.
    """
    together = frames.batch if _batched(am) else 1
    row = max(1, together * am.shape[2] * dtype.itemsize)
    step = max(16, _SLICE_BYTES.get(am.device.type, 1 << 26) // row)
    if _batched(am):
        sequences = [(slice(0, frames.batch), frames.frames)]
    else:
        own = frames.lengths.tolist() if isinstance(frames, Packed) else [frames.frames] * frames.batch
        sequences = [(slice(b, b + 1), count) for b, count in enumerate(own)]
    for sequence, count in sequences:
        parts = max(1, -(-count // step))
        for i in range(parts):
            yield sequence, slice(count * i // parts, count * (i + 1) // parts)


def _layout(am: Tensor, lengths: Tensor | None, longest: int) -> Padded:
    return Padded(*am.shape[:2]) if lengths is None else Packed(lengths, am.shape[1], longest)


def _frames_at(am: Tensor, frames: Padded, at: tuple[slice, slice]) -> Tensor:
    """Returns a slice (b, t, C) of the frames, with zeros in place of padding that packed frames do not have."""
    if not isinstance(frames, Packed):
        return am[at]
    place, missing = (t.view(frames.batch, frames.frames)[at] for t in frames.to_lattice)
    found = am[0].index_select(0, place.flatten()).unflatten(0, place.shape)
    return found.masked_fill_(missing.unsqueeze(2), 0.0) if _batched(am) else found


def _put(dam: Tensor, frames: Padded, at: tuple[slice, slice], grad: Tensor) -> None:
    """Writes the gradient of a slice of frames. That of padding goes to the row behind packed frames."""
    if not isinstance(frames, Packed):
        dam[at] = grad
        return
    place, missing = (t.view(frames.batch, frames.frames)[at].flatten() for t in frames.to_lattice)
    place = place.masked_fill(missing, dam.shape[1] - 1)
    dam[0].index_copy_(0, place, grad.flatten(0, 1).to(dam.dtype))


def _compute_dtype(lm: Tensor, am: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(lm.dtype, am.dtype), torch.float32)


def _exponentials(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns (e^(x − m), m), m the maximum of each row."""
    maximum = x.amax(-1, keepdim=True)
    return torch.sub(x.to(dtype), maximum.to(dtype)).exp_(), maximum.to(dtype)


def _batched(x: Tensor) -> bool:
    """Says whether one call multiplies the whole batch and matrix products also add equal symbols: sums by index are
    deterministic on the CPU only.
    """
    return x.is_cuda


def _products(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Computes out[b] = left[b] right[b]ᵀ."""
    if _batched(out):
        torch.bmm(left, right.transpose(1, 2), out=out)
    else:
        for o, a, b in zip(out, left, right, strict=True):
            o.copy_(_gemm.forward(a, b, None))


def _left_rows(lm: Tensor, dtype: torch.dtype, unigram: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (e^lm with the unigram as one more row, maxima, sums): (B, S+1 or S+2, C), (B, S+1, 1), (B, S+1, 1)."""
    tiny = torch.finfo(dtype).tiny
    batch, positions, classes = lm.shape
    left = lm.new_empty(batch, positions + int(unigram), classes, dtype=dtype)
    probs = left[:, :positions]
    maximum = lm.amax(-1, keepdim=True).to(dtype)
    torch.sub(lm.to(dtype), maximum, out=probs).exp_()
    sums = probs.sum(-1, keepdim=True)
    if unigram:
        shares = (1.0 / sums).reshape(1, -1) / max(1, batch * positions)
        left[:, positions] = (shares @ probs.reshape(-1, classes)) + tiny
    return left, maximum, sums


def forward(
    lm: Tensor, am: Tensor, symbols: Tensor, blank: int, lm_scale: float, am_scale: float,
    lengths: Tensor | None, longest: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (px (B, S, T), py (B, S+1, T), sums (B, S+1 or S+2, T) for the backward)."""
    dtype = _compute_dtype(lm, am)
    tiny = torch.finfo(dtype).tiny
    layout = _layout(am, lengths, longest)
    batch, positions, frames = layout.batch, lm.shape[1], layout.frames
    length = positions - 1
    left, lm_max, lm_sums = _left_rows(lm, dtype, am_scale != 0)
    sums = am.new_ones(batch, left.shape[1], frames, dtype=dtype)
    am_max = am.new_zeros(batch, 1, frames, dtype=dtype)
    for rows, part in _slices(am, layout, dtype):
        exponentials, maximum = _exponentials(_frames_at(am, layout, (rows, part)), dtype)
        am_max[rows, 0, part] = maximum.squeeze(-1)
        _products(sums[rows, :, part], left[rows], exponentials)
    base = sums[:, :positions].add(tiny).log_().add_(lm_max).add_(am_max)  # N
    base.mul_(lm_scale + am_scale - 1.0)
    if lm_scale:
        base.sub_((lm_sums.log() + lm_max) * lm_scale)
    if am_scale:
        base.sub_((sums[:, positions:].log() + am_max) * am_scale)
    own = layout.lattice(am.gather(2, layout.repeated(symbols)))
    px = own.transpose(1, 2).to(dtype) * (1.0 - lm_scale)
    px.add_(lm[:, :length].gather(2, symbols.unsqueeze(2)).to(dtype) * (1.0 - am_scale)).add_(
        base[:, :length]
    )
    py = base.add_(layout.lattice(am[:, :, blank]).unsqueeze(1).to(dtype) * (1.0 - lm_scale))
    py.add_(lm[:, :, blank].unsqueeze(2).to(dtype) * (1.0 - am_scale))
    if am_scale and batch:
        unigram = left[0, positions].log()
        px.add_(unigram[symbols].unsqueeze(2) * am_scale)
        py.add_(unigram[blank] * am_scale)
    return px.contiguous(), py, sums


def backward(
    grad_px: Tensor,
    grad_py: Tensor,
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    sums: Tensor,
    blank: int,
    lm_scale: float,
    am_scale: float,
    lengths: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """Returns (dlm, dam)."""
    dtype = sums.dtype
    layout = _layout(am, lengths, longest)
    tiny = torch.finfo(dtype).tiny
    (_, positions, classes), length = lm.shape, symbols.shape[1]
    left, _, lm_sums = _left_rows(lm, dtype, am_scale != 0)
    total = grad_py.clone()
    total[:, :length] += grad_px
    weights = torch.empty_like(sums)
    torch.mul(total, lm_scale + am_scale - 1.0, out=weights[:, :positions])
    weights[:, :positions] /= sums[:, :positions] + tiny
    if am_scale:
        weights[:, positions] = total.sum(1) * -am_scale / sums[:, positions]
    symbol_grad = (grad_px * (1.0 - lm_scale)).transpose(1, 2)  # (B, T, S)
    blank_grad = grad_py.sum(1) * (1.0 - lm_scale)  # (B, T)
    chosen = _one_hot(symbols, classes, dtype) if _batched(lm) else None
    dleft = torch.zeros_like(left)
    dam = am.new_empty(am.shape) if lengths is None else am.new_zeros(1, am.shape[1] + 1, classes)
    for rows, part in _slices(am, layout, dtype):
        exponentials, _ = _exponentials(_frames_at(am, layout, (rows, part)), dtype)
        w = weights[rows, :, part]
        if chosen is not None:
            dleft[rows].baddbmm_(w, exponentials)
            grad = torch.bmm(w.transpose(1, 2), left[rows]).mul_(exponentials)
            grad.baddbmm_(symbol_grad[rows, part], chosen[rows])
        else:  # one sequence
            w = w[0].contiguous()
            dleft[rows] += _gemm.input_grad(w, exponentials[0])
            grad = exponentials.mul_(_gemm.weight_grad(w, left[rows][0]))
            index = symbols[rows].unsqueeze(1).expand(1, grad.shape[1], length)
            grad.scatter_add_(2, index, symbol_grad[rows, part].contiguous())
        grad[:, :, blank] += blank_grad[rows, part]
        _put(dam, layout, (rows, part), grad)
    dlm = _grad_lm(dleft, left, lm_sums, total, grad_px, grad_py, symbols, chosen, blank, lm_scale, am_scale)
    return dlm.to(lm.dtype), dam if lengths is None else dam[0, :-1].unsqueeze(0)


def _grad_lm(
    dleft: Tensor,
    left: Tensor,
    lm_sums: Tensor,
    total: Tensor,
    grad_px: Tensor,
    grad_py: Tensor,
    symbols: Tensor,
    chosen: Tensor | None,
    blank: int,
    lm_scale: float,
    am_scale: float,
) -> Tensor:
    """Returns dlm (B, S+1, C), from the gradient of the rows of ``left``."""
    batch, positions, classes = total.shape[0], total.shape[1], left.shape[2]
    length = positions - 1
    probs = left[:, :positions]
    dlm = dleft[:, :positions]
    by_symbol, by_blank = grad_px.sum(2), grad_py.sum(2)  # (B, S), (B, S+1)
    if lm_scale:
        dlm.sub_(total.sum(2, keepdim=True) * lm_scale / lm_sums)
    if am_scale and batch:
        chosen_sum = (
            torch.zeros(classes, dtype=total.dtype, device=total.device).index_add_(
                0, symbols.reshape(-1), by_symbol.reshape(-1)
            )
            if chosen is None
            else by_symbol.reshape(1, -1).matmul(chosen.reshape(-1, classes)).squeeze(0)
        )
        chosen_sum[blank] += by_blank.sum()
        dmean = (dleft[:, positions].sum(0) + chosen_sum * am_scale / left[0, positions]) / (
            batch * positions
        )
        inner = (probs * dmean).sum(-1, keepdim=True) / lm_sums
        dlm.add_((dmean - inner) / lm_sums)
    dlm = dlm.mul_(probs).contiguous()
    by_symbol = by_symbol.unsqueeze(2) * (1.0 - am_scale)
    if chosen is None:
        dlm[:, :length].scatter_add_(2, symbols.unsqueeze(2), by_symbol)
    else:
        dlm[:, :length] += chosen * by_symbol
    dlm[:, :, blank] += by_blank * (1.0 - am_scale)
    return dlm


def _one_hot(symbols: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Returns (B, S, C)."""
    zeros = torch.zeros(*symbols.shape, classes, dtype=dtype, device=symbols.device)
    return zeros.scatter_(2, symbols.unsqueeze(2), 1.0)


# --------------------------------------------------------------------------- registration
_OPTIONS = "int blank, float lm_scale, float am_scale, Tensor? lengths, SymInt longest"


def _fake_forward(
    lm: Tensor, am: Tensor, symbols: Tensor, blank: int, lm_scale: float, am_scale: float,
    lengths: Tensor | None, longest: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = _compute_dtype(lm, am)
    batch, positions, frames = lm.shape[0], lm.shape[1], am.shape[1] if lengths is None else longest
    return (
        am.new_empty(batch, positions - 1, frames, dtype=dtype),
        am.new_empty(batch, positions, frames, dtype=dtype),
        am.new_empty(batch, positions + int(am_scale != 0), frames, dtype=dtype),
    )


_BACKWARD_OP = register(
    "rnnt_additive_logprobs_backward(Tensor grad_px, Tensor grad_py, Tensor lm, Tensor am, Tensor symbols, "
    f"Tensor sums, {_OPTIONS}) -> (Tensor, Tensor)",
    backward,
    lambda grad_px, grad_py, lm, am, *_: (lm.new_empty(lm.shape), am.new_empty(am.shape)),
    autocast=lambda dtype, *arguments: arguments,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    lm, am, symbols, *ctx.rest, lengths, ctx.longest = inputs
    ctx.save_for_backward(lm, am, symbols, output[2], lengths)
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_px: Tensor, grad_py: Tensor, _: object) -> tuple[Tensor | None, ...]:
    *saved, lengths = ctx.saved_tensors
    return *_BACKWARD_OP(grad_px, grad_py, *saved, *ctx.rest, lengths, ctx.longest), *(None,) * 6


_OP = register(
    f"rnnt_additive_logprobs(Tensor lm, Tensor am, Tensor symbols, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_backward,
    autocast=lambda dtype, *arguments: arguments,
    transformed=lambda *arguments: _formula(*arguments),
)


def _formula(
    lm: Tensor, am: Tensor, symbols: Tensor, blank: int, lm_scale: float, am_scale: float,
    lengths: Tensor | None, longest: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes what ``forward`` does by operators that transforms know, with the exponentials of all frames."""
    am = _layout(am, lengths, longest).lattice(am)
    lm, am = (t.to(_compute_dtype(lm, am)) for t in (lm, am))
    tiny, length = torch.finfo(lm.dtype).tiny, symbols.shape[1]
    lm_max, am_max = lm.amax(-1, keepdim=True), am.amax(-1, keepdim=True).mT
    left, right = (lm - lm_max).exp(), (am - am_max.mT).exp()
    sums = left @ right.mT
    base = (lm_scale + am_scale - 1.0) * ((sums + tiny).log() + lm_max + am_max)
    if lm_scale:
        base = base - lm_scale * lm.logsumexp(-1, keepdim=True)
    classes = torch.cat((symbols, torch.full_like(symbols[:, :1], blank)), 1)
    index = classes.unsqueeze(1).expand(-1, am.shape[1], -1)
    by_am = (1.0 - lm_scale) * am.gather(2, index).mT  # [B, S + 1, T], the last for blank
    if am_scale:
        unigram = lm.softmax(-1).mean((0, 1)) + tiny
        by_unigram = (right @ unigram).unsqueeze(1)
        base = base - am_scale * (by_unigram.log() + am_max)
        by_am = by_am + am_scale * unigram.log()[classes].unsqueeze(2)
        sums = torch.cat((sums, by_unigram), 1)
    by_symbol = (1.0 - am_scale) * lm[:, :length].gather(2, symbols.unsqueeze(2))
    by_blank = (1.0 - am_scale) * lm[:, :, blank].unsqueeze(2)
    return base[:, :length] + by_am[:, :-1] + by_symbol, base + by_am[:, -1:] + by_blank, sums


def additive_logprobs(
    lm: Tensor, am: Tensor, frames: Padded, symbols: Tensor, blank: int, lm_scale: float, am_scale: float
) -> tuple[Tensor, Tensor]:
    """Returns (px (B, S, T), py (B, S+1, T)) in float32, or float64 where an input is; the caller has checked the
    arguments.
    """
    lengths = frames.lengths if isinstance(frames, Packed) else None
    px, py, _ = _OP(lm, am, symbols, blank, float(lm_scale), float(am_scale), lengths, frames.frames)
    return px, py
