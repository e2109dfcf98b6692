# SPDX-License-Identifier: Apache-2.0
r"""Forced alignment: the likeliest path of given tokens through the lattice of a transducer, a TDT or CTC.

The recursions are those of the losses with a maximum in place of the logarithm of a sum. In the lattice of a
transducer (``fastasr.ops.rnnt_lattice``) and of a TDT (``fastasr.ops.tdt_lattice``) the derivative of the best path's
score is 1 for each arc on the path and 0 for the others, so autograd finds the path. For CTC (Graves et al., 2006),
with the states l of blank, token 1, blank, token 2, …, blank:

    p[t, l] = log_probs[t, label of l] + max(p[t-1, l], p[t-1, l-1], p[t-1, l-2])

where l - 2 counts only between two different tokens. One byte per state and frame remembers which was the largest.

Sums are float64. Of equally likely paths the first wins, looking from the end of the path back: in RNN-T blank comes
before the symbol; in TDT the durations come in the given order, and for each of them blank before the symbol; in CTC
the last token comes before the last blank, then staying in a state before entering it, from the nearer state first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops.rnnt_lattice import Steps
from fastasr.ops.tdt_lattice import Steps as TdtSteps
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check, joiner, lengths, logprobs, tdt


@dataclass
class Alignment:
    """Where the tokens of a batch lie. Behind a sequence's last token, and for sequences that cannot be aligned, starts
    are -1, durations 0 and confidences 0.

    Attributes:
        starts: (B, S) int64, the first frame of each token.
        durations: (B, S) int64, in frames. RNN-T: 1. TDT: the duration that the path takes with the token. CTC: the
            frames that repeat the token.
        confidences: (B, S) float64, the probability of the token where the path emits it, without that of its duration
            and without penalties; for CTC the mean over its frames.
        scores: (B,) float64, the log-probability of the path; -inf if there is none.
    """

    starts: Tensor
    durations: Tensor
    confidences: Tensor
    scores: Tensor


# --------------------------------------------------------------------------- RNN-T
def rnnt_align(
    logits: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> Alignment:
    """Returns the alignment of logits (B, T, S + 1, C). The arguments are those of ``rnnt_loss``."""
    op = "rnnt.rnnt_align"
    arguments.choice(op, "rnnt_type", rnnt_type, arguments.RNNT_TYPES)
    with torch.no_grad():
        px, py = logprobs.joint(op, logits, symbols, termination_symbol, boundary, "modified")
    return _through_rnnt(op, px, py, boundary, rnnt_type)


def joiner_align(
    am: Tensor,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    use_hat_loss: bool = False,
    activation: str = "tanh",
) -> Alignment:
    """Returns the alignment of the joiner activation(am + lm) Wᵀ + bias, without its logits. The arguments are those of
    ``joiner_loss``."""
    op = "rnnt.joiner_align"
    call = am, lm, weight, bias, symbols, termination_symbol, boundary, rnnt_type, use_hat_loss, activation
    with torch.no_grad():
        px, py, boundary = joiner.logprobs_of_joiner(op, *call, False)
    return _through_rnnt(op, px, py, boundary, rnnt_type)


def _through_rnnt(op, px, py, boundary, rnnt_type) -> Alignment:
    """Aligns px (B, S, T) and py (B, S + 1, T) of a joiner."""
    if boundary is not None:
        boundary = boundary.to(torch.int64)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = _leaf(px), _leaf(py)
        lattice = Steps(*logprobs.lattice(op, x, y, boundary, rnnt_type), boundary)
        scores = lattice.scores(lattice.cells(lambda symbol, blank: _first_best([blank, symbol])))
        (path,) = torch.autograd.grad(scores.sum(), x)
    return _alignment(px, path, path.new_ones(path.shape[:2], dtype=torch.int64), scores)


# --------------------------------------------------------------------------- TDT
def tdt_align(
    token_logits: Tensor,
    duration_logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank_token_id: int,
    durations: Sequence[int],
    sigma: float = 0.0,
) -> Alignment:
    """Returns the alignment of a TDT joiner's logits. The arguments are those of ``tdt_loss``."""
    op = "rnnt.tdt_align"
    call = token_logits, duration_logits, targets, logit_lengths, target_lengths, blank_token_id, durations
    with torch.no_grad():
        found = tdt.logprobs_of_logits(op, *call)
    return _through_tdt(*found, _check.number(op, "sigma", sigma))


def tdt_joiner_align(
    am: Tensor,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank_token_id: int,
    durations: Sequence[int],
    sigma: float = 0.0,
    activation: str = "relu",
) -> Alignment:
    """Returns the alignment of the joiner activation(am + lm) Wᵀ + bias, without its logits. The arguments are those of
    ``tdt_joiner_loss``."""
    op = "rnnt.tdt_joiner_align"
    call = am, lm, weight, bias, targets, logit_lengths, target_lengths, blank_token_id, durations, activation
    with torch.no_grad():
        found = tdt.logprobs_of_joiner(op, *call, keep_logits=False)
    return _through_tdt(*found, _check.number(op, "sigma", sigma))


def _through_tdt(px, py, pd, durations, boundary, sigma) -> Alignment:
    with torch.inference_mode(False), torch.enable_grad():
        x, y, z = _leaf(px), _leaf(py), _leaf(pd)
        scores = TdtSteps(x - sigma, y - sigma, z, durations, boundary).scores(_first_best)
        path, with_durations = torch.autograd.grad(scores.sum(), (x, z))
    # a path leaves a cell once: where it leaves with a symbol, that arc's duration is the cell's
    taken = (path.unsqueeze(-1) * with_durations[:, :, :-1]).sum(1)
    durations = (taken.long() * durations).sum(-1)
    return _alignment(px.transpose(1, 2), path.transpose(1, 2), durations, scores)


