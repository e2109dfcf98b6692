# SPDX-License-Identifier: Apache-2.0
"""Samples of toeplitz_attention."""

import torch

from fastasr.ops import _activation
from fastasr.ops.toeplitz_attention import chunks, definition
from fastasr.testing.table import Invalid, Make, OpTable, Sample


def _call(make: Make, length: int, batch: int, d: int, v: int, positions: int | None = None, **more) -> dict:
    size = chunks(length, more.get("chunk_size", 0))[0]
    return {
        "query_key": make.normal(length, batch, d, scale=1.5),
        "gate": make.normal(length, batch, v),
        "value": make.normal(length, batch, v),
        "qk_weight": make.normal(2, d, scale=0.5),
        "qk_bias": make.normal(2, d, scale=0.3),
        "position_bias": make.normal(2 * (positions or size) - 1, scale=0.5),
    } | more


def _slices(make: Make, length: int, batch: int, d: int, v: int, **more) -> dict:
    """query_key and gate as slices of one projection, as in a MEGA block."""
    base = make.normal(length, batch, d + v + 11)
    call = _call(make, length, batch, d, v, **more)
    return call | {"query_key": base[..., 5 : 5 + d], "gate": base[..., 5 + d : 5 + d + v]}


def _padding(*lengths: int) -> torch.Tensor:
    """Padding behind each length, and one padded key in the middle of the first sequence."""
    mask = torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]
    mask[0, lengths[0] // 2] = True
    return mask


def _dropout(make: Make, length: int, batch: int, d: int, v: int, chunk_size: int = 0, **more) -> dict:
    size, count = chunks(length, chunk_size)
    keep = make.uniform(batch, count, size, size) > 0.2
    return _call(make, length, batch, d, v, chunk_size=chunk_size, weights_dropout=keep, **more)


def _infinite(make: Make) -> dict:
    call = _call(make, 5, 2, 8, 12)
    call["query_key"][0, 0, 3] = -float("inf")
    return call


def _with(**arguments):
    return lambda m: _call(m, 5, 2, 8, 12) | {k: v(m) if callable(v) else v for k, v in arguments.items()}


def _registered(a: dict) -> tuple:
    wide = torch.promote_types(a["query_key"].dtype, torch.float32)
    dropout = a.get("weights_dropout")
    return (
        *(a[name] for name in ("query_key", "gate", "value")),
        *(a[name].to(wide) for name in ("qk_weight", "qk_bias", "position_bias")),
        a.get("padding_mask"),
        None if dropout is None else dropout.to(wide),
        a.get("causal", True),
        a.get("chunk_size", 0),
        _activation.NAMES.index(a.get("activation", "silu")),
        a.get("activate_value", False),
    )


def _random(make: Make, shape) -> dict:
    length, batch, size = shape.size() % 70, shape.size() % 5, 1 + shape.size() % 40
    chunk = shape.choice((0, 0, 1, 7, 32, 40))
    return _call(
        make,
        length,
        batch,
        size,
        shape.size() % 50,
        positions=max(1, length) + shape.choice((0, 3)),
        chunk_size=chunk,
        causal=shape.choice((True, False)),
        activation=shape.choice(_activation.NAMES),
        activate_value=shape.choice((True, False)),
    )


TABLE = OpTable(
    op="toeplitz_attention",
    definition=definition,
    registered=_registered,
    samples=(
        Sample("an infinite frame", _infinite, exact=False),
        Sample("causal", lambda m: _call(m, 13, 3, 16, 20), thorough=True),
        Sample(
            "slices, value before the activation",
            lambda m: _slices(m, 9, 2, 16, 20, activate_value=True),
            thorough=True,
        ),
        Sample("dropout", lambda m: _dropout(m, 6, 2, 16, 24), thorough=True),
        Sample(
            "chunks of which the last is short",
            lambda m: _call(m, 10, 2, 8, 12, chunk_size=4, padding_mask=_padding(10, 7)),
            thorough=True,
        ),
        Sample("both ways", lambda m: _call(m, 65, 2, 64, 96, causal=False), large=True),
        Sample("padding", lambda m: _call(m, 70, 3, 64, 97, padding_mask=_padding(70, 40, 1))),
        Sample(
            "padding both ways",
            lambda m: _call(m, 70, 3, 64, 97, padding_mask=_padding(70, 40, 1), causal=False),
            large=True,
        ),
        Sample(
            "nothing but padding",
            lambda m: _call(m, 12, 2, 8, 12, padding_mask=torch.tensor([[True] * 12, [False] * 12])),
        ),
        Sample("chunks", lambda m: _call(m, 192, 2, 64, 96, chunk_size=64), large=True),
        Sample("a long bias", lambda m: _call(m, 40, 2, 16, 32, positions=64)),
        Sample("dropout in chunks", lambda m: _dropout(m, 256, 3, 128, 160, 64, causal=False), large=True),
        *(
            Sample(
                name,
                lambda m, name=name: _call(m, 100, 2, 128, 129, activation=name, activate_value=True),
                large=True,
            )
            for name in _activation.NAMES
        ),
        Sample("block", lambda m: _slices(m, 100, 2, 128, 256), large=True),
        Sample("long", lambda m: _call(m, 300, 1, 64, 64), large=True),
        Sample("one frame", lambda m: _call(m, 1, 3, 8, 12)),
        Sample("no frames", lambda m: _call(m, 0, 3, 8, 12)),
        Sample("no sequences", lambda m: _call(m, 5, 0, 8, 12)),
        Sample("no values", lambda m: _call(m, 5, 2, 8, 0)),
        Sample(
            "a query without a key",
            lambda m: _call(m, 4, 1, 8, 12, padding_mask=torch.tensor([[True, True, False, False]])),
            exact=False,
        ),
    ),
    invalid=(
        Invalid("gate of another length", _with(gate=lambda m: m.normal(4, 2, 12)), ValueError, "gate"),
        Invalid("value of another width", _with(value=lambda m: m.normal(5, 2, 13)), ValueError, "value"),
        Invalid("query_key is a matrix", _with(query_key=lambda m: m.normal(5, 8)), ValueError, "query_key"),
        Invalid(
            "qk_weight of another size", _with(qk_weight=lambda m: m.normal(2, 7)), ValueError, "qk_weight"
        ),
        Invalid("qk_bias is a vector", _with(qk_bias=lambda m: m.normal(16)), ValueError, "qk_bias"),
        Invalid(
            "position_bias is short", _with(position_bias=lambda m: m.normal(7)), ValueError, "position_bias"
        ),
        Invalid(
            "position_bias is even", _with(position_bias=lambda m: m.normal(10)), ValueError, "position_bias"
        ),
        Invalid("causal is an int", _with(causal=1), TypeError, "causal"),
        Invalid("chunk_size is a float", _with(chunk_size=2.0), TypeError, "chunk_size"),
        Invalid("unknown activation", _with(activation="laplace"), ValueError, "activation"),
        Invalid(
            "padding_mask of integers",
            _with(padding_mask=lambda m: torch.zeros(2, 5).int()),
            TypeError,
            "padding_mask",
        ),
        Invalid(
            "padding_mask transposed",
            _with(padding_mask=lambda m: torch.zeros(5, 2, dtype=torch.bool)),
            ValueError,
            "padding_mask",
        ),
        Invalid(
            "dropout of another shape",
            _with(weights_dropout=lambda m: m.normal(2, 5, 5) > 0),
            ValueError,
            "weights_dropout",
        ),
    ),
    unread=("value",),
    random=_random,
)
