# SPDX-License-Identifier: Apache-2.0
"""Packs a causal layer for the native chunk: numbers, matrices and small tables.

``cpu::ChunkPlan`` (csrc/cpu/streaming/zipformer_chunk_plan.cpp) defines the order. This module computes once what is
the same for every chunk: the projected positions, the scale of the convolutions within a chunk and exp(log_scale) of
the norm.
"""

from dataclasses import dataclass, field

import torch

from fastasr.models.zipformer.chunk_causal_convolution import ChunkCausalDepthwiseConv1d


@dataclass
class Packed:
    """``numbers`` describe the shapes; ``products`` are weights (outputs, inputs) and biases in turn."""

    numbers: list = field(default_factory=list)
    products: list = field(default_factory=list)
    tables: list = field(default_factory=list)

    def product(self, weight, bias):
        self.products.append(_floats(weight.flatten(1)))
        self.products.append(weight.new_zeros(len(weight)) if bias is None else _floats(bias))

    def linears(self, *modules):
        for module in modules:
            self.product(module.weight, module.bias)

    def table(self, values):
        self.tables.append(_floats(values))


def numbers_of_layer(layer, factor=1, layers=1):
    """Returns the numbers of ``cpu::ChunkStack``."""
    attention = layer.self_attn_weights
    return [
        attention.in_proj.in_features,
        factor,
        layers,
        attention.num_heads,
        attention.query_head_dim,
        layer.self_attn1.in_proj.out_features // attention.num_heads,
        attention.pos_head_dim,
        layer.conv_module1.depthwise_conv.kernel_size,
        *(getattr(layer, f"feed_forward{i}").in_proj.out_features for i in (1, 2, 3)),
        layer.nonlin_attention.out_proj.in_features,
    ]


def pack_layer(packed, layer, positions, frames):
    """Packs a causal layer for chunks of ``frames``. positions (offsets, pos_dim) are the positional encodings."""
    attention = layer.self_attn_weights
    packed.linears(attention.in_proj, layer.feed_forward1.in_proj, layer.feed_forward1.out_proj)
    packed.linears(layer.nonlin_attention.in_proj, layer.nonlin_attention.out_proj)
    packed.table(attention.linear_pos.weight.double() @ positions.double().T)
    for self_attention, conv_module, feed_forward in (
        (layer.self_attn1, layer.conv_module1, layer.feed_forward2),
        (layer.self_attn2, layer.conv_module2, layer.feed_forward3),
    ):
        for module in (self_attention, conv_module, feed_forward):
            packed.linears(module.in_proj, module.out_proj)
        _pack_convolution(packed, conv_module.depthwise_conv, frames)
    packed.table(layer.bypass_mid.bypass_scale)
    packed.table(layer.bypass.bypass_scale)
    packed.table(layer.norm.bias)
    packed.table(layer.norm.log_scale.exp())


def _pack_convolution(packed, conv, frames):
    for part in (conv.causal_conv, conv.chunkwise_conv):
        packed.table(part.weight[:, 0].T)
        packed.table(part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias)
    packed.table(ChunkCausalDepthwiseConv1d._get_chunk_scale(conv, frames).T)


def _floats(values):
    return values.detach().to(torch.float32).contiguous()
