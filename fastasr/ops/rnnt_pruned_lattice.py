# SPDX-License-Identifier: Apache-2.0
r"""The lattice of a transducer inside a band: R cells of each frame, as pruning leaves them.

Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training" (2022), section 3. Cell (t, r) of the band is cell
s = ``starts[b, t]`` + r of frame t in the whole lattice, see :mod:`fastasr.ops.rnnt_lattice`; cells outside the band
have no outgoing arcs. With x = ``symbol_logprobs`` and y = ``blank_logprobs``, both (B, T, R), c the cells in which a
frame is entered and d = starts[t+1] - starts[t]:

    regular   p[t,r] = log(e^c[t,r] + e^(p[t,r-1] + x[t,r-1])),  a[t,j] = p[t,j] + y[t,j]
    modified  p[t,r] = c[t,r],  a[t,j] = log(e^(p[t,j-1] + x[t,j-1]) + e^(p[t,j] + y[t,j]))
    c[t+1,r] = a[t,r+d]

a has R + 1 cells: the modified lattice may leave a window at its top, and enter the next one. What this gives is what
the whole lattice gives with the band scattered into -inf. Bytes per cell of e bytes: forward 2 e (3 e when shares are
kept), backward 3 e. Upstream scatters: ``rnnt_loss_pruned`` of k2 and fast_rnnt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check
from fastasr.ops._dispatch import PLAIN, KernelFamily, direct, native_kernels, triton_kernels
from fastasr.ops._lattice import (
    check_boundary,
    check_boundary_values,
    check_integers,
    compute_dtype,
    log_add,
    log_probabilities,
    share,
)
from fastasr.ops._register import refuse_double_backward, register

NAME = "rnnt_pruned_lattice"
FAMILY = KernelFamily(NAME, (NAME,), (native_kernels(NAME), triton_kernels(NAME)))

_INF = float("inf")


# --------------------------------------------------------------------------- definition
def definition(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    starts: Tensor,
    boundary: Tensor | None = None,
    *,
    modified: bool = False,
    return_occupation: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The formula in eager PyTorch, one frame after the other."""
    band = _Band(symbol_logprobs, blank_logprobs, starts, boundary, modified)
    scores, shares = band.scores()
    if not return_occupation:
        return scores
    with torch.no_grad():
        return scores, *band.occupation(None, scores.detach(), shares.detach())


