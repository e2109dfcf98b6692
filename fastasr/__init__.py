# SPDX-License-Identifier: Apache-2.0
"""Fused, verified, reversible kernels for speech models: the same call on GPU and CPU.

``accelerate(model)`` swaps faster forwards into a model in place and reports what it did; ``verify``, ``restore``,
``eager_mode`` and ``explain`` check, undo, suspend and preview it, ``refresh`` renews the data kept between calls,
``why`` says which calls leave the fast path and why, and inside ``upstream_draws`` attention draws its dropout as
upstream does. ``packed`` makes ``PackedFrames``, batches without padding. ``fastasr.ops`` holds the operations
themselves.

``import fastasr`` registers ``torch.ops.fastasr``, which ``torch.export.load`` looks up: at once if torch is imported,
and otherwise as soon as it is. It imports nothing else: the command answers ``--help`` without torch, and each name
here imports its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastasr._registration import register_with_torch

__version__ = "0.1.0"

_SWAP = (
    *("accelerate", "explain", "verify", "restore", "refresh", "eager_mode", "upstream_draws", "why"),
    "SwapReport",
)
_GRAPHS = ("Graphs", "graph_state")
_PACKED_FRAMES = ("PackedFrames", "packed")
_SUBPACKAGES = (
    "ops",
    "models",
    "graphs",
    "rnnt",
    "compat",
    "swap",
    "testing",
    "kernels",
    "asr",
    "benchmarks",
)
__all__ = [
    "Graphs",
    "PackedFrames",
    "SwapReport",
    "accelerate",
    "backend",
    "eager_mode",
    "explain",
    "graph_state",
    "ops",
    "packed",
    "refresh",
    "restore",
    "upstream_draws",
    "verify",
    "why",
]

if TYPE_CHECKING:
    from fastasr import ops
    from fastasr.graphs import Graphs, graph_state
    from fastasr.ops._dispatch import backend
    from fastasr.packed_frames import PackedFrames, packed
    from fastasr.swap import SwapReport, accelerate, eager_mode, explain, refresh, restore, upstream_draws
    from fastasr.swap.verify import verify
    from fastasr.swap.why import why


def __getattr__(name: str) -> Any:
    if name in _SWAP:
        return getattr(import_module("fastasr.swap"), name)
    if name in _GRAPHS:
        return getattr(import_module("fastasr.graphs"), name)
    if name in _PACKED_FRAMES:
        return getattr(import_module("fastasr.packed_frames"), name)
    if name == "backend":
        return import_module("fastasr.ops._dispatch").backend
    if name in _SUBPACKAGES:
        return import_module(f"fastasr.{name}")
    from fastasr._nearest import no_attribute

    raise no_attribute(__name__, name, __dir__())


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES})


register_with_torch()
