# SPDX-License-Identifier: Apache-2.0
"""Samples of swoosh_linear, and its benchmark: the feed-forward modules of Zipformer-M's stacks 0 and 3.

There, forward is inference without dropout. The passes with gradients are a training step: dropout 0.1 with a mask
shared over time, as upstream trains.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr.ops._dropout import draw_mask
from fastasr.ops._op import OPS
from fastasr.testing.samples.linear import affine
from fastasr.testing.speed import (
    BATCH,
    FRAMES,
    Case,
    Implementation,
    compiled,
    costs,
    parameters,
    upstream_member,
)
from fastasr.testing.table import Invalid, Make, OpTable, Sample, changed


def _definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kind: str = "SwooshL",
    dropout_p: float = 0.0,
    dropout_shared_dim: int | None = None,
    training: bool = False,
) -> Tensor:
    mask = draw_mask(x, dropout_p, dropout_shared_dim) if training and dropout_p else None
    return OPS["swoosh_linear"].definition(x, weight, bias, kind, mask)


def _registered(a: dict) -> tuple:
    mask, shared_dim = None, -1
    if a.get("training") and a.get("dropout_p"):
        mask = draw_mask(a["x"].detach(), a["dropout_p"], a["dropout_shared_dim"])
        shared_dim = -1 if a["dropout_shared_dim"] is None else a["dropout_shared_dim"] % a["x"].dim()
    return a["x"], a["weight"], a["bias"], a.get("kind", "SwooshL"), mask, None, shared_dim


def _training(
    make: Make, shape: tuple[int, ...], n: int, shared_dim: int | None, kind: str = "SwooshL"
) -> dict:
    dropout = {"dropout_p": 0.25, "dropout_shared_dim": shared_dim, "training": True}
    return affine(make, shape, n) | {"kind": kind} | dropout


_with = partial(changed, lambda m: affine(m, (3, 8), 5))


TABLE = OpTable(
    op="swoosh_linear",
    definition=_definition,
    registered=_registered,
    samples=(
        Sample("tbc", lambda m: affine(m, (6, 2, 16), 12) | {"kind": "SwooshL"}, thorough=True),
        Sample(
            "SwooshR, no bias",
            lambda m: affine(m, (7, 9), 5, bias=False) | {"kind": "SwooshR"},
            thorough=True,
        ),
        Sample("dropout shared over time", lambda m: _training(m, (6, 2, 16), 12, 0), thorough=True),
        Sample(
            "dropout shared over channels",
            lambda m: _training(m, (6, 2, 16), 12, -1, "SwooshR"),
            thorough=True,
        ),
        Sample("dropout shared over the batch", lambda m: _training(m, (6, 3, 16), 12, 1)),
        Sample("dropout of every element", lambda m: _training(m, (6, 2, 16), 12, None)),
        Sample("dropout of one channel", lambda m: _training(m, (9, 1), 5, 0)),
        Sample("dropout in eval", lambda m: _training(m, (6, 2, 16), 12, 0) | {"training": False}),
        Sample("feed-forward", lambda m: _training(m, (150, 4, 160), 96, 0)),
        Sample("vector", lambda m: affine(m, (16,), 8)),
        Sample("no rows", lambda m: _training(m, (0, 3, 8), 5, 0)),
        Sample("no outputs", lambda m: affine(m, (4, 8), 0)),
        Sample("no channels", lambda m: affine(m, (4, 0), 5)),
    ),
    invalid=(
        Invalid("p is 1", _with(dropout_p=1.0), ValueError, "dropout_p"),
        Invalid("p is negative", _with(dropout_p=-0.1), ValueError, "dropout_p"),
        Invalid("p is NaN", _with(dropout_p=float("nan")), ValueError, "dropout_p"),
        Invalid("p is a string", _with(dropout_p="0.1"), TypeError, "dropout_p"),
        Invalid(
            "shared dimension out of range", _with(dropout_shared_dim=2), ValueError, "dropout_shared_dim"
        ),
        Invalid(
            "shared dimension is a float", _with(dropout_shared_dim=0.0), TypeError, "dropout_shared_dim"
        ),
    ),
    rows=("x",),
    thread_invariant=False,
    random=lambda m, shape: (
        affine(m, shape() or (3,), shape.size()) | {"kind": shape.choice(("SwooshL", "SwooshR"))}
    ),
)


# --- the benchmark

TRAINING: dict[str, Any] = {"dropout_p": 0.1, "dropout_shared_dim": 0}


def formula(x: Tensor, weight: Tensor, bias: Tensor, dropout_p: float) -> Tensor:
    """Computes linear(mask * swoosh_l(x)); the mask is shared over the first dimension, time."""
    y = OPS["swoosh_l"].definition(x)
    if dropout_p > 0:
        kept = torch.rand((1, *x.shape[1:]), device=x.device, dtype=x.dtype) > dropout_p
        y = y * (kept.to(x.dtype) * (1 / (1 - dropout_p)))
    return F.linear(y, weight, bias)


def _formula(function: Callable, x: Tensor, weight: Tensor, bias: Tensor) -> Implementation:
    return Implementation(
        lambda: function(x, weight, bias, TRAINING["dropout_p"]),
        parameters(x, weight, bias),
        inference=lambda: function(x, weight, bias, 0.0),
    )


def _fastasr(x: Tensor, weight: Tensor, bias: Tensor) -> Implementation:
    call = partial(ops.swoosh_linear, x, weight, bias, kind="SwooshL", **TRAINING)
    inference = partial(call, training=False)
    return Implementation(partial(call, training=True), parameters(x, weight, bias), inference)


def _upstream(x: Tensor, weight: Tensor, bias: Tensor) -> Implementation:
    cls = upstream_member("zipformer.modules.scaling.ActivationDropoutAndLinear")
    build = partial(cls, *weight.shape[::-1], activation="SwooshL", **TRAINING)
    training, inference = build().to(x), build().to(x).eval()
    for linear in (training, inference):
        linear.weight = torch.nn.Parameter(weight.detach())
        linear.bias = torch.nn.Parameter(bias.detach())
    wanted = parameters(x, training.weight, training.bias)
    return Implementation(partial(training, x), wanted, inference=partial(inference, x))


def sized(T: int = 796, B: int = 4, K: int = 512, N: int = 192) -> Case:
    def arguments(make: Make) -> dict:
        return affine(make, (T, B, K), N)

    def make(device: str, dtype: torch.dtype) -> dict[str, Callable[[], Implementation]]:
        given = cache(lambda: arguments(Make(dtype, device)))
        return {
            "eager": lambda: _formula(formula, **given()),
            "compile": lambda: _formula(compiled(formula), **given()),
            "upstream": lambda: _upstream(**given()),
            "fastasr": lambda: _fastasr(**given()),
        }

    text, rows, weight = f"{T}x{B}x{K}", T * B, K * N
    product, forward = 2 * rows * weight, rows * K + weight + rows * N
    passes = costs((forward, product), (forward + rows * K + weight, 2 * product))
    return Case("swoosh_linear", f"{text}->{N}", text, make, passes, arguments=arguments)


CASES = (sized(), sized(100, 4, 1536, 512))
ON_DEVICE = (sized(FRAMES, BATCH, 512, 192), sized(FRAMES, BATCH, 1536, 512))
WATCH = "the masked kernels; the product in torch beside them"
