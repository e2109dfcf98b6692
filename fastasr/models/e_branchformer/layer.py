# SPDX-License-Identifier: Apache-2.0
"""The E-Branchformer layer: feed-forward, attention and cgMLP side by side, merge, feed-forward, norm."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr.models.common import plumbing
from fastasr.models.common.normed_stream import End, Stream, computes
from fastasr.models.common.plain import is_watched, runs
from fastasr.models.common.ragged import on_gpu
from fastasr.models.common.row import Row
from fastasr.models.e_branchformer import merge as merging
from fastasr.models.e_branchformer.attention import RelPositionMultiHeadedAttention
from fastasr.models.e_branchformer.cgmlp import FeedForwardConvGated, is_layer_norm
from fastasr.models.e_branchformer.feed_forward import PositionwiseFeedForward
from fastasr.ops._register import autocast_dtype


class EBranchformerLayer(torch.nn.Module):
    """A layer with RETURNN's options and ESPnet's attribute names and call.

    State dicts of ESPnet's ``EBranchformerEncoderLayer`` load unchanged.

    Args:
        out_dim: the model's width.
        ff_dim: width of the feed-forward blocks; default 4 out_dim.
        ff_activation: name or module of the feed-forward blocks' activation.
        dropout: rate of the dropout after every branch and within the feed-forward blocks and the cgMLP.
        num_heads, att_dropout: heads of the attention and the dropout rate of its weights.
        cgmlp: a module in place of the cgMLP, or None. It takes x, with positions a pair of both, and the mask.
        cgmlp_ff_dim: width of the gated half (half of ESPnet's ``cgmlp_linear_units``); default 3 out_dim.
        cgmlp_conv_kernel, merge_conv_kernel: taps of the convolutions, odd.
        self_att: a module in place of the attention, called as ``self_att(x, x, x, pos_emb, mask)``, or None.
        norm: makes a norm from its width; default LayerNorm with ESPnet's epsilon of 1e-12 (RETURNN's is 1e-6).
        use_ffn, macaron: whether there is a feed-forward block at the end, and one at the start too. If there are two,
            the output of each is multiplied by 1/2.
        cgmlp_options: further arguments of :class:`FeedForwardConvGated`.
    """

    depthwise_conv_fusion: torch.nn.Conv1d
    merge_proj: torch.nn.Linear

    def __init__(
        self,
        out_dim: int = 512,
        *,
        ff_dim: int | None = None,
        ff_activation: str | torch.nn.Module = "silu",
        dropout: float = 0.1,
        num_heads: int = 4,
        self_att: torch.nn.Module | None = None,
        att_dropout: float = 0.1,
        cgmlp: torch.nn.Module | None = None,
        cgmlp_ff_dim: int | None = None,
        cgmlp_conv_kernel: int = 31,
        merge_conv_kernel: int = 3,
        norm: Callable[[int], torch.nn.Module] | None = None,
        use_ffn: bool = True,
        macaron: bool = True,
        zero_triu: bool = False,
        cgmlp_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.size = out_dim
        ff_dim = 4 * out_dim if ff_dim is None else ff_dim
        make_norm = norm if norm is not None else lambda width: torch.nn.LayerNorm(width, eps=1e-12)
        if self_att is None:
            self_att = RelPositionMultiHeadedAttention(num_heads, out_dim, att_dropout, zero_triu)
        self.attn = self_att
        if cgmlp is None:
            cgmlp = FeedForwardConvGated(
                out_dim,
                ff_dim=cgmlp_ff_dim,
                kernel_size=cgmlp_conv_kernel,
                dropout=dropout,
                norm=norm,
                **(cgmlp_options or {}),
            )
        self.cgmlp = cgmlp
        self.feed_forward = self.feed_forward_macaron = None
        self.ff_scale = 1.0
        if use_ffn:
            self.feed_forward = PositionwiseFeedForward(out_dim, ff_dim, dropout, ff_activation)
        if use_ffn and macaron:
            self.feed_forward_macaron = PositionwiseFeedForward(out_dim, ff_dim, dropout, ff_activation)
        if use_ffn:
            self.norm_ff = make_norm(out_dim)
        if use_ffn and macaron:
            self.ff_scale = 0.5
            self.norm_ff_macaron = make_norm(out_dim)
        self.norm_mha = make_norm(out_dim)
        self.norm_mlp = make_norm(out_dim)
        self.norm_final = make_norm(out_dim)
        self.dropout = torch.nn.Dropout(dropout)
        merging.add_to(self, 2 * out_dim, out_dim, merge_conv_kernel)

    def forward(
        self, x_input: Tensor | tuple[Tensor, Tensor], mask: Row | Tensor | None = None, cache: None = None
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Row | Tensor | None]:
        """x_input, mask (B, 1, T), True at valid frames -> (x_input's replacement, mask).

        x_input is x (B, T, out_dim), or a pair of x and the positional encoding (1, 2T − 1, out_dim) that relative
        attention needs; the result has the same form. With a ``Row`` as the mask, x is (1, N, out_dim).
        """
        if cache is not None:
            raise NotImplementedError("EBranchformerLayer: cache: expected None, as upstream")
        x, positions = x_input if isinstance(x_input, tuple) else (x_input, None)
        x, _ = branches(self, x, None, positions, mask).normed()
        return (x if positions is None else (x, positions)), mask


def branches(
    layer: EBranchformerLayer,
    x: Tensor,
    normed: Tensor | None,
    positions: Tensor | None,
    mask: Row | Tensor | None,
) -> End:
    """Runs the branches. ``normed`` is the first norm of x, or None."""
    stream = Stream(x, _is_fused(layer, x))
    dropped = partial(plumbing.dropout, layer.dropout)
    if normed is None:
        normed = _first_norm(layer)(stream.x)
    if layer.feed_forward_macaron is not None:
        update = dropped(layer.feed_forward_macaron(normed))
        normed = stream.add(layer.norm_mha, update, layer.ff_scale)
    if type(layer.attn).__name__ == "FastSelfAttention":
        x1 = layer.attn(normed, mask)
    elif positions is not None:
        x1 = layer.attn(normed, normed, normed, positions, mask)
    else:
        x1 = layer.attn(normed, normed, normed, mask)
    x1 = dropped(x1)
    x2 = layer.norm_mlp(stream.x)
    x2 = layer.cgmlp(x2 if positions is None else (x2, positions), mask)
    x2 = dropped(x2[0] if isinstance(x2, tuple) else x2)
    update = dropped(merging.merge(layer, x1, x2, mask.hidden if isinstance(mask, Row) else None))
    if layer.feed_forward is None:
        return End(stream, layer.norm_final, update)
    update = dropped(layer.feed_forward(stream.add(layer.norm_ff, update)))
    return End(stream, layer.norm_final, update, layer.ff_scale)


def _first_norm(layer: EBranchformerLayer) -> Any:
    return layer.norm_mha if layer.feed_forward_macaron is None else layer.norm_ff_macaron


def joint(layer: Any, x: Tensor) -> Any:
    """Returns the first norm, torch's or ESPnet's, for ``normed_stream.through``, or None."""
    first = layer.attn if layer.feed_forward_macaron is None else layer.feed_forward_macaron
    norm = _first_norm(layer)
    plain = on_gpu(x.device) and computes(layer, EBranchformerLayer) and not is_watched(layer)
    return norm if plain and _is_known(first) and is_layer_norm(layer, norm) else None


def _is_known(branch: torch.nn.Module) -> bool:
    """Says whether this branch begins with a linear layer, which under autocast casts its input, and has no hooks."""
    forwards = RelPositionMultiHeadedAttention.forward, PositionwiseFeedForward.forward
    return any(runs(branch, forward) for forward in forwards) and not is_watched(branch)


def _is_fused(layer: EBranchformerLayer, x: Tensor) -> bool:
    """Says whether ``ops.add_norm`` serves the layer. Under autocast it gives a branch the narrower numbers that its
    first layer would cast to: unknown modules and those with hooks get what upstream gives them."""
    if not on_gpu(x.device) or not layer.ff_scale:
        return False
    norms, taking = [layer.norm_mha, layer.norm_final], [layer.attn]
    if layer.feed_forward is not None:
        norms.append(layer.norm_ff)
        taking.append(layer.feed_forward)
    known = autocast_dtype(x) is None or all(map(_is_known, taking))
    return known and all(is_layer_norm(layer, norm) for norm in norms)
