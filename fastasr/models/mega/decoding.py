# SPDX-License-Identifier: Apache-2.0
"""Runs one decoding step of all blocks at once: by a native call on the CPU, by a captured graph on a CUDA device.

On the CPU a step of a few hypotheses spends its time on reading the weights, 51 MB at ESPnet's default sizes. They are
packed once, in the order in which a step reads them, into one block of memory on huge pages. **This doubles the memory
of the blocks' weights.** To decline it, set ``decoder.packed_decoding = False``; steps then run block by block.

The weights are packed at the first step, and again when the modules have changed, as
:mod:`fastasr.models.common.packed_layers` tells.

Keys and values lie in buffers with room to grow. The returned states are views of these buffers, and the next step
writes one row behind the view instead of copying the history. If two hypotheses continue from one state, the first
takes this row and the second copies the history. Treat states as read-only.

On a CUDA device the step is ``StaticStep`` (``graph_decoding``). One graph is captured per batch size and power of two
of the history's length; it reads the weights of the modules themselves.
"""

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr._recording import is_traced
from fastasr._transforms import is_transformed, transform
from fastasr.models.common import plumbing
from fastasr.models.common.packed_layers import Packed, PackedLayers
from fastasr.models.common.plain import is_plain, is_plain_named, runs
from fastasr.models.mega import activations, graph_decoding, positional_bias
from fastasr.models.mega.damped_ema import State
from fastasr.ops import _dispatch

if TYPE_CHECKING:
    from fastasr.models.mega.decoder import MEGADecoder
    from fastasr.models.mega.feed_forward import NormalizedPositionwiseFeedForward
    from fastasr.models.mega.gated_attention import MEGA
    from fastasr.models.mega.graph_decoding import StaticStep

_STATE = ("ema_state", "prev_key", "prev_value")
_OTHER_STATES = "states that the step does not read, or more positions than the decoder has"
_ASKED_FOR = ("gradients are on", "packed_decoding is False", "it is more than one step")
_POSITIONS = 512  # initial number of positions of a rotary bias, which has no largest length


def step(decoder: "MEGADecoder", labels: Tensor, states: list[State]) -> tuple[Tensor, list[State]] | None:
    """Returns ``decoder.inference(labels, states)`` for labels (B, 1), or None if this path cannot be used.

    It can be used for MEGADecoder, ours or ESPnet's swapped, in evaluation mode, without gradients, with the activation
    swish and layer_norm, on the CPU in float32 or on a CUDA device; :func:`why_not` returns the first reason against
    it. On the CPU the bits depend neither on the number of threads nor on the other hypotheses of the batch.
    """
    if reason := _why_not_now(decoder, labels):
        if not (is_traced() or torch.jit.is_tracing() or decoder.training):
            asked_for = reason in _ASKED_FOR or reason.startswith("backend ")
            _left.note(decoder, reason, "inference", logging.INFO if asked_for else logging.WARNING)
        return None
    plan = _PLANS.of(decoder)
    done = None if plan.reason else _stepped(plan, labels, states)
    if done is None:
        _left.note(decoder, plan.why(decoder) or _OTHER_STATES, "inference")
    return done


def _stepped(plan: "_Plan", labels: Tensor, states: list[State]) -> tuple[Tensor, list[State]] | None:
    """Returns the result of ``step``, or None if the native step cannot read the states."""
    if len(states) != plan.blocks:
        return None
    flat: list[Any] = []
    lengths: list[Any] = []
    for state in states:
        for name in _STATE:
            if name not in state:
                return None
            tensor = state[name]
            if tensor is None:
                tensor = plan.nothing
            elif type(tensor) is not Tensor or tensor.is_cpu is not plan.on_cpu:
                return None
            flat.append(tensor)
        lengths.append(state.get("prev_length"))
    ragged = any(length is not None for length in lengths)
    if ragged:
        if plan.phantom:
            return None
        lengths = [
            torch.full(
                (labels.shape[0],), keys.shape[1] if keys.numel() else 0, dtype=torch.int64, device="cpu"
            )
            if length is None
            else length
            for length, keys in zip(lengths, flat[1::3], strict=True)
        ]
    out = plan.run(labels, flat, lengths if ragged else [])
    if not out:
        return None
    after = [dict(zip(_STATE, out[i : i + 3], strict=True)) for i in range(1, len(out), 3)]
    if ragged:
        for state, length in zip(after, lengths, strict=True):
            _advance(state, length, plan.chunk)
    return out[0], after


