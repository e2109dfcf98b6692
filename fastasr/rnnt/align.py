# SPDX-License-Identifier: Apache-2.0
r"""Forced alignment: the likeliest path of given tokens through the lattice of a transducer, a TDT or CTC.

The recursions are those of the losses with a maximum in place of the logarithm of a sum, step by step over the
anti-diagonals of the lattice of a transducer (``fastasr.ops.rnnt_lattice``) or a TDT (``fastasr.ops.tdt_lattice``), and
over the frames of CTC (Graves et al., 2006). CTC has the states l of blank, token 1, blank, token 2, …, blank:

    p[t, l] = log_probs[t, label of l] + max(p[t-1, l], p[t-1, l-1], p[t-1, l-2])

where l - 2 counts only between two different tokens. One byte per cell remembers which arc into it was the best, and
the path is read from its end.

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

from fastasr.ops._joiner import Activation
from fastasr.ops._lattice_steps import RnntSteps, TdtSteps
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check, joiner, lengths, logprobs, tdt
from fastasr.rnnt._frames import Padded


@dataclass
class Alignment:
    """The places of a batch's tokens. Behind a sequence's last token, and for sequences that cannot be aligned, starts
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
    """Returns the alignment of logits (B, T, S + 1, C). ``rnnt_loss`` describes the arguments."""
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
    activation: Activation = "tanh",
) -> Alignment:
    """Returns the alignment of the joiner activation(am + lm) Wᵀ + bias, without its logits. The arguments are those of
    ``joiner_loss``."""
    op = "rnnt.joiner_align"
    call = am, lm, weight, bias, symbols, termination_symbol, boundary, rnnt_type, use_hat_loss, activation
    with torch.no_grad():
        px, py, boundary = joiner.logprobs_of_joiner(op, *call, False)
    return _through_rnnt(op, px, py, boundary, rnnt_type)


def _through_rnnt(op: str, px: Tensor, py: Tensor, boundary: Tensor | None, rnnt_type: str) -> Alignment:
    """Aligns px (B, S, T) and py (B, S + 1, T) of a joiner."""
    if boundary is not None:
        boundary = boundary.to(torch.int64)
    with torch.no_grad():
        lattice = RnntSteps(*logprobs.lattice(op, px.double(), py.double(), boundary, rnnt_type), boundary)
        chosen = []

        def best(symbol: Tensor, blank: Tensor) -> Tensor:
            chosen.append(symbol > blank)
            return torch.maximum(symbol, blank)

        scores = lattice.scores(lattice.cells(best))
        ends = [(cell[:, 0], lattice.step_of(cell)) for cell in (lattice.begin, lattice.end)]
        moves = [torch.tensor([(1, 0), (1, 1)], device=px.device, dtype=torch.int64)]
        steps, _ = _best_path(px.shape[1], chosen, moves, *ends)
    starts = steps - lattice.row[:-1] if lattice.regular else steps
    return _alignment(px, starts, steps.new_ones(()), steps >= 0, scores)


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
    activation: Activation = "relu",
) -> Alignment:
    """Returns the alignment of the joiner activation(am + lm) Wᵀ + bias, without its logits. The arguments are those of
    ``tdt_joiner_loss``."""
    op = "rnnt.tdt_joiner_align"
    call = am, lm, weight, bias, targets, logit_lengths, target_lengths, blank_token_id, durations, activation
    with torch.no_grad():
        found = tdt.logprobs_of_joiner(op, *call, keep_logits=False)
    return _through_tdt(*found, _check.number(op, "sigma", sigma))


def _through_tdt(
    px: Tensor, py: Tensor, pd: Tensor, durations: Tensor, boundary: Tensor, sigma: float
) -> Alignment:
    with torch.no_grad():
        x, y, z = (t.double() for t in (px, py, pd))
        lattice = TdtSteps(x - sigma, y - sigma, z, durations, boundary)
        chosen = []

        def best(terms: list[Tensor]) -> Tensor:
            scores, which = torch.stack(terms).max(0)  # the first of equal ones
            chosen.append(which.to(torch.uint8))
            return scores

        scores = lattice.scores(best)
        ends = [(cell[:, 0], cell.sum(1)) for cell in (lattice.begin, lattice.end)]
        arcs = [lattice.arcs(k) for k in range(1, max(lattice.durations) + 2)]
        moves = [
            torch.tensor(
                [(0, 0), *((back, token) for _, back, token in each)], device=px.device, dtype=torch.int64
            )
            for each in arcs
        ]
        steps, moved = _best_path(px.shape[2], chosen[1:], moves, *ends)
    return _alignment(px.transpose(1, 2), steps - lattice.s[:-1], moved - 1, steps >= 0, scores)


