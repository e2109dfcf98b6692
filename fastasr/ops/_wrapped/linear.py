# SPDX-License-Identifier: Apache-2.0
"""The public linear: torch's own call, with its node of autograd, where that is at least as fast."""

import torch
import torch.nn.functional as F
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastasr._transforms import transforms_active
from fastasr.ops import _reduced_weights
from fastasr.ops._dispatch import FLOATING, PLAIN
from fastasr.ops._gemm import torchs
from fastasr.ops._op import OPS
from fastasr.ops._register import autocast_dtype
from fastasr.ops._written.linear import linear as checked
from fastasr.ops.linear import FAMILY, takes, torch_wins

_MOST_CALLS = 10_000  # At most this many calls are remembered.

op = OPS["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    try:
        if is_dynamo_compiling() or type(x) not in PLAIN:
            pass
        elif FAMILY.native is None or not x.is_cpu:
            if _is_torchs(x, weight, bias):
                return F.linear(x, weight, bias)
        else:
            call = (
                x.numel(), weight.shape, bias is None or bias.shape, x.dtype,
                is_grad_enabled() and weight.requires_grad, torch.get_num_threads(),
            )  # fmt: skip
            wins = FAMILY.chosen.get(call)
            # An equal call was checked before. torch refuses the rest, but not a weight on the meta device.
            if (
                wins
                and x.is_cpu
                and weight.is_cpu
                and x.layout is weight.layout is torch.strided
                and (bias is None or bias.layout is torch.strided)
            ):
                return torchs(x, weight, bias)
            if wins is None and _plain(x, weight, bias) and _decide(call, x, weight, bias):
                return torchs(x, weight, bias)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        pass  # the checks tell what is wrong
    return checked(x, weight, bias)


def _is_torchs(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Says whether torch alone serves the call, and refuses arguments where the checks would."""
    device, dtype, shape = x.device, x.dtype, weight.shape
    if FAMILY.kernels(x) is not None or len(shape) != 2 or weight.device != device:
        return False
    if not (x.layout is weight.layout is torch.strided and dtype in FLOATING):
        return False
    if bias is not None:
        if bias.shape != shape[:1] or bias.device != device or bias.layout is not torch.strided:
            return False
        if bias.dtype is not dtype:
            return bias.dtype in FLOATING and weight.dtype in FLOATING and autocast_dtype(x) is not None
    return weight.dtype is dtype or (weight.dtype in FLOATING and autocast_dtype(x) is not None)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Says whether the call is one that torch may serve in the kernels' place."""
    if FAMILY.native is None or transforms_active() or forward_ad._current_level >= 0:
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    plain = all(type(t) in PLAIN and t.is_cpu and t.dtype is x.dtype for t in tensors)
    return plain and not is_autocast_enabled("cpu") and takes(x, weight, bias)


def _decide(call: tuple, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool | None:
    """Says whether torch wins, and remembers the answer for such calls. A copy in fewer bits comes first."""
    if _reduced_weights.copies:
        return _reduced_weights.of(x, weight) is None and torch_wins(x, weight, bias)
    wins = torch_wins(x, weight, bias)
    if wins is not None:
        if len(FAMILY.chosen) >= _MOST_CALLS:
            FAMILY.chosen.clear()
        FAMILY.chosen[call] = wins
        if _reduced_weights.copies:  # another thread has made one meanwhile
            FAMILY.chosen.clear()
    return wins


linear.__doc__ = checked.__doc__
op.serve(linear)