class _Band:
    def __init__(self, x: Tensor, y: Tensor, starts: Tensor, boundary: Tensor | None, modified: bool):
        self.batch, self.frames, self.window = x.shape
        self.modified = modified
        if boundary is None:
            boundary = whole(starts, self.window)
        self.s_begin, self.t_begin, self.s_end, self.t_end = boundary.unbind(1)
        self.starts = starts
        self.r = torch.arange(self.window, device=x.device)
        s = starts[..., None] + self.r  # (B, T, R)
        t = torch.arange(self.frames, device=x.device)[:, None]
        s_begin, t_begin, s_end, t_end = (e[:, None, None] for e in boundary.unbind(1))
        begun = (s >= s_begin) & (t >= t_begin)
        self.inside_y = begun & (s <= s_end) & (t < t_end)
        self.inside_x = begun & (s < s_end) & (t < t_end + int(not modified))
        if not modified:
            self.inside_x = self.inside_x & (self.r + 1 < self.window)
        dtype = compute_dtype(x, y)
        self.x = log_probabilities(x, dtype, self.inside_x)
        self.y = log_probabilities(y, dtype, self.inside_y)
        self.poisoned = self.x.isnan().any(2).any(1) | self.y.isnan().any(2).any(1)

    def _moved(self, cells: Tensor, by: Tensor, width: int, fill: float) -> Tensor:
        """(B, width): cell r from cell r + by, ``fill`` where there is none."""
        at = torch.arange(width, device=cells.device) + by[:, None]
        there = (at >= 0) & (at < cells.shape[1])
        return torch.where(there, cells.gather(1, at.clamp(0, cells.shape[1] - 1)), fill)

    def _at_begin(self, t: int) -> Tensor:
        return ((self.starts[:, t, None] + self.r) == self.s_begin[:, None]) & (self.t_begin == t)[:, None]

    def _ends(self, t: int) -> Tensor:
        """(B, R): the end of the boundary, where it is a cell of frame t's window."""
        return ((self.starts[:, t, None] + self.r) == self.s_end[:, None]) & (self.t_end == t)[:, None]

    def _leaves(self, t: int) -> Tensor:
        """(B, R + 1): the end of the boundary, where frame t leads to it."""
        s = self.starts[:, t, None] + torch.arange(self.window + 1, device=self.r.device)
        return (s == self.s_end[:, None]) & (self.t_end == t + 1)[:, None]

    def scores(self) -> tuple[Tensor, Tensor]:
        """(scores, shares): shares (B, T, R + 1) of the symbol arcs in p (regular) or a (modified)."""
        nothing = (self.s_begin == self.s_end) & (self.t_begin == self.t_end)
        scores = self.x.new_full((self.batch,), -_INF)
        scores = (
            scores + self.x[:, :0].sum((1, 2)) + self.y[:, :0].sum((1, 2))
        )  # zeros: gradients without arcs too
        p = self.x.new_full((self.batch, self.window), -_INF)
        shares = []
        for t in range(self.frames):
            x, y = self.x[:, t], self.y[:, t]
            p = torch.where(self._at_begin(t), 0.0, p)
            if self.modified:
                scores = self._pick(scores, p, self._ends(t))
                entering = F.pad(p + x, (1, 0), value=-_INF)
                a = log_add(entering, F.pad(p + y, (0, 1), value=-_INF))
                shares.append(share(entering, a))
            else:
                p, symbol = self._along_frame(p, x)
                shares.append(symbol)
                scores = self._pick(scores, p, self._ends(t))
                a = F.pad(p + y, (0, 1), value=-_INF)
            scores = self._pick(scores, a, self._leaves(t))
            if t + 1 < self.frames:
                p = self._moved(a, self.starts[:, t + 1] - self.starts[:, t], self.window, -_INF)
        scores = torch.where(self.poisoned, float("nan"), torch.where(nothing, 0.0, scores))
        width = self.window + 1
        return scores, torch.stack(shares, 1) if shares else scores.new_zeros(self.batch, 0, width)

    def _along_frame(self, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        cells, shares = list(p.unbind(1)), [torch.zeros_like(p[:, 0])]
        for r in range(1, self.window):
            entering = cells[r - 1] + x[:, r - 1]
            cells[r] = log_add(cells[r], entering)
            shares.append(share(entering, cells[r]))
        return torch.stack(cells, 1), torch.stack((*shares, torch.zeros_like(p[:, 0])), 1)

    @staticmethod
    def _pick(scores: Tensor, cells: Tensor, where: Tensor) -> Tensor:
        """The one cell of each sequence where there is one; no gradient where no path reaches it."""
        picked = torch.where(where, cells, 0.0).sum(1)
        return torch.where(where.any(1), torch.where(picked == -_INF, -_INF, picked), scores)

    def occupation(self, grad: Tensor | None, scores: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the arcs for ``grad`` (B,) of the scores (None: 1)."""
        end = torch.where(
            scores.isfinite(), torch.ones_like(scores) if grad is None else grad.to(scores.dtype), 0.0
        )
        end = end[:, None]
        dx, dy = torch.zeros_like(self.x, dtype=scores.dtype), torch.zeros_like(self.y, dtype=scores.dtype)
        g = scores.new_zeros(self.batch, self.window)
        for t in range(self.frames - 1, -1, -1):
            ended = self._ends(t)  # then no arc of frame t leads on, but symbols along it
            into = g.new_zeros(self.batch, self.window + 1)
            if t + 1 < self.frames:
                into = self._moved(g, self.starts[:, t] - self.starts[:, t + 1], self.window + 1, 0.0)
            leaves = self._leaves(t)
            if t + 1 < self.frames:  # the end may be a cell of the next window: then it came in with g
                leaves = leaves & ~self._ends(t + 1).any(1, keepdim=True)
            into = into + torch.where(leaves, end, 0.0)
            if self.modified:
                symbol = into * shares[:, t]
                blank = (into - symbol)[:, : self.window]
                dx[:, t], dy[:, t] = symbol[:, 1:], blank
                g = symbol[:, 1:] + blank + torch.where(ended, end, 0.0)
            else:
                dy[:, t] = into[:, : self.window]
                g = into[:, : self.window] + torch.where(ended, end, 0.0)
                cells = list(g.unbind(1))
                for r in range(self.window - 1, 0, -1):
                    symbol = cells[r] * shares[:, t, r]
                    dx[:, t, r - 1] = symbol
                    cells[r], cells[r - 1] = cells[r] - symbol, cells[r - 1] + symbol
                g = torch.stack(cells, 1)
        bad = scores.isnan()[:, None, None]
        dx, dy = (torch.where(bad, float("nan"), d) for d in (dx, dy))
        return torch.where(self.inside_x, dx, 0.0), torch.where(self.inside_y, dy, 0.0)


def whole(starts: Tensor, window: int) -> Tensor:
    """The boundary (B, 4) from (0, 0) to the top of the last window."""
    zero = torch.zeros(starts.shape[0], dtype=torch.int64, device=starts.device)
    s_end = starts[:, -1] + (window - 1) if starts.shape[1] else zero
    return torch.stack((zero, zero, s_end, zero + starts.shape[1]), 1)


# --------------------------------------------------------------------------- kernels
def forward(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    starts: Tensor,
    boundary: Tensor | None,
    modified: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(scores, shares) without autograd, by the best kernel; shares without elements unless ``keep``."""
    dtype = compute_dtype(symbol_logprobs, blank_logprobs)
    x, y = symbol_logprobs.to(dtype).contiguous(), blank_logprobs.to(dtype).contiguous()
    kernels = FAMILY.kernels(x)
    if kernels is None:
        with torch.no_grad():
            scores, shares = _Band(x, y, starts, boundary, modified).scores()
            return scores, shares if keep else x.new_empty(0)
    starts, boundary = starts.contiguous(), None if boundary is None else boundary.contiguous()
    return kernels.forward(x, y, starts, boundary, modified, keep)


def backward(
    grad: Tensor | None,
    scores: Tensor,
    shares: Tensor,
    starts: Tensor,
    boundary: Tensor | None,
    window: int,
    modified: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the log probabilities in the compute dtype, for ``grad`` of the scores; None: the occupations."""
    kernels = FAMILY.kernels(scores)
    if kernels is None:
        like = scores.new_empty(*starts.shape, window)
        return _Band(like, like, starts, boundary, modified).occupation(grad, scores, shares)
    grad = None if grad is None else grad.to(scores.dtype).contiguous()
    starts, boundary = starts.contiguous(), None if boundary is None else boundary.contiguous()
    return kernels.backward(grad, scores, shares, starts, boundary, window, modified)


class _PrunedLattice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, y: Tensor, starts: Tensor, boundary: Tensor | None, modified: bool, occupied: bool
    ):
        scores, shares = forward(x, y, starts, boundary, modified, True)
        ctx.save_for_backward(scores, shares, starts, boundary)
        ctx.window, ctx.modified = x.shape[2], modified
        ctx.dtypes = (x.dtype, y.dtype)
        if not occupied:
            return scores
        occupation = backward(None, scores, shares, starts, boundary, ctx.window, modified)
        ctx.mark_non_differentiable(*occupation)
        return scores, *occupation

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        refuse_double_backward(NAME)
        dx, dy = backward(grad, *ctx.saved_tensors, ctx.window, ctx.modified)
        return dx.to(ctx.dtypes[0]), dy.to(ctx.dtypes[1]), None, None, None, None


class _NativeLattice(torch.autograd.Function):
    """The shortest path: the native kernels check their arguments themselves and raise RuntimeError."""

    @staticmethod
    def forward(
        ctx, kernels, x: Tensor, y: Tensor, starts: Tensor, boundary: Tensor | None, modified: bool
    ) -> Tensor:
        scores, shares = kernels.forward(x, y, starts, boundary, modified, True)
        ctx.save_for_backward(scores, shares, starts, boundary)
        ctx.kernels, ctx.window, ctx.modified = kernels, x.shape[2], modified
        return scores

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward(NAME)
        gradients = ctx.kernels.backward(grad.contiguous(), *ctx.saved_tensors, ctx.window, ctx.modified)
        return None, *gradients, None, None, None


# --------------------------------------------------------------------------- registration
def _whole_forward(x, y, starts, boundary, modified: bool, return_occupation: bool, keep: bool):
    scores, shares = forward(x, y, starts, boundary, modified, keep or return_occupation)
    if return_occupation:
        occupation = backward(None, scores, shares, starts, boundary, x.shape[2], modified)
    else:
        occupation = scores.new_empty(0), scores.new_empty(0)
    return scores, *occupation, shares if keep else scores.new_empty(0)


def shares_shape(kernels, batch: int, frames: int, window: int) -> tuple[int, ...]:
    """What kernels keep; those of the CPU work on sixteen sequences at a time."""
    if kernels is not None and kernels.backend == "cpu":
        return (batch + 15) // 16, frames, window + 1, 16
    return batch, frames, window + 1


def _fake_forward(x, y, starts, boundary, modified: bool, return_occupation: bool, keep: bool):
    like = x.new_empty if x.dtype is compute_dtype(x, y) else x.to(compute_dtype(x, y)).new_empty
    batch, frames, window = x.shape
    occupation = (like(x.shape), like(x.shape)) if return_occupation else (like(0), like(0))
    return (
        like(batch),
        *occupation,
        like(shares_shape(FAMILY.kernels(x, y), batch, frames, window)) if keep else like(0),
    )


def _fake_backward(grad, scores, shares, starts, boundary, window: int, modified: bool):
    shape = (*starts.shape, window)
    return scores.new_empty(shape), scores.new_empty(shape)


_BACKWARD_OP = register(
    f"{NAME}_backward(Tensor grad, Tensor scores, Tensor shares, Tensor starts, Tensor? boundary, SymInt window, "
    "bool modified) -> (Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    x, y, starts, boundary, ctx.modified, _, ctx.keep = inputs
    scores, *occupation, shares = output
    ctx.mark_non_differentiable(*occupation, shares)
    ctx.window = x.shape[2]
    ctx.dtypes = (x.dtype, y.dtype)
    ctx.save_for_backward(*((scores, shares) if ctx.keep else (x, y)), starts, boundary)


def _op_backward(ctx, grad: Tensor, *_):
    first, second, starts, boundary = ctx.saved_tensors
    kept = (
        (first, second) if ctx.keep else _OP(first, second, starts, boundary, ctx.modified, False, True)[::3]
    )
    dx, dy = _BACKWARD_OP(grad, *kept, starts, boundary, ctx.window, ctx.modified)
    return dx.to(ctx.dtypes[0]), dy.to(ctx.dtypes[1]), None, None, None, None, None


_OP = register(
    f"{NAME}(Tensor symbol_logprobs, Tensor blank_logprobs, Tensor starts, Tensor? boundary, bool modified, "
    "bool return_occupation, bool keep_shares) -> (Tensor, Tensor, Tensor, Tensor)",
    _whole_forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_op_backward,
)


def _check_starts(op: str, starts: Tensor) -> None:
    if starts.numel() and (int(starts.min()) < 0 or bool((starts[:, 1:] < starts[:, :-1]).any())):
        row = int(((starts < 0).any(1) | (starts[:, 1:] < starts[:, :-1]).any(1)).nonzero()[0])
        raise ValueError(
            f"fastasr.{op}: starts: expected numbers >= 0 that do not decrease along a row, got others in row {row}"
        )


def rnnt_pruned_lattice(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    starts: Tensor,
    boundary: Tensor | None = None,
    *,
    modified: bool = False,
    return_occupation: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The log of the summed probability of all paths through each lattice that stay inside the band.

    Args:
        symbol_logprobs, blank_logprobs: (B, T, R), log probabilities of symbol s+1 and of a blank in cell (s, t),
            s = starts[b, t] + r. float32, bfloat16, float16 or float64; special values as in ``rnnt_lattice``. The
            last column's symbols are not used in the regular lattice: they leave the band.
        starts: (B, T) int64, the first s of each frame's window; it does not decrease along t.
        boundary: (B, 4) int64, [s_begin, t_begin, s_end, t_end]; None: from (0, 0) to the top of the last window,
            [0, 0, starts[b, -1] + R - 1, T].
        modified: a symbol takes a frame.
        return_occupation: return occupations too.
    Returns:
        scores (B,), of float64 if an argument is, else of float32; -inf where no path reaches the end. With
        ``return_occupation`` (scores, symbol_occupation, blank_occupation), see ``rnnt_lattice``.
    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes or devices do not match; on the CPU: starts that decrease or are negative, a boundary that is
            not in order or ends after T. On a GPU these are not looked at, which would stall it: nothing outside the
            tensors is read, and what comes out is unspecified.
    """
    op, x, y = NAME, symbol_logprobs, blank_logprobs
    if (
        not is_compiling()
        and FAMILY.native is not None
        and return_occupation is False
        and type(modified) is bool
        and type(x) in PLAIN
        and type(y) in PLAIN
        and type(starts) in PLAIN
        and (boundary is None or type(boundary) in PLAIN)
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and x.shape == y.shape
    ):
        try:
            if is_grad_enabled() and (x.requires_grad or y.requires_grad):
                return _NativeLattice.apply(FAMILY.native, x, y, starts, boundary, modified)
            return FAMILY.native.forward(x, y, starts, boundary, modified, False)[0]
        except RuntimeError:
            pass  # the checked path tells why, or does what the kernels do not
    _check.floating_tensor(op, "symbol_logprobs", x)
    _check.floating_tensor(op, "blank_logprobs", y)
    _check.flag(op, "modified", modified)
    _check.flag(op, "return_occupation", return_occupation)
    _check.same_device(op, "blank_logprobs", y, x, "symbol_logprobs")
    _check.shape(op, "symbol_logprobs", x, "(B, T, R), R >= 1", x.dim() == 3 and x.shape[2] >= 1)
    _check.shape(op, "blank_logprobs", y, "that of symbol_logprobs", y.shape == x.shape)
    check_integers(op, "starts", starts, x, "symbol_logprobs")
    _check.shape(op, "starts", starts, "(B, T), those of symbol_logprobs", starts.shape == x.shape[:2])
    check_boundary(op, boundary, x, "symbol_logprobs")
    grad = is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if not direct(x, y, starts, boundary):
        scores, *occupation, _ = _OP(x, y, starts, boundary, modified, return_occupation, grad)
        return (scores, *occupation) if return_occupation else scores
    if starts.is_cpu:
        _check_starts(op, starts)
        if boundary is not None:
            check_boundary_values(op, boundary, None, x.shape[1])
    if FAMILY.kernels(x, y) is None:
        return definition(x, y, starts, boundary, modified=modified, return_occupation=return_occupation)
    if grad:
        return _PrunedLattice.apply(x, y, starts, boundary, modified, return_occupation)
    scores, shares = forward(x, y, starts, boundary, modified, return_occupation)
    if not return_occupation:
        return scores
    return scores, *backward(None, scores, shares, starts, boundary, x.shape[2], modified)