def stack(states: list[Tensor]) -> Tensor | None:
    """Stacks histories (T_i, H) to (B, max T, H), with zeros in front of the shorter ones and room to grow. Returns
    None if the native path cannot be used."""
    if is_traced() or is_transformed() or torch.is_grad_enabled() or not _native():
        return None
    if not all(type(t) is Tensor and t.is_cpu and t.dtype is torch.float32 for t in states):
        return None
    return torch.ops.fastasr_cpu.mega_stack.default(states)


def why_not(decoder: "MEGADecoder", labels: Tensor | None = None) -> str:
    """Returns why :func:`step` cannot be used for this decoder now; "" if it can."""
    return _why_not_now(decoder, labels) or _PLANS.of(decoder).reason


def why_not_yet(decoder: "MEGADecoder") -> str | None:
    """Does the same for a call without gradients; None before the first step, which packs the weights."""
    with torch.no_grad():
        return _why_not_now(decoder, None) or _PLANS.why_not(decoder)


def _advance(state: State, length: Tensor, chunk: int) -> None:
    """Updates the state as ``MEGA`` does after one more position of a batch whose sequences differ in length."""
    length = length + 1
    if chunk > 0:
        length = torch.where(length >= chunk, 0, length)
    kept = int(length.max())
    first = state["prev_key"].shape[1] - kept
    state["prev_key"], state["prev_value"] = state["prev_key"][:, first:], state["prev_value"][:, first:]
    if int(length.min()) < kept:
        state["prev_length"] = length


# --------------------------------------------------------------------------- conditions
def _native() -> bool:
    return _dispatch.forced_backend() in ("auto", "cpu") and not _dispatch.why_not_native()


def _serves_natively(decoder: "MEGADecoder") -> bool:
    return decoder.embed.weight.is_cpu


def _why_not_now(decoder: "MEGADecoder", labels: Tensor | None) -> str:
    """Returns a reason that may change from call to call, or ""."""
    if is_traced() or torch.jit.is_tracing():
        return "the call is being compiled or traced"
    if decoder.training:
        return "the decoder is in training mode"
    if not getattr(decoder, "packed_decoding", True):
        return "packed_decoding is False"
    if torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters()):
        return "gradients are on"
    if is_transformed():
        return f"the call is under {transform()}"
    if type(decoder.embed) is not torch.nn.Embedding:  # a user's layer in its place may have no weight
        return "embed is not a plain Embedding"
    weight = decoder.embed.weight
    if weight.device.type not in ("cpu", "cuda"):
        return f"no kernel for {weight.device.type} tensors"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is on"
    if weight.is_cpu and not _native():
        return _dispatch.why_not_native() or f"backend {_dispatch.forced_backend()!r} is forced"
    if not weight.is_cpu and _dispatch.forced_backend() not in ("auto", "cuda"):
        return f"backend {_dispatch.forced_backend()!r} is forced"
    if labels is None:
        return ""
    if type(labels) is not Tensor or labels.ndim != 2 or labels.device != weight.device:
        return "labels are not a tensor of shape (B, 1) on the decoder's device"
    return "" if labels.shape[1] == 1 else "it is more than one step"


def _why_not_ever(decoder: "MEGADecoder") -> str:
    """Returns a reason that holds until the module changes, or ""."""
    parameters = list(decoder.parameters())
    device, dtype = decoder.embed.weight.device, decoder.embed.weight.dtype
    if any(type(p) not in _dispatch.PLAIN for p in parameters):
        return "not all parameters are plain tensors"
    if any(p.device != device or p.dtype != dtype for p in parameters):
        return "parameters differ in device or dtype"
    if device.type == "cpu" and dtype is not torch.float32:
        return "not all parameters are float32"
    if any(p.is_inference() for p in parameters):
        return "parameters were made in inference mode, where changes leave no trace"
    embed = decoder.embed
    if not is_plain(embed, torch.nn.Embedding) or embed.max_norm is not None:
        return "embed is not a plain Embedding"
    if not plumbing.is_layer_norm(decoder.final_norm):
        return "final_norm is not a LayerNorm with weight and bias"
    if not len(decoder.mega_blocks):
        return "there are no blocks"
    for i, (mega, feed_forward) in enumerate(decoder.mega_blocks):
        reason = _why_not_block(mega, feed_forward)
        if reason:
            return f"block {i}: {reason}"
    shapes = {_widths(mega, feed_forward) for mega, feed_forward in decoder.mega_blocks}
    if len(shapes) > 1:
        return "blocks differ in shape"
    return ""


