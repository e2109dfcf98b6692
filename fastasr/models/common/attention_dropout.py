# SPDX-License-Identifier: Apache-2.0
"""Dropout of attention weights, and on GPUs of activations: by the kernel, which forms no weights and writes no mask,
or as upstream draws it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastasr import _left
from fastasr.ops import _weights_dropout

_as_upstream = False


@contextmanager
def upstream_draws() -> Iterator[None]:
    """Has attention with relative positions draw the dropout of its weights as upstream does, inside the block, and on
    a GPU feed-forward blocks the dropout between their layers.

    By default the kernel decides by a hash what to drop: attention never holds all weights, and on a GPU a feed-forward
    block then moves no bytes for its dropout. The share and the distribution are upstream's, the random numbers are
    not. Inside the block the same seed drops the same as upstream; the weights are formed, so memory grows with the
    square of the length. The setting holds for all threads.
    """
    global _as_upstream
    before, _as_upstream = _as_upstream, True
    try:
        yield
    finally:
        _as_upstream = before


def as_upstream() -> bool:
    """Says whether the call is inside a block of ``upstream_draws``."""
    return _as_upstream


def forms_weights(p: float | None) -> bool:
    """Says whether the caller must form the weights for dropout p."""
    return p != 0 and (p is None or p >= 1 or as_upstream())


def dropout_of(
    module: torch.nn.Module, share: float | None, device: torch.device, reason: str | None = None
) -> dict[str, Any] | None:
    """Returns the kernel's arguments for dropout of this share of the module's weights, as ``of_kernel``, or None where
    the caller must form the weights, for ``reason`` or because of the dropout. It notes why."""
    if reason is not None:
        _left.note(module, reason)
        return None
    arguments = of_kernel(share, device)
    if share is None or share >= 1:
        _left.note(module, "the dropout of attention weights has hooks, is no plain Dropout, or drops all")
    elif arguments is None:
        _left.note(module, "upstream_draws is on, so attention forms its weights", level=logging.INFO)
    return arguments


def of_kernel(p: float | None, device: torch.device) -> dict[str, Any] | None:
    """Returns the op's arguments for dropout p, with a new seed, or None where the caller must form the weights. That
    includes p = None, which stands for a module that is no plain dropout.
    """
    if p == 0:
        return {}
    if p is None or forms_weights(p):
        return None
    return {"dropout_p": float(p), "dropout_seed": _weights_dropout.draw_seed(device)}
