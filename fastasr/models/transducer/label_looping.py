# SPDX-License-Identifier: Apache-2.0
"""Greedy search of a transducer over a batch: for each sequence, at frame t and with the predictor's output g,

    logits = head act(f[t] + g)     token = argmax over tokens     duration = durations[argmax over durations]
    blank:   t moves by the duration, at least by 1; without durations by 1. g stays.
    a label: t moves by the duration; without durations it stays. g is the predictor's output after the label.

The first of several largest logits wins, and a NaN counts as the largest, as for ``torch.argmax``. RNN-T: Graves
(2012); TDT, with durations: Xu et al. (2023). On the CPU one native call does it (csrc/cpu/decoding/greedy_search.h),
where sequences advance on their own: label looping, Xu et al. (2024). On a GPU a step of all sequences is recorded as a
graph and replayed if there are many frames, and the host waits for the device once in 32 steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr._transforms import is_transformed
from fastasr.models.common.graph_capture import capture
from fastasr.ops import _activation, _dispatch, _weight_formats
from fastasr.ops._weight_formats import FORMATS

ACTIVATIONS = ("relu", "tanh")
_MOST_LAYERS = 8  # the native call's limit
_RECORDED = 256  # A GPU records a step from this many frames on: a recording costs as much as many steps.

# The integers of a sequence; the predictor's last tokens follow, the newest last. A negative token embeds as zeros.
FRAME, SYMBOLS, PENDING, END, TOKENS = range(5)


@dataclass(frozen=True, eq=False)
class Weights:
    """The parameters of a predictor and a joint network.

    The predictor is embedding -> LSTM layers -> linear (-> LayerNorm) or, without LSTM layers, embedding ->
    convolution over the last ``context`` tokens and ReLU, if there is one -> linear.
    """

    embedding: Tensor  # (tokens, E), blank included
    layers: tuple  # as torch.nn.LSTM's, of each w_ih (4 H, inputs), w_hh (4 H, H), b_ih (4 H), b_hh (4 H)
    linear: tuple  # weight (J, H or E) and bias (J)
    head: tuple  # weight (tokens + durations, J) and bias
    activation: str  # of the joint network: "relu" or "tanh"
    convolution: Tensor | None = None  # (E, E / groups, context)
    norm: tuple | None = None  # weight (J), bias (J), eps
    # With them LSTM layers normalise gates and cells: of each weight and bias (4 H), then (H)
    gate_norms: tuple = ()
    gate_eps: float = 0.0
    context: int = 1

    @property
    def hidden(self) -> int:
        return self.layers[0][1].shape[1] if self.layers else 0

    @property
    def durations(self) -> int:
        return len(self.head[0]) - len(self.embedding)

    @property
    def floats(self) -> int:
        """Returns the size of a sequence's state: h and c of each layer, then the predictor's output."""
        return 2 * len(self.layers) * self.hidden + len(self.linear[0])

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Yields names and tensors of the matrices that the native call stores in a format."""
        for i, layer in enumerate(self.layers):
            yield from ((f"LSTM layer {i}", matrix.detach()) for matrix in layer[:2])
        yield "the predictor's linear layer", self.linear[0].detach()
        yield "the head", self.head[0].detach()

    def tensors(self) -> list[Tensor]:
        every = [t for layer in self.layers for t in layer] + [*self.linear, *self.head, self.embedding]
        every += [] if self.convolution is None else [self.convolution]
        every += [t for norm in self.gate_norms for t in norm]
        return every + list(self.norm[:2] if self.norm else ())


@dataclass(frozen=True)
class Rules:
    """The rules by which a search moves.

    Args:
        blank: the blank token. skipped: a token that counts as blank; -1: none.
        durations: values of the durations, in the order of the head's outputs; () for RNN-T.
        most_symbols: labels on one frame before the sequence is moved by 1; 0: any number.
        together: True: every sequence takes as many steps as the longest. Behind its end it goes on with the last of
            all frames, and there is at least one step. False: each ends at its own length.
        blank_penalty: subtracted from blank's logit.
        scored: whether to return the tokens' log-probabilities.
    """

    blank: int
    durations: tuple = ()
    skipped: int = -1
    most_symbols: int = 0
    together: bool = False
    blank_penalty: float = 0.0
    scored: bool = False


