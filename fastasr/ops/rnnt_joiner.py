# SPDX-License-Identifier: Apache-2.0
r"""The joiner of a pruned transducer, and the log-probabilities that a lattice reads (Kuang et al., 2022, section 3).

Row (b, t, r), with s = starts[b, t] + r, joins frame t and the context of s symbols:

h = m act(am[b, t] + lm[b, s]),  l = W h + bias,  L = log Σ_v exp(l_v),
blank_logprobs = l_blank − L,  symbol_logprobs = l_y − L for y = symbols[b, s], −∞ where s has no symbol.

m is 1, or under dropout 0 for the share p of all values and 1 / (1 − p) for the others: a hash of a seed and of the
value's place (:mod:`fastasr.ops._weights_dropout`), which the backward pass computes again.

HAT (Variani et al., 2020): blank_logprobs = log σ(l_blank), and with L over the other outputs alone
symbol_logprobs = l_y − L + log σ(−l_blank).

Backward, gx, gy being the gradients of the two (0 where the value is −∞), p = softmax(l), e_v the unit vector of v:
dl = gx e_y + gy e_blank − (gx + gy) p; HAT: dl_v = gx ([v = y] − p_v) with p over v ≠ blank, and
dl_blank = gy σ(−l_blank) − gx σ(l_blank). Then dW = Σ dl hᵀ, dbias = Σ dl, da = m Wᵀ dl ⊙ act', dam[b, t] = Σ_r da,
dlm[b, s] = Σ over the rows of that s.

Upstream: k2's ``do_rnnt_pruning``, the model's joiner, ``get_rnnt_logprobs_pruned``, ``get_hat_logprobs_pruned``.

For N = B T R rows, D channels, V outputs and e bytes per element: 2 N D V FLOPs forward and 4 N D V backward (6 N D V
where logits are computed again). Bytes read and written once: e (B T D + B (S + 1) D + V D) and 8 N forward; twice
the first and 8 N backward. Kept for the backward: 16 N bytes, and 4 N (V + D) where logits are kept; on a GPU e N D of
h, up to 128 MB. Eager needs about N (20 V + 4 D) bytes at the peak of its backward.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from fastasr.ops._dispatch import Kernels
from fastasr.ops._joiner import ACTIVATIONS, FAMILY, check, launch, log_probabilities, operands
from fastasr.ops._op import Arguments, Needs, Op, Saved, op


# --------------------------------------------------------------------------- parts
def _check(op: Op, a: Arguments) -> None:
    if a.hat and a.weight.shape[0] < 2:
        op.fail("weight", "at least 2 outputs with hat", a.weight.shape[0])
    check(op, a, a.starts, a.weight.shape[0])


def _operands(a: Arguments) -> tuple:
    return operands(a, a.starts, a.s_range, a.hat, 0)


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> Sequence[Tensor]:
    px, py, _, normaliser = launch(kernels, a, _operands(a), a.starts.numel() * a.s_range, keep)
    return px, py, normaliser


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], s: Saved, needs: Needs
) -> Sequence[Tensor | None]:
    chunks = getattr(s.normaliser, "chunks", None)
    return kernels.backward(*grads, None, *_operands(s), s.normaliser, needs, chunks)


# --------------------------------------------------------------------------- the op
@op(
    FAMILY,
    autocast="weight bias",  # the activation is computed in the dtype that its operands have
    keeps={"normaliser": Annotated[Tensor, "B T s_range", torch.float64]},
    launch=_launch,
    gradients=_gradients,
    check=_check,
    fast=False,  # the kernels do not check values
)
def rnnt_joiner(
    am: Annotated[Tensor, "B T D"],
    lm: Annotated[Tensor, "B S+1 D"],
    weight: Annotated[Tensor, "V D, V >= 1"],
    bias: Annotated[Tensor, "V"] | None,
    symbols: Annotated[Tensor, "B S", int],
    starts: Annotated[Tensor, "B T", int],
    *,
    s_range: Annotated[int, ">= 1"],
    termination_symbol: int,
    boundary: Annotated[Tensor, "B 4", int] | None = None,
    activation: Annotated[Literal["tanh", "relu"], ACTIVATIONS] = "tanh",
    hat: bool = False,
    keep_logits: bool | None = None,
    dropout_p: Annotated[float, ">= 0 and < 1"] = 0.0,
    dropout_seed: Annotated[Tensor, "1", torch.int64] | None = None,
) -> tuple[
    Annotated[Tensor, "symbol_logprobs: B T s_range", "wide am + lm + weight"],
    Annotated[Tensor, "blank_logprobs: B T s_range", "wide am + lm + weight"],
]:
    """Returns (symbol_logprobs, blank_logprobs) of a pruned transducer's joiner, without a tensor of B × T × R × V.

    Args:
        am: (B, T, D), the projected frames; lm: (B, S + 1, D), the projected contexts. float32, bfloat16, float16 or
            float64.
        weight: (V, D); bias: (V,) or None: the output layer, in the dtype of am + lm, except under autocast, which
            casts them.
        symbols: int64 (B, S), values in [0, V) within the boundary; symbols behind it are not read.
        starts: int64 (B, T), the first s of each frame's window (``ranges[:, :, 0]`` of k2), in [0, S].
        s_range: R, the size of the window; S + 1 with starts of 0 is the full lattice. Rows with s > S are outside.
        termination_symbol: the output of blank.
        boundary: int64 (B, 4) of s_begin, t_begin, s_end, t_end; None: all of every sequence.
        activation: "tanh" or "relu".
        hat: factor blank out as a Bernoulli variable (HAT).
        keep_logits: keep logits for the backward (4 N (V + D) bytes) or compute them again; None: by their size. A GPU
            keeps hidden rows instead, e N D bytes up to 128 MB, unless this is False.
        dropout_p: the share of h that is set to 0; the others are divided by 1 − dropout_p.
        dropout_seed: int64 (1,), which chooses these values; needed where dropout_p is more than 0.
    Returns:
        Both (B, T, R), float32 (float64 for float64). symbol_logprobs is -inf where s has no symbol before s_end, both
        are -inf outside the boundary. Rows outside it, and in the backward pass rows whose gradients are both 0, are
        not computed.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match; symbols, starts or boundary out of range, for CPU tensors
            outside ``torch.compile``. On a GPU that check would wait for the device: there a symbol outside the
            vocabulary gives NaN, and a row whose s is outside [0, S] is -inf.
    """
    px, py, _ = log_probabilities(
        am, lm, weight, bias, symbols, starts, s_range, termination_symbol, boundary, activation, hat, dropout_p,
        dropout_seed,
    )  # fmt: skip
    return px, py
