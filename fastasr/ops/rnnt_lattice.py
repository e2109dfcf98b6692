# SPDX-License-Identifier: Apache-2.0
r"""The lattice of a transducer: the log of the summed probability of all paths, and how much each arc takes part.

Graves, "Sequence transduction with recurrent neural networks" (2012); Kuang et al., "Pruned RNN-T" (2022), section 2.
Cells (s, t): s symbols were emitted by frame t. With x = ``symbol_logprobs`` and y = ``blank_logprobs``, p = 0 at the
beginning of the boundary:

    regular   p[s,t] = log(e^(p[s-1,t] + x[s-1,t]) + e^(p[s,t-1] + y[s,t-1])),      x (B, S, T+1), y (B, S+1, T)
    modified  p[s,t] = log(e^(p[s-1,t-1] + x[s-1,t-1]) + e^(p[s,t-1] + y[s,t-1])),  x (B, S, T): a symbol takes a frame

    score = p[s_end, t_end]

The occupation of an arc is the probability that a path takes it, and the gradient of the score. With w the share of the
symbol arc in cell (s, t), w = e^(p[s-1,t] + x[s-1,t] - p[s,t]), and g = 1 at the end, backward from there:

    symbol_occupation = w g          blank_occupation = (1 - w) g          g of a cell = the sum over its outgoing arcs

A forward keeps the shares alone, one number per cell; gradients are products and sums of them. Bytes per cell of e
bytes: forward 2 e (3 e when shares are kept), backward 3 e. Upstream:
``mutual_information_recursion`` of k2 and fast_rnnt.
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
    columns,
    compute_dtype,
    log_add,
    log_probabilities,
    share,
)
from fastasr.ops._register import refuse_double_backward, register

NAME = "rnnt_lattice"
FAMILY = KernelFamily(NAME, (NAME,), (native_kernels(NAME), triton_kernels(NAME)))

_INF = float("inf")


# --------------------------------------------------------------------------- definition
def definition(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    boundary: Tensor | None = None,
    *,
    return_occupation: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The formula in eager PyTorch, one step of cells after the other: anti-diagonals s + t of a regular lattice,
    frames of a modified one."""
    lattice = _Steps(symbol_logprobs, blank_logprobs, boundary)
    cells = lattice.cells()
    scores = lattice.scores(cells)
    if not return_occupation:
        return scores
    with torch.no_grad():
        return scores, *lattice.occupation(None, scores.detach(), lattice.shares(cells.detach()))


