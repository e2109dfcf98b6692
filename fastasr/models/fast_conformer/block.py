# SPDX-License-Identifier: Apache-2.0
"""The FastConformer block: half a feed-forward block, attention, convolution, half a feed-forward block, norm.

On a GPU one kernel adds a branch to the stream and normalises the sum for the next branch.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common import plumbing
from fastasr.models.common.plain import any_watched, weight_and_bias
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
        x = hidden_states
        autocast = autocast_dtype(x) is not None
        add_norm = _fused if _is_fused(self, x, autocast) else _by_torch
        if add_norm is _fused and autocast and x.dtype.itemsize == 2:
            x = x.float()  # All blocks after the first get float32, because autocast computes norms in it.
        x, n = add_norm(self.norm_self_att, x, self.feed_forward1(self.norm_feed_forward1(x)), 0.5)
        attended = self.self_attn(
            hidden_states=n, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
        )[0]
        x, n = add_norm(self.norm_conv, x, attended)
        x, n = add_norm(self.norm_feed_forward2, x, self.conv(n, attention_mask=attention_mask))
        update = self.feed_forward2(n)
        if add_norm is _fused and autocast:
            update = update.to(x.dtype)  # the last norm is the stream's, in its dtype
        return add_norm(self.norm_out, x, update, 0.5)[1]


def through_blocks(
    encoder: "FastConformerEncoder", x: Tensor, mask: "Packing | Row | Tensor | None", positions: Tensor
) -> Tensor:
    """Returns x behind the encoder's blocks, of which training leaves some out at random."""
    for layer in encoder.layers:
        if encoder.training and encoder.layerdrop > 0.0 and torch.rand([]) < encoder.layerdrop:
            continue
        x = layer(x, attention_mask=mask, position_embeddings=positions)
    return x


def _is_fused(block: FastConformerBlock, x: Tensor, autocast: bool) -> bool:
    """Says whether ``ops.add_norm`` serves the block. Under autocast it gives a branch the narrower numbers that its
    first layer would cast to: modules with hooks get what upstream gives them."""
    norms = block.norm_self_att, block.norm_conv, block.norm_feed_forward2, block.norm_out
    branches = block.self_attn, block.conv, block.feed_forward2
    return (
        masks.on_gpu(x.device)
        and all(map(plumbing.is_layer_norm, norms))
        and not (autocast and any_watched(branches))
    )


def _fused(norm: torch.nn.LayerNorm, x: Tensor, update: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    if update.dtype is not x.dtype and autocast_dtype(x) is None:  # No layer casts its input here.
        return _by_torch(norm, x, update, scale)
    return ops.add_norm(x, update, *weight_and_bias(norm), norm.eps, scale)


def _by_torch(norm: torch.nn.Module, x: Tensor, update: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    x = torch.add(x, update, alpha=scale)  # one pass
    return x, norm(x)