@dataclass
class Steps:
    """The steps of a search, (batch, steps): tokens with blanks, the frames that each moved by, log-probabilities or
    None. Sequence n has the first ``counts[n]``; zeros follow."""

    tokens: Tensor
    moves: Tensor
    scores: Tensor | None
    counts: Tensor


class LabelLooping:
    """Greedy search with these weights. ``why_not`` says why it does not run natively: "" if it does.

    Args:
        format: "fp32", "bf16", "fp16" or "int8", the storage of the native call's copy of the matrices; sums are
            float32.

    Raises:
        ValueError: weights do not fit each other or the format, or no such format or activation.
    """

    def __init__(self, weights: Weights, format: str = "fp32") -> None:
        if format not in FORMATS:
            raise ValueError(f"LabelLooping: format: expected one of {', '.join(FORMATS)}, got {format!r}")
        _check_weights(weights)
        self.weights = weights
        self._never = why_not_native(weights)
        if self._never and format != "fp32":
            raise ValueError(f"LabelLooping: format {format} needs the native call: {self._never}")
        if not self._never:
            _weight_formats.check("LabelLooping", format, weights.matrices())
            self._pack(FORMATS[format])

    @property
    def why_not(self) -> str:
        return self._never or why_not_now()

    def _pack(self, format: int) -> None:
        w = self.weights
        group = 0 if w.convolution is None else w.convolution.shape[1]
        activation = _activation.NAMES.index(w.activation)
        self._numbers = [len(w.embedding), w.durations, len(w.linear[0]), w.embedding.shape[1], len(w.layers)]
        self._numbers += [w.hidden, w.context, group, activation]
        self._numbers += [int(w.norm is not None), int(bool(w.gate_norms)), format]
        self._eps = [float(w.norm[2]) if w.norm else 0.0, float(w.gate_eps)]
        vectors = ([w.convolution] if group else []) + list(w.norm[:2] if w.norm else ())
        vectors += [t for norm in w.gate_norms for t in norm]
        with torch.no_grad():
            self._embedding = w.embedding.detach().contiguous()
            parts = [
                [t.detach().contiguous() for t in part]
                for part in ([t for layer in w.layers for t in layer], [*w.linear, *w.head], vectors)
            ]
            self._packed = torch.ops.fastasr_cpu.greedy_pack.default(self._numbers, self._eps, *parts)

    def start(self, batch: int, first: list[int]) -> tuple[Tensor, Tensor]:
        """Returns state (batch, floats) and counters (batch, fields) of sequences before their first frame. ``first``:
        the ``context`` tokens that stand before the first label."""
        w = self.weights
        if len(first) != w.context or not all(token < len(w.embedding) for token in first):
            raise ValueError(f"LabelLooping: first: expected {w.context} tokens, got {list(first)}")
        row = [0, 0, 1, 0, *first]
        counters = torch.tensor([row] * batch, device=w.embedding.device, dtype=torch.int64)
        return w.embedding.new_zeros(batch, w.floats), counters.view(batch, len(row))

    @torch.no_grad()
    def search(
        self, encoded: Tensor, lengths: Tensor, rules: Rules, state: Tensor, counters: Tensor, most_steps: int
    ) -> Steps:
        """Searches encoded (batch, frames, J), projected frames of which ``lengths`` (batch,) are valid. Updates state
        and counters in place and returns Steps, at most ``most_steps`` per sequence.

        A sequence that has moved behind its end keeps that frame in its counters, which the caller may carry over.

        Raises:
            ValueError: shapes, dtypes, lengths or rules do not fit.
        """
        lengths = self._check(encoded, lengths, rules, state, counters, most_steps)
        if self.why_not or is_transformed():
            return _by_operations(self.weights, encoded, lengths, rules, state, counters, most_steps)
        tokens, moves, scores, counts = torch.ops.fastasr_cpu.greedy_search.default(
            self._numbers,
            self._eps,
            self._packed,
            self._embedding,
            encoded if encoded.stride(2) == 1 else encoded.contiguous(),
            lengths,
            list(rules.durations),
            [rules.blank, rules.skipped, rules.most_symbols, int(rules.together), most_steps],
            float(rules.blank_penalty),
            state,
            counters,
            rules.scored,
            torch.get_num_threads(),
        )
        longest = int(counts.max()) if len(counts) else 0
        scores = scores[:, :longest] if rules.scored else None
        return Steps(tokens[:, :longest], moves[:, :longest], scores, counts)

    def _check(
        self, encoded: Tensor, lengths: Tensor, rules: Rules, state: Tensor, counters: Tensor, most_steps: int
    ) -> Tensor:
        """Returns the lengths as int64 on the device of the weights."""
        w, like = self.weights, self.weights.embedding
        joint, tokens = len(w.linear[0]), len(like)
        if encoded.ndim != 3 or encoded.shape[2] != joint:
            raise ValueError(
                f"LabelLooping: encoded: expected (batch, frames, {joint}), got {tuple(encoded.shape)}"
            )
        if encoded.dtype != like.dtype or encoded.device != like.device:
            raise ValueError(
                f"LabelLooping: encoded: expected {like.dtype} on {like.device}, "
                f"got {encoded.dtype} on {encoded.device}"
            )
        batch, frames, _ = encoded.shape
        lengths = torch.as_tensor(lengths, device=like.device)
        if lengths.shape != (batch,) or lengths.is_floating_point():
            raise ValueError(
                f"LabelLooping: lengths: expected {batch} ints, got {lengths.dtype} {tuple(lengths.shape)}"
            )
        lengths = lengths.to(torch.int64).contiguous()
        if batch and (int(lengths.min()) < 0 or int(lengths.max()) > frames):
            raise ValueError(f"LabelLooping: lengths: expected 0 to {frames} frames, got {lengths.tolist()}")
        if not 0 <= rules.blank < tokens:
            raise ValueError(f"LabelLooping: blank: expected a token below {tokens}, got {rules.blank}")
        values = rules.durations
        if len(values) != w.durations or not all(isinstance(v, int) and v >= 0 for v in values):
            raise ValueError(
                f"LabelLooping: durations: expected {w.durations} ints of at least 0, got {values}"
            )
        if rules.most_symbols < 0 or most_steps < 0:
            raise ValueError(
                f"LabelLooping: most_symbols and most_steps must be at least 0, "
                f"got {rules.most_symbols} and {most_steps}"
            )
        if rules.together and not frames:
            raise ValueError("LabelLooping: together: expected at least one frame, got none")
        for name, t, kind, like_start in (
            ("state", state, like.dtype, w.floats),
            ("counters", counters, torch.int64, TOKENS + w.context),
        ):
            if t.shape != (batch, like_start) or t.dtype != kind or not t.is_contiguous():
                raise ValueError(
                    f"LabelLooping: {name}: expected contiguous {kind} ({batch}, {like_start}), "
                    f"got {t.dtype} {tuple(t.shape)}"
                )
        return lengths


