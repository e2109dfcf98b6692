# SPDX-License-Identifier: Apache-2.0
r"""The ends of MEGA's blocks (Ma et al., 2022, section 3.3): a residual, gated or not, and LayerNorm.

gated_residual_norm: y = LN(t), t = x + σ(update) ⊙ (a − x), a = act(candidate + hidden) ⊙ M;
residual_norm: y = LN(t), t = x + update;
with LN(t) = n ⊙ weight + bias, n = (t − mean t) / σ_t, σ_t = √(var t + eps), over the channels. M, optional, is the
mask of dropout. With d = grad ⊙ weight: dt = (d − mean d − n mean(d n)) / σ_t, dweight = Σ_rows grad ⊙ n, dbias =
Σ_rows grad; dx = dt (1 − σ), dupdate = dt (a − x) σ (1 − σ), dcandidate = dhidden = dt σ M act'; without the gate dx =
dupdate = dt.

Upstream: the last lines of ``MEGA.forward`` in ``espnet2.asr_transducer.decoder.blocks.mega`` and of
``NormalizedPositionwiseFeedForward.forward`` in ``espnet2.asr_transducer.decoder.modules.mega.feed_forward``.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _activation, _layout
from fastasr.ops._dispatch import KernelFamily, Kernels, native_kernels, triton_kernels
from fastasr.ops._op import Arguments, Needs, Op, Saved, op

FAMILY = KernelFamily("residual_norm", (), (native_kernels("residual_norm"), triton_kernels("residual_norm")))
INPUTS = ("x", "update", "candidate", "hidden")
PARAMETERS = ("dropout_mask", "weight", "bias")


# --------------------------------------------------------------------------- kernels
def _operands(kernels: Kernels, a: Arguments, dtype: torch.dtype) -> tuple:
    """Returns the inputs in one dtype with evenly spaced rows, and the parameters: in the dtype of the computation, or
    in their own for Triton's kernels, which convert what they load.
    """
    work = torch.float64 if torch.float64 in (a.weight.dtype, a.bias.dtype) else dtype
    wide = torch.promote_types(work, torch.float32)
    inputs = (getattr(a, name, None) for name in INPUTS)
    parameters = (getattr(a, name, None) for name in PARAMETERS)

    def read(t: Tensor) -> Tensor:
        return t if kernels.backend == "triton" and t.is_floating_point() else t.to(wide)

    return (
        *(None if t is None else _layout.rows(t.to(work)) for t in inputs),
        *(None if t is None else read(t).contiguous() for t in parameters),
    )


def _number(a: Arguments) -> int:
    return _activation.NAMES.index(getattr(a, "activation", "identity"))


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    y, statistics = kernels.forward(*_operands(kernels, a, dtype), a.eps, _number(a), keep)
    if statistics is None:  # Triton's kernels compute them again
        statistics = a.weight.new_empty(*y.shape[:-1], 3, dtype=torch.float32)
    return y, statistics


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor, ...]:
    x, *operands = _operands(kernels, saved, op.written.result_dtypes(saved)[0])
    (grad,) = grads
    grad = grad.to(x.dtype).contiguous()
    dx, dupdate, dsum, *others = kernels.backward(
        grad, x, *operands, saved.statistics, saved.eps, _number(saved)
    )
    return dx, *((dupdate, dsum, dsum) if hasattr(saved, "candidate") else (dx,)), *others


def _op(forward: str, backward: str, **more: Any) -> Op:
    return op(
        FAMILY,
        keeps={"statistics": Annotated[Tensor, "*S 3", "wide y + weight + bias"]},
        strides=dict.fromkeys(INPUTS, "rows"),
        forward=f"{forward} keep",
        backward=f"grad {backward}",
        launch=_launch,
        gradients=_gradients,
        **more,
    )


def _layer_norm(t: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(t, t.shape[-1:], weight.to(t.dtype), bias.to(t.dtype), eps)


# --------------------------------------------------------------------------- the ops
@_op(
    forward="x update candidate hidden dropout_mask weight bias eps activation",
    backward="x update candidate hidden dropout_mask weight bias statistics eps activation "
    "-> x update candidate=hidden weight bias",
)
def gated_residual_norm(
    x: Annotated[Tensor, "*S C, C >= 1"],
    update: Annotated[Tensor, "*S C"],
    candidate: Annotated[Tensor, "*S C"],
    hidden: Annotated[Tensor, "*S C"],
    weight: Annotated[Tensor, "C", "wide"],
    bias: Annotated[Tensor, "C", "wide"],
    eps: Annotated[float, ">= 0"] = 1e-5,
    *,
    activation: _activation.Activation = "silu",
    dropout_mask: Annotated[Tensor, "*S C", "constant"] | None = None,
) -> Annotated[Tensor, "*S C", "x + update + candidate + hidden"]:
    """LayerNorm(x + σ(update) · (act(candidate + hidden) · dropout_mask − x)) over the last dimension.

    Args:
        x, update, candidate, hidden: (..., D), one shape; slices of a wider projection need no copy. float32, bfloat16,
            float16 or float64.
        weight, bias: (D,).
        eps: added to the variance.
        activation: "identity", "silu", "relu", "tanh" or "gelu".
        dropout_mask: x's shape, bool or floating, multiplied on the activated sum; it gets no gradient.
    Returns:
        A tensor of x's shape in the promoted dtype of the four inputs, computed in float32 or better, rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    proposal = _activation.FUNCTIONS[activation](candidate + hidden)
    if dropout_mask is not None:
        proposal = proposal * dropout_mask
    return _layer_norm(x + torch.sigmoid(update) * (proposal - x), weight, bias, eps)


@_op(
    forward="x update None None None weight bias eps 0",
    backward="x update None None None weight bias statistics eps 0 -> x=update _ _ weight bias",
)
def residual_norm(
    x: Annotated[Tensor, "*S C, C >= 1"],
    update: Annotated[Tensor, "*S C"],
    weight: Annotated[Tensor, "C", "wide"],
    bias: Annotated[Tensor, "C", "wide"],
    eps: Annotated[float, ">= 0"] = 1e-5,
) -> Annotated[Tensor, "*S C", "x + update"]:
    """LayerNorm(x + update) over the last dimension.

    Args:
        x, update: (..., D), one shape. float32, bfloat16, float16 or float64.
        weight, bias: (D,).
        eps: added to the variance.
    Returns:
        A tensor of x's shape in the promoted dtype of x and update, computed in float32 or better, rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    return _layer_norm(x + update, weight, bias, eps)
