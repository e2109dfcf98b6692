# SPDX-License-Identifier: Apache-2.0
"""Code that rnnt_lattice and rnnt_pruned_lattice share, and in part rnnt_joiner: the boundary, the meaning of an entry,
a safe log-sum, and the calls of the kernels.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastasr._transforms import transforms_active
from fastasr.ops._dispatch import PLAIN, Kernels
from fastasr.ops._op import Arguments, Op

# Log probabilities below LEAST count as -inf: kernels keep powers of two as float32 numbers and the impossible as
# -2^100.
LEAST = -(2.0**80)
INF = float("inf")


# --------------------------------------------------------------------------- entries
def log_probabilities(
    x: Tensor, y: Tensor, inside_x: Tensor, inside_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (x, y, whether a sequence has a NaN): the entries in float32 or better, -inf where they are
    not inside.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    found = []
    for t, inside in ((x.to(dtype), inside_x), (y.to(dtype), inside_y)):
        t = torch.where(t == INF, float("nan"), t)
        found.append(torch.where((t < LEAST) | ~inside, -INF, t))
    x, y = found
    return x, y, x.isnan().any(2).any(1) | y.isnan().any(2).any(1)


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """Returns log(e^a + e^b), with gradients of any order, which are 0 where both are -inf."""
    alone, largest = (a == -INF) | (b == -INF), torch.maximum(a, b)
    both = torch.logaddexp(torch.where(alone, 0.0, a), torch.where(alone, 0.0, b))
    return torch.where(alone, torch.where(largest == -INF, -INF, largest), both)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Returns e^(part - whole), 0 where whole is -inf."""
    none = whole == -INF
    return torch.where(none, 0.0, (part - torch.where(none, 0.0, whole)).exp())


def occupation(gradient: Tensor, scores: Tensor, inside: Tensor) -> Tensor:
    """Returns the gradient of the scores inside the boundary, NaN where a score is NaN, and 0 outside."""
    return torch.where(inside, torch.where(scores.isnan()[:, None, None], float("nan"), gradient), 0.0)


# --------------------------------------------------------------------------- the boundary
def whole(s_end: Tensor, frames: int) -> Tensor:
    """Returns the boundary (B, 4) from (0, 0) to (s_end, frames), without a copy from the host."""
    zero = torch.zeros_like(s_end)
    return torch.stack((zero, zero, s_end, zero + frames), 1)


def within(boundary: Tensor, s: Tensor, t: Tensor, regular: bool) -> tuple[Tensor, Tensor]:
    """Says whether the symbol arc and the blank arc of the cells (s, t) lie inside the boundary (B, 4)."""
    s_begin, t_begin, s_end, t_end = (boundary[:, i].view(-1, 1, 1) for i in range(4))
    begun = (s >= s_begin) & (t >= t_begin)
    return begun & (s < s_end) & (t < t_end + int(regular)), begun & (s <= s_end) & (t < t_end)


def values_are_checked(t: Tensor) -> bool:
    """Says whether values are checked: not on a GPU, which reading them would stall, not in a traced call, and not
    under torch.func, where vmap hides them.
    """
    return not is_compiling() and type(t) in PLAIN and t.is_cpu and not transforms_active()


def check_boundary(op: Op, boundary: Tensor | None, symbols: int | None, frames: int) -> None:
    """Checks 0 <= s_begin <= s_end <= symbols (None: any number) and 0 <= t_begin <= t_end <= frames in every row."""
    if boundary is None or not values_are_checked(boundary):
        return
    for row, (s_begin, t_begin, s_end, t_end) in enumerate(boundary.tolist()):
        most = s_end if symbols is None else symbols
        if not (0 <= s_begin <= s_end <= most and 0 <= t_begin <= t_end <= frames):
            expected = f"0 <= s_begin <= s_end <= {'s_end' if symbols is None else symbols}"
            expected += f" and 0 <= t_begin <= t_end <= {frames}"
            op.fail("boundary", expected, f"{[s_begin, t_begin, s_end, t_end]} in row {row}")


Scores = Annotated[Tensor, "scores: B", "wide symbol_logprobs + blank_logprobs"]


# --------------------------------------------------------------------------- kernels
def launch(call: Callable, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> list[Tensor]:
    """Calls the kernels with contiguous tensors in the dtype of the scores."""
    x, y, *others = (t.contiguous() if isinstance(t, Tensor) else t for t in a)
    found = call(kernels, keep, x.to(dtype), y.to(dtype), *others)
    return [found[0].new_empty(0) if t is None else t for t in found]
