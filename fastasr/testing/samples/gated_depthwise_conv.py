# SPDX-License-Identifier: Apache-2.0
"""Samples of gated_depthwise_conv, and its benchmark: the convolution modules of Zipformer-M's stacks 0 and 3, plain
and chunk-causal, with the chunks of a model trained with 32 frames at 50 Hz.

Upstream is its module's code between in_proj and out_proj, without its balancers and whitening; the streaming case is
one step with its cache.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastasr.ops import _swoosh
from fastasr.ops._depthwise_conv import ACTIVATIONS, GATES
from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import (
    BATCH,
    FORWARD,
    FRAMES,
    Case,
    Cost,
    Implementation,
    case,
    costs,
    module,
    upstream_member,
)
from fastasr.testing.table import Invalid, Make, OpTable, Sample, sampler


def _plain(make: Make, frames: int, batch: int, channels: int, taps: int, **options: Any) -> dict:
    return {
        "h": make.normal(frames, batch, 2 * channels, scale=1.5),
        "weight": make.normal(channels, 1, taps, scale=0.3),
        "bias": make.normal(channels),
        "padding_mask": make.padding(frames, [max(0, frames - 2 * b) for b in range(batch)]),
        **options,
    }


def _past(make: Make, frames: int, batch: int, channels: int, taps: int, delay: int, **options: Any) -> dict:
    cache = make.normal(batch, channels, taps // 2 + delay)
    return _plain(make, frames, batch, channels, taps, cache=cache, delay=delay, **options)


def _recordings(
    make: Make, frames: int, batch: int, channels: int, taps: int, *starts: int, **options: Any
) -> dict:
    """Returns a call on recordings that lie one after the other in every sequence, chunk-causal with a ``chunk``."""
    form = _causal if "chunk" in options else _plain
    bounds = torch.tensor(starts, dtype=torch.int64)
    return form(make, frames, batch, channels, taps, starts=bounds, **options)


def _causal(
    make: Make, frames: int, batch: int, channels: int, taps: int, chunk: int = -1, **options: Any
) -> dict:
    return _plain(make, frames, batch, channels, taps) | {
        "causal_weight": make.normal(channels, 1, taps // 2 + 1, scale=0.3),
        "causal_bias": make.normal(channels),
        "chunk_scale": make.normal(2, channels, taps, scale=0.3),
        "chunk_size": chunk,
        **options,
    }


def _wide_parameters(make: Make, form: Callable[..., dict], *shape: int, **options: Any) -> dict:
    """Makes a call whose weights and biases are float32, as under autocast and behind a norm in them."""
    wide = form(Make(dtype=torch.float32, device=make.device, seed=3), *shape)
    names = "weight", "bias", "causal_weight", "causal_bias"
    return form(make, *shape, **options) | {name: wide[name] for name in names if name in wide}


def _stream(
    make: Make, frames: int, batch: int, channels: int, taps: int, chunk: int = -1, **options: Any
) -> dict:
    cache = make.normal(batch, channels, taps // 2)
    return _causal(make, frames, batch, channels, taps, chunk, cache=cache, return_cache=True, **options)


def _without(name: str, partner: str, make: Make) -> dict:
    """Returns a chunk-causal call with ``name`` but without the argument that it needs."""
    call = _causal(make, 12, 2, 10, 3, 4)
    needed = ("causal_weight", "chunk_scale", "causal_bias", "chunk_size")
    return {k: v for k, v in call.items() if k == name or k not in needed}


def _with_starts(form: Callable[..., dict], options: dict, make: Make) -> dict:
    """Returns a call of a form that takes no starts, with starts."""
    return form(make, 12, 2, 10, 5) | options | {"starts": torch.tensor([4], dtype=torch.int64)}


def _random(make: Make, shape: Shape) -> dict:
    frames, batch, channels = shape.size(), shape.choice((0, 1, 2, 5)), shape.size()
    taps = shape.choice((1, 3, 7, 15, 31))
    options: dict[str, Any] = {
        "activation": shape.choice(tuple(ACTIVATIONS)),
        "gate": shape.choice(tuple(GATES)),
    }
    form = shape.choice(("plain", "recordings", "past", "causal", "stream"))
    if form == "plain":
        return _plain(make, frames, batch, channels, taps) | options
    if form == "recordings":
        starts = [shape.choice(range(-2, frames + 3)) for _ in range(shape.choice((1, 2, 5)))]
        size = shape.choice((None, -1, 1, 6, 40))
        chunks = {} if size is None else {"chunk": size}
        return _recordings(make, frames, batch, channels, taps, *starts, **chunks) | options
    if form == "past":
        taps = shape.choice((1, 2, 4, 9, 15, 32))
        delay = shape.choice((-(taps // 2), 0, (taps - 1) // 2))
        return _past(make, frames, batch, channels, taps, delay) | options
    chunk = shape.choice((-1, 1, 2, 3, 4, 8, 13, 32, 65, 100))
    return (_causal if form == "causal" else _stream)(make, frames, batch, channels, taps, chunk) | options


def _one_bad_frame(sample: Sample, value: float = math.nan) -> Sample:
    def arguments(make: Make) -> dict:
        made = sample.arguments(make)
        made["h"][9, 0, 3] = value
        return made

    return replace(sample, arguments=arguments, exact=False)


def _saturated_gates(make: Make) -> dict:
    """Makes gates so large that the logistic function is 0 or 1; the exponential must not overflow there."""
    arguments = _plain(make, 40, 2, 20, 5)
    for frame, value in enumerate((-88.0, -104.0, -6e4, -math.inf, 88.0, 6e4, math.inf)):
        arguments["h"][frame, 0, 20 + frame] = value
    return arguments


NEEDS = (
    ("causal_weight", "chunk_scale"),
    ("chunk_scale", "causal_weight"),
    ("causal_bias", "causal_weight"),
    ("chunk_size", "causal_weight"),
)
plain, past, causal = sampler(_plain), sampler(_past), sampler(_causal)
stream, recordings = sampler(_stream), sampler(_recordings)
TABLE = OpTable(
    op="gated_depthwise_conv",
    samples=(
        plain("plain", (14, 2, 12, 7), thorough=True),
        causal("chunks", (24, 3, 12, 5, 4), thorough=True),
        stream("stream", (13, 2, 12, 5, 6), thorough=True),
        causal(
            "identity, no biases",
            (12, 2, 10, 3),
            activation="identity",
            bias=None,
            causal_bias=None,
            thorough=True,
        ),
        plain(
            "weight is a matrix, no mask",
            (30, 3, 16, 5),
            activation="identity",
            weight=lambda m: m.normal(16, 5),
            padding_mask=None,
        ),
        plain("SiLU", (14, 2, 12, 9), activation="silu", thorough=True),
        Sample(
            "parameters in float32, SiLU",
            lambda m: _wide_parameters(m, _plain, 20, 2, 40, 9, activation="silu"),
        ),
        Sample("parameters in float32, chunks", lambda m: _wide_parameters(m, _causal, 24, 3, 12, 5, 4)),
        past("gate of SiLU", (13, 2, 12, 3, 1), activation="silu", gate="silu", thorough=True),
        plain("gate of SiLU, identity", (70, 3, 40, 3), activation="identity", gate="silu"),
        stream("gate of SiLU, chunks", (24, 3, 12, 5, 4), gate="silu"),
        causal("SiLU, chunks", (24, 3, 12, 5, 4), activation="silu"),
        past("causal by delay, cached", (12, 2, 10, 9, 4), activation="silu", thorough=True),
        past("even, cached", (13, 2, 10, 4, 0), activation="identity", return_cache=True, thorough=True),
        plain("even, none of the past", (70, 2, 33, 4), delay=-2),
        past("causal by delay, longer than a block", (150, 2, 40, 31, 15)),
        past("causal by delay, shorter than the kernel", (3, 2, 40, 31, 15), return_cache=True),
        plain("one tap", (160, 3, 64, 1)),
        stream("one tap, causal", (40, 2, 24, 1, 5)),
        plain("shorter than the kernel", (7, 3, 80, 31)),
        stream("one frame, causal", (1, 8, 33, 15)),
        recordings("recordings", (30, 2, 12, 7, 0, 11, 13, 30), thorough=True),
        recordings(
            "recordings, SiLU, even, starts in any order and some equal",
            (45, 2, 10, 4, 20, 3, 40, 20, 20),
            delay=1,
            activation="silu",
            thorough=True,
        ),
        recordings(
            "recordings, identity, no mask, gate of SiLU",
            (90, 1, 40, 31, 0, 33, 70, 90),
            activation="identity",
            gate="silu",
            bias=None,
            padding_mask=None,
        ),
        recordings(
            "starts outside of the frames", (20, 3, 66, 5, 2**40, -3, 9), delay=-2, activation="identity"
        ),
        recordings(
            "recordings, chunks, some of them shorter",
            (30, 2, 12, 5, 3, 0, 11, 11, 13, 28),
            chunk=4,
            thorough=True,
        ),
        recordings(
            "recordings, whole ones are chunks",
            (31, 2, 12, 7, 25, 2, 20, 4),
            chunk=-1,
            activation="identity",
            thorough=True,
        ),
        recordings("recordings, chunks of 12", (90, 3, 66, 9, 1, 40, 55, 90), chunk=12),
        recordings("recordings, chunks of 1", (20, 2, 33, 3, 7, 12), chunk=1),
        recordings("no frames, recordings", (0, 3, 8, 5, 0, 0)),
        recordings("one tap, recordings", (12, 2, 24, 1, 4, 7)),
        recordings("encoder, recordings", (600, 1, 96, 31, 0, 250, 420, 600), large=True),
        recordings(
            "encoder, recordings, chunks of 32", (400, 1, 96, 31, 0, 250, 256, 300), chunk=32, large=True
        ),
        plain("encoder", (150, 4, 192, 31), large=True),
        plain("encoder, identity", (100, 5, 96, 15), activation="identity", large=True),
        causal("encoder, chunks of 32", (150, 3, 64, 31, 32), large=True),
        causal("encoder, chunks of 4", (70, 3, 80, 15, 4), large=True),
        causal("two blocks of channels, chunks of 4", (40, 2, 66, 5, 4)),
        causal("encoder, chunks of 2, identity", (70, 3, 64, 15, 2), activation="identity"),
        causal("chunks longer than a block", (230, 2, 33, 31, 100), large=True),
        causal("whole sequence, causal", (150, 2, 64, 31), large=True),
        plain("no frames", (0, 3, 8, 5)),
        stream("no frames, causal", (0, 3, 8, 5)),
        past("no frames, causal by delay", (0, 3, 8, 5, 2)),
        causal("no sequences", (4, 0, 8, 5, 2)),
        causal("no channels", (4, 2, 0, 5, 2)),
        Sample("saturated gates", _saturated_gates),
        _one_bad_frame(plain("infinity in one frame", (20, 2, 8, 5)), math.inf),
        _one_bad_frame(causal("NaN in one frame, chunks", (20, 2, 8, 5, 4))),
        _one_bad_frame(recordings("NaN in one frame, recordings", (20, 2, 8, 5, 10))),
        _one_bad_frame(recordings("NaN in one frame, recordings in chunks", (24, 2, 8, 5, 10), chunk=8)),
    ),
    unread=("weight", "causal_weight"),  # some taps reach no frame of a short sequence
    random=_random,
    invalid=tuple(
        Invalid(f"{name} without {partner}", partial(_without, name, partner), ValueError, match)
        for name, partner in NEEDS
        for match in [
            f"fastasr.gated_depthwise_conv: {name}: expected it together with {partner}, got no {partner}"
        ]
    )
    + tuple(
        Invalid(
            f"starts and {name}",
            partial(_with_starts, form, options),
            ValueError,
            f"{name}: expected {expected}",
        )
        for name, form, options, expected in (
            ("cache", partial(_past, delay=1), {}, "None with starts"),
            ("return_cache", _plain, {"return_cache": True}, "False with starts"),
        )
    ),
)


# --- the benchmark


class Between(torch.nn.Module):
    """What upstream's convolution module computes between its projections."""

    def __init__(self, conv: nn.Conv1d, **options: Any) -> None:
        super().__init__()
        self.conv, self.options = conv, options

    def forward(self, h: Tensor) -> Tensor:
        x, s = h.chunk(2, dim=2)
        y = self.conv((x * torch.sigmoid(s)).permute(1, 2, 0), **self.options).permute(2, 0, 1)
        return _swoosh.definition(y, "SwooshR")