# --------------------------------------------------------------------------- what both share
def _leaf(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64, copy=True).requires_grad_()


def _first_best(terms: list[Tensor]) -> Tensor:
    """Returns the largest term, whose gradient goes to the first of several."""
    return torch.stack(terms).max(0).values


def _alignment(px: Tensor, path: Tensor, durations: Tensor, scores: Tensor) -> Alignment:
    """Reads the alignment from px (B, S, T), the gradient ``path`` of its best path's score, and the tokens' durations
    (B, S)."""
    scores = scores.detach()
    found = path.any(2) & scores.isfinite().unsqueeze(1)
    if not path.shape[2]:  # argmax needs an element
        return Alignment(found.long() - 1, found.long(), found.double(), scores)
    starts = path.argmax(2, keepdim=True)
    confidences = px.gather(2, starts)[..., 0].double().exp()
    return Alignment(
        torch.where(found, starts[..., 0], -1),
        torch.where(found, durations, 0),
        torch.where(found, confidences, 0.0),
        scores,
    )


# --------------------------------------------------------------------------- CTC
@torch.no_grad()
def ctc_align(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int = 0
) -> Alignment:
    """Returns the alignment of CTC's log-probabilities (B, T, C). ``torchaudio.functional.forced_align`` has the first
    arguments, for one sequence.

    Args:
        targets: (B, S), integers in [0, C) other than blank in front of each sequence's end.
        input_lengths, target_lengths: (B,), integers: frames and tokens of each sequence.
        blank: in [0, C).
    """
    op = "rnnt.ctc_align"
    arguments.floating(op, "log_probs", log_probs, "(B, T, C)")
    batch, frames, classes = log_probs.shape
    arguments.class_index(op, "blank", blank, classes)
    length = arguments.integers(op, "targets", targets, (batch, None), log_probs, "log_probs").shape[1]
    limits = lengths.boundary(op, input_lengths, target_lengths, batch, frames, length, log_probs)
    targets = arguments.symbols(op, targets, length, classes, limits, log_probs)
    _, _, ends, frame_counts = limits.unbind(1)
    inside = torch.arange(length, device=targets.device) < ends.unsqueeze(1)
    if arguments.has_values(targets):
        arguments.holds(op, "targets", (targets != blank) | ~inside, "tokens other than blank", targets)

    labels = torch.full((batch, 2 * length + 1), blank, device=targets.device)
    labels[:, 1::2] = targets
    moves, last, scores = _ctc_forward(log_probs, labels, frame_counts, ends)
    path = torch.empty(batch, frames, dtype=torch.int64, device=targets.device)
    for t in range(frames - 1, -1, -1):
        path[:, t] = last
        last = last - moves[t].gather(1, last.unsqueeze(1)).squeeze(1)

    # the states of a path never fall, and stay the same behind the last frame
    states = torch.arange(1, 2 * length + 1, 2, device=targets.device).repeat(batch, 1)
    starts, stops = (torch.searchsorted(path, states, right=right) for right in (False, True))
    stops = torch.minimum(stops, frame_counts.unsqueeze(1))
    on_path = log_probs.gather(2, labels.gather(1, path).unsqueeze(2)).squeeze(2).double().exp()
    sums = F.pad(on_path.cumsum(1), (1, 0))
    found = inside & scores.isfinite().unsqueeze(1)
    durations = torch.where(found, stops - starts, 0)
    means = (sums.gather(1, stops) - sums.gather(1, starts)) / durations
    return Alignment(torch.where(found, starts, -1), durations, torch.where(found, means, 0.0), scores)


def _ctc_forward(log_probs, labels, frame_counts, ends) -> tuple[Tensor, Tensor, Tensor]:
    """Returns by how many states the best path into each state moved on each frame (T, B, 2 S + 1), the state that it
    ends in (B,) and its score (B,)."""
    batch, frames, _ = log_probs.shape
    width = labels.shape[1]
    # entering[:, n, l]: what it costs to come from state l - n
    entering = log_probs.new_full((batch, 3, width), 0.0, dtype=torch.float64)
    state = torch.arange(width, device=labels.device)
    entering[:, 1, :1] = entering[:, 2] = -math.inf
    entering[:, 2, 2:].masked_fill_(labels[:, 2:] != labels[:, :-2], 0.0)
    p = torch.where(state == 0, 0.0, -math.inf).to(torch.float64).repeat(batch, 1)
    moves = torch.empty(frames, batch, width, dtype=torch.uint8, device=labels.device)
    for t in range(frames):
        from_states = F.pad(p, (2, 0), value=-math.inf).unfold(1, width, 1).flip(1)
        # the first frame may begin with the first token
        best, move = (from_states + entering).max(1)
        here = best + log_probs[:, t].gather(1, labels)
        inside = (t < frame_counts).unsqueeze(1)
        p, moves[t] = torch.where(inside, here, p), move * inside
    of_ends = torch.stack((2 * ends - 1, 2 * ends), 1)
    last = p.gather(1, of_ends.clamp(min=0))
    scores, which = last.max(1)
    return moves, of_ends.clamp(min=0).gather(1, which.unsqueeze(1)).squeeze(1), scores
