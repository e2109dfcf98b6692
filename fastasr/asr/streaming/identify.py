# SPDX-License-Identifier: Apache-2.0
"""Decides whether a streaming engine can take a model. It takes causal Zipformers in eval mode whose code is known.

A packed engine does not run the model's code, so every module of the encoder must be ours, torch's, or of a known
version. The swap's rules know the layers; ``STREAMING`` lists the other methods that streaming runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parametrize

from fastasr.asr.export.wrappers import bins_of
from fastasr.swap import binding
from fastasr.swap.engine import decide
from fastasr.swap.rule import upstream_class
from fastasr.swap.rules.zipformer.convolution import CHUNK_CAUSAL
from fastasr.swap.rules.zipformer.versions import BOTH, ICEFALL, PACKAGE
from fastasr.swap.source_hash import SourceUnavailable, fingerprint

_OURS = ("fastasr.models.zipformer.", "fastasr.models.common.")
_PACKAGE, _ICEFALL, _EVERY = PACKAGE.origin, ICEFALL.origin, BOTH.origin

_ENCODER = ("streaming_forward", "get_init_states")
# Class name -> the methods that a chunk runs, and the fingerprints of the known versions.
STREAMING = {
    "Zipformer": (_ENCODER, {"614892d60017c2a6e1d3dd4e": _PACKAGE}),
    "Zipformer2": (_ENCODER, {"3ced5c4c126f4ef873a5fb7f": _ICEFALL}),
    "ZipformerEncoder": (("streaming_forward",), {"acae2a4ca6038d1eec0d7784": _PACKAGE}),
    "Zipformer2Encoder": (("streaming_forward",), {"cc6fc2678ed4f46beedf7552": _ICEFALL}),
    "DownsampledZipformerEncoder": (("streaming_forward",), {"c1eeee041233a16a35b54da7": _PACKAGE}),
    "DownsampledZipformer2Encoder": (("streaming_forward",), {"7b9d1e4cc77b84ee7a44fab2": _ICEFALL}),
    "SimpleDownsample": (
        ("forward",),
        {
            "0b4a0963cf96f851ba535291": _EVERY,  # icefall: since pull request 1755
            "d5b544a9315e184c6a5a2571": _ICEFALL,  # since pull request 2086
            "9a3df28e7a6e040fc292c767": "icefall before pull request 1755",
            "cf6c0db6981ca5afefddc887": "icefall before pull request 1108",
        },
    ),
    "SimpleUpsample": (("forward",), {"dbf685249a5b00d49d4fd33d": _EVERY}),
    "CompactRelPositionalEncoding": (
        ("forward",),
        {
            "7e59bbd546e49ec64392cc54": _EVERY,  # icefall: since pull request 1108
            "e84271362a96e3e480dbb94f": _ICEFALL,  # since pull request 2086
            "383ed596dd4021171eebb108": "icefall before pull request 1108",
        },
    ),
    "FeedforwardModule": (("forward",), {"858c8b8ccb9b766678204574": _EVERY}),
    "ChunkCausalDepthwiseConv1d": (("forward", "streaming_forward"), CHUNK_CAUSAL),
    "Conv2dSubsampling": (_ENCODER, {"101554133667bdf112ad1af9": _EVERY}),
    "ConvNeXt": (("streaming_forward",), {"b173dce1c14677d3fc645d55": _EVERY}),
}
# These classes act in training only, so a chunk of a model in eval mode does not need them.
_IDLE = {
    "Balancer",
    "Whiten",
    "Dropout2",
    "Dropout3",
    "ScheduledFloat",
    "Identity",
    "ScaleGrad",
    "ScalarMultiply",
}


@dataclass
class Identified:
    """A model that an engine takes. ``bins``: the channels of its features. ``origin``: whose code it runs."""

    encoder: torch.nn.Module
    encoder_embed: torch.nn.Module
    bins: int
    channels: int
    origin: str


def identify(model: Any, chunk_size: int, left_context_frames: int, foreign: bool = False) -> Identified:
    """Returns the Identified of ``model``, which has what an engine needs to know.

    ``foreign`` accepts unknown code, for backends that call the model's own code.
    Raises TypeError if ``model`` has no encoder or front end, ValueError if it cannot stream with these sizes.
    """
    for name in ("encoder", "encoder_embed"):
        if not isinstance(getattr(model, name, None), torch.nn.Module):
            raise TypeError(f"streaming: a model needs .{name}, and this {type(model).__name__} has none")
    encoder, embed = model.encoder, model.encoder_embed
    _check_runs(encoder, embed)
    _check_chunks(encoder, chunk_size, left_context_frames)
    found = set() if foreign else {_known(path, module) for path, module in _modules(encoder, embed)}
    origins = sorted(origin for origin in found if origin)
    return Identified(
        encoder,
        embed,
        bins_of(embed),
        max(encoder.encoder_dim),
        ", ".join(origins) if not foreign else "not looked at",
    )


def _check_runs(encoder: Any, embed: Any) -> None:
    for path, module in _modules(encoder, embed):
        if module.training:
            raise ValueError(f"streaming: {path} is in training mode: call model.eval()")
    if not getattr(encoder, "causal", False):
        raise ValueError("streaming: the encoder is not causal: it was trained to see whole utterances")
    for path, parameter in (*encoder.named_parameters("encoder"), *embed.named_parameters("encoder_embed")):
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"streaming: {path} is {parameter.dtype}, expected torch.float32: call model.float()"
            )
    devices = {parameter.device for part in (encoder, embed) for parameter in part.parameters()}
    if len(devices) != 1:
        raise ValueError(f"streaming: the model lies on {len(devices)} devices, expected one")


def _check_chunks(encoder: Any, chunk_size: int, left_context_frames: int) -> None:
    for name, value in (("chunk_size", chunk_size), ("left_context_frames", left_context_frames)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"streaming: {name} must be an int, got {value!r}")
    factors = tuple(encoder.downsampling_factor)
    whole = max(2, *factors)
    if chunk_size < 1 or any(chunk_size % factor for factor in (2, *factors)):
        raise ValueError(
            f"streaming: chunk_size must be a multiple of {whole}, the encoder's frames being joined by {factors}, "
            f"got {chunk_size}"
        )
    if left_context_frames < 0 or any(left_context_frames % factor for factor in factors):
        raise ValueError(
            f"streaming: left_context_frames must be a multiple of {whole} and not negative, got {left_context_frames}"
        )
    chunks, lefts = tuple(encoder.chunk_size), tuple(encoder.left_context_frames)
    if chunk_size not in chunks:
        raise ValueError(
            f"streaming: the model was trained with chunk_size {chunks}, got {chunk_size} (to try it all the same, set "
            f"model.encoder.chunk_size)"
        )
    if left_context_frames not in lefts and -1 not in lefts:
        raise ValueError(
            f"streaming: the model was trained with left_context_frames {lefts}, got {left_context_frames} (to try it "
            f"all the same, set model.encoder.left_context_frames)"
        )


def _modules(encoder: Any, embed: Any) -> Iterator[tuple[str, Any]]:
    yield from encoder.named_modules(prefix="encoder")
    yield from embed.named_modules(prefix="encoder_embed")


def _known(path: Path | str, module: Any) -> str | None:
    """Returns whose code ``module`` runs; None for torch's. Raises ValueError for unknown code."""
    cls = upstream_class(module)
    reason = _touched(module)
    if reason:
        raise ValueError(f"streaming: {path} ({cls.__name__}) {reason}")
    if cls.__module__.startswith("torch."):
        return None
    if cls.__module__.startswith(_OURS):
        return "fastasr"
    origin = None
    if cls.__name__ in STREAMING:
        methods, known = STREAMING[cls.__name__]
        try:
            value = fingerprint([getattr(cls, method) for method in methods], cls)
        except (SourceUnavailable, AttributeError) as error:
            raise ValueError(f"streaming: {path} ({cls.__name__}): {error}") from None
        if value not in known:
            raise ValueError(
                f"streaming: {path} runs code that is no known version of {cls.__name__} (fingerprint {value})"
            )
        origin = known[value]
    decision = decide(module)
    if decision.rule is None:
        if origin is None and cls.__name__ not in _IDLE:
            raise ValueError(
                f"streaming: {path} is a {cls.__name__}, which this encoder does not have upstream"
            )
        return origin
    if not decision.apply:
        raise ValueError(f"streaming: {path} ({cls.__name__}): {decision.reason}")
    return origin


_METHODS = ("forward", "streaming_forward", "get_init_states")


def _touched(module: Any) -> str | None:
    """Returns a reason if this instance has another forward or hooks, else None."""
    for method in _METHODS:
        if binding.foreign_method(module, method) is not None:
            return f"has a {method} of its own"
    if parametrize.is_parametrized(module):
        return f"has parametrizations on {', '.join(module.parametrizations)}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which a packed engine would not call"
    if isinstance(module, torch.jit.ScriptModule):
        return "was compiled by TorchScript"
    return None
