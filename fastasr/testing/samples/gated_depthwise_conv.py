# SPDX-License-Identifier: Apache-2.0
"""Samples of gated_depthwise_conv, and its benchmark: the convolution modules of Zipformer-M's stacks 0 and 3, plain
and chunk-causal, with the chunks of a model trained with 32 frames at 50 Hz.

Upstream is its module's code between in_proj and out_proj, without its balancers and whitening; the streaming case is
one step with its cache.
"""

import math
from collections.abc import Callable
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
from fastasr.testing.table import Invalid, Make, OpTable, Sample


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


def _stream(make: Make, frames: int, batch: int, channels: int, taps: int, chunk: int = -1) -> dict:
    cache = make.normal(batch, channels, taps // 2)
    return _causal(make, frames, batch, channels, taps, chunk, cache=cache, return_cache=True)


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


def _one_bad_frame(make: Make, arguments: dict, value: float) -> dict:
    arguments["h"][9, 0, 3] = value
    return arguments


def _saturated_gates(make: Make, arguments: dict) -> dict:
    """Makes gates so large that the logistic function is 0 or 1; the exponential must not overflow there."""
    channels = arguments["weight"].shape[0]
    for frame, value in enumerate((-88.0, -104.0, -6e4, -float("inf"), 88.0, 6e4, float("inf"))):
        arguments["h"][frame, 0, channels + frame] = value
    return arguments


NEEDS = (
    ("causal_weight", "chunk_scale"),
    ("chunk_scale", "causal_weight"),
    ("causal_bias", "causal_weight"),
    ("chunk_size", "causal_weight"),
)
TABLE = OpTable(
    op="gated_depthwise_conv",
    samples=(
        Sample("plain", lambda m: _plain(m, 14, 2, 12, 7), thorough=True),
        Sample("chunks", lambda m: _causal(m, 24, 3, 12, 5, 4), thorough=True),
        Sample("stream", lambda m: _stream(m, 13, 2, 12, 5, 6), thorough=True),
        Sample(
            "identity, no biases",
            lambda m: _causal(m, 12, 2, 10, 3, activation="identity") | {"bias": None, "causal_bias": None},
            thorough=True,
        ),
        Sample(
            "weight is a matrix, no mask",
            lambda m: (
                _plain(m, 30, 3, 16, 5, activation="identity")
                | {"weight": m.normal(16, 5), "padding_mask": None}
            ),
        ),
        Sample("SiLU", lambda m: _plain(m, 14, 2, 12, 9, activation="silu"), thorough=True),
        Sample(
            "gate of SiLU", lambda m: _past(m, 13, 2, 12, 3, 1, activation="silu", gate="silu"), thorough=True
        ),
        Sample(
            "gate of SiLU, identity", lambda m: _plain(m, 70, 3, 40, 3, activation="identity", gate="silu")
        ),
        Sample("gate of SiLU, chunks", lambda m: _stream(m, 24, 3, 12, 5, 4) | {"gate": "silu"}),
        Sample("SiLU, chunks", lambda m: _causal(m, 24, 3, 12, 5, 4, activation="silu")),
        Sample(
            "causal by delay, cached", lambda m: _past(m, 12, 2, 10, 9, 4, activation="silu"), thorough=True
        ),
        Sample(
            "even, cached",
            lambda m: _past(m, 13, 2, 10, 4, 0, activation="identity", return_cache=True),
            thorough=True,
        ),
        Sample("even, none of the past", lambda m: _plain(m, 70, 2, 33, 4, delay=-2)),
        Sample("causal by delay, longer than a block", lambda m: _past(m, 150, 2, 40, 31, 15)),
        Sample(
            "causal by delay, shorter than the kernel",
            lambda m: _past(m, 3, 2, 40, 31, 15, return_cache=True),
        ),
        Sample("one tap", lambda m: _plain(m, 160, 3, 64, 1)),
        Sample("one tap, causal", lambda m: _stream(m, 40, 2, 24, 1, 5)),
        Sample("shorter than the kernel", lambda m: _plain(m, 7, 3, 80, 31)),
        Sample("one frame, causal", lambda m: _stream(m, 1, 8, 33, 15)),
        Sample("recordings", lambda m: _recordings(m, 30, 2, 12, 7, 0, 11, 13, 30), thorough=True),
        Sample(
            "recordings, SiLU, even, starts in any order and some equal",
            lambda m: _recordings(m, 45, 2, 10, 4, 20, 3, 40, 20, 20, delay=1, activation="silu"),
            thorough=True,
        ),
        Sample(
            "recordings, identity, no mask, gate of SiLU",
            lambda m: (
                _recordings(m, 90, 1, 40, 31, 0, 33, 70, 90, activation="identity", gate="silu")
                | {"bias": None, "padding_mask": None}
            ),
        ),
        Sample(
            "starts outside of the frames",
            lambda m: _recordings(m, 20, 3, 66, 5, 2**40, -3, 9, delay=-2, activation="identity"),
        ),
        Sample(
            "recordings, chunks, some of them shorter",
            lambda m: _recordings(m, 30, 2, 12, 5, 3, 0, 11, 11, 13, 28, chunk=4),
            thorough=True,
        ),
        Sample(
            "recordings, whole ones are chunks",
            lambda m: _recordings(m, 31, 2, 12, 7, 25, 2, 20, 4, chunk=-1, activation="identity"),
            thorough=True,
        ),
        Sample("recordings, chunks of 12", lambda m: _recordings(m, 90, 3, 66, 9, 1, 40, 55, 90, chunk=12)),
        Sample("recordings, chunks of 1", lambda m: _recordings(m, 20, 2, 33, 3, 7, 12, chunk=1)),
        Sample("no frames, recordings", lambda m: _recordings(m, 0, 3, 8, 5, 0, 0)),
        Sample("one tap, recordings", lambda m: _recordings(m, 12, 2, 24, 1, 4, 7)),
        Sample("encoder, recordings", lambda m: _recordings(m, 600, 1, 96, 31, 0, 250, 420, 600), large=True),
        Sample(
            "encoder, recordings, chunks of 32",
            lambda m: _recordings(m, 400, 1, 96, 31, 0, 250, 256, 300, chunk=32),
            large=True,
        ),
        Sample("encoder", lambda m: _plain(m, 150, 4, 192, 31), large=True),
        Sample("encoder, identity", lambda m: _plain(m, 100, 5, 96, 15, activation="identity"), large=True),
        Sample("encoder, chunks of 32", lambda m: _causal(m, 150, 3, 64, 31, 32), large=True),
        Sample("encoder, chunks of 4", lambda m: _causal(m, 70, 3, 80, 15, 4), large=True),
        Sample("two blocks of channels, chunks of 4", lambda m: _causal(m, 40, 2, 66, 5, 4)),
        Sample(
            "encoder, chunks of 2, identity", lambda m: _causal(m, 70, 3, 64, 15, 2, activation="identity")
        ),
        Sample("chunks longer than a block", lambda m: _causal(m, 230, 2, 33, 31, 100), large=True),
        Sample("whole sequence, causal", lambda m: _causal(m, 150, 2, 64, 31), large=True),
        Sample("no frames", lambda m: _plain(m, 0, 3, 8, 5)),
        Sample("no frames, causal", lambda m: _stream(m, 0, 3, 8, 5)),
        Sample("no frames, causal by delay", lambda m: _past(m, 0, 3, 8, 5, 2)),
        Sample("no sequences", lambda m: _causal(m, 4, 0, 8, 5, 2)),
        Sample("no channels", lambda m: _causal(m, 4, 2, 0, 5, 2)),
        Sample("saturated gates", lambda m: _saturated_gates(m, _plain(m, 40, 2, 20, 5))),
        Sample(
            "infinity in one frame",
            lambda m: _one_bad_frame(m, _plain(m, 20, 2, 8, 5), float("inf")),
            exact=False,
        ),
        Sample(
            "NaN in one frame, chunks",
            lambda m: _one_bad_frame(m, _causal(m, 20, 2, 8, 5, 4), float("nan")),
            exact=False,
        ),
        Sample(
            "NaN in one frame, recordings",
            lambda m: _one_bad_frame(m, _recordings(m, 20, 2, 8, 5, 10), float("nan")),
            exact=False,
        ),
        Sample(
            "NaN in one frame, recordings in chunks",
            lambda m: _one_bad_frame(m, _recordings(m, 24, 2, 8, 5, 10, chunk=8), float("nan")),
            exact=False,
        ),
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