def _why_not_block(mega: "MEGA", feed_forward: "NormalizedPositionwiseFeedForward") -> str:
    from fastasr.models.mega.feed_forward import NormalizedPositionwiseFeedForward
    from fastasr.models.mega.gated_attention import MEGA

    if not runs(mega, MEGA.forward) or not runs(feed_forward, NormalizedPositionwiseFeedForward.forward):
        return "a forward that is not fastasr's"
    if not is_plain_named(mega.multihead_damped_ema, ("MultiHeadDampedEMA",), mega):
        return "the moving average is not MultiHeadDampedEMA"
    if not positional_bias.is_plain(mega.rel_pos_bias, mega):
        return "the bias is neither simple nor rotary"
    for name in ("proj_v", "proj_mx", "proj_h"):
        if not plumbing.is_plain_linear(getattr(mega, name)):
            return f"{name} is not a plain Linear"
    for name in ("linear1", "linear2"):
        if not plumbing.is_plain_linear(getattr(feed_forward, name)):
            return f"{name} is not a plain Linear"
    for module in (mega, mega.multihead_damped_ema, feed_forward):
        if activations.fused_name(module.activation) != "silu":
            return "the activation is not swish"
    dropouts = (
        mega.dropout,
        mega.dropout_attn,
        mega.dropout_ema,
        feed_forward.dropout,
        feed_forward.hidden_dropout,
    )
    if not all(is_plain(dropout, torch.nn.Dropout) for dropout in dropouts):
        return "a dropout is not a plain Dropout"
    for module in (mega, feed_forward):
        if not plumbing.is_layer_norm(module.normalization):
            return "the normalisation is not a LayerNorm with weight and bias"
    return ""


def _widths(
    mega: "MEGA", feed_forward: "NormalizedPositionwiseFeedForward"
) -> tuple[int, int, int, int, int, int, bool]:
    chunk, phantom = max(mega.chunk_size, 0), bool(getattr(mega, "phantom_first_step", True))
    heads = mega.multihead_damped_ema.kernel_projection_matrix.shape[1]
    inner = feed_forward.linear1.weight.shape[0]
    return mega.size, heads, mega.qk_size, mega.v_size, inner, chunk, phantom