class _Steps:
    """A batch of lattices by steps k: the arcs that leave step k are (K, B, S+1) each, by the s they enter."""

    def __init__(self, x: Tensor, y: Tensor, boundary: Tensor | None):
        self.batch, self.symbols, self.width = x.shape
        self.frames = y.shape[2]
        self.regular = self.width == self.frames + 1
        self.steps = self.frames + (self.symbols if self.regular else 0)
        if boundary is None:
            boundary = whole(x, self.symbols, self.frames)
        self.s_begin, self.t_begin, self.s_end, self.t_end = columns(boundary, self.symbols, self.frames)
        self.first, self.last = (
            (self.s_begin + self.t_begin, self.s_end + self.t_end)
            if self.regular
            else (self.t_begin, self.t_end)
        )
        dtype = compute_dtype(x, y)
        x = log_probabilities(x, dtype, self._inside_x(x.device))
        y = log_probabilities(y, dtype, self._inside_y(x.device))
        self.poisoned = x.isnan().any(2).any(1) | y.isnan().any(2).any(1)
        self.x = F.pad(self._to_steps(x), (1, 0), value=-_INF)
        self.y = self._to_steps(y)
        self.row = torch.arange(self.symbols + 1, device=x.device)

    def _inside(self, rows: int, width: int, s_end: Tensor, t_end: Tensor, device) -> Tensor:
        s, t = torch.arange(rows, device=device)[:, None], torch.arange(width, device=device)
        begin = (s >= self.s_begin[:, None, None]) & (t >= self.t_begin[:, None, None])
        return begin & (s < s_end[:, None, None]) & (t < t_end[:, None, None])

    def _inside_x(self, device) -> Tensor:
        return self._inside(self.symbols, self.width, self.s_end, self.t_end + int(self.regular), device)

    def _inside_y(self, device) -> Tensor:
        return self._inside(self.symbols + 1, self.frames, self.s_end + 1, self.t_end, device)

    def _to_steps(self, x: Tensor) -> Tensor:
        """(B, R, W) to (K, B, R): row s of a regular lattice moves s steps on, by reading rows of K + 1 as of K."""
        if self.regular:
            rows, steps = x.shape[1], self.steps
            x = F.pad(x, (0, steps + 1 - x.shape[2]), value=-_INF).flatten(1)
            x = x[:, : rows * steps].reshape(self.batch, rows, steps)
        return x.permute(2, 0, 1)

    def _from_steps(self, x: Tensor, width: int) -> Tensor:
        x = x.permute(1, 2, 0)
        if self.regular:
            rows, steps = x.shape[1], self.steps
            x = F.pad(x.flatten(1), (0, rows)).reshape(self.batch, rows, steps + 1)
        return x[..., :width]

    def _at(self, step: Tensor, s: Tensor, k: int) -> Tensor:
        """(B, S+1): the cell s of a step, where that step is k."""
        return (self.row == s[:, None]) & (step == k)[:, None]

    def cells(self) -> Tensor:
        """p by steps, (K + 1, B, S + 1)."""
        p = self.y.new_full((self.batch, self.symbols + 1), -_INF)
        cells = []
        for k in range(self.steps + 1):
            if k:
                entering = F.pad(p[:, : self.symbols], (1, 0), value=-_INF)
                p = log_add(entering + self.x[k - 1], p + self.y[k - 1])
            p = torch.where(self._at(self.first, self.s_begin, k), 0.0, p)
            cells.append(p)
        return torch.stack(cells)

    def scores(self, cells: Tensor) -> Tensor:
        scores = cells[self.last, torch.arange(self.batch, device=cells.device), self.s_end]
        scores = (
            scores + self.x[:0].sum((0, 2)) + self.y[:0].sum((0, 2))
        )  # zeros: gradients exist without arcs too
        return torch.where(self.poisoned, float("nan"), scores)

    def shares(self, cells: Tensor) -> Tensor:
        """(B, K + 1, S + 1): the share of the symbol arc in each cell."""
        entering = F.pad(cells[:-1, :, : self.symbols], (1, 0), value=-_INF) + self.x
        return F.pad(share(entering, cells[1:]).transpose(0, 1), (0, 0, 1, 0))

    def occupation(self, grad: Tensor | None, scores: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the arcs for ``grad`` (B,) of the scores (None: 1)."""
        end = torch.where(
            scores.isfinite(), torch.ones_like(scores) if grad is None else grad.to(scores.dtype), 0.0
        )
        g = torch.zeros_like(self.row, dtype=scores.dtype).expand(self.batch, -1)
        dx, dy = [], []
        for k in range(self.steps, 0, -1):
            g = torch.where(self._at(self.last, self.s_end, k), end[:, None], g)
            symbol = g * shares[:, k]
            blank = g - symbol
            dx.append(symbol[:, 1:])
            dy.append(blank)
            g = blank + F.pad(symbol[:, 1:], (0, 1))
        empty = scores.new_zeros((0, self.batch, self.symbols + 1))
        dx = torch.stack(dx[::-1]) if dx else empty[..., 1:]
        dy = torch.stack(dy[::-1]) if dy else empty
        bad = scores.isnan()[:, None, None]
        out = []
        for d, width, inside in ((dx, self.width, self._inside_x), (dy, self.frames, self._inside_y)):
            inside = inside(scores.device)
            out.append(torch.where(inside, torch.where(bad, float("nan"), self._from_steps(d, width)), 0.0))
        return tuple(out)


def whole(x: Tensor, symbols: int, frames: int) -> Tensor:
    """The boundary (B, 4) of whole lattices, without a copy from the host."""
    zero = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return torch.stack((zero, zero, zero + symbols, zero + frames), 1)


# --------------------------------------------------------------------------- kernels
def forward(
    symbol_logprobs: Tensor, blank_logprobs: Tensor, boundary: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """(scores, shares) without autograd, by the best kernel; shares without elements unless ``keep``."""
    dtype = compute_dtype(symbol_logprobs, blank_logprobs)
    x, y = symbol_logprobs.to(dtype).contiguous(), blank_logprobs.to(dtype).contiguous()
    kernels = FAMILY.kernels(x)
    if kernels is None:
        with torch.no_grad():
            lattice = _Steps(x, y, boundary)
            cells = lattice.cells()
            return lattice.scores(cells), lattice.shares(cells) if keep else x.new_empty(0)
    return kernels.forward(x, y, None if boundary is None else boundary.contiguous(), keep)


def backward(
    grad: Tensor | None,
    scores: Tensor,
    shares: Tensor,
    boundary: Tensor | None,
    symbols: int,
    width: int,
    frames: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the log probabilities in the compute dtype, for ``grad`` of the scores; None: the occupations."""
    kernels = FAMILY.kernels(scores)
    if kernels is None:
        batch = scores.shape[0]
        like = _Steps(
            scores.new_empty(batch, symbols, width), scores.new_empty(batch, symbols + 1, frames), boundary
        )
        return like.occupation(grad, scores, shares)
    grad = None if grad is None else grad.to(scores.dtype).contiguous()
    boundary = None if boundary is None else boundary.contiguous()
    return kernels.backward(grad, scores, shares, boundary, symbols, width, frames)


class _Lattice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, boundary: Tensor | None, return_occupation: bool):
        scores, shares = forward(x, y, boundary, True)
        ctx.save_for_backward(scores, shares, boundary)
        ctx.sizes = (x.shape[1], x.shape[2], y.shape[2])
        ctx.dtypes = (x.dtype, y.dtype)
        if not return_occupation:
            return scores
        occupation = backward(None, scores, shares, boundary, *ctx.sizes)
        ctx.mark_non_differentiable(*occupation)
        return scores, *occupation

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        refuse_double_backward(NAME)
        scores, shares, boundary = ctx.saved_tensors
        dx, dy = backward(grad, scores, shares, boundary, *ctx.sizes)
        return dx.to(ctx.dtypes[0]), dy.to(ctx.dtypes[1]), None, None


