# SPDX-License-Identifier: Apache-2.0
"""The FastConformer block: half a feed-forward block, attention, convolution, half a feed-forward block, norm.

On a GPU one kernel adds a branch to the stream and normalises the sum for the next branch.
"""

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from fastasr import ops
from fastasr._recording import recording
from fastasr.models.common import plumbing
from fastasr.models.common.plain import any_watched, has_known_forward, runs, weight_and_bias
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
        return _end(self, *_branches(self, hidden_states, None, **given, **kwargs))[0]


def through_blocks(
    encoder: "FastConformerEncoder", x: Tensor, mask: "Packing | Row | Tensor | None", positions: Tensor
) -> Tensor:
    """Returns x behind the encoder's blocks, of which training leaves some out at random.

    On a GPU one kernel computes the last norm of a block and the first of the next.
    """
    share = encoder.layerdrop if encoder.training else 0.0
    layers = (layer for layer in encoder.layers if share == 0.0 or torch.rand([]) >= share)
    given: dict[str, Any] = {"attention_mask": mask, "position_embeddings": positions}
    layer, normed = next(layers, None), None
    while layer is not None:
        if masks.on_gpu(x.device) and _is_plain(layer):
            ends = _branches(layer, x, normed, **given)
            follower = next(layers, None)
            joined = follower is not None and _is_plain(follower)
            x, normed = _end(layer, *ends, follower if joined else None)
        else:
            x = layer(x, **given)
            follower = next(layers, None)
        layer = follower
    return x


def _is_plain(layer: Any) -> TypeGuard[FastConformerBlock]:
    """Says whether a call of this layer does what ``_branches`` and ``_end`` do, and its first norm is torch's."""
    return (
        _runs_ours(layer)
        and not any_watched((layer, layer.feed_forward1))
        and not (layer.training and getattr(layer, "gradient_checkpointing", False))
        and plumbing.is_layer_norm(layer.norm_feed_forward1)
    )


def _runs_ours(layer: torch.nn.Module) -> bool:
    """Says whether the layer runs ``FastConformerBlock.forward``. In a recording of all blocks that includes layers
    which would record their own calls: only ``accelerate`` binds a forward to a block of fastasr's."""
    if runs(layer, FastConformerBlock.forward):
        return True
    bound = vars(layer).get("forward")
    if recording() is None or bound is None or not has_known_forward(layer):
        return False
    behind = getattr(bound.__func__.fastasr_forward, "__wrapped__", None)
    return type(layer) is FastConformerBlock or behind is FastConformerBlock.forward


def _branches(
    block: FastConformerBlock, x: Tensor, normed: Tensor | None, **given: Any
) -> tuple[Tensor, Tensor, bool]:
    """Returns the stream in front of the block's last sum, the update that it adds by half, and whether kernels add.
    ``normed`` is the first norm of x, or None."""
    autocast = autocast_dtype(x) is not None
    fused = _is_fused(block, x, autocast)
    add_norm = _fused if fused else _by_torch
    if fused and autocast and x.dtype.itemsize == 2:
        x = x.float()  # All blocks after the first get float32, because autocast computes norms in it.
    if normed is None:
        normed = block.norm_feed_forward1(x)
    x, n = add_norm(block.norm_self_att, x, block.feed_forward1(normed), 0.5)
    x, n = add_norm(block.norm_conv, x, block.self_attn(hidden_states=n, **given)[0])
    update = block.conv(n, attention_mask=given["attention_mask"])
    x, n = add_norm(block.norm_feed_forward2, x, update)
    return x, block.feed_forward2(n), fused


def _end(
    block: FastConformerBlock,
    x: Tensor,
    update: Tensor,
    fused: bool,
    follower: FastConformerBlock | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the block's output, and its first norm in the ``follower`` where one kernel computes both."""
    autocast, norm = autocast_dtype(x) is not None, block.norm_out
    if fused and follower is not None and (autocast or update.dtype is x.dtype):
        following = follower.norm_feed_forward1
        parameters = *weight_and_bias(norm), *weight_and_bias(following)
        return ops.add_two_norms(x, update, *parameters, norm.eps, following.eps, 0.5)
    if fused and autocast:
        # The stream takes the update's place, so that the norm has its dtype: x + u / 2 is half of u + 2 x, and a norm
        # is the same of a row and of its double.
        return ops.add_norm(update, x, *weight_and_bias(norm), 4.0 * norm.eps, 2.0)[1], None
    return (_fused if fused else _by_torch)(norm, x, update, 0.5)[1], None


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
