# SPDX-License-Identifier: Apache-2.0
r"""LSTM with LayerNorm on the gates and on the cell (torchaudio's RNN-T predictor), whole sequences or one step.

    i, f, v, o = the quarters of LN(x_t W_xᵀ + h W_hᵀ)
    c = LN(σ(f) c + σ(i) tanh(v))        h = σ(o) tanh(c)        y_t = h

with LN(z) = (z − mean z) / √(var z + eps) ⊙ weight + bias over the 4H gates and over the H cells: torchaudio's
``_CustomLSTM`` with ``layer_norm=True``, from ``torchaudio.models.rnnt``.

Backward, with n the normalised row, s = 1 / √(var + eps), and d the gradient before weight: d LN = (d − mean d − n mean
d n) s; through the activations as they stand; dh of the step before is dgates W_h. The gradients of x, W_x and W_h are
one matrix product each over all steps. The forward pass keeps n of gates and cell and the two s, 5H + 2
numbers per step and sequence; the backward pass computes activations and cells again.

FLOPs: 8 H (D + H) per step and sequence forward. The product with W_x runs over all steps at once; W_h, 4H × H numbers,
is read in every step, from a cache that holds it.
"""

import functools
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _gemm
from fastasr.ops._dispatch import Kernels
from fastasr.ops._op import Arguments, Needs, Op, Saved, op

# Up to this many rows (steps x sequences) the C++ kernels multiply by input_weight themselves, step by step; over
# several steps they read it again in each.
FEW_ROWS, FEW_ROWS_OF_ONE_STEP = 4, 32


# --------------------------------------------------------------------------- kernels
def _few(x: Tensor) -> bool:
    return 0 < x.numel() <= (FEW_ROWS_OF_ONE_STEP if x.shape[0] == 1 else FEW_ROWS) * x.shape[2]


def _fast(native: Kernels, keep: bool, x: Tensor, input_weight: Tensor, *others: Any) -> Sequence[Tensor]:
    strided = x.layout is input_weight.layout is torch.strided
    # The vendor's product with W_x takes dtypes that the kernel refuses.
    if not (strided and x.dtype is torch.float32 and x.dim() == 3 and input_weight.dim() == 2):
        raise NotImplementedError
    operands = (x, input_weight) if _few(x) else (_gemm.forward(x, input_weight, None), None)
    return native.forward(*operands, *others, keep)


def _norms(a: Arguments) -> tuple[Tensor, ...]:
    return a.gate_weight, a.gate_bias, a.cell_weight, a.cell_bias


def _read(kernels: Kernels, work: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns tensors as kernels read them: in the dtype of the computation, or in their own for Triton's, which
    convert what they load.
    """
    if kernels.backend == "cpu":
        tensors = tuple(None if t is None else t.to(work) for t in tensors)
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> Sequence[Tensor]:
    work = torch.promote_types(dtype, torch.float32)
    few = kernels.backend == "cpu" and a.x.dtype is work and _few(a.x)  # narrow weights cost more to widen
    x, input_weight, weight = a.x, a.input_weight, a.hidden_weight
    if kernels.backend != "cpu":
        # a product of another layout rounds differently, and the norms of few units enlarge the difference
        x, input_weight = x.contiguous(), input_weight.contiguous()
    product = x if few else _gemm.forward(x, input_weight, None)
    if kernels.backend == "cpu":
        product, weight = product.to(work), weight.to(work)
    return kernels.forward(
        product.contiguous(),
        input_weight.to(work).contiguous() if few else None,
        weight.contiguous(),
        *_read(kernels, work, *_norms(a), a.hidden, a.cell),
        a.eps,
        keep,
    )


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor | None], s: Saved, needs: Needs
) -> tuple[Tensor | None, ...]:
    work = torch.promote_types(s.y.dtype, torch.float32)
    need_state = needs.hidden and s.hidden is not None
    dgates, *dnorms, dhidden, dcell = kernels.backward(
        *_read(kernels, work, *grads, s.hidden_weight, *_norms(s), s.cell),
        s.kept,
        s.x.shape[0],
        s.x.shape[1],
        s.eps,
        need_state,
    )
    dgates = dgates.to(s.x.dtype)
    dx = _gemm.input_grad(dgates, s.input_weight) if needs.x else None
    dinput = _gemm.weight_grad(dgates, s.x) if needs.input_weight else None
    dweight = None
    if needs.hidden_weight:
        before, along = s.y[:-1], dgates[1:]  # a state of zeros adds nothing
        if s.hidden is not None and len(s.y):
            before, along = torch.cat((s.hidden.to(s.y.dtype)[None], before)), dgates
        dweight = _gemm.weight_grad(along, before.to(s.x.dtype))
    return dx, dinput, dweight, *dnorms, dhidden if need_state else None, dcell


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    keeps={"y": None, "kept": Annotated[Tensor, "T*B*(5*H+2)", "wide y"]},
    one_dtype="x input_weight hidden_weight",
    launch=_launch,
    gradients=_gradients,
    fast=_fast,
)
def layer_norm_lstm(
    x: Annotated[Tensor, "T B D"],
    input_weight: Annotated[Tensor, "4*H D"],
    hidden_weight: Annotated[Tensor, "4*H H, H >= 1"],
    gate_weight: Annotated[Tensor, "4*H"],
    gate_bias: Annotated[Tensor, "4*H"],
    cell_weight: Annotated[Tensor, "H"],
    cell_bias: Annotated[Tensor, "H"],
    hidden: Annotated[Tensor, "B H"] | None = None,
    cell: Annotated[Tensor, "B H"] | None = None,
    eps: Annotated[float, ">= 0"] = 1e-5,
) -> tuple[
    Annotated[Tensor, "y: T B H", "x + gate_weight + gate_bias + cell_weight + cell_bias"],
    Annotated[Tensor, "last_hidden: B H", "y"],
    Annotated[Tensor, "last_cell: B H", "y"],
]:
    """Runs an LSTM layer with LayerNorm on gates and cell, over a whole sequence or one step.

    Args:
        x: (T, B, D); float32, bfloat16, float16 or float64.
        input_weight: (4H, D), hidden_weight: (4H, H), in the order input, forget, cell and output gate; x's dtype,
            except under autocast, which casts the three.
        gate_weight, gate_bias: (4H,), of the gates' LayerNorm; cell_weight, cell_bias: (H,), of the cell's.
        hidden, cell: (B, H), the state before the first step; None: zeros.
        eps: added to both variances.
    Returns:
        y (T, B, H), and the state after the last step, hidden and cell, (B, H) each: in the promoted dtype of x and the
        normalisations' parameters, computed in float32 or better. hidden is y[-1].
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    units = hidden_weight.shape[1]
    norms = gate_weight, gate_bias, cell_weight, cell_bias
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in norms), x.dtype)
    gate_weight, gate_bias, cell_weight, cell_bias = (t.to(dtype) for t in norms)
    h, c = (x.new_zeros(x.shape[1], units, dtype=dtype) if s is None else s.to(dtype) for s in (hidden, cell))
    steps = []
    for gates in F.linear(x, input_weight).unbind(0):
        gates = (gates + F.linear(h.to(x.dtype), hidden_weight)).to(dtype)
        gates = F.layer_norm(gates, (4 * units,), gate_weight, gate_bias, eps)
        i, f, v, o = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(v)
        c = F.layer_norm(c, (units,), cell_weight, cell_bias, eps)
        h = torch.sigmoid(o) * torch.tanh(c)
        steps.append(h)
    y = torch.stack(steps) if steps else h.new_empty(0, x.shape[1], units)
    return y, h, c