def _check_weights(w: Weights) -> None:
    tokens, channels = w.embedding.shape
    joint = len(w.linear[0])
    inputs = channels
    shapes = []
    for w_ih, w_hh, b_ih, b_hh in w.layers:
        gates = 4 * w.hidden
        shapes += [(w_ih, (gates, inputs)), (w_hh, (gates, w.hidden)), (b_ih, (gates,)), (b_hh, (gates,))]
        inputs = w.hidden
    for norm in w.gate_norms:
        shapes += zip(norm, ((4 * w.hidden,), (4 * w.hidden,), (w.hidden,), (w.hidden,)), strict=True)
    outputs = len(w.head[0])
    shapes += [(w.linear[0], (joint, inputs)), (w.linear[1], (joint,))]
    shapes += [(w.head[0], (outputs, joint)), (w.head[1], (outputs,))]
    if w.norm is not None:
        shapes += [(w.norm[0], (joint,)), (w.norm[1], (joint,))]
    group = 0 if w.convolution is None else w.convolution.shape[1]
    if group:
        shapes.append((w.convolution, (channels, group, w.context)))
    wrong = [(tuple(t.shape), shape) for t, shape in shapes if tuple(t.shape) != shape]
    if wrong:
        raise ValueError(f"LabelLooping: weights: expected shape {wrong[0][1]}, got {wrong[0][0]}")
    if len(w.gate_norms) not in (0, len(w.layers)):
        raise ValueError("LabelLooping: weights: expected norms for each LSTM layer or none")
    if outputs < tokens or (w.layers and (group or w.context != 1)) or (group and channels % group):
        raise ValueError("LabelLooping: weights: head, LSTM layers, convolution and context do not fit")
    if w.context > 1 and not group:
        raise ValueError("LabelLooping: weights: a context of several tokens needs a convolution")
    if w.activation not in ACTIVATIONS:
        raise ValueError(f"LabelLooping: activation: expected relu or tanh, got {w.activation!r}")


