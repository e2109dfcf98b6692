# SPDX-License-Identifier: Apache-2.0
"""Runs a layer in inference in one native call, a whole sequence or a chunk of a stream.

Whole sequences (csrc/bindings/zipformer_layer.cpp), padded or recordings without padding, run the kernels of the
layer's submodules on the layer's own weights and give their bits, without Python and torch's dispatcher, which take
half a millisecond for a layer. A chunk (``layer_step`` in csrc/cpu/streaming/zipformer_chunk.h) reads packed weights;
states stay upstream's tensors. The first call of either kind compares an example with the results of the submodules.
:mod:`fastasr.models.common.packed_layers` tells when that is done again, what packing costs and how to decline it.
"""

import random
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common import layer_products
from fastasr.models.common.linear import Linear
from fastasr.models.common.packed_layers import PackedLayer, PackedLayers, may_call, may_serve, note_declined
from fastasr.models.common.plain import is_plain, runs
from fastasr.models.common.ragged import Packing, current, in_use
from fastasr.models.zipformer import attention, convolution
from fastasr.models.zipformer.activations import ActivationDropoutAndLinear
from fastasr.models.zipformer.bypass import BypassModule
from fastasr.models.zipformer.nonlin_attention import NonlinAttention
from fastasr.models.zipformer.normalization import BiasNorm
from fastasr.models.zipformer.packing import PRODUCTS, Packed, ZipformerSizes, pack_layer
from fastasr.models.zipformer.self_attention import SelfAttention
from fastasr.ops import _gemm

if TYPE_CHECKING:
    from fastasr.models.zipformer.layer import ZipformerEncoderLayer

_native = torch.ops.fastasr_cpu

# The rows of a chunk are frames times streams. With more rows, reading the weights no longer dominates.
MOST_ROWS = 128

# The number of chunk sizes for which a layer keeps its small tables.
CHUNK_SIZES = 4

_POSITIONS = "self_attn_weights.linear_pos"
_ALL_PRODUCTS = (*PRODUCTS, _POSITIONS)

# The classes whose forward each part must run in a whole sequence, and whose streaming_forward, if any, in a chunk.
_PARTS: dict[str, Any] = {
    "self_attn_weights": attention.RelPositionMultiheadAttentionWeights,
    "self_attn1": SelfAttention,
    "self_attn2": SelfAttention,
    "nonlin_attention": NonlinAttention,
    "conv_module1": convolution.ConvolutionModule,
    "conv_module2": convolution.ConvolutionModule,
}
_ACTIVATED = {f"feed_forward{i}.out_proj": "SwooshL" for i in (1, 2, 3)}
_ACTIVATED |= {f"conv_module{i}.out_proj": "SwooshR" for i in (1, 2)}
_OF_SEQUENCES = _PARTS | {"bypass_mid": BypassModule, "bypass": BypassModule, "norm": BiasNorm}
_OF_SEQUENCES |= {
    name: ActivationDropoutAndLinear if name in _ACTIVATED else Linear for name in _ALL_PRODUCTS
}


def encode(
    layer: "ZipformerEncoderLayer",
    src: Tensor,
    pos_emb: Tensor,
    chunk_size: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    left_context_chunks: int | None,
    by_submodules: Callable[..., Any],
) -> Tensor | None:
    """Returns the layer's output, or None where its submodules compute it: with gradients, hooks, autocast or another
    dtype, where a submodule runs other code, and before all products have been measured.
    ``by_submodules(src, pos_emb, chunk_size, attn_mask, key_padding_mask, left_context_chunks)`` computes the same.
    """
    bias = getattr(layer.norm, "bias", None)
    if not may_call(layer, src, bias):
        note_declined(layer, src, bias, "forward")
        return None
    native = _SEQUENCES.of(layer, by_submodules)
    if native.reason:
        _left.note(layer, native.why(layer))
        return None
    chunked, packing = chunk_size > 0 and left_context_chunks is not None, current()
    masks: dict[str, Any] = {
        "key_padding_mask": key_padding_mask if key_padding_mask is None else key_padding_mask.to(torch.bool),
        "attn_mask": attn_mask,
        "chunk_size": chunk_size if chunked else -1,
        "left_context_chunks": left_context_chunks if chunked else -1,
    }
    call = src, pos_emb, chunk_size, masks, packing.lengths if isinstance(packing, Packing) else []
    if not native.fits(*call) or (products := native.products(*call)) is None:
        return None
    y = native.run(products, *call)
    attention.draw_for_entropy(
        layer.self_attn_weights, lambda: attention.plain(layer.self_attn_weights, src, pos_emb, masks)
    )
    return y


