# SPDX-License-Identifier: Apache-2.0
"""Rules for the encoder as a whole: a causal one gives its layers windows in place of a mask of time by time, and with
``accelerate(ragged=True)`` any runs without padding."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastasr import _left
from fastasr.graphs.module import OnRow
from fastasr.models import zipformer as models
from fastasr.models.common.plain import any_watched
from fastasr.models.zipformer import ragged, row
from fastasr.models.zipformer.encoder import encoded
from fastasr.models.zipformer.stack import in_windows
from fastasr.packed_frames import PackedFrames
from fastasr.swap.binding import bound_forward
from fastasr.swap.rule import (
    Graphed,
    Ragged,
    Rule,
    Upstream,
    check_parameters,
    own_forward,
    unread_code,
    upstream_class,
    upstream_forward,
)
from fastasr.swap.rules.zipformer.versions import ICEFALL, PACKAGE

# the zipformer package's, and icefall's since pull request 2086
_STACKS = {"4594189750189293c0d27870", "b4aaf999a1d0f4d4403208bd"}
_DOWNSAMPLED = {"a0afcb21135230d9ecb5c6be", "a73ace9dd5add7a70b8d8807"}
_RESAMPLING = {"0b4a0963cf96f851ba535291", "d5b544a9315e184c6a5a2571", "dbf685249a5b00d49d4fd33d"}


_MASKED = "upstream's forward runs, which makes a mask of time by time for chunks: {}"


def causal_encoder(
    self: Upstream, x: Tensor, x_lens: Tensor, src_key_padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Runs as upstream, but makes no mask of time by time, which layers that know their windows do not need."""
    compiling = torch.compiler.is_compiling()
    reason = None if compiling else why_not(self)
    if reason is not None:
        _left.note(self, _MASKED.format(reason))
    if compiling or reason is not None:
        return upstream_class(self).forward(self, x, x_lens, src_key_padding_mask)
    return encoded(self, x, x_lens, src_key_padding_mask, in_windows)


def _masked_now(encoder: Upstream) -> dict[str, str | None]:
    reason = why_not(encoder) if bound_forward(encoder) is causal_encoder else None
    return {"forward": "" if reason is None else _MASKED.format(reason)}


def why_not(encoder: Upstream) -> str | None:
    """Returns why an encoder in chunks keeps upstream's mask, or None. It looks anew at every call, since layers may be
    restored, replaced or hooked at any time."""
    reason = _unread_stacks(encoder)
    if reason is not None:
        return reason
    for name, stack, _ in _stacks(encoder):
        if any_watched([stack]):
            return f"{name} has a hook, but is not called where layers get windows"
        for i, layer in enumerate(getattr(stack, "layers", ())):
            where = f"{name}.layers.{i}"
            if bound_forward(layer) is not models.ZipformerEncoderLayer.forward:
                return f"{where} is not swapped, or is one of icefall before pull request 1566"
            attention = layer.self_attn_weights
            if bound_forward(attention) is not models.RelPositionMultiheadAttentionWeights.forward:
                return f"{where}.self_attn_weights is not swapped"
            if any_watched((layer, attention)):
                return f"{where} or its self_attn_weights has a hook, which would get other arguments"
    return None


def _stacks(encoder: Upstream) -> Iterator[tuple[str, Upstream, set[str]]]:
    """Yields (name, stack, fingerprints of its known code), for a stack at a lower rate also the one inside."""
    for i, stack in enumerate(encoder.encoders):
        name = f"encoders.{i}"
        if hasattr(stack, "downsample"):
            yield name, stack, _DOWNSAMPLED
            name, stack = f"{name}.encoder", stack.encoder
        yield name, stack, _STACKS


def _unread_stacks(encoder: Upstream) -> str | None:
    """Our forwards compute the stacks, so these must be upstream's code."""
    reasons = (unread_code(name, stack, own_forward, known) for name, stack, known in _stacks(encoder))
    return next(filter(None, reasons), None)