def why_not_now() -> str:
    """Returns why no search runs natively at this moment, or ""."""
    forced = _dispatch.forced_backend()
    return "" if forced in ("auto", "cpu") else f"the backend {forced} is in force"


def why_not_native(w: Weights) -> str:
    """Returns why a search with these weights cannot run natively, or ""."""
    if why_not := _dispatch.why_not_cpu("greedy_pack", "greedy_search"):
        return why_not
    if any(not t.is_cpu for t in w.tensors()):
        return "not all parameters are on the CPU"
    if any(t.dtype is not torch.float32 for t in w.tensors()):
        return "not all parameters are float32"
    return f"it takes at most {_MOST_LAYERS} LSTM layers" if len(w.layers) > _MOST_LAYERS else ""


# --------------------------------------------------------------------------- the definition, in PyTorch
def _by_operations(
    w: Weights,
    encoded: Tensor,
    lengths: Tensor,
    rules: Rules,
    state: Tensor,
    counters: Tensor,
    most_steps: int,
) -> Steps:
    batch = len(encoded)
    tokens = torch.zeros(batch, most_steps, dtype=torch.int64, device=encoded.device)
    moves, scores = torch.zeros_like(tokens), encoded.new_zeros(tokens.shape, dtype=torch.float32)
    steps = Steps(tokens, moves, scores if rules.scored else None, torch.zeros_like(lengths))
    record, looks = _pace(encoded)
    live, step = _step(w, encoded, lengths, rules, state, counters, steps, looks == 1)
    repeat = step
    while batch and most_steps and live().any():
        if record and repeat is step:
            with torch.cuda.device_of(encoded):
                repeat = record(step)
        for _ in range(looks):
            repeat()
    longest = int(steps.counts.max()) if batch else 0
    kept = None if steps.scores is None else steps.scores[:, :longest]
    return Steps(tokens[:, :longest], moves[:, :longest], kept, steps.counts)


def _pace(encoded: Tensor) -> tuple[Callable[[Callable[[], object]], Callable[[], None]] | None, int]:
    """Returns the recorder of a step, if any, and the number of steps after which the host checks whether all sequences
    have ended, which waits for the device. A graph serves one call, so it must be worth recording."""
    if not encoded.is_cuda:
        return None, 1
    return capture if encoded.shape[1] >= _RECORDED else None, 32


