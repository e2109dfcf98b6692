# SPDX-License-Identifier: Apache-2.0
r"""Linear layer: y = x Wᵀ + b, dx = g W, dW = gᵀ x, db = Σ_rows g.

``torch.nn.functional.linear`` with a measured choice of matrix product on CPU, see :mod:`fastasr.ops._gemm`. FLOPs:
2 M N K each for y, dx and dW.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import _saved_tensors_hooks_is_enabled as _hooks_allowed  # type: ignore[attr-defined]

from fastasr._recording import recording
from fastasr.ops import _gemm
from fastasr.ops._dispatch import (
    FLOATING,
    KernelFamily,
    Kernels,
    forced_backend,
    native_kernels,
    triton_kernels,
)
from fastasr.ops._linear import bias_grad, fits, late
from fastasr.ops._op import OPS, Arguments, Needs, Op, Saved, op


class _Family(KernelFamily):
    """torch computes the layer on CUDA. In a recorded call fastasr computes its gradients, to add up the bias's faster.
    Elsewhere that costs more than it saves: torch's node of autograd takes 26 us less host time than one in Python.
    """

    def kernels(self, x: Tensor, *others: Tensor | None) -> Kernels | None:
        recorded = recording()
        if (
            recorded is not None
            and forced_backend() in ("auto", "triton")
            and not self.why_not(_SUMS, x.device, x.dtype)
        ):
            later = None if recorded.back is None else recorded.back.later
            return Kernels("triton", _gemm.forward, None, later=later)
        return super().kernels(x, *others)


_NATIVE = native_kernels("linear", "gemm", lambda: Kernels("cpu", _gemm.forward, None), (torch.float32,))
_SUMS = triton_kernels("linear")
FAMILY = _Family("linear", (), (_NATIVE,), vendor=True)

_MIDDLE = 1024 * _gemm.SMALL  # larger steps take a hundred times as long as a node in Python


# --------------------------------------------------------------------------- kernels
def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Says whether the products take the call. Only float32 has a choice, and only float32 may be forced."""
    served = x.dtype is torch.float32 or (x.dtype in FLOATING and forced_backend() == "auto")
    return served and fits(x, weight, bias)


def _product(kernels: Kernels, keep: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not takes(x, weight, bias):
        raise NotImplementedError
    return kernels.forward(x, weight, bias)


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> Tensor:
    return kernels.forward(*a)


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor | None, ...]:
    (grad,) = grads
    return (
        _gemm.input_grad(grad, saved.weight) if needs.x else None,
        _gemm.weight_grad(grad, saved.x) if needs.weight else None,
        bias_grad(grad, kernels.backend, late(kernels, saved.bias, grad)) if needs.bias else None,
    )


def _step(product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Runs forward and backward, as a training step does."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    # hooks of the caller, such as a checkpoint's, are not for these tensors
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = product(*leaves)
        return torch.autograd.grad(y, leaves, y.detach())[1]


def _by_node(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes the layer by a node of autograd in Python, whose products are the faster ones."""
    apply = OPS["linear"].written.apply
    assert apply is not None
    return apply(FAMILY.native, True, x, weight, bias)


_gemm.register_product("step", torch=partial(_step, _gemm.torchs), native=partial(_step, _by_node))


def torch_wins(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool | None:
    """Says whether torch serves this call at least as fast, or None before the products of its passes are chosen.

    torch's own node of autograd costs less than one in Python: it decides for small sizes, and for those in the middle
    the whole step is measured. Larger ones have torch's node where all products are torch's.
    """
    (n, k), threads = weight.shape, torch.get_num_threads()
    trains, size = torch.is_grad_enabled() and weight.requires_grad, x.numel() * n
    if not k or x.dtype is not torch.float32 or size < (16 if trains else 1) * _gemm.SMALL:
        return True
    rows = x.numel() // k
    passes = [("forward", rows.bit_length(), n, k, threads)]
    if trains:
        if n < _gemm.CHAINS:
            return False
        passes += [
            ("input_grad", rows.bit_length(), k, n, threads),
            ("weight_grad", n.bit_length(), k, rows, threads),
        ]
    wins = [_gemm.is_torch(key) for key in passes]
    if all(wins) or wins[0] is None:
        return wins[0]
    if wins[0] and size < _MIDDLE and _hooks_allowed():
        return _gemm.is_torch(("step", *passes[0][1:]), x, weight, bias)
    return False if False in wins else None


# --------------------------------------------------------------------------- the op
@op(FAMILY, one_dtype="x weight bias", launch=_launch, gradients=_gradients, fast=_product)
def linear(
    x: Annotated[Tensor, "*S K"], weight: Annotated[Tensor, "N K"], bias: Annotated[Tensor, "N"] | None = None
) -> Annotated[Tensor, "*S N", "x"]:
    """x weightᵀ + bias: ``torch.nn.functional.linear``, faster where another matrix product is.

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K); bias: (N,) or None; x's dtype, except under autocast, which casts all three.
    Returns:
        (..., N).
    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not match.
    """
    return F.linear(x, weight, bias)
