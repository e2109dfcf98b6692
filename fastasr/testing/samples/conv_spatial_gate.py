# SPDX-License-Identifier: Apache-2.0
"""Samples of conv_spatial_gate."""

import torch

from fastasr.ops import _activation
from fastasr.ops.conv_spatial_gate import definition
from fastasr.testing.table import Invalid, Make, OpTable, Sample


def _mask(make: Make, batch: int, frames: int) -> torch.Tensor:
    """Padding of a ragged batch: the first sequence is whole, the others end earlier and earlier."""
    lengths = torch.tensor([frames - 2 * b for b in range(batch)]).clamp(min=0)
    return (torch.arange(frames) >= lengths[:, None]).to(make.device)


def _call(make: Make, batch: int, frames: int, channels: int, taps: int, masked=True, **options) -> dict:
    mask = {"padding_mask": _mask(make, batch, frames)} if masked else {}
    return {
        "x": make.normal(batch, frames, 2 * channels, scale=1.5, mean=0.3),
        "norm_weight": make.normal(channels, scale=0.3, mean=1.0),
        "norm_bias": make.normal(channels, scale=0.2),
        "weight": make.normal(channels, 1, taps, scale=0.3),
        "bias": make.normal(channels, mean=1.0),
        **mask,
        **options,
    }


def _with(**arguments):
    return lambda m: _call(m, 2, 6, 5, 3) | {k: v(m) if callable(v) else v for k, v in arguments.items()}


def _registered(a: dict) -> tuple:
    wide = torch.promote_types(a["x"].dtype, torch.float32)
    parameters = (
        a[n] if a[n] is None else a[n].to(wide) for n in ("norm_weight", "norm_bias", "weight", "bias")
    )
    number = _activation.NAMES.index(a.get("activation", "identity"))
    return a["x"], *parameters, a.get("padding_mask"), a.get("eps", 1e-5), number


def _one_bad_frame(make: Make, arguments: dict, value: float) -> dict:
    arguments["x"][0, 9, 3] = value
    arguments["x"][0, 5, -2] = value
    return arguments


def _random(make: Make, shape) -> dict:
    frames, batch, channels = shape.size(), shape.choice((0, 1, 2, 5)), 1 + shape.size()
    taps = shape.choice((1, 3, 7, 15, 31))
    # with few channels and a small eps, what LayerNorm divides by may be all rounding
    options = {"activation": shape.choice(_activation.NAMES), "eps": shape.choice((0.1, 1.0))}
    return _call(make, batch, frames, channels, taps) | options


TABLE = OpTable(
    op="conv_spatial_gate",
    definition=definition,
    registered=_registered,
    samples=(
        Sample("gate", lambda m: _call(m, 2, 14, 12, 7), thorough=True),
        Sample(
            "no mask, no bias, weight is a matrix",
            lambda m: (
                _call(m, 3, 13, 16, 5, masked=False, eps=1e-12) | {"weight": m.normal(16, 5), "bias": None}
            ),
            thorough=True,
        ),
        Sample("silu gate", lambda m: _call(m, 2, 20, 18, 3, activation="silu"), thorough=True),
        Sample("gelu gate", lambda m: _call(m, 2, 21, 33, 15, activation="gelu")),
        Sample("tanh gate", lambda m: _call(m, 2, 19, 40, 5, activation="tanh")),
        Sample("gelu gate, more frames", lambda m: _call(m, 2, 70, 33, 15, activation="gelu"), large=True),
        Sample("tanh gate, more frames", lambda m: _call(m, 2, 70, 40, 5, activation="tanh"), large=True),
        Sample("one tap", lambda m: _call(m, 2, 17, 64, 1)),
        Sample("one tap, more frames", lambda m: _call(m, 3, 130, 64, 1), large=True),
        Sample("shorter than the kernel", lambda m: _call(m, 3, 7, 80, 31)),
        Sample("one frame", lambda m: _call(m, 8, 1, 33, 15)),
        Sample("encoder", lambda m: _call(m, 4, 150, 200, 31), large=True),
        Sample("wide", lambda m: _call(m, 2, 40, 1100, 31), large=True),
        Sample("no frames", lambda m: _call(m, 3, 0, 8, 5)),
        Sample("no sequences", lambda m: _call(m, 0, 4, 8, 5)),
        Sample(
            "infinity in two frames",
            lambda m: _one_bad_frame(m, _call(m, 2, 20, 8, 5), float("inf")),
            exact=False,
        ),
        Sample(
            "NaN in two frames", lambda m: _one_bad_frame(m, _call(m, 2, 20, 8, 5), float("nan")), exact=False
        ),
    ),
    invalid=(
        Invalid("x is a matrix", _with(x=lambda m: m.normal(6, 10)), ValueError, "x"),
        Invalid("x has an odd number of channels", _with(x=lambda m: m.normal(2, 6, 9)), ValueError, "x"),
        Invalid(
            "norm_weight of another size", _with(norm_weight=lambda m: m.normal(4)), ValueError, "norm_weight"
        ),
        Invalid("norm_bias is None", _with(norm_bias=None), TypeError, "norm_bias"),
        Invalid("an even number of taps", _with(weight=lambda m: m.normal(5, 1, 4)), ValueError, "weight"),
        Invalid("weight of other channels", _with(weight=lambda m: m.normal(4, 1, 3)), ValueError, "weight"),
        Invalid("weight is dense", _with(weight=lambda m: m.normal(5, 5, 3)), ValueError, "weight"),
        Invalid("bias of another size", _with(bias=lambda m: m.normal(4)), ValueError, "bias"),
        Invalid(
            "mask is not bool",
            _with(padding_mask=lambda m: torch.zeros(2, 6, device=m.device)),
            TypeError,
            "padding_mask",
        ),
        Invalid(
            "mask is transposed",
            _with(padding_mask=lambda m: torch.zeros(6, 2, dtype=torch.bool, device=m.device)),
            ValueError,
            "padding_mask",
        ),
        Invalid("eps is negative", _with(eps=-1.0), ValueError, "eps"),
        Invalid("unknown activation", _with(activation="elu"), ValueError, "activation"),
        Invalid("activation is None", _with(activation=None), TypeError, "activation"),
    ),
    unread=("weight",),  # taps that reach no frame of a short sequence
    rows=("x", "padding_mask"),
    random=_random,
)