class _NativeLattice(torch.autograd.Function):
    """The shortest path: the native kernels check their arguments themselves and raise RuntimeError."""

    @staticmethod
    def forward(ctx, kernels, x: Tensor, y: Tensor, boundary: Tensor | None) -> Tensor:
        scores, shares = kernels.forward(x, y, boundary, True)
        ctx.save_for_backward(scores, shares, boundary)
        ctx.kernels, ctx.sizes = kernels, (x.shape[1], x.shape[2], y.shape[2])
        return scores

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward(NAME)
        return None, *ctx.kernels.backward(grad.contiguous(), *ctx.saved_tensors, *ctx.sizes), None


# --------------------------------------------------------------------------- registration
def _whole_forward(x: Tensor, y: Tensor, boundary: Tensor | None, return_occupation: bool, keep: bool):
    scores, shares = forward(x, y, boundary, keep or return_occupation)
    if return_occupation:
        occupation = backward(None, scores, shares, boundary, x.shape[1], x.shape[2], y.shape[2])
    else:
        occupation = scores.new_empty(0), scores.new_empty(0)
    return scores, *occupation, shares if keep else scores.new_empty(0)


def shares_shape(backend: str, x: Tensor, y: Tensor) -> tuple[int, int, int]:
    """What the kernels of a backend keep: a row of S + 1 shares per step, padded as they like it."""
    batch, symbols, width = x.shape
    steps = y.shape[2] + (symbols if width == y.shape[2] + 1 else 0)
    if backend == "cpu":
        row = (symbols + 16) // 16 * 16
        return batch, steps, torch.sym_min(row, (y.shape[2] + 63) // 16 * 16) if steps > y.shape[2] else row
    if backend == "triton":
        return batch, symbols + 1, (y.shape[2] + 16) // 16 * 16
    return batch, steps + 1, symbols + 1


def _fake_forward(x: Tensor, y: Tensor, boundary: Tensor | None, return_occupation: bool, keep: bool):
    dtype = compute_dtype(x, y)
    kernels = FAMILY.kernels(x, y)
    like = x.new_empty if x.dtype is dtype else x.to(dtype).new_empty
    occupation = (like(x.shape), like(y.shape)) if return_occupation else (like(0), like(0))
    shares = like(shares_shape("eager" if kernels is None else kernels.backend, x, y)) if keep else like(0)
    return like(x.shape[0]), *occupation, shares


def _fake_backward(grad, scores, shares, boundary, symbols: int, width: int, frames: int):
    batch = scores.shape[0]
    return scores.new_empty(batch, symbols, width), scores.new_empty(batch, symbols + 1, frames)


_BACKWARD_OP = register(
    f"{NAME}_backward(Tensor grad, Tensor scores, Tensor shares, Tensor? boundary, SymInt symbols, SymInt width, "
    "SymInt frames) -> (Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    x, y, boundary, _, keep = inputs
    scores, *occupation, shares = output
    ctx.mark_non_differentiable(*occupation, shares)
    ctx.keep = keep
    ctx.sizes = (x.shape[1], x.shape[2], y.shape[2])
    ctx.dtypes = (x.dtype, y.dtype)
    if keep:
        ctx.save_for_backward(scores, shares, boundary)
    else:
        ctx.save_for_backward(x, y, boundary)


def _op_backward(ctx, grad: Tensor, *_):
    first, second, boundary = ctx.saved_tensors
    scores, shares = (first, second) if ctx.keep else _OP(first, second, boundary, False, True)[::3]
    dx, dy = _BACKWARD_OP(grad, scores, shares, boundary, *ctx.sizes)
    return dx.to(ctx.dtypes[0]), dy.to(ctx.dtypes[1]), None, None, None


_OP = register(
    f"{NAME}(Tensor symbol_logprobs, Tensor blank_logprobs, Tensor? boundary, bool return_occupation, "
    "bool keep_shares) -> (Tensor, Tensor, Tensor, Tensor)",
    _whole_forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_op_backward,
)


def rnnt_lattice(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    boundary: Tensor | None = None,
    *,
    return_occupation: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The log of the summed probability of all paths through each lattice.

    Args:
        symbol_logprobs: (B, S, T+1) for the regular lattice, (B, S, T) for the modified one, where a symbol takes a
            frame: log probability of symbol s+1 in cell (s, t). float32, bfloat16, float16 or float64. Values below
            -2^80 count as -inf; a NaN or +inf inside the boundary makes the sequence's score and occupations NaN.
        blank_logprobs: (B, S+1, T), log probability of a blank in cell (s, t).
        boundary: (B, 4) int64, [s_begin, t_begin, s_end, t_end] of each sequence; None: [0, 0, S, T]. The symbol arcs
            of frame t_end are part of a regular lattice.
        return_occupation: return occupations too.
    Returns:
        scores (B,), of float64 if an argument is, else of float32; -inf where no path reaches the end. With
        ``return_occupation`` (scores, symbol_occupation, blank_occupation): the gradients of the scores in the scores'
        dtype and the arguments' shapes, 0 outside the boundary and where no path reaches the end. They are constants
        for autograd; the scores are differentiable.
    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes or devices do not match; a boundary that is not inside the lattice (on a GPU it is moved
            inside instead: to look at it would stall the GPU).
    """
    op, x, y = NAME, symbol_logprobs, blank_logprobs
    if (
        not is_compiling()
        and FAMILY.native is not None
        and type(return_occupation) is bool
        and type(x) in PLAIN
        and type(y) in PLAIN
        and (boundary is None or type(boundary) in PLAIN)
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
    ):
        try:
            wanted = is_grad_enabled() and (x.requires_grad or y.requires_grad)
            if wanted and not return_occupation:
                return _NativeLattice.apply(FAMILY.native, x, y, boundary)
            if not wanted:
                scores, shares = FAMILY.native.forward(x, y, boundary, return_occupation)
                if not return_occupation:
                    return scores
                sizes = x.shape[1], x.shape[2], y.shape[2]
                return scores, *FAMILY.native.backward(None, scores, shares, boundary, *sizes)
        except RuntimeError:
            pass  # the checked path tells why, or does what the kernels do not
    _check.floating_tensor(op, "symbol_logprobs", x)
    _check.floating_tensor(op, "blank_logprobs", y)
    _check.flag(op, "return_occupation", return_occupation)
    _check.same_device(op, "blank_logprobs", y, x, "symbol_logprobs")
    _check.shape(op, "symbol_logprobs", x, "(B, S, T+1) or (B, S, T)", x.dim() == 3)
    # no numbers in what is expected: formatting a size makes torch.compile take it for a constant
    ok = y.dim() == 3 and y.shape[0] == x.shape[0] and y.shape[1] == x.shape[1] + 1
    _check.shape(op, "blank_logprobs", y, "(B, S+1, T), symbol_logprobs being (B, S, ...)", ok)
    expected = "(B, S, T+1) or (B, S, T), T being that of blank_logprobs"
    _check.shape(op, "symbol_logprobs", x, expected, x.shape[2] - y.shape[2] in (0, 1))
    check_boundary(op, boundary, x, "symbol_logprobs")
    grad = is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if not direct(x, y, boundary):
        scores, *occupation, _ = _OP(x, y, boundary, return_occupation, grad)
        return (scores, *occupation) if return_occupation else scores
    if boundary is not None and boundary.is_cpu:
        check_boundary_values(op, boundary, x.shape[1], y.shape[2])
    if FAMILY.kernels(x, y) is None:
        return definition(x, y, boundary, return_occupation=return_occupation)
    if grad:
        return _Lattice.apply(x, y, boundary, return_occupation)
    scores, shares = forward(x, y, boundary, return_occupation)
    if not return_occupation:
        return scores
    return scores, *backward(None, scores, shares, boundary, x.shape[1], x.shape[2], y.shape[2])
