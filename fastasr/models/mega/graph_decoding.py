# SPDX-License-Identifier: Apache-2.0
"""One decoding step on buffers with fixed addresses, as a CUDA graph needs it.

ESPnet launches 151 kernels per step of four blocks, and the launches take most of the time. Here labels, moving
averages, keys and values lie in buffers of fixed size, and the position is a number on the device. A step therefore
runs the same kernels on the same addresses for every length of the history. It is captured once for a batch size and a
largest history and then replayed with one launch.

States are copied in before a replay, unless they are those that the last step returned, which the buffers still hold.
Each result is copied out after it, since the next step overwrites the buffers. Everything but the capture also runs in
eager PyTorch on the CPU, where it is tested.
"""

import math
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.mega import positional_bias

if TYPE_CHECKING:
    from fastasr.models.mega.damped_ema import MultiHeadDampedEMA
    from fastasr.models.mega.decoder import MEGADecoder
    from fastasr.models.mega.gated_attention import MEGA

SMALLEST = 64  # positions of the shortest history; longer ones take the next power of two
GRAPHS = 8  # captured steps that a decoder keeps


def bucket(positions: int, limit: int) -> int:
    """Returns the buffers' length for a history of ``positions``, which is at most ``limit`` (0: no limit)."""
    rows = max(SMALLEST, 1 << (positions - 1).bit_length())
    return min(rows, limit) if limit else rows