def step(
    layer: "ZipformerEncoderLayer",
    src: Tensor,
    pos_emb: Tensor,
    states: Sequence[Tensor],
    left_context_len: int,
    masked: Tensor | None,
    by_submodules: Callable[..., Any],
) -> list[Tensor] | None:
    """Returns [output, the six new states] of ``layer.streaming_forward``, or None if the native call cannot be used.

    It can be used for layers in eval mode, without gradients, in float32 on the CPU, whose submodules run our code, and
    for chunks of at most 128 rows. ``by_submodules`` is a function that computes the same by the submodules.
    """
    bias = getattr(layer.norm, "bias", None)
    if not may_serve(layer, src, bias):
        note_declined(layer, src, bias, "streaming_forward")
        return None
    if src.shape[0] * src.shape[1] > MOST_ROWS:
        return None
    native = _CHUNKS.of(layer, by_submodules)
    if native.reason or not native.fits(src, pos_emb, states, left_context_len, masked):
        reason = native.why(layer) or "states, masks or positions that the native call does not read"
        _left.note(layer, reason, "streaming_forward")
        return None
    return native.run(src, pos_emb, states, left_context_len, masked)


def why_not(layer: torch.nn.Module) -> dict[str, str | None]:
    """Returns by method why its native call cannot be used: "" if it can, None before the first call."""
    return {"forward": _SEQUENCES.why_not(layer), "streaming_forward": _CHUNKS.why_not(layer)}


def _is_mask(mask: Tensor | None, *shapes: tuple[int, ...]) -> bool:
    return mask is None or (mask.dtype is torch.bool and mask.is_cpu and mask.shape in shapes)


def _wave(step: float, *shape: int) -> Tensor:
    """Returns sin(step n) for n = 1, 2, … in this shape."""
    n = torch.Size(shape).numel()
    return torch.arange(1.0, n + 1, dtype=torch.float32, device="cpu").mul_(step).sin_().view(shape)