# --------------------------------------------------------------------------- shared by both
def _best_path(
    tokens: int,
    chosen: Sequence[Tensor],
    moves: Sequence[Tensor],
    begin: tuple[Tensor, Tensor],
    end: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns the step of the cell where each token is emitted (B, S), -1 if none is, and by how many steps the path
    moves on with it.

    Args:
        tokens: S.
        chosen: of each step from the second on, the best arc into each cell (B, S + 1).
        moves: of these steps, the last for all that follow: by how many steps and tokens each arc moves (arcs, 2).
        begin, end: the first and the last cell of the path: tokens before it (B,) and step (B,).
    """
    steps = torch.full((len(begin[0]), tokens + 1), -1, device=begin[0].device, dtype=torch.int64)
    moved = torch.zeros_like(steps)
    s, at = end
    for k in range(len(chosen), 0, -1):
        arc = chosen[k - 1].gather(1, s.unsqueeze(1)).squeeze(1).long()
        on_path = (at == k) & (k > begin[1])
        move = torch.where(on_path.unsqueeze(1), moves[min(k, len(moves)) - 1][arc], 0)
        at, s = at - move[:, 0], s - move[:, 1]
        token = torch.where(move[:, 1] > 0, s, tokens).unsqueeze(1)  # the last column: arcs without token
        steps.scatter_(1, token, at.unsqueeze(1))
        moved.scatter_(1, token, move[:, :1])
    return steps[:, :-1], moved[:, :-1]


def _alignment(px: Tensor, starts: Tensor, durations: Tensor, found: Tensor, scores: Tensor) -> Alignment:
    """Returns the alignment of the tokens that are ``found`` (B, S), with confidences read from px (B, S, T)."""
    found = found & scores.isfinite().unsqueeze(1)
    if not px.shape[2]:  # gather needs at least one element
        return Alignment(found.long() - 1, found.long(), found.double(), scores)
    starts = torch.where(found, starts, -1)
    confidences = px.gather(2, starts.clamp(min=0).unsqueeze(2))[..., 0].double().exp()
    return Alignment(starts, torch.where(found, durations, 0), torch.where(found, confidences, 0.0), scores)


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
    limits = lengths.boundary(op, Padded(batch, frames), input_lengths, target_lengths, length, log_probs)
    targets = arguments.symbols(op, targets, batch, length, classes, limits, log_probs)
    _, _, ends, frame_counts = limits.unbind(1)
    inside = torch.arange(length, device=targets.device, dtype=torch.int64) < ends.unsqueeze(1)
    if arguments.has_values(targets):
        arguments.holds(op, "targets", (targets != blank) | ~inside, "tokens other than blank", targets)

    labels = torch.full((batch, 2 * length + 1), blank, device=targets.device, dtype=torch.int64)
    labels[:, 1::2] = targets
    moves, last, scores = _ctc_forward(log_probs, labels, frame_counts, ends)
    path = torch.empty(batch, frames, dtype=torch.int64, device=targets.device)
    for t in range(frames - 1, -1, -1):
        path[:, t] = last
        last = last - moves[t].gather(1, last.unsqueeze(1)).squeeze(1)

    # the states of a path never fall, and stay the same behind the last frame
    states = torch.arange(1, 2 * length + 1, 2, device=targets.device, dtype=torch.int64).repeat(batch, 1)
    starts, stops = (torch.searchsorted(path, states, right=right) for right in (False, True))
    stops = torch.minimum(stops, frame_counts.unsqueeze(1))
    on_path = log_probs.gather(2, labels.gather(1, path).unsqueeze(2)).squeeze(2).double().exp()
    sums = F.pad(on_path.cumsum(1), (1, 0))
    found = inside & scores.isfinite().unsqueeze(1)
    durations = torch.where(found, stops - starts, 0)
    means = (sums.gather(1, stops) - sums.gather(1, starts)) / durations
    return Alignment(torch.where(found, starts, -1), durations, torch.where(found, means, 0.0), scores)


def _ctc_forward(
    log_probs: Tensor, labels: Tensor, frame_counts: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns by how many states the best path into each state moved on each frame (T, B, 2 S + 1), its last state (B,)
    and its score (B,)."""
    batch, frames, _ = log_probs.shape
    width = labels.shape[1]
    # the cost of coming from l - 2
    differ = log_probs.new_full((batch, width), -math.inf, dtype=torch.float64)
    differ[:, 2:].masked_fill_(labels[:, 2:] != labels[:, :-2], 0.0)
    # It holds two frames in turn. The two columns in front are no states.
    both = log_probs.new_full((2, batch, width + 2), -math.inf, dtype=torch.float64)
    both[0, :, 2] = 0.0  # the first frame may begin with the first token
    moves = torch.empty(frames, batch, width, dtype=torch.uint8, device=labels.device)
    skipping, further = torch.empty_like(differ), torch.empty_like(differ, dtype=torch.bool)
    for t in range(frames):
        before, p = both[t % 2], both[(t + 1) % 2, :, 2:]
        stay, enter, move = before[:, 2:], before[:, 1:-1], moves[t]
        torch.gt(enter, stay, out=move)
        torch.maximum(stay, enter, out=p)
        torch.add(before[:, :-2], differ, out=skipping)
        move.masked_fill_(torch.gt(skipping, p, out=further), 2)
        torch.maximum(p, skipping, out=p)
        p += log_probs[:, t].gather(1, labels)
        inside = (t < frame_counts).unsqueeze(1)
        torch.where(inside, p, stay, out=p)
        move *= inside
    p = both[frames % 2, :, 2:]
    of_ends = torch.stack((2 * ends - 1, 2 * ends), 1)
    last = p.gather(1, of_ends.clamp(min=0))
    scores, which = last.max(1)
    return moves, of_ends.clamp(min=0).gather(1, which.unsqueeze(1)).squeeze(1), scores