def ragged_encoder(
    self: Upstream, x: Tensor | PackedFrames, x_lens: Tensor, src_key_padding_mask: Tensor | None = None
) -> tuple[Any, Tensor]:
    """Runs on the frames that exist, or as upstream if there is no padding or it must stay."""
    return _without_padding(self, upstream_class(self).forward, x, x_lens, src_key_padding_mask)


def ragged_causal_encoder(
    self: Upstream, x: Tensor | PackedFrames, x_lens: Tensor, src_key_padding_mask: Tensor | None = None
) -> tuple[Any, Tensor]:
    return _without_padding(self, causal_encoder, x, x_lens, src_key_padding_mask)


def _without_padding(
    encoder: Upstream,
    padded: Callable,
    x: Tensor | PackedFrames,
    x_lens: Tensor,
    src_key_padding_mask: Tensor | None,
) -> tuple[Any, Tensor]:
    if isinstance(x, PackedFrames):
        return ragged.of_packed(encoder, x, src_key_padding_mask)
    lengths = ragged.lengths(encoder, x, src_key_padding_mask)
    if lengths is None:
        return padded(encoder, x, x_lens, src_key_padding_mask)
    return ragged.encoded(encoder, x, lengths), (x_lens + 1) // 2


def _why_not(encoder: Upstream) -> str | None:
    """Without padding our forward also computes the resampling."""
    reason = _unread_stacks(encoder)
    reason = reason or unread_code("downsample_output", encoder.downsample_output, own_forward, _RESAMPLING)
    for name, stack, known in _stacks(encoder):
        if known is _DOWNSAMPLED:
            for part in ("downsample", "upsample"):
                reason = reason or unread_code(
                    f"{name}.{part}", getattr(stack, part), own_forward, _RESAMPLING
                )
    return reason or ragged.why_not(encoder)


def _why_no_row(encoder: Upstream) -> str | None:
    if isinstance(encoder, models.Zipformer):
        return row.why_not(encoder) if encoder.ragged else "it runs on padding: set its attribute ragged"
    return _why_not(encoder) or row.why_not(encoder)


def _parts(encoder: Upstream) -> list[nn.Module]:
    return list(encoder.encoders)


def _structure(module: Upstream) -> str | None:
    return "is causal" if module.causal else check_parameters(module, {})


def _causal_structure(module: Upstream) -> str | None:
    if not module.causal:
        return "is not causal"
    return check_parameters(module, {}) or _unread_stacks(module)


_ON_ROW = OnRow(row.encoded, row.packed, _why_no_row)

CAUSAL_ENCODER = Rule(
    name="zipformer.causal_encoder",
    class_name="Zipformer",
    forward=causal_encoder,
    structure=_causal_structure,
    known={"a8293a774b5bf0cea0a06a0a": PACKAGE},
    companion=True,
    ragged=Ragged(ragged_causal_encoder, _why_not),
    graphs=Graphed(choice="get_chunk_info", parts=_parts, on_row=_ON_ROW),
    leaves=_masked_now,
    note="makes no mask for chunks where all layers and their self_attn_weights are swapped",
)

CAUSAL_ZIPFORMER2 = replace(
    CAUSAL_ENCODER, class_name="Zipformer2", known={"deb746dcdc8224bdd3daba1c": ICEFALL}
)

ENCODER = replace(
    CAUSAL_ENCODER,
    name="zipformer.encoder",
    forward=ragged_encoder,
    structure=_structure,
    leaves=lambda module: {},
    shallow=True,
    ragged=Ragged(ragged_encoder, _why_not),
    graphs=Graphed(upstream_forward, parts=_parts, on_row=_ON_ROW),
    note="bound by ragged=True and graphs=True alone",
)

ZIPFORMER2 = replace(ENCODER, class_name="Zipformer2", known=CAUSAL_ZIPFORMER2.known)