def _step(
    w: Weights,
    encoded: Tensor,
    lengths: Tensor,
    rules: Rules,
    state: Tensor,
    counters: Tensor,
    steps: Steps,
    looking: bool,
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """Returns two functions without arguments: one says which sequences take another step, one takes it. Unless the
    host is ``looking`` whether the predictor must run, they wait for nothing and keep all shapes and addresses, so that
    a CUDA graph can replay the step. Behind the end the step does nothing.
    """
    batch, frames, joint = encoded.shape
    rows = torch.arange(batch, device=encoded.device, dtype=torch.int64)
    durations = torch.tensor(rules.durations or (0,), device=encoded.device, dtype=torch.int64)
    counts, most_steps = steps.counts, steps.tokens.shape[1]

    def live() -> Tensor:
        ended = counters[:, END] > 0 if rules.together else counters[:, FRAME] >= lengths
        ended = ended.all().expand(batch) if rules.together else ended
        return ~ended & (counts < most_steps)

    def step() -> None:
        now = live()
        pending = now & (counters[:, PENDING] == 1)
        if not looking or pending.any():
            predicted = predict(w, counters[:, TOKENS:], state)
            state.copy_(torch.where(pending.unsqueeze(1), predicted, state))
        at = counters[:, FRAME].clamp(max=frames - 1)
        logits = join(w, encoded[rows, at], state[:, state.shape[1] - joint :])
        logits, logits_of_durations = logits[:, : len(w.embedding)], logits[:, len(w.embedding) :]
        logits[:, rules.blank] -= rules.blank_penalty
        token = logits.argmax(-1)
        blank = (token == rules.blank) | (token == rules.skipped)
        if rules.durations:
            moved = durations[logits_of_durations.argmax(-1)]
        else:
            moved = torch.zeros_like(token)
        moved = torch.where(blank, moved.clamp(min=1), moved)
        symbols = (counters[:, SYMBOLS] + 1).masked_fill(blank | (moved > 0), 0)
        if rules.most_symbols:
            forced = symbols >= rules.most_symbols
            moved, symbols = moved.masked_fill(forced, 1), symbols.masked_fill(forced, 0)
        found = [(steps.tokens, token), (steps.moves, moved)]
        if steps.scores is not None:
            found.append((steps.scores, logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0]))
        column = counts.clamp(max=most_steps - 1).unsqueeze(1)
        for kept, value in found:
            value = torch.where(now, value, kept.gather(1, column)[:, 0])
            kept.scatter_(1, column, value.unsqueeze(1))
        counts.add_(now)
        frame = counters[:, FRAME] + moved
        end = torch.where((counters[:, END] == 0) & (frame >= lengths), counts, counters[:, END])
        context = torch.cat((counters[:, TOKENS + 1 :], token.unsqueeze(1)), 1)
        context = torch.where(blank.unsqueeze(1), counters[:, TOKENS:], context)
        waits = (~blank).to(counters.dtype)  # The predictor has read the earlier token there.
        after = torch.cat((torch.stack((frame, symbols, waits, end), 1), context), 1)
        counters.copy_(torch.where(now.unsqueeze(1), after, counters))

    return live, step


def predict(w: Weights, tokens: Tensor, state: Tensor) -> Tensor:
    """Reads the last of tokens (rows, context); returns the state (rows, floats) after it: h and c of each layer, then
    the predictor's output."""
    x = w.embedding[tokens.clamp(min=0)] * (tokens >= 0).unsqueeze(-1)
    new = []
    if w.convolution is not None:
        channels, group, _ = w.convolution.shape
        x = F.conv1d(x.transpose(1, 2), w.convolution, groups=channels // group).relu().transpose(1, 2)
    x = x[:, -1]
    for i, (w_ih, w_hh, b_ih, b_hh) in enumerate(w.layers):
        h, c = state[:, 2 * i * w.hidden : 2 * (i + 1) * w.hidden].chunk(2, 1)
        if w.gate_norms:
            gates = F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
            x, c = _normalized_cell(gates, c, w.gate_norms[i], w.gate_eps)
        else:
            x, c = torch.lstm_cell(x, (h, c), w_ih, w_hh, b_ih, b_hh)
        new += [x, c]
    g = F.linear(x, *w.linear)
    return torch.cat((*new, F.layer_norm(g, g.shape[-1:], *w.norm) if w.norm else g), 1)


def _normalized_cell(
    gates: Tensor, c: Tensor, norms: tuple[Tensor, ...], eps: float
) -> tuple[Tensor, Tensor]:
    gate_weight, gate_bias, cell_weight, cell_bias = norms
    i, f, v, o = F.layer_norm(gates, gates.shape[1:], gate_weight, gate_bias, eps).chunk(4, 1)
    c = F.layer_norm(f.sigmoid() * c + i.sigmoid() * v.tanh(), c.shape[1:], cell_weight, cell_bias, eps)
    return o.sigmoid() * c.tanh(), c


def join(w: Weights, frames: Tensor, predictions: Tensor) -> Tensor:
    """Two of (rows, J) -> logits (rows, tokens + durations)."""
    return F.linear(getattr(torch, w.activation)(frames + predictions), *w.head)
