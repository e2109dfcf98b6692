# SPDX-License-Identifier: Apache-2.0
"""Samples of rel_attention, and its benchmark in an E-Branchformer layer (8 heads of 64): four padded sequences of
16 s, and one minute of audio, all of it and in chunks of 14 frames with 70 before them, as Nemotron streams.

It is compared with the definition, with ESPnet's own code between its projections, and with torch's fused attention,
which takes the scores of positions and the padding as one additive mask.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._relative_positions import outside_context, relative_shift
from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import (
    BATCH,
    FRAMES,
    Case,
    Cost,
    Unavailable,
    case,
    compiled,
    computed,
    costs,
    upstream_member,
)
from fastasr.testing.table import Invalid, Make, OpTable, Sample, sampler


def _call(
    make: Make,
    batch: int,
    frames: int,
    heads: int,
    width: int,
    value: int | None = None,
    cached: int = 0,
    **more: Any,
) -> dict:
    keys = cached + frames
    return {
        "q": make.normal(batch, frames, heads, width),
        "k": make.normal(batch, keys, heads, width),
        "v": make.normal(batch, keys, heads, width if value is None else value),
        "pos": make.normal(frames and frames + keys - 1, heads, width),
        "bias_u": make.normal(heads, width, scale=0.5),
        "bias_v": make.normal(heads, width, scale=0.5),
    } | _given(make, more)


def _given(make: Make, arguments: dict) -> dict:
    """Returns the arguments, of which some are functions of ``make``."""
    return {name: value(make) if callable(value) else value for name, value in arguments.items()}


_sample = sampler(_call)
_small = sampler(_call, draws=8)  # a few hundred numbers, whose errors are compared over several draws


def _padding(frames: int, *lengths: int) -> Callable[[Make], Tensor]:
    return lambda make: make.padding(frames, lengths)


def _random_mask(*shape: int, hidden: float = 0.3) -> Callable[[Make], Tensor]:
    return lambda make: make.uniform(*shape) < hidden


def _window(make: Make, frames: int, left: int, right: int) -> Tensor:
    offset = torch.arange(frames)[None, :] - torch.arange(frames)[:, None]
    return (offset < -left) | (offset > right)


def _empty_rows(make: Make, frames: int) -> Tensor:
    """Makes a mask in which two queries see nothing: the first and one in the middle."""
    mask = torch.ones(frames, frames, dtype=torch.bool).triu(1)
    mask[0], mask[frames // 2] = True, True
    return mask


def _dropout(p: float, seed: int) -> dict:
    return {"dropout_p": p, "dropout_seed": lambda make: torch.tensor([seed])}


def _context(left: int, right: int, chunk_size: int = 1) -> dict:
    return {"context": (left, right), "chunk_size": chunk_size}


def _without(*names: str) -> dict:
    return dict.fromkeys(names)


def _by_offset(frames: int, heads: int, batch: int = 0, cached: int = 0) -> dict:
    """Makes a bias by offset, and a gate where ``batch`` is given."""
    call = {"offset_bias": lambda make: make.normal(frames and 2 * frames + cached - 1, heads)}
    return call | ({"offset_gate": lambda make: make.normal(batch, frames, heads)} if batch else {})


def _recordings(*starts: int) -> dict:
    return {"starts": lambda make: torch.tensor(starts, dtype=torch.int64)}


def _span(left: int, right: int, heads: int, width: int) -> dict:
    """Makes positions of the keys from ``left`` frames before a query to ``right`` behind it."""
    return {"pos": lambda make: make.normal(left + right + 1, heads, width), "pos_span": (left, right)}


def _with_mean(make: Make) -> dict:
    """Makes a call in which dS k needs rows of dS that add up to 0."""
    call = _call(make, 1, 60, 2, 16) | _without("bias_u")  # whose gradient would be a rest of such sums
    q, k, pos = (0.3 * call[name] for name in ("q", "k", "pos"))
    return call | {"q": q, "k": k + 1, "v": call["v"] + 1, "pos": pos}


def _infinite(make: Make) -> dict:
    call = _call(make, 2, 7, 2, 4)
    call["q"][1, 3, 0, 2] = float("inf")
    return call


def _random(make: Make, shape: Shape) -> dict:
    batch, frames, heads = shape.size() % 4, shape.size() % 130, 1 + shape.size() % 3
    width, cached = 1 + shape.size() % 70, shape.choice((0, shape.size() % 80))
    call = _call(make, batch, frames, heads, width, shape.choice((width, 1 + shape.size() % 40)), cached)
    keys = cached + frames
    if shape.choice((True, False)):
        call |= _context(shape.size() % 60 - 1, shape.size() % 40 - 1, 1 + shape.size() % 20)
    elif not cached and shape.choice((True, False)):
        starts = (shape.size() % (frames + 3) - 1 for _ in range(1 + shape.size() % 5))
        call |= _given(make, _recordings(*starts))
    if shape.choice((True, False)):
        call |= {"offset_bias": make.normal(frames and frames + keys - 1, heads)}
        if shape.choice((True, False)):
            call |= {"offset_gate": make.normal(batch, frames, heads)}
    if shape.choice((True, False)):
        call["key_bias"] = make.normal(shape.choice((1, batch)), shape.choice((1, heads)), keys)
    if shape.choice((True, False)):
        call["soft_cap"] = shape.size() % 20 / 4
    if shape.choice((True, False)):
        left, right = shape.size() % 90, shape.size() % 90
        call |= {"pos": make.normal(left + right + 1, shape.choice((1, heads)), width)}
        call |= {"pos_span": (left, right)}
    elif shape.choice((True, False)):
        call["pos"] = call["pos"][:, :1].contiguous()
    absent = shape.choice(
        ((), (), ("bias_u",), ("bias_u", "bias_v"), ("pos", "bias_v"), ("pos", "bias_u", "bias_v"))
    )
    call |= dict.fromkeys(absent)
    if call["pos"] is None:
        call.pop("pos_span", None)
    if shape.choice((True, False)):
        lengths = [shape.size() % (keys + 1) for _ in range(batch)]
        call["key_padding_mask"] = make.padding(keys, lengths) if batch else torch.zeros(0, keys) > 0
    if shape.choice((True, False)):
        call |= _given(make, _dropout(shape.size() % 10 / 10, shape.size()))
    if shape.choice((True, False)):
        sizes = shape.choice(((frames, keys), (batch, frames, keys)))
        call["attn_mask"] = make.uniform(*sizes) < 0.4
    return call


TABLE = OpTable(
    op="rel_attention",
    samples=(
        _small("plain", (1, 7, 2, 8), thorough=True),
        _small("padding", (3, 9, 2, 4), key_padding_mask=_padding(9, 9, 5, 1)),
        _small(
            "a mask and padding",
            (2, 9, 1, 8),
            key_padding_mask=_padding(9, 9, 6),
            attn_mask=_random_mask(9, 9),
            thorough=True,
        ),
        _small("a mask of each sequence", (2, 8, 1, 5), attn_mask=_random_mask(2, 8, 8)),
        _small("values of another width", (1, 6, 2, 4, 7), thorough=True),
        _small("queries that see nothing", (1, 11, 2, 8), attn_mask=partial(_empty_rows, frames=11)),
        _small("a sequence of padding alone", (2, 6, 2, 8), key_padding_mask=_padding(6, 6, 0)),
        _sample(
            "padding in front and within",
            (1, 35, 1, 16),
            key_padding_mask=_random_mask(1, 35, hidden=0.5),
            draws=2,
        ),
        _small("dropout", (2, 9, 2, 8), thorough=True, **_dropout(0.3, -7)),
        _sample(
            "dropout, masks, wide values, several tiles",
            (2, 67, 2, 20, 24),
            key_padding_mask=_padding(67, 67, 40),
            attn_mask=_random_mask(67, 67),
            large=True,
            **_dropout(0.1, 2**45 + 11),
        ),
        _sample("dropout, several blocks of keys", (1, 600, 1, 16), large=True, **_dropout(0.5, 3)),
        _small("one frame", (2, 1, 1, 8)),
        _small("two frames", (2, 2, 2, 8)),
        _small("a head of one channel", (2, 19, 2, 1)),
        _sample("an odd width", (1, 9, 1, 37), draws=4),
        _small(
            "several tiles, masks, wide values",
            (1, 37, 1, 20, 24),
            key_padding_mask=_padding(37, 30),
            attn_mask=_random_mask(37, 37, hidden=0.4),
        ),
        _small("an odd width, several tiles", (1, 35, 2, 37), large=True),
        _sample("heads of 64, several tiles", (1, 67, 2, 64), draws=2, large=True),
        _sample("heads of 128", (2, 69, 1, 128), key_padding_mask=_padding(69, 60, 69), draws=2, large=True),
        _small(
            "heads of 100, values of 128, padding, dropout",
            (1, 67, 1, 100, 128),
            key_padding_mask=_padding(67, 60),
            **_dropout(0.2, 9),
        ),
        _sample("wide heads", (1, 33, 1, 144), key_padding_mask=_padding(33, 30), draws=2, large=True),
        _sample("base", (2, 150, 2, 64), key_padding_mask=_padding(150, 150, 101), large=True),
        _sample(
            "a window", (1, 140, 2, 64), attn_mask=partial(_window, frames=140, left=20, right=9), large=True
        ),
        _sample(
            "several blocks of keys",
            (1, 600, 1, 16),
            key_padding_mask=_padding(600, 580),
            large=True,
            draws=4,
        ),
        _small("keys of a cache", (2, 3, 2, 8), cached=5, thorough=True),
        _small("one query and a cache", (2, 1, 2, 4), cached=9, **_context(9, 0)),
        _small("a limited context", (2, 13, 2, 8), thorough=True, **_context(3, 1)),
        _small("recordings one after the other", (1, 17, 2, 8), thorough=True, **_recordings(0, 5, 6, 6, 15)),
        _small(
            "recordings in any order, frames of none in front, a context",
            (2, 19, 1, 8),
            **_recordings(16, 3, 9),
            **_context(4, 2),
        ),
        _sample(
            "recordings and the positions of the longest",
            (1, 90, 2, 8),
            draws=2,
            **_span(39, 39, 2, 8),
            **_recordings(0, 40, 75),
            **_context(39, 39),
        ),
        _small("starts outside of the frames", (1, 9, 2, 4), **_recordings(-3, 4, 2**40)),
        _small("no recording", (1, 5, 1, 4), **_recordings(3)),
        _sample(
            "recordings of several tiles, padding, dropout",
            (1, 163, 1, 16),
            key_padding_mask=_random_mask(1, 163, hidden=0.2),
            draws=2,
            **_dropout(0.3, 5),
            **_recordings(0, 70, 71, 150, 158),
        ),
        _sample(
            "more recordings than are read at a time, a bias by offset with a gate",
            (1, 131, 2, 8),
            draws=2,
            **_by_offset(131, 2, 1),
            **_recordings(*range(0, 126, 3)),
        ),
        _small("the past alone", (1, 9, 1, 8), **_context(-1, 0)),
        _small(
            "chunks, a cache, padding within the context",
            (2, 7, 1, 8),
            cached=6,
            key_padding_mask=_random_mask(2, 13, hidden=0.6),
            **_context(4, 0, 4),
        ),
        _sample(
            "chunks, several tiles, masks, a cache, dropout",
            (1, 40, 1, 20, 24, 21),
            key_padding_mask=_padding(61, 50),
            attn_mask=_random_mask(40, 61, hidden=0.2),
            **_context(21, 2, 7),
            **_dropout(0.2, 9),
        ),
        _sample("a limited context, several tiles", (1, 67, 1, 16), draws=2, **_context(20, 9)),
        _sample(
            "a limited context, several blocks of keys",
            (1, 700, 1, 16),
            draws=2,
            large=True,
            **_context(70, 13),
        ),
        _small("no positions", (2, 9, 2, 8), thorough=True, **_without("pos", "bias_u", "bias_v")),
        _small("no biases", (2, 19, 2, 8), **_without("bias_u", "bias_v")),
        _small("no bias of content, a context", (1, 9, 2, 8), bias_u=None, **_context(3, 1)),
        _small(
            "a bias by offset, no positions",
            (2, 19, 2, 8),
            thorough=True,
            **_by_offset(19, 2),
            **_without("pos", "bias_v"),
        ),
        _small(
            "a bias by offset with a gate, no positions, padding",
            (2, 19, 3, 8),
            key_padding_mask=_padding(19, 19, 7),
            thorough=True,
            **_by_offset(19, 3, 2),
            **_without("pos", "bias_u", "bias_v"),
        ),
        _small(
            "a bias by offset with a gate, positions, a cache, a context",
            (2, 7, 2, 8),
            cached=6,
            **_by_offset(7, 2, 2, 6),
            **_context(4, 0, 3),
        ),
        _sample(
            "a bias by offset with a gate, several tiles, masks, dropout",
            (3, 67, 2, 20, 24),
            attn_mask=_random_mask(3, 67, 67),
            large=True,
            **_by_offset(67, 2, 3),
            **_dropout(0.2, 5),
        ),
        _sample(
            "a bias by offset with a gate, several blocks of keys",
            (1, 600, 2, 16),
            large=True,
            draws=2,
            **_by_offset(600, 2, 1),
            **_without("pos", "bias_u", "bias_v"),
        ),
        _sample("a bias by offset, no frames", (2, 0, 2, 8), pos=None, bias_v=None, **_by_offset(0, 2)),
        _small("a bias by key", (3, 9, 2, 8), key_bias=lambda make: make.normal(3, 2, 9), thorough=True),
        _small(
            "a bias by key for all heads, a mask, dropout",
            (3, 19, 2, 8),
            attn_mask=_random_mask(19, 19),
            key_bias=lambda make: make.normal(3, 1, 19),
            **_dropout(0.2, 5),
        ),
        _small(
            "a bias by key for all sequences, no positions, a context",
            (3, 19, 2, 8),
            key_bias=lambda make: make.normal(1, 2, 19),
            **_context(7, 2),
            **_without("pos", "bias_v"),
        ),
        _sample(
            "a bias by key for all, a bias by offset, a soft cap, a cache, several tiles",
            (2, 45, 2, 20, 24, 21),
            key_bias=lambda make: make.normal(1, 1, 66),
            soft_cap=2.0,
            draws=2,
            **_by_offset(45, 2, cached=21),
        ),
        _sample(
            "a bias by key, several blocks of keys",
            (1, 600, 2, 16),
            key_bias=lambda make: make.normal(1, 2, 600),
            large=True,
            draws=2,
        ),
        _small("a soft cap", (2, 9, 2, 8), soft_cap=2.0, thorough=True),
        _small(
            "a soft cap that hardly acts, a context, padding",
            (2, 27, 2, 8),
            key_padding_mask=_padding(27, 27, 15),
            soft_cap=50.0,
            **_context(11, 0),
        ),
        _sample(
            "a soft cap, a bias by offset, masks, dropout, several tiles",
            (2, 67, 2, 20, 24),
            attn_mask=_random_mask(67, 67),
            soft_cap=1.5,
            draws=2,
            **_by_offset(67, 2, 2),
            **_dropout(0.2, 5),
        ),
        _small("positions that heads share", (2, 9, 2, 8), pos=lambda m: m.normal(17, 1, 8)),
        _small("a span of positions", (2, 19, 2, 8), thorough=True, **_span(3, 2, 2, 8)),
        _small(
            "a span that heads share, no biases, padding, dropout",
            (3, 29, 3, 8),
            key_padding_mask=_padding(29, 29, 7, 0),
            **_span(5, 1, 1, 8),
            **_dropout(0.2, 5),
            **_without("bias_u", "bias_v"),
        ),
        # without the cap its gradient would be 0: a softmax does not see one number added to all scores
        _small("a span of one row, a soft cap", (2, 9, 2, 8), soft_cap=2.0, **_span(0, 0, 2, 8)),
        _small("a span on the left alone, a cache", (2, 7, 2, 8), cached=9, **_span(6, 0, 1, 8)),
        _small("a span beyond the keys", (2, 9, 2, 8), **_span(20, 11, 2, 8)),
        _small("a span beyond the keys on the left", (1, 9, 2, 8), **_span(20, 1, 1, 8)),
        _small("a span, one query and a cache", (2, 1, 2, 8), cached=9, **_span(4, 1, 2, 8)),
        _small(
            "a span, chunks, masks, a soft cap",
            (2, 25, 2, 8),
            attn_mask=_random_mask(25, 25),
            soft_cap=2.0,
            **_span(2, 3, 1, 8),
            **_context(6, 0, 6),
        ),
        _sample(
            "a span, a bias by offset, several tiles, a cache",
            (2, 140, 2, 20, 24, 21),
            draws=2,
            large=True,
            **_span(30, 7, 1, 20),
            **_by_offset(140, 2, 2, 21),
            **_context(90, 60),
        ),
        _sample(
            "a span, several tiles",
            (1, 150, 2, 16),
            key_padding_mask=_padding(150, 140),
            draws=2,
            **_span(20, 8, 1, 16),
        ),
        _sample(
            "a span, several blocks of keys", (1, 1200, 1, 16), draws=2, large=True, **_span(64, 8, 1, 16)
        ),
        _sample("a span, no frames", (2, 0, 2, 8), **_span(4, 2, 1, 8)),
        Sample("keys and values with a mean", _with_mean, thorough=True),
        Sample("an infinite query", _infinite, exact=False),
        _sample("no frames", (2, 0, 2, 8)),
        _sample("no frames, keys of a cache", (2, 0, 2, 8), cached=3),
        _sample("no sequences", (0, 5, 2, 8)),
    ),
    invalid=tuple(
        Invalid(name, partial(_call, batch=1, frames=4, heads=1, width=4, **given), ValueError, blamed)
        for name, blamed, given in (
            ("recordings and a cache", "k", {"cached": 2} | _recordings(0, 4)),
            ("recordings and chunks", "chunk_size", _recordings(0, 4) | _context(2, 0, 2)),
            ("no starts", "starts", _recordings()),
            ("a negative context", "context", _context(-2, 0)),
            ("a span of one side", "pos_span", {"pos_span": (3, -1)}),
            ("a span alone", "pos_span", {"pos_span": (3, 1)} | _without("pos", "bias_v")),
            ("positions beyond the span", "pos", {"pos_span": (3, 1)}),
            ("a bias of position alone", "bias_v", _without("pos")),
            ("a gate alone", "offset_gate", {"offset_gate": lambda make: make.normal(1, 4, 1)}),
            ("fewer keys than queries", "k", {"cached": -1}),
        )
    ),
    unread=("k", "v"),  # the op may skip hidden keys
    random=_random,
)


# --- the benchmark

HEADS, WIDTH = 8, 64


def espnet(heads: int, width: int, device: str) -> Callable:
    """Returns ESPnet's attention with projections that return their inputs."""
    name = "espnet2.asr.encoder.e_branchformer_encoder.RelPositionMultiHeadedAttention"
    attention = upstream_member(name)
    module = attention(heads, heads * width, 0.0).to(device)
    for name in ("linear_q", "linear_k", "linear_v", "linear_pos", "linear_out"):
        setattr(module, name, torch.nn.Identity())
    del module.pos_bias_u, module.pos_bias_v

    def run(
        q: Tensor, k: Tensor, v: Tensor, pos: Tensor, bias_u: Tensor, bias_v: Tensor, key_padding_mask: Tensor
    ) -> Tensor:
        module.pos_bias_u, module.pos_bias_v = bias_u, bias_v
        shape, mask = q.shape, ~key_padding_mask.unsqueeze(1)
        q, k, v, pos = (t.flatten(-2) for t in (q, k, v, pos))
        return module(q, k, v, pos.unsqueeze(0), mask).view(shape)

    return run