class StaticStep:
    """A step of ``batch`` hypotheses of a decoder over at most ``rows`` positions, including the new one.

    The constructor computes coefficients from the parameters: make another object when the parameters change.
    """

    @torch.no_grad()
    def __init__(self, decoder: "MEGADecoder", batch: int, rows: int) -> None:
        mega: MEGA = decoder.mega_blocks[0][0]
        self.decoder, self.batch, self.rows = decoder, batch, rows
        self.blocks, self.key = len(decoder.mega_blocks), mega.qk_size
        like: Any = {"device": decoder.embed.weight.device, "dtype": decoder.embed.weight.dtype}
        index: Any = {"device": like["device"], "dtype": torch.int64}
        heads = mega.multihead_damped_ema.kernel_projection_matrix.shape[1]
        self.labels = torch.zeros(batch, 1, **index)
        self.length = torch.zeros(1, **index)  # positions before this one
        # how many of the first positions each sequence lacks
        self.absent = torch.zeros(self.blocks, batch, **index)
        self.average = torch.zeros(self.blocks, batch, mega.size, heads, **like)
        self.history = torch.zeros(self.blocks, batch, rows, self.key + mega.v_size, **like)
        self.out = torch.zeros(batch, 1, mega.size, **like)
        self._positions = torch.arange(rows, **index)
        self._coefficients = [_coefficients(m.multihead_damped_ema) for m, _ in decoder.mega_blocks]
        biases = [positional_bias.relative(m.rel_pos_bias, rows)[:rows] for m, _ in decoder.mega_blocks]
        self._bias = torch.stack(biases).to(like["dtype"])  # for the offsets -(rows - 1) .. 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._done: torch.cuda.Event | None = None
        self._last: list[tuple[weakref.ref[Tensor], int]] | None = None
        self._lock = threading.Lock()

    # ----------------------------------------------------------------------- the captured part
    def run(self) -> None:
        """Runs one step on the buffers, which then hold the states after it."""
        positions, length = self._positions, self.length
        offsets = (positions + (self.rows - 1) - length).clamp_(max=self.rows - 1)
        unseen = positions > length
        x = F.embedding(self.labels.squeeze(1), self.decoder.embed.weight)  # (B, D)
        for i, (mega, feed_forward) in enumerate(self.decoder.mega_blocks):
            x = self._mega(
                i, mega, x, self._bias[i][offsets], unseen | (positions < self.absent[i].unsqueeze(1))
            )
            hidden = F.silu(_linear(feed_forward.linear1, x))
            x = _norm(feed_forward.normalization, x + _linear(feed_forward.linear2, hidden))
        self.out.copy_(_norm(self.decoder.final_norm, x).unsqueeze(1))
        self.length.add_(1)

    def _mega(self, i: int, mega: "MEGA", x: Tensor, bias: Tensor, unseen: Tensor) -> Tensor:
        inputs, decay, projection, residual = self._coefficients[i]
        average, history = self.average[i], self.history[i]
        average.mul_(decay).addcmul_(inputs, x.unsqueeze(-1))
        e = F.silu((average * projection).sum(-1) + residual * x)
        update, z, gate, candidate = _linear(mega.proj_mx, e).split(
            [mega.size, mega.qk_size, mega.v_size, mega.size], dim=-1
        )
        query, key = (F.silu(z).unsqueeze(1) * mega.qk_weight + mega.qk_bias).unbind(1)
        row = torch.cat([key, F.silu(_linear(mega.proj_v, x))], dim=-1)
        history.index_copy_(1, self.length, row.unsqueeze(1))
        keys, values = history.split([self.key, mega.v_size], dim=-1)
        scores = torch.bmm(keys, (query * mega.scaling).unsqueeze(-1)).squeeze(-1) + bias  # (B, rows)
        scores = scores.masked_fill(unseen, -math.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        context = torch.bmm(weights.to(values.dtype).unsqueeze(1), values).squeeze(1) * F.silu(gate)
        proposal = F.silu(candidate + _linear(mega.proj_h, context))
        return _norm(mega.normalization, torch.addcmul(x, torch.sigmoid(update), proposal - x))

    # ----------------------------------------------------------------------- around it
    @torch.no_grad()
    def capture(self) -> "StaticStep":
        """Records ``run`` as a CUDA graph, which steps replay from then on. The buffers are undefined afterwards."""
        side = torch.cuda.Stream(self.out.device)
        side.wait_stream(torch.cuda.current_stream(self.out.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries allocate memory and choose kernels at their first calls
                self.length.zero_()
                self.run()
        torch.cuda.current_stream(self.out.device).wait_stream(side)
        self.length.zero_()
        self._graph, self._done = torch.cuda.CUDAGraph(), torch.cuda.Event()
        with torch.cuda.graph(self._graph):
            self.run()
        self._last = None
        return self

    @torch.no_grad()
    def step(self, labels: Tensor, states: list[Tensor], lengths: list[Tensor]) -> list[Tensor]:
        """Returns [out, then per block the moving average, keys and values after the step].

        states: the moving average, keys (B, T, k) and values (B, T, v) of every block, empty tensors where there are
        none. lengths: an empty list, or for every block how many of the T positions each sequence has.
        """
        with self._lock:
            if self._done is not None:  # another stream may have made the last step
                torch.cuda.current_stream(self.out.device).wait_event(self._done)
            length = states[1].shape[1] if states[1].numel() else 0
            self.labels.copy_(labels)
            if lengths or not self._still_there(states):
                self._load(states, lengths, length)
            if self._graph is None:
                self.run()
            else:
                self._graph.replay()
            results = self._results(length + 1, bool(lengths))
            if self._done is not None:
                self._done.record(torch.cuda.current_stream(self.out.device))
            return results

    def _still_there(self, states: list[Tensor]) -> bool:
        if self._last is None:
            return False
        return all(a is b() and _version(a) == v for a, (b, v) in zip(states, self._last, strict=True))

    def _load(self, states: list[Tensor], lengths: list[Tensor], length: int) -> None:
        # rows that are not written must be finite, since a weight of zero times NaN is NaN
        self.history.zero_()
        self.average.zero_()
        self.length.fill_(length)
        self.absent.zero_()
        for i in range(self.blocks):
            average, keys, values = states[3 * i : 3 * i + 3]
            if average.numel():
                self.average[i].copy_(average)
            if length:
                self.history[i, :, :length, : self.key].copy_(keys)
                self.history[i, :, :length, self.key :].copy_(values)
            if lengths:
                self.absent[i].copy_(length - lengths[i], non_blocking=True)

    def _results(self, length: int, ragged: bool) -> list[Tensor]:
        averages = self.average.clone()
        history = self.history[:, :, :length].clone(memory_format=torch.contiguous_format)
        results = [self.out.clone()]
        for average, rows in zip(averages.unbind(), history.unbind(), strict=True):
            results += [average, rows[..., : self.key], rows[..., self.key :]]
        self._last = None if ragged else [(weakref.ref(t), _version(t)) for t in results[1:]]
        return results


def _version(tensor: Tensor) -> int:
    """Returns a number that changes when the tensor is written to. Tensors of inference mode have none: it is 0."""
    return 0 if tensor.is_inference() else tensor._version


def _coefficients(average: "MultiHeadDampedEMA") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns p beta, q, gamma / sqrt(N) and omega of the moving average."""
    p = torch.sigmoid(average.damping_factor)
    inputs, decay = p * average.ema_expansion_matrix, 1.0 - p * torch.sigmoid(average.decay_factor)
    heads = average.kernel_projection_matrix.shape[1]
    projection = average.kernel_projection_matrix * heads**-0.5
    return inputs.squeeze(-1), decay.squeeze(-1), projection, average.residual_weight


def _linear(module: torch.nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def _norm(module: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
