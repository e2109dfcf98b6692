# SPDX-License-Identifier: Apache-2.0
"""The encoder on a row, as ``models.common.row`` describes: one of fixed length, so that one recorded call serves every
batch, or one that just fits a batch. The encoder is ours, or ESPnet's with our modules in it.

A recording's output and its number of frames are those of the recording alone. In a padded batch they are not: the
gate, the merge and the front end see padding behind a recording's end, and the front end makes frames of it. Each
dropout draws numbers for all frames of the row.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastasr.models.common import attention_dropout, normed_stream, plumbing, ragged
from fastasr.models.common.convolutions import in_sequence, projected
from fastasr.models.common.plain import is_plain, is_plain_named, is_watched, runs
from fastasr.models.common.row import Capacity, Room, RowCall, Spans, gap, laid_out
from fastasr.models.e_branchformer.attention import RelPositionMultiHeadedAttention
from fastasr.models.e_branchformer.cgmlp import ConvolutionalSpatialGatingUnit, FeedForwardConvGated
from fastasr.models.e_branchformer.layer import EBranchformerLayer, branches, joint
from fastasr.packed_frames import PackedFrames

_BY_FRAME = torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Dropout, torch.nn.Embedding


def why_not(encoder: Any) -> str | None:
    """Returns why this encoder cannot run on a row, or None."""
    if encoder.interctc_layer_idx:
        return "it gives outputs of inner layers"
    if encoder.gradient_checkpoint_layers:
        return "it checkpoints activations"
    for i, layer in enumerate(encoder.encoders):
        reason = _why_not_layer(layer)
        if reason is not None:
            return f"layer {i}: {reason}"
    return _why_not_front(encoder)


def _why_not_layer(layer: Any) -> str | None:
    if not normed_stream.has_code_of(layer, EBranchformerLayer):
        return "it is not swapped"
    if not hasattr(layer.attn, "linear_pos"):
        return "its attention has no relative positions"
    if not runs(layer.attn, RelPositionMultiHeadedAttention.forward):
        return "its attention is not swapped"
    if layer.attn.zero_triu:
        return "its attention forms the weights"
    if not runs(layer.cgmlp, FeedForwardConvGated.forward):
        return "its cgMLP is not swapped"
    if not runs(layer.cgmlp.csgu, ConvolutionalSpatialGatingUnit.forward):
        return "its gate is not swapped"
    if not all(map(plumbing.is_depthwise_conv, _convs(layer))):
        return "one of its convolutions is not torch's depthwise convolution"
    return None


def _convs(layer: Any) -> tuple[Any, Any]:
    return layer.cgmlp.csgu.conv, layer.depthwise_conv_fusion


def _why_not_front(encoder: Any) -> str | None:
    front, positions = encoder.embed, positions_of(encoder)
    if is_watched(front) or not is_plain_named(positions, ("RelPositionalEncoding",), encoder):
        return "its positions are not relative ones, or it has hooks in front of the layers"
    modules: Any = front[:-1] if isinstance(front, torch.nn.Sequential) else [*front.conv, _projection(front)]
    convs = [
        m for m in modules if is_plain(m, torch.nn.Conv2d) and (m.padding, m.dilation) == ((0, 0), (1, 1))
    ]
    if len(convs) + sum(is_plain(m, torch.nn.ReLU, *_BY_FRAME) for m in modules) < len(modules):
        return "its input layer has modules that are not torch's, or have hooks"
    return None


def positions_of(encoder: Any) -> Any:
    """Returns the module that makes the positions behind the input layer, or None."""
    front = encoder.embed
    if hasattr(front, "pos_enc"):  # ESPnet's input layer conv2d8
        return front.pos_enc
    last = front if isinstance(front, torch.nn.Sequential) else getattr(front, "out", None)
    return last[-1] if isinstance(last, torch.nn.Sequential) and len(last) else None


def _projection(front: Any) -> Any:
    return front.out[0] if isinstance(front.out, torch.nn.Sequential) else front.out


def _steps(encoder: Any) -> list[tuple[int, int]]:
    """Returns (taps, stride) over time of the front end's convolutions."""
    convs = getattr(encoder.embed, "conv", ())
    return [(m.kernel_size[0], m.stride[0]) for m in convs if isinstance(m, torch.nn.Conv2d)]


def _subsampled(steps: list[tuple[int, int]], frames: Any) -> Any:
    """Returns the frames behind the front end for a number of frames, or a tensor of them."""
    for taps, stride in steps:
        frames = (frames - taps) // stride + 1
    return frames.clamp(min=0) if isinstance(frames, Tensor) else max(0, frames)


class Call(NamedTuple):
    """The arguments of ``EBranchformerEncoder.forward``, ESPnet's and ours."""

    xs_pad: Tensor | PackedFrames
    ilens: Tensor
    prev_states: object = None
    masks: Tensor | None = None
    ctc: Any = None
    max_layer: int | None = None
    return_all_hs: bool = False