def additive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    bias_u: Tensor,
    bias_v: Tensor,
    key_padding_mask: Tensor | None = None,
    context: tuple[int, int] = (-1, -1),
    chunk_size: int = 1,
) -> Tensor:
    """Returns torch's fused attention with the scores of positions, padding and context as its mask."""
    position = ((q + bias_v) * q.shape[-1] ** -0.5).transpose(1, 2)
    mask = relative_shift(torch.matmul(position, pos.permute(1, 2, 0)))
    hidden = outside_context(mask, context, chunk_size)
    if key_padding_mask is not None:
        hidden = hidden | key_padding_mask[:, None, None]
    mask = mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    content, k, v = (t.transpose(1, 2) for t in (q + bias_u, k, v))
    return F.scaled_dot_product_attention(content, k, v, attn_mask=mask).transpose(1, 2)


def flex(device: str) -> Callable:
    """Returns torch's FlexAttention with a kernel that adds position scores formed beforehand."""
    if torch.device(device).type != "cuda":
        raise Unavailable("FlexAttention is compared on a GPU")
    from torch.nn.attention.flex_attention import flex_attention

    attention = compiled(flex_attention)

    def run(
        q: Tensor, k: Tensor, v: Tensor, pos: Tensor, bias_u: Tensor, bias_v: Tensor, key_padding_mask: Tensor
    ) -> Tensor:
        frames = q.shape[1]
        position = ((q + bias_v) * q.shape[-1] ** -0.5).transpose(1, 2)
        by_offset = torch.matmul(position, pos.permute(1, 2, 0))

        def scores(content: Tensor, sequence: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            score = content + by_offset[sequence, head, i, frames - 1 + j - i]
            return torch.where(key_padding_mask[sequence, j], -float("inf"), score)

        content, k, v = (t.transpose(1, 2) for t in (q + bias_u, k, v))
        return attention(content, k, v, score_mod=scores).transpose(1, 2)

    return run


def sized(T: int = 400, B: int = 4, H: int = HEADS, D: int = WIDTH) -> Case:
    def arguments(make: Make) -> dict:
        lengths = torch.linspace(T, T * 0.8, B).long()
        return _call(make, B, T, H, D, key_padding_mask=_padding(T, *lengths))

    others = {
        "additive mask": lambda **call: computed(additive, call),
        "FlexAttention": lambda **call: computed(flex(call["q"].device), call),
        "upstream": lambda **call: computed(espnet(H, D, call["q"].device), call),
    }
    name = f"{B}x{T}, {H} heads of {D}"
    return case("rel_attention", name, arguments, _passes(B, T, T * T, H, D), others=others)


def _passes(
    batch: int, frames: int, pairs: int, heads: int = HEADS, width: int = WIDTH
) -> Callable[[int], dict[str, Cost]]:
    """Returns the costs of each pass, where queries see ``pairs`` keys in all."""
    product = 2 * batch * heads * pairs * width
    rows, offsets = batch * frames * heads * width, 2 * frames * heads * width
    return costs((4 * rows + offsets, 3 * product), (7 * rows + 2 * offsets, 8 * product))


def _chunks(frames: int, batch: int, left: int = 70, chunk_size: int = 14) -> Case:
    context = _context(left, 0, chunk_size)
    chunks = range(0, frames, chunk_size)  # A range, no tensor: computing during an import starts threads.
    sizes = [
        (min(i + chunk_size, frames) - i, min(i + chunk_size, frames) - max(0, i - left)) for i in chunks
    ]
    pairs = sum(queries * keys for queries, keys in sizes)
    return case(
        "rel_attention",
        f"{batch}x{frames} in chunks of {chunk_size}, {HEADS} heads of {WIDTH}",
        lambda m: _call(m, batch, frames, HEADS, WIDTH, **context),
        _passes(batch, frames, pairs),
        others={"additive mask": lambda **call: computed(additive, call)},
    )


CASES = (sized(400, 4), sized(1500, 1), _chunks(1500, 1))
ON_DEVICE = (sized(400, BATCH), sized(400, BATCH, D=128), sized(FRAMES, BATCH), _chunks(FRAMES, BATCH))
WATCH = (
    "scores by offset shifted by `tl.gather` in registers; dropout by a hash; heads of up to 128; contexts; "
    "delta from y and its remainder in 16 bits"
)
