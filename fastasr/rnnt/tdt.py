# SPDX-License-Identifier: Apache-2.0
r"""Losses of token-and-duration transducers (TDT): transformers' ``tdt_loss``, and the joiner fused with its loss.

Each arc of a TDT emits a token and moves on by one of the durations (Xu et al., 2023); ``fastasr.ops.tdt_lattice`` has
the recursion. σ (``sigma``) is subtracted from the log-probabilities of tokens, which favours paths with few arcs.

``fastasr.rnnt.lengths`` has the reductions. A sequence that cannot be aligned has the loss +∞ and gradients of 0;
``zero_infinity`` makes it 0.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr._tables import kept
from fastasr.ops import _weights_dropout
from fastasr.ops._joiner import Activation
from fastasr.packed_frames import PackedFrames
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check, lengths, logprobs
from fastasr.rnnt._frames import Padded, frames_of
from fastasr.rnnt.joiner import multiplies_padding, negligible

# px (B, T, U), py (B, T, U + 1), pd (B, T, U + 1, N), the durations and the boundary
Logprobs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tdt_loss(
    token_logits: Tensor | PackedFrames,
    duration_logits: Tensor | PackedFrames,
    targets: Tensor,
    logit_lengths: Tensor | None,
    target_lengths: Tensor,
    blank_token_id: int,
    durations: Sequence[int],
    sigma: float = 0.0,
    reduction: str = "mean",
    *,
    zero_infinity: bool = False,
    fastemit_lambda: float = 0.0,
    longest: int | None = None,
) -> Tensor:
    """Returns the loss of a TDT joiner's logits; ``transformers.loss.loss_tdt.tdt_loss`` has the same arguments.

    Args:
        token_logits: (B, T, U + 1, V), or packed frames (N, U + 1, V).
        duration_logits: (B, T, U + 1, N), or packed as token_logits.
        targets: (B, U), integers in [0, V) in front of each sequence's end.
        logit_lengths, target_lengths: (B,), integers: frames and symbols of each sequence. Packed frames have lengths:
            then logit_lengths is None.
        blank_token_id: blank, in [0, V).
        durations: N different numbers of frames, in any order.
        sigma: the constant of undernormalisation.
        reduction: mean, mean_volume, mean_batch, sum or none.
        zero_infinity: a sequence that cannot be aligned has the loss 0.
        fastemit_lambda: the gradients of symbol arcs are multiplied by 1 + λ (FastEmit).
        longest: see ``fastasr.rnnt.losses``.
    """
    op = "rnnt.tdt_loss"
    found = logprobs_of_logits(
        op,
        token_logits,
        duration_logits,
        targets,
        logit_lengths,
        target_lengths,
        blank_token_id,
        durations,
        longest,
    )
    return _loss(op, *found, sigma, fastemit_lambda, reduction, zero_infinity)


def tdt_joiner_loss(
    am: Tensor | PackedFrames,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor | None,
    target_lengths: Tensor,
    blank_token_id: int,
    durations: Sequence[int],
    sigma: float = 0.0,
    reduction: str = "mean",
    activation: Activation = "relu",
    dropout_p: float = 0.0,
    *,
    keep_logits: bool | None = None,
    zero_infinity: bool = False,
    fastemit_lambda: float = 0.0,
    longest: int | None = None,
) -> Tensor:
    """Returns ``tdt_loss`` of the joiner dropout(activation(am + lm)) Wᵀ + bias, without its (B, T, U + 1, V) logits.

    Args:
        am: (B, T, D), the encoder's output after the joiner's projection, or packed frames (N, D).
        lm: (B, U + 1, D), the prediction network's output after the joiner's projection.
        weight: (V + N, D); bias: (V + N,) or None. The output layer: V tokens, then N durations.
        activation: tanh or relu.
        dropout_p: dropout before the output layer, with random numbers of its own.
        keep_logits: whether to keep logits for the backward pass; None decides by their size.
        The other arguments are those of ``tdt_loss``.
    """
    op = "rnnt.tdt_joiner_loss"
    px, py, pd, steps, boundary = logprobs_of_joiner(
        op, am, lm, weight, bias, targets, logit_lengths, target_lengths, blank_token_id, durations, activation,
        dropout_p, keep_logits, longest,
    )  # fmt: skip
    px, py, pd = negligible(px, py, pd)
    return _loss(op, px, py, pd, steps, boundary, sigma, fastemit_lambda, reduction, zero_infinity)


# --------------------------------------------------------------------------- log-probabilities for the lattice
def logprobs_of_logits(
    op: str,
    token_logits: Tensor | PackedFrames,
    duration_logits: Tensor | PackedFrames,
    targets: Tensor,
    logit_lengths: Tensor | None,
    target_lengths: Tensor,
    blank_token_id: int,
    durations: Sequence[int],
    longest: int | None = None,
) -> Logprobs:
    """Checks the arguments of the function ``op`` and returns px (B, T, U), py (B, T, U + 1), pd (B, T, U + 1, N), the
    durations and the boundary."""
    rows, frames = frames_of(op, "token_logits", token_logits, "(B, T, U + 1, V)", longest)
    if isinstance(token_logits, PackedFrames):
        longest = frames.frames
    of_durations, _ = frames_of(op, "duration_logits", duration_logits, "(B, T, U + 1, N)", longest)
    batch, (positions, classes) = frames.batch, rows.shape[2:]
    steps = _durations(op, durations, rows.device)
    expected = (*rows.shape[:3], len(steps))
    _check.shape(op, "duration_logits", of_durations, f"{expected}", of_durations.shape == expected)
    arguments.class_index(op, "blank_token_id", blank_token_id, classes)
    boundary = lengths.boundary(op, frames, logit_lengths, target_lengths, positions - 1, rows)
    targets = arguments.symbols(op, targets, batch, positions - 1, classes, boundary, rows)
    labels = frames.repeated(F.pad(targets, (0, 1), value=blank_token_id))
    px, py = logprobs.row_scores(frames, rows, labels, blank_token_id)
    wide = torch.promote_types(of_durations.dtype, torch.float32)
    return px[:, :, :-1], py, frames.lattice(of_durations).to(wide).log_softmax(-1), steps, boundary


def logprobs_of_joiner(
    op: str, am: Tensor | PackedFrames, lm: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    logit_lengths: Tensor | None, target_lengths: Tensor, blank_token_id: int, durations: Sequence[int],
    activation: Activation, dropout_p: float = 0.0, keep_logits: bool | None = None, longest: int | None = None,
) -> Logprobs:  # fmt: skip
    """Does the same as ``logprobs_of_logits`` for the joiner dropout(activation(am + lm)) Wᵀ + bias."""
    am, frames = frames_of(op, "am", am, "(B, T, D)", longest)
    arguments.floating(op, "lm", lm, "(B, U + 1, D)")
    arguments.floating(op, "weight", weight, "(V + N, D)")
    batch, channels, positions = frames.batch, am.shape[2], lm.shape[1]
    fits = lm.shape == (batch, positions, channels) and positions >= 1
    _check.shape(op, "lm", lm, f"({batch}, U + 1, {channels}) with U >= 0", fits)
    steps = _durations(op, durations, am.device)
    classes = weight.shape[0] - len(steps)
    arguments.class_index(op, "blank_token_id", blank_token_id, classes)
    boundary = lengths.boundary(op, frames, logit_lengths, target_lengths, positions - 1, am)
    targets = arguments.symbols(op, targets, batch, positions - 1, classes, boundary, am)
    if not multiplies_padding(am):
        am, frames = frames.lattice(am), Padded(batch, frames.frames)
    starts = torch.zeros(am.shape[:2], dtype=torch.int64, device=am.device)
    contexts, line, starts, inside = frames.joined(lm, targets, starts, boundary)
    found = ops.tdt_joiner(
        *(frames.owned(am), contexts, weight, bias, line, starts),
        s_range=positions,
        durations=len(steps),
        termination_symbol=blank_token_id,
        boundary=inside,
        activation=activation,
        keep_logits=keep_logits,
        dropout_p=float(dropout_p),
        dropout_seed=_weights_dropout.draw_seed(am.device) if dropout_p else None,
    )
    px, py, pd = (frames.lattice(t) for t in found)
    return px[:, :, :-1], py, pd, steps, boundary


# --------------------------------------------------------------------------- shared code
def _loss(
    op: str,
    px: Tensor,
    py: Tensor,
    pd: Tensor,
    steps: Tensor,
    boundary: Tensor,
    sigma: float,
    fastemit_lambda: float,
    reduction: str,
    zero_infinity: bool,
) -> Tensor:
    factor = 1.0 + _check.number(op, "fastemit_lambda", fastemit_lambda)
    if _check.number(op, "sigma", sigma):
        px, py = px - sigma, py - sigma
    loss = -ops.tdt_lattice(logprobs.scale_gradient(px, factor), py, pd, steps, boundary)
    if _check.flag(op, "zero_infinity", zero_infinity):
        loss = torch.where(loss == math.inf, 0.0, loss)
    return lengths.reduced(op, loss, boundary[:, 2], reduction)


def _durations(op: str, durations: Sequence[int], device: torch.device) -> Tensor:
    found = tuple(durations)
    whole = all(isinstance(d, int) and not isinstance(d, bool) and d >= 0 for d in found)
    if not found or not whole or len(set(found)) < len(found):
        raise ValueError(f"fastasr.{op}: durations: expected different integers >= 0, got {list(found)}")
    if device.type == "cpu":
        return torch.tensor(found, dtype=torch.int64, device="cpu")
    return _on_device(found, device)  # a copy to a GPU waits for it


@kept(64)
def _on_device(durations: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the result is cached, and a training step may use it later
        return torch.tensor(durations, dtype=torch.int64, device=device)