def packed(encoder: Any, capacity: Capacity, *args: Any, **kwargs: Any) -> RowCall | str:
    """Returns a call of ``encoded`` for the arguments of a ``Call``, or the reason why there is none, beside those of
    ``why_not``."""
    given = Call(*args, **kwargs)
    xs_pad, masks = given.xs_pad, given.masks
    reason = _obstacle(encoder, given)
    if reason is not None:
        return reason
    if isinstance(xs_pad, PackedFrames):
        if masks is not None:
            return "it has a mask beside its PackedFrames"
        xs_pad = xs_pad.of_features()
        lengths = xs_pad.lengths
    elif masks is None:
        lengths = given.ilens.to(torch.int64).clamp(max=xs_pad.shape[1])
    elif masks.shape != xs_pad.shape[:2]:
        return "its mask is not one of lengths"
    else:
        lengths = (~masks).sum(-1)
    steps = _steps(encoder)
    factor = math.prod(stride for _, stride in steps)
    seen = 1  # frames of features that a frame behind the front end sees
    for taps, stride in reversed(steps):
        seen = (seen - 1) * stride + taps

    def finish(hidden: Tensor | PackedFrames) -> Any:
        return hidden if isinstance(hidden, PackedFrames) else (hidden, _subsampled(steps, lengths), None)

    convs = [conv for layer in encoder.encoders for conv in _convs(layer)]
    call = laid_out(
        capacity,
        xs_pad,
        lengths,
        finish,
        factor,
        partial(_subsampled, steps),
        gap(convs, -(-(seen - 1) // factor)),
        seen - factor,
    )
    if isinstance(call, str):
        return call
    *row, longest = call.arguments
    table = _table(encoder, max(1, _subsampled(steps, longest)))
    return call._replace(arguments=(*row, table))


def _obstacle(encoder: Any, given: Call) -> str | None:
    """Returns why a call cannot run on a row now, or None."""
    if given.max_layer is not None or given.return_all_hs:
        return "the call asks for outputs of inner layers"
    shares = (plumbing.dropped_share(layer.attn.dropout) for layer in encoder.encoders)
    if any(map(attention_dropout.forms_weights, shares)):
        return "the dropout of attention weights is drawn as upstream draws it, or has hooks"
    return None


def _table(encoder: Any, frames: int) -> Tensor:
    """Returns the positions (2 frames − 1, D) of a recording of so many frames. A recorded call copies them, because
    the module may replace its table."""
    positions = positions_of(encoder)
    positions.extend_pe(encoder.after_norm.weight.detach()[:1].expand(1, frames))
    middle = positions.pe.shape[1] // 2
    table: Tensor = positions.pe[0, middle - frames + 1 : middle + frames]
    return table


def encoded(encoder: Any, features: Tensor, begins: Tensor, ends: Tensor, table: Tensor) -> Tensor:
    """Features (1, N₀, input_size) of recordings, which lie at [begins, ends), both (R,), and positions (2T − 1, D)
    of the longest one -> hidden states (1, N, D)."""
    front: Any = encoder.embed
    if isinstance(front, torch.nn.Sequential):
        x = features
        x = front[:-1](x)
    else:
        x = projected(_projection(front), in_sequence(front.conv, features.unsqueeze(1)))
    steps, positions = _steps(encoder), positions_of(encoder)
    begins, lengths = begins // math.prod(stride for _, stride in steps), ends - begins
    row = Spans(begins, begins + _subsampled(steps, lengths)).row(x)
    x, table = positions.dropout(x * positions.xscale), positions.dropout(table.unsqueeze(0))
    share = encoder.layer_drop_rate if encoder.training else 0.0
    draw = partial(torch.rand, (), dtype=torch.float32, device="cpu")
    x = normed_stream.through(
        (layer for layer in encoder.encoders if not share or draw() >= share),
        x,
        lambda layer, x: layer((x, table), row)[0][0],
        partial(branches, positions=table, mask=row),
        lambda layer: joint(layer, x),
    )
    hidden: Tensor = encoder.after_norm(x)
    return hidden


def without_padding(encoder: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs a call that is not replayed on a row that just fits it. Returns None where there is no padding or it must
    stay. It waits for the lengths.

    Raises ValueError where PackedFrames cannot be on a row.
    """
    given = Call(*args, **kwargs)
    xs_pad, masks = given.xs_pad, given.masks

    def against() -> str | None:
        return why_not(encoder) or _obstacle(encoder, given)

    if isinstance(xs_pad, PackedFrames):
        reason = None if getattr(encoder, "ragged", True) else "encoder.ragged is False"
        xs_pad = xs_pad.of_features().to(xs_pad.frames.device)
        found = xs_pad.lengths.tolist()
        room = Room(sum(found), len(found), max(1, *found))
        hidden = reason or against() or room.run(encoder, packed, encoded, *given._replace(xs_pad=xs_pad))
        if isinstance(hidden, str):
            raise ValueError(ragged.REFUSED.format(hidden))
        return hidden._replace(frames=hidden.frames[: int(hidden.lengths.sum())])
    valid = masks if masks is None else ~masks
    if valid is None:
        frame = torch.arange(xs_pad.shape[1], device=xs_pad.device, dtype=torch.int64)
        valid = frame < given.ilens.to(xs_pad.device).unsqueeze(1)
    lengths = ragged.lengths(encoder, valid, against, least_on_gpu=None)
    if lengths is None:
        return None
    found = Room(sum(lengths), len(lengths), xs_pad.shape[1]).run(encoder, packed, encoded, *given)
    return None if isinstance(found, str) else found
