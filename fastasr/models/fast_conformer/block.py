# SPDX-License-Identifier: Apache-2.0
"""The FastConformer block: half a feed-forward block, attention, convolution, half a feed-forward block, norm."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastasr.models.common import normed_stream, plumbing
from fastasr.models.common.normed_stream import End, Stream
from fastasr.models.common.plain import any_watched
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import FastConformerAttention
from fastasr.models.fast_conformer.convolution import FastConformerConvolution
from fastasr.models.fast_conformer.feed_forward import FastConformerFeedForward
from fastasr.ops._register import autocast_dtype

if TYPE_CHECKING:
    from fastasr.models.common.ragged import Packing
    from fastasr.models.common.row import Row
    from fastasr.models.fast_conformer.encoder import FastConformerEncoder


class FastConformerBlock(torch.nn.Module):
    """x (B, T, width) -> same shape: x + ½ FF(LN x), x + attention(LN x), x + convolution(LN x), LN(x + ½ FF(LN x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        taps: int = 9,
        bias: bool = True,
        conv_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.feed_forward1 = FastConformerFeedForward(width, hidden, bias, dropout)
        self.self_attn = FastConformerAttention(width, heads, bias, attention_dropout)
        self.conv = FastConformerConvolution(width, taps, conv_bias)
        self.feed_forward2 = FastConformerFeedForward(width, hidden, bias, dropout)
        self.norm_feed_forward1 = torch.nn.LayerNorm(width)
        self.norm_self_att = torch.nn.LayerNorm(width)
        self.norm_conv = torch.nn.LayerNorm(width)
        self.norm_feed_forward2 = torch.nn.LayerNorm(width)
        self.norm_out = torch.nn.LayerNorm(width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: "Packing | Row | Tensor | None" = None,
        position_embeddings: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        return _branches(self, hidden_states, None, **given, **kwargs).normed()[0]


def through_blocks(
    encoder: "FastConformerEncoder", x: Tensor, mask: "Packing | Row | Tensor | None", positions: Tensor
) -> Tensor:
    """Returns x behind the encoder's blocks, of which training leaves some out at random."""
    share = encoder.layerdrop if encoder.training else 0.0
    layers = (layer for layer in encoder.layers if share == 0.0 or torch.rand([]) >= share)
    given: dict[str, Any] = {"attention_mask": mask, "position_embeddings": positions}
    return normed_stream.through(
        layers,
        x,
        lambda layer, x: layer(x, **given),
        partial(_branches, **given),
        lambda layer: layer.norm_feed_forward1 if masks.on_gpu(x.device) and _is_plain(layer) else None,
    )


def _is_plain(layer: Any) -> bool:
    """Says whether a call of this layer does what ``_branches`` and its end do, and its first norm is torch's."""
    return (
        normed_stream.computes(layer, FastConformerBlock)
        and not any_watched((layer, layer.feed_forward1))
        and not (layer.training and getattr(layer, "gradient_checkpointing", False))
        and plumbing.is_layer_norm(layer.norm_feed_forward1)
    )


def _branches(block: FastConformerBlock, x: Tensor, normed: Tensor | None, **given: Any) -> End:
    """Runs the branches. ``normed`` is the first norm of x, or None."""
    stream = Stream(x, _is_fused(block, x))
    if normed is None:
        normed = block.norm_feed_forward1(stream.x)
    n = stream.add(block.norm_self_att, block.feed_forward1(normed), 0.5)
    n = stream.add(block.norm_conv, block.self_attn(hidden_states=n, **given)[0])
    n = stream.add(block.norm_feed_forward2, block.conv(n, attention_mask=given["attention_mask"]))
    return End(stream, block.norm_out, block.feed_forward2(n), 0.5)


def _is_fused(block: FastConformerBlock, x: Tensor) -> bool:
    """Says whether ``ops.add_norm`` serves the block. Under autocast it gives a branch the narrower numbers that its
    first layer would cast to: modules with hooks get what upstream gives them."""
    norms = block.norm_self_att, block.norm_conv, block.norm_feed_forward2, block.norm_out
    branches = block.self_attn, block.conv, block.feed_forward2
    return (
        masks.on_gpu(x.device)
        and all(map(plumbing.is_layer_norm, norms))
        and not (autocast_dtype(x) is not None and any_watched(branches))
    )