class _Sequences(PackedLayer["ZipformerEncoderLayer"]):
    OPERATIONS, COPIES = "submodules", False

    def _why_not_ever(self, layer: "ZipformerEncoderLayer") -> str:
        parts = dict(layer.named_modules())
        for name, ours in _OF_SEQUENCES.items():
            if name not in parts or not runs(parts[name], ours.forward):
                return f"{name} runs other code than fastasr's"
        for name, activation in _ACTIVATED.items():
            if parts[name].activation != activation:
                return f"{name} has another activation than {activation}"
        return ""

    def _pack(self, layer: "ZipformerEncoderLayer") -> None:
        self.sizes = ZipformerSizes.of(layer)
        modules: list[Any] = [layer.get_submodule(name) for name in _ALL_PRODUCTS]
        none = layer.norm.bias.new_empty(0)
        self._weights = [module.weight for module in modules]
        self._biases = [none if module.bias is None else module.bias for module in modules]
        self._positions = layer.self_attn_weights.linear_pos.in_features
        self._tables: list[Any] = []
        for conv_module in (layer.conv_module1, layer.conv_module2):
            h = none.new_empty(1, 1, 2 * self.sizes.dim)
            tensors = convolution.kernel_weights(conv_module, h, None, -1)
            if tensors is None or any(tensor is None for tensor in tensors):
                raise ValueError("a convolution that the kernel does not compute")
            self._tables += tensors
        self._causal = len(self._tables) > 4
        self._tables += [layer.bypass_mid.bypass_scale, layer.bypass.bypass_scale]
        self._tables += [layer.norm.bias, layer.norm.log_scale]
        self._products: dict[tuple[Any, ...], layer_products.Products] = {}

    def _example(self, by_submodules: Callable[..., Any]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Computes two sequences of 5 frames, of which one is shorter, both ways."""
        frames, batch = 5, 2
        src = _wave(0.7, frames, batch, self.sizes.dim)
        pos_emb = _wave(0.3, 1, 2 * frames - 1, self._positions)
        padding = torch.zeros(batch, frames, dtype=torch.bool, device="cpu")
        padding[1, -1] = True
        state = random.getstate()
        with in_use(None):
            expected = by_submodules(src, pos_emb, -1, None, padding, None)
        random.setstate(state)
        masks = {"key_padding_mask": padding, "attn_mask": None, "chunk_size": -1, "left_context_chunks": -1}
        call: Any = src, pos_emb, -1, masks, []
        products: Any = self.products(*call)
        return [self.run(products, *call)], [expected]

    def fits(
        self, src: Tensor, pos_emb: Tensor, chunk_size: int, masks: dict[str, Any], lengths: list[int]
    ) -> bool:
        """Says whether the native call can read these arguments; the submodules raise for wrong ones. With ``lengths``
        src is (N, 1, channels), the frames of recordings of these lengths."""
        frames, batch, channels = src.shape
        padding, mask = masks["key_padding_mask"], masks["attn_mask"]
        if lengths and not (sum(lengths) == frames and batch == 1 and padding is None and mask is None):
            return False
        rows = 2 * max(lengths, default=frames) - 1
        return (
            channels == self.sizes.dim
            and pos_emb.dtype is torch.float32
            and pos_emb.is_cpu
            and pos_emb.shape in ((1, rows, self._positions), (batch, rows, self._positions))
            and (chunk_size < 0 or (chunk_size > 0 and self._causal))
            and _is_mask(padding, (batch, frames))
            and _is_mask(mask, (frames, frames), (batch, frames, frames))
        )

    def products(
        self, src: Tensor, pos_emb: Tensor, chunk_size: int, masks: dict[str, Any], lengths: list[int]
    ) -> layer_products.Products | None:
        """Returns the products of this call and the way of the first head's, or None if one has not been measured or
        is watched."""
        key = *src.shape[:2], *pos_emb.shape[:2], bool(lengths), *layer_products.key()
        found = self._products.get(key)
        if found is None:
            frames = len(src)
            first_head = "torch" if lengths else _gemm.known_batched(frames, frames, self.sizes.hidden)
            inputs = (pos_emb if name == _POSITIONS else src for name in _ALL_PRODUCTS)
            found = layer_products.of(self._state, zip(inputs, self._weights, strict=True))
            if found is None or first_head is None:
                return None
            found.ways.append(layer_products.WAYS[first_head])
            while len(self._products) >= 16:
                self._products.pop(next(iter(self._products)), None)
            self._products[key] = found
        return None if found.watched() else found

    def run(
        self,
        products: layer_products.Products,
        src: Tensor,
        pos_emb: Tensor,
        chunk_size: int,
        masks: dict[str, Any],
        lengths: list[int],
    ) -> Tensor:
        padding, mask = masks["key_padding_mask"], masks["attn_mask"]
        return _native.zipformer_layer.default(
            self.sizes,
            src.contiguous(),
            pos_emb.contiguous(),
            padding if padding is None else padding.contiguous(),
            mask if mask is None else mask.contiguous(),  # at a lower rate it is a part of the outer one
            lengths,
            products.weights,
            self._biases,
            products.ways,
            self._tables,
            masks["chunk_size"],
            masks["left_context_chunks"],
            chunk_size,
        )


class _Chunks(PackedLayer["ZipformerEncoderLayer"]):
    METHODS, OPERATIONS = ("forward", "streaming_forward"), "submodules"

    def __init__(self, layer: "ZipformerEncoderLayer", by_submodules: Callable[..., Any]) -> None:
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._layer: Callable[[], Any] = weakref.ref(layer)
        super().__init__(layer, by_submodules)

    def _why_not_ever(self, layer: "ZipformerEncoderLayer") -> str:
        for name, ours in _PARTS.items():
            if not runs(getattr(layer, name), ours.streaming_forward, "streaming_forward"):
                return f"{name} runs other code than fastasr's"
        for name in _ALL_PRODUCTS:
            if name not in _ACTIVATED and not is_plain(layer.get_submodule(name), torch.nn.Linear, Linear):
                return f"{name} is not a plain Linear"
        conv = layer.conv_module1.depthwise_conv
        if type(conv).__name__ != "ChunkCausalDepthwiseConv1d" or conv.kernel_size < 3:
            return "its convolutions are not causal, or of one tap"
        return ""

    def _pack(self, layer: "ZipformerEncoderLayer") -> None:
        self.sizes = ZipformerSizes.of(layer)
        self._positions = layer.self_attn_weights.linear_pos.in_features
        packed = Packed()
        pack_layer(packed, layer, layer.norm.bias.new_zeros(1, self._positions), 1)
        (self._weights,) = _native.zipformer_chunk_pack.default(self.sizes, 1, 0, packed.weights, [], [])

    def _example(self, by_submodules: Callable[..., Any]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Computes a chunk of 3 frames with 5 frames of left context both ways."""
        frames, left = 3, 5
        src = _wave(0.7, frames, 1, self.sizes.dim)
        pos_emb = _wave(0.3, 1, left + 2 * frames - 1, self._positions)
        shapes = self.sizes.state_shapes(1, left)
        states = [_wave(0.9 + 0.1 * i, *shape) for i, shape in enumerate(shapes)]
        masked = torch.zeros(1, left + frames, dtype=torch.bool, device="cpu")
        masked[:, [1, -1]] = True
        got = self.run(src, pos_emb, states, left, masked)
        self._tables.clear()
        return got, by_submodules(src, pos_emb, states, left, masked)

    def fits(
        self, src: Tensor, pos_emb: Tensor, states: Sequence[Tensor], left: int, masked: Tensor | None
    ) -> bool:
        """Says whether the native call can read these arguments without conversion."""
        frames, streams, dim = src.shape
        return (
            dim == self.sizes.dim
            and pos_emb.shape == (1, left + 2 * frames - 1, self._positions)
            and all(
                state.shape == shape and state.dtype is torch.float32 and state.is_cpu
                for state, shape in zip(states, self.sizes.state_shapes(streams, left), strict=True)
            )
            and _is_mask(masked, (streams, left + frames))
        )

    def run(
        self, src: Tensor, pos_emb: Tensor, states: Sequence[Tensor], left: int, masked: Tensor | None
    ) -> list[Tensor]:
        return _native.zipformer_layer_step.default(
            self.sizes,
            left,
            self._weights,
            self._vectors(src.shape[0], left, pos_emb),
            src.contiguous(),
            [state.contiguous() for state in states],
            None if masked is None else masked.contiguous(),
            torch.get_num_threads(),
        )

    def _vectors(self, frames: int, left: int, pos_emb: Tensor) -> Tensor:
        """Returns biases, norms, convolutions and projected positions for chunks of ``frames``."""
        known = self._tables.get((frames, left))
        if known is not None and torch.equal(known[0], pos_emb):
            return known[1]
        packed = Packed()
        with torch.no_grad():
            pack_layer(packed, self._layer(), pos_emb[0], frames)
        vectors = _native.zipformer_chunk_pack.default(
            self.sizes, frames, left, [], packed.biases, packed.tables
        )[0]
        while len(self._tables) >= CHUNK_SIZES:
            del self._tables[next(iter(self._tables))]
        self._tables[frames, left] = pos_emb.clone(), vectors
        return vectors


_SEQUENCES, _CHUNKS = PackedLayers(_Sequences), PackedLayers(_Chunks)
