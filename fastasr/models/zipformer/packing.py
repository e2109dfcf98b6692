# SPDX-License-Identifier: Apache-2.0
"""The plan of a layer's native calls, and what a causal layer packs for chunks: matrices and small tables.

``cpu::ZipformerProducts`` (csrc/cpu/streaming/zipformer_layer.h) defines the order of the products and
``cpu::ChunkPlan`` (zipformer_chunk_plan.cpp) that of the tables. This module computes once the data that all chunks
share: the projected positions, the scale of the convolutions within a chunk and exp(log_scale) of the norm.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastasr.models.zipformer.chunk_causal_convolution import ChunkCausalDepthwiseConv1d

if TYPE_CHECKING:
    from fastasr.models.zipformer.layer import ZipformerEncoderLayer


# The products of a layer, in the order in which they run and in which lists have them.
PRODUCTS = (
    "self_attn_weights.in_proj",
    *(
        f"{module}.{projection}"
        for module in (
            *("feed_forward1", "nonlin_attention", "self_attn1", "conv_module1", "feed_forward2"),
            *("self_attn2", "conv_module2", "feed_forward3"),
        )
        for projection in ("in_proj", "out_proj")
    ),
)


class EncoderSizes(NamedTuple):
    """The sizes of ``cpu::ChunkShape``: frames at 50 Hz, the front end's, and the format of the weights."""

    chunk: int
    left: int
    bins: int
    maps1: int
    maps2: int
    maps3: int
    expanded: int
    weights: int


class ZipformerSizes(NamedTuple):
    """The sizes of ``cpu::ZipformerSizes``. The factor is the downsampling."""

    dim: int
    factor: int
    layers: int
    heads: int
    query: int
    value: int
    pos: int
    taps: int
    inner1: int
    inner2: int
    inner3: int
    hidden: int

    @classmethod
    def of(cls, layer: "ZipformerEncoderLayer", factor: int = 1, layers: int = 1) -> "ZipformerSizes":
        """Returns the sizes of a stack of layers like this one."""
        attention, taps = layer.self_attn_weights, layer.conv_module1.depthwise_conv.kernel_size
        return cls(
            dim=attention.in_proj.in_features,
            factor=factor,
            layers=layers,
            heads=attention.num_heads,
            query=attention.query_head_dim,
            value=layer.self_attn1.in_proj.out_features // attention.num_heads,
            pos=attention.pos_head_dim,
            taps=taps if isinstance(taps, int) else taps[0],
            inner1=layer.feed_forward1.in_proj.out_features,
            inner2=layer.feed_forward2.in_proj.out_features,
            inner3=layer.feed_forward3.in_proj.out_features,
            hidden=layer.nonlin_attention.out_proj.in_features,
        )

    def state_shapes(self, streams: int, left: int) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of a layer's six states, as upstream has them. left is in frames of the stack."""
        values, past = (left, streams, self.heads * self.value), (streams, self.dim, self.taps // 2)
        keys, hidden = (left, streams, self.heads * self.query), (1, streams, left, self.hidden)
        return keys, hidden, values, values, past, past


@dataclass
class Packed:
    """The inputs of packing: weights (outputs, inputs) and biases of the products, and small tables."""

    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)

    def product(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weights.append(_floats(weight.flatten(1)))
        self.biases.append(weight.new_zeros(len(weight)) if bias is None else _floats(bias))

    def linears(self, *modules: Any) -> None:
        for module in modules:
            self.product(module.weight, module.bias)

    def table(self, values: Tensor) -> None:
        self.tables.append(_floats(values))


def pack_layer(packed: Packed, layer: "ZipformerEncoderLayer", positions: Tensor, frames: int) -> None:
    """Packs a causal layer for chunks of ``frames``. positions (offsets, pos_dim) are the positional encodings."""
    packed.linears(*map(layer.get_submodule, PRODUCTS))
    packed.table(layer.self_attn_weights.linear_pos.weight.double() @ positions.double().T)
    for conv_module in (layer.conv_module1, layer.conv_module2):
        _pack_convolution(packed, conv_module.depthwise_conv, frames)
    packed.table(layer.bypass_mid.bypass_scale)
    packed.table(layer.bypass.bypass_scale)
    packed.table(layer.norm.bias)
    packed.table(layer.norm.log_scale.exp())


def _pack_convolution(packed: Packed, conv: Any, frames: int) -> None:
    for part in (conv.causal_conv, conv.chunkwise_conv):
        packed.table(part.weight[:, 0].T)
        packed.table(part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias)
    packed.table(ChunkCausalDepthwiseConv1d._get_chunk_scale(conv, frames).T)


def _floats(values: Tensor) -> Tensor:
    return values.detach().to(torch.float32).contiguous()
