# SPDX-License-Identifier: Apache-2.0
"""Replace the forward of known modules of a user's model by fastasr's, in place, reported and undoable."""

from fastasr.models.common.attention_dropout import upstream_draws
from fastasr.swap.engine import accelerate, eager_mode, explain, refresh, restore
from fastasr.swap.report import SwapReport
from fastasr.swap.verify import verify
from fastasr.swap.why import why

__all__ = [
    "SwapReport",
    "accelerate",
    "eager_mode",
    "explain",
    "refresh",
    "restore",
    "upstream_draws",
    "verify",
    "why",
]
