# SPDX-License-Identifier: Apache-2.0
"""Runs a layer in inference in one native call, csrc/bindings/zipformer_layer.cpp.

It runs the kernels of the layer's submodules and gives their bits, without Python and torch's dispatcher, which take
half a millisecond for a layer. The first call of a layer compares an example with the results of its submodules. A
layer that has changed is compared again; :mod:`fastasr.models.common.module_state` tells what counts as a
change.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common.linear import Linear
from fastasr.models.common.packed_layers import PackedLayer, PackedLayers, may_call, note_declined
from fastasr.models.common.plain import runs
from fastasr.models.common.ragged import current
from fastasr.models.zipformer import attention, convolution
from fastasr.models.zipformer.activations import ActivationDropoutAndLinear
from fastasr.models.zipformer.bypass import BypassModule
from fastasr.models.zipformer.nonlin_attention import NonlinAttention
from fastasr.models.zipformer.normalization import BiasNorm
from fastasr.models.zipformer.self_attention import SelfAttention
from fastasr.ops import _gemm, _reduced_weights

if TYPE_CHECKING:
    from fastasr.models.zipformer.layer import ZipformerEncoderLayer

_WAYS = {"torch": 0, "native": 1, "few rows": 2, "bf16": 3, "int8": 4}  # of csrc/bindings/zipformer_layer.cpp

_MODULES: dict[str, Any] = {  # the classes whose forward each part must run
    "self_attn_weights": attention.RelPositionMultiheadAttentionWeights,
    "self_attn1": SelfAttention,
    "self_attn2": SelfAttention,
    "nonlin_attention": NonlinAttention,
    "conv_module1": convolution.ConvolutionModule,
    "conv_module2": convolution.ConvolutionModule,
    "bypass_mid": BypassModule,
    "bypass": BypassModule,
    "norm": BiasNorm,
}
_PAIRS = (
    *("feed_forward1", "nonlin_attention", "self_attn1", "conv_module1", "feed_forward2"),
    *("self_attn2", "conv_module2", "feed_forward3"),
)
_ACTIVATED = {f"feed_forward{i}.out_proj": "SwooshL" for i in (1, 2, 3)}
_ACTIVATED |= {f"conv_module{i}.out_proj": "SwooshR" for i in (1, 2)}
PRODUCTS = (
    *("self_attn_weights.in_proj", "self_attn_weights.linear_pos"),
    *(f"{module}.{projection}" for module in _PAIRS for projection in ("in_proj", "out_proj")),
)
_MODULES |= {name: ActivationDropoutAndLinear if name in _ACTIVATED else Linear for name in PRODUCTS}


def encoded(
    layer: "ZipformerEncoderLayer",
    src: Tensor,
    pos_emb: Tensor,
    chunk_size: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    left_context_chunks: int | None,
    by_submodules: Callable[..., Any],
) -> Tensor | None:
    """Returns the layer's output, or None where its submodules compute it: with gradients, hooks, packed frames,
    autocast or another dtype, where a submodule runs other code, and before all products have been measured.
    ``by_submodules(src, pos_emb, chunk_size, attn_mask, key_padding_mask, left_context_chunks)`` computes the same.
    """
    bias = getattr(layer.norm, "bias", None)
    if not may_call(layer, src, bias) or current() is not None:
        note_declined(layer, src, bias, "forward")
        return None
    native = _LAYERS.of(layer, by_submodules)
    if native.reason:
        _left.note(layer, native.why(layer))
        return None
    if not native.fits(src, pos_emb, chunk_size, attn_mask, key_padding_mask):
        return None
    products = native.products(src, pos_emb)
    if products is None:
        return None
    masks: dict[str, Any] = {
        "key_padding_mask": None,
        "attn_mask": None,
        "chunk_size": -1,
        "left_context_chunks": -1,
    }
    if attn_mask is not None:
        masks["attn_mask"] = attn_mask.contiguous()  # at a lower rate it is a part of the outer one
    if key_padding_mask is not None:
        masks["key_padding_mask"] = key_padding_mask.to(torch.bool).contiguous()
    if chunk_size > 0 and left_context_chunks is not None:
        masks |= {"chunk_size": chunk_size, "left_context_chunks": left_context_chunks}
    y = native.run(products, src.contiguous(), pos_emb.contiguous(), chunk_size, masks)
    attention.draw_for_entropy(
        layer.self_attn_weights, lambda: attention.plain(layer.self_attn_weights, src, pos_emb, masks)
    )
    return y


@dataclass
class _Products:
    """The products of calls of one size: matrices or their copies in fewer bits, and the ways to multiply."""

    weights: list
    ways: list
    first_head_way: int
    copies: list


class _Layer(PackedLayer["ZipformerEncoderLayer"]):
    OPERATIONS, COPIES = "submodules", False

    def _why_not_ever(self, layer: "ZipformerEncoderLayer") -> str:
        parts = dict(layer.named_modules())
        for name, ours in _MODULES.items():
            if name not in parts or not runs(parts[name], ours.forward):
                return f"{name} runs other code than fastasr's"
        for name, activation in _ACTIVATED.items():
            if parts[name].activation != activation:
                return f"{name} has another activation than {activation}"
        return ""

    def _pack(self, layer: "ZipformerEncoderLayer") -> None:
        modules: list[Any] = [layer.get_submodule(name) for name in PRODUCTS]
        self._weights = [module.weight for module in modules]
        none = layer.norm.bias.new_empty(0)
        self._biases = [none if module.bias is None else module.bias for module in modules]
        self._outputs = [len(weight) for weight in self._weights]
        attention = layer.self_attn_weights
        self._heads, self._query_dim = attention.num_heads, attention.query_head_dim
        self._channels, self._positions = self._weights[0].shape[1], attention.linear_pos.in_features
        self._convolutions: list[Any] = []
        for conv_module in (layer.conv_module1, layer.conv_module2):
            h = none.new_empty(1, 1, 2 * self._channels)
            tensors = convolution.kernel_weights(conv_module, h, None, -1)
            if tensors is None or any(tensor is None for tensor in tensors):
                raise ValueError("a convolution that the kernel does not compute")
            self._convolutions += tensors
        self._causal = len(self._convolutions) > 4
        self._bypass_mid, self._bypass = layer.bypass_mid.bypass_scale, layer.bypass.bypass_scale
        self._norm_bias, self._norm_log_scale = layer.norm.bias, layer.norm.log_scale
        self._products: dict[tuple[Any, ...], _Products] = {}

    def _example(self, by_submodules: Callable[..., Any]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Computes two sequences of 5 frames, of which one is shorter, both ways."""
        frames, batch = 5, 2
        src = (
            torch.arange(1.0, frames * batch * self._channels + 1, dtype=torch.float32, device="cpu")
            .mul_(0.7)
            .sin_()
        )
        src = src.view(frames, batch, self._channels)
        pos_emb = (
            torch.arange(1.0, (2 * frames - 1) * self._positions + 1, dtype=torch.float32, device="cpu")
            .mul_(0.3)
            .sin_()
        )
        pos_emb = pos_emb.view(1, -1, self._positions)
        padding = torch.zeros(batch, frames, dtype=torch.bool, device="cpu")
        padding[1, -1] = True
        state = random.getstate()
        expected = by_submodules(src, pos_emb, -1, None, padding, None)
        random.setstate(state)
        masks = {"key_padding_mask": padding, "attn_mask": None, "chunk_size": -1, "left_context_chunks": -1}
        products: Any = self.products(src, pos_emb)
        return [self.run(products, src, pos_emb, -1, masks)], [expected]

    def fits(
        self,
        src: Tensor,
        pos_emb: Tensor,
        chunk_size: int,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
    ) -> bool:
        """Says whether the native call can read these arguments; the submodules raise for wrong ones."""
        frames, batch, channels = src.shape
        return (
            channels == self._channels
            and pos_emb.dtype is torch.float32
            and pos_emb.is_cpu
            and pos_emb.shape[1:] == (2 * frames - 1, self._positions)
            and len(pos_emb) in (1, batch)
            and (chunk_size < 0 or (chunk_size > 0 and self._causal))
            and (key_padding_mask is None or key_padding_mask.is_cpu)
            and (key_padding_mask is None or key_padding_mask.shape == (batch, frames))
            and (attn_mask is None or (attn_mask.dtype is torch.bool and attn_mask.is_cpu))
            and (attn_mask is None or attn_mask.shape in ((frames, frames), (batch, frames, frames)))
        )

    def products(self, src: Tensor, pos_emb: Tensor) -> _Products | None:
        """Returns the products of this call, or None if one has not been measured or is watched."""
        modes = torch.are_deterministic_algorithms_enabled(), _reduced_weights.is_suspended()
        generations = _gemm.generation(), _reduced_weights.generation()
        key = *src.shape[:2], len(pos_emb), torch.get_num_threads(), *modes, *generations
        found = self._products.get(key)
        if found is None:
            found = self._measured(src, pos_emb)
            if found is None:
                return None
            while len(self._products) >= 16:
                self._products.pop(next(iter(self._products)), None)
            self._products[key] = found
        return None if any(copy.watch is not None for copy in found.copies) else found

    def _measured(self, src: Tensor, pos_emb: Tensor) -> _Products | None:
        frames, hidden = len(src), self._weights[PRODUCTS.index("nonlin_attention.out_proj")].shape[1]
        first_head_way = _gemm.known_batched(frames, frames, hidden)
        if first_head_way is None:
            return None
        found = _Products([], [], _WAYS[first_head_way], [])
        if _reduced_weights.copies:
            self._state.compare()
        for name, weight in zip(PRODUCTS, self._weights, strict=True):
            x = pos_emb if name == "self_attn_weights.linear_pos" else src
            copy = _reduced_weights.of(x, weight) if _reduced_weights.copies else None
            if copy is None:
                way = _gemm.chosen_product("forward", x.shape[0] * x.shape[1], *weight.shape)
                found.weights.append(weight)
            else:
                way = copy.format
                found.copies.append(copy)
                found.weights.append(copy.packed)
            if way is None:
                return None
            found.ways.append(_WAYS[way])
        return found

    def run(
        self,
        products: _Products,
        src: Tensor,
        pos_emb: Tensor,
        chunk_size: int,
        masks: dict[str, Any],
    ) -> Tensor:
        return torch.ops.fastasr_cpu.zipformer_layer.default(
            src,
            pos_emb,
            masks["key_padding_mask"],
            masks["attn_mask"],
            products.weights,
            self._biases,
            products.ways,
            self._outputs,
            products.first_head_way,
            self._convolutions,
            self._bypass_mid,
            self._norm_bias,
            self._norm_log_scale,
            self._bypass,
            self._heads,
            self._query_dim,
            masks["chunk_size"],
            masks["left_context_chunks"],
            chunk_size,
        )


_LAYERS = PackedLayers(_Layer)
why_not = _LAYERS.why_not