def _upstream(
    h: Tensor, weight: Tensor, bias: Tensor, chunk_size: int | None = None, **causal: Any
) -> Implementation:
    channels, _, taps = weight.shape
    if chunk_size is None:
        conv = Between(torch.nn.Conv1d(channels, channels, taps, groups=channels, padding=taps // 2)).to(h)
        parameters: dict[str, Any] = {"conv.weight": weight, "conv.bias": bias}
        return module(conv, h, **parameters)
    conv = upstream_member("zipformer.modules.scaling.ChunkCausalDepthwiseConv1d")(channels, taps)
    state: dict[str, Any] = {"chunkwise_conv.weight": weight, "chunkwise_conv.bias": bias}
    state |= {"causal_conv.weight": causal["causal_weight"], "causal_conv.bias": causal["causal_bias"]}
    state |= {"chunkwise_conv_scale": causal["chunk_scale"]}
    state = {f"conv.{name}": value for name, value in state.items()}
    return module(Between(conv, chunk_size=chunk_size).to(h), h, **state)


def _costs(shape: tuple[int, ...], taps: int, causal: bool) -> Callable[[int], dict[str, Cost]]:
    n = math.prod(shape)
    products = n * (taps + taps // 2 + 1 if causal else taps)
    # x, s; y. x, s, dy; dx, ds. z again, du, the taps' gradients
    return costs((3 * n, 2 * products), (5 * n, 6 * products))


def _case(shape: tuple[int, int, int], taps: int, chunk: int | None = None) -> Case:
    def arguments(make: Make) -> dict:
        made = _causal(make, *shape, taps, chunk) if chunk else _plain(make, *shape, taps)
        return made | {"padding_mask": None}

    note, passes = f", {taps} taps" + f", chunks of {chunk}" * bool(chunk), _costs(shape, taps, bool(chunk))
    return case("gated_depthwise_conv", shape, arguments, passes, note, others={"upstream": _upstream})


def _step_case(shape: tuple[int, int, int], taps: int) -> Case:
    def arguments(make: Make) -> dict:
        return _stream(make, *shape, taps) | {"padding_mask": None, "return_cache": True}

    def kept(arguments: dict, result: Any) -> Tensor:
        y, new_cache = result
        arguments["cache"].copy_(new_cache)
        return y

    note, passes = f", {taps} taps, one streaming step", _costs(shape, taps, True)
    options: dict[str, Any] = {"passes": (FORWARD,), "differentiable": (), "result": kept}
    return case("gated_depthwise_conv", shape, arguments, passes, note, **options)


def sized(T: int = 796, B: int = 4, C: int = 192, K: int = 31) -> Case:
    return _case((T, B, C), K)


CASES = (
    _case((796, 4, 192), 31),
    _case((796, 4, 192), 31, chunk=32),
    _case((100, 4, 512), 15),
    _case((100, 4, 512), 15, chunk=4),
    _step_case((16, 1, 192), 31),
)
# stacks 0 and 3, plain and chunk-causal
ON_DEVICE = (
    *(_case((FRAMES, BATCH, 192), 31, chunk) for chunk in (None, 32)),
    *(_case((188, BATCH, 512), 15, chunk) for chunk in (None, 4)),
)
WATCH = (
    "`ex2` of the gate and its correction; groups of eight frames; the chunk-causal form; seven launches backward; "
    "recordings in a row"
)