# --------------------------------------------------------------------------- the packed decoder
class _Plan(Packed["MEGADecoder"]):
    def __init__(self, decoder: "MEGADecoder") -> None:
        super().__init__(decoder)
        self.blocks, self.on_cpu = len(decoder.mega_blocks), decoder.embed.weight.is_cpu
        self.reason = self.reason or _why_not_ever(decoder)
        if not self.reason:
            self._pack(decoder)

    @staticmethod
    def drops(part: torch.nn.Module) -> bool:
        return bool(getattr(part, "p", 0))

    @torch.no_grad()
    def _pack(self, decoder: "MEGADecoder") -> None:
        size, heads, key, value, inner, self.chunk, self.phantom = _widths(*decoder.mega_blocks[0])
        self.shape = [size, heads, key, value, inner, self.blocks, self.chunk, int(self.phantom)]
        self._native = _serves_natively(decoder)
        self._biases = biases = [mega.rel_pos_bias for mega, _ in decoder.mega_blocks]
        # a simple bias has a largest number of positions, a rotary one has none
        self._limit = min(
            (b.max_positions for b in biases if hasattr(b, "relative_position_bias")), default=0
        )
        if not self._native:
            self._decoder: Callable[[], Any] = weakref.ref(decoder)
            self._graphs: dict[tuple[int, int], graph_decoding.StaticStep] = {}
            self.embed = decoder.embed.weight.detach()
            self.nothing = self.embed.new_empty(0)
            return
        weights: list[Tensor] = []
        eps: list[float] = []
        for mega, feed_forward in decoder.mega_blocks:
            average = mega.multihead_damped_ema
            weights += [average.damping_factor, average.decay_factor, average.ema_expansion_matrix]
            weights += [average.kernel_projection_matrix, average.residual_weight]
            for linear in (mega.proj_v, mega.proj_mx, mega.proj_h):
                weights += _affine(linear)
            weights += [mega.qk_weight, mega.qk_bias, mega.normalization.weight, mega.normalization.bias]
            weights += [*_affine(feed_forward.linear1), *_affine(feed_forward.linear2)]
            weights += [feed_forward.normalization.weight, feed_forward.normalization.bias]
            eps += [mega.normalization.eps, feed_forward.normalization.eps]
        weights += [decoder.final_norm.weight, decoder.final_norm.bias]
        eps.append(decoder.final_norm.eps)
        self.embed = decoder.embed.weight.detach().contiguous()
        self.nothing = self.embed.new_empty(0)
        namespace = torch.ops.fastasr_cpu
        self._op = namespace.mega_step.default
        self._packed = namespace.mega_pack.default(self.shape, [w.contiguous() for w in weights], eps)
        self._lay_bias(self._limit or _POSITIONS)

    def _lay_bias(self, positions: int) -> None:
        """Stores the bias of the offsets -(positions - 1) .. 0, (blocks, positions). A step reads a row's end."""
        rows = [positional_bias.relative(bias, positions)[:positions] for bias in self._biases]
        self._bias = torch.stack(rows).detach().contiguous()

    @torch.no_grad()
    def run(self, labels: Tensor, states: list[Tensor], lengths: list[Tensor]) -> list[Tensor]:
        """Returns [out, then per block the moving average, keys and values], or [] if the step cannot be used."""
        if not self._native:
            return self._replay(labels, states, lengths)
        out = self._op(self._packed, self.shape, self._bias, self.embed, labels, states, lengths)
        if not out and not self._limit:
            needed = 1 + max(keys.shape[1] if keys.ndim == 3 else 0 for keys in states[1::3])
            if needed > self._bias.shape[1]:
                self._lay_bias(1 << needed.bit_length())
                out = self._op(self._packed, self.shape, self._bias, self.embed, labels, states, lengths)
        return out

    def _replay(self, labels: Tensor, states: list[Tensor], lengths: list[Tensor]) -> list[Tensor]:
        if torch.cuda.is_current_stream_capturing():
            return []
        batch, length = labels.shape[0], states[1].shape[1] if states[1].numel() else 0
        if not batch or not self._fit(states, batch, length):
            return []
        return ended(self._static(batch, length + 1).step(labels, states, lengths), self, lengths)

    def _fit(self, states: list[Tensor], batch: int, length: int) -> bool:
        """Says whether the native step accepts these states of ``length`` positions."""
        size, heads, key, value = self.shape[:4]
        limit = self.chunk or self._limit
        if limit and length + 1 > limit:
            return False
        for average, keys, values in zip(*[iter(states)] * 3, strict=True):
            if average.numel() and (
                average.shape[-2:] != (size, heads) or average.numel() != batch * size * heads
            ):
                return False
            if any(t.dtype is not self.embed.dtype for t in (average, keys, values)):
                return False
            if length and (keys.shape != (batch, length, key) or values.shape != (batch, length, value)):
                return False
            if not length and (keys.numel() or values.numel()):
                return False
        return True

    def _static(self, batch: int, positions: int) -> "StaticStep":
        """Returns the captured step for these sizes. If there are too many, the least recently used is dropped."""
        name = (batch, graph_decoding.bucket(positions, self.chunk or self._limit))
        static = self._graphs.pop(name, None)
        if static is None:
            static = graph_decoding.StaticStep(self._decoder(), *name).capture()
            while len(self._graphs) >= graph_decoding.GRAPHS:
                del self._graphs[next(iter(self._graphs))]
        self._graphs[name] = static
        return static


_PLANS = PackedLayers(_Plan)
release = _PLANS.release


def ended(results: list[Tensor], shape: Any, lengths: list[Tensor]) -> list[Tensor]:
    """Returns ``results`` with only those keys and values that are kept at the end of a chunk."""
    if lengths or not shape.chunk or results[2].shape[1] < shape.chunk:
        return results
    kept = slice(shape.chunk - 1, None) if shape.phantom else slice(0)
    return [t if i % 3 == 1 or i == 0 else t[:, kept] for i, t in enumerate(results)]


def _affine(linear: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    weight, bias = linear.weight, linear.bias
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias
