# SPDX-License-Identifier: Apache-2.0
r"""The joiner of a token-and-duration transducer, and the log-probabilities that a lattice reads (Xu et al., 2023).

Row (b, t, r) joins frame t and the context of s = starts[b, t] + r symbols. The output layer has V tokens and, behind
them, N durations:

h = m act(am[b, t] + lm[b, s]),  l = W h + bias,  L = log Σ_{v < V} exp(l_v),
blank_logprobs = l_blank − L,  symbol_logprobs = l_y − L for y = symbols[b, s],
duration_logprobs_i = l_{V+i} − log Σ_j exp(l_{V+j}).

m is the dropout of :mod:`fastasr.ops.rnnt_joiner`, whose kernels compute this op too; the derivatives are there. With
gz the gradients of the durations and q their softmax, dl_{V+i} = gz_i − q_i Σ_j gz_j.

Upstream: transformers' ``ParakeetTDTJointNetwork`` and the first lines of its ``tdt_loss``, which keep three tensors of
B T (S + 1) (V + N); NeMo's ``RNNTJoint`` with ``num_extra_outputs``. FLOPs and bytes are those of rnnt_joiner.
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
    check(op, a, a.starts, a.weight.shape[0] - a.durations)


def _operands(a: Arguments) -> tuple:
    return operands(a, a.starts, a.s_range, False, a.durations)


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> Sequence[Tensor]:
    return launch(kernels, a, _operands(a), a.starts.numel() * a.s_range, keep)


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], s: Saved, needs: Needs
) -> Sequence[Tensor | None]:
    chunks = getattr(s.normaliser, "chunks", None)
    return kernels.backward(*grads, *_operands(s), s.normaliser, needs, chunks)


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
def tdt_joiner(
    am: Annotated[Tensor, "B T D"],
    lm: Annotated[Tensor, "B S+1 D"],
    weight: Annotated[Tensor, "V+durations D, V >= 1"],
    bias: Annotated[Tensor, "V+durations"] | None,
    symbols: Annotated[Tensor, "B S", int],
    starts: Annotated[Tensor, "B T", int],
    *,
    s_range: Annotated[int, ">= 1"],
    durations: Annotated[int, ">= 1"],
    termination_symbol: int,
    boundary: Annotated[Tensor, "B 4", int] | None = None,
    activation: Annotated[Literal["tanh", "relu"], ACTIVATIONS] = "tanh",
    keep_logits: bool | None = None,
    dropout_p: Annotated[float, ">= 0 and < 1"] = 0.0,
    dropout_seed: Annotated[Tensor, "1", torch.int64] | None = None,
) -> tuple[
    Annotated[Tensor, "symbol_logprobs: B T s_range", "wide am + lm + weight"],
    Annotated[Tensor, "blank_logprobs: B T s_range", "wide am + lm + weight"],
    Annotated[Tensor, "duration_logprobs: B T s_range durations", "wide am + lm + weight"],
]:
    """Returns the log-probabilities of symbol, blank and durations of a TDT joiner, without B × T × R × V logits.

    Args:
        am, lm, symbols, starts, s_range, termination_symbol, boundary, activation, dropout_p, dropout_seed: as for
            :func:`fastasr.ops.rnnt_joiner`, with V tokens.
        weight: (V + durations, D); bias: (V + durations,) or None: the output layer, in the dtype of am + lm, except
            under autocast, which casts them.
        durations: N, the number of outputs behind the tokens.
        keep_logits: keep logits for the backward (4 B T R (V + D) bytes) or compute them again; None: by their size.
    Returns:
        (B, T, R), (B, T, R) and (B, T, R, N), float32 (float64 for float64). Of the full lattice, ``tdt_lattice`` takes
        them, the first without its last column. All are -inf outside the boundary, symbol_logprobs where s has no
        symbol too. Rows outside it, and in the backward pass rows whose gradients are all 0, are not computed.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match; symbols, starts or boundary out of range, for CPU tensors
            outside ``torch.compile`` (see ``rnnt_joiner``).
    """
    return log_probabilities(
        am, lm, weight, bias, symbols, starts, s_range, termination_symbol, boundary, activation, False, dropout_p,
        dropout_seed, durations,
    )  # fmt: skip
