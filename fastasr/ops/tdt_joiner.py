# SPDX-License-Identifier: Apache-2.0
r"""The joiner of a token-and-duration transducer, and the log-probabilities that a lattice reads (Xu et al., 2023).

Row (b, t, s) joins frame t and the context of s symbols. The output layer has V tokens and, behind them, N durations:

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
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _activation, _weights_dropout
from fastasr.ops._dispatch import Kernels
from fastasr.ops._joiner import ACTIVATIONS, FAMILY, check, launch, log_probabilities, operands
from fastasr.ops._lattice import within
from fastasr.ops._op import Arguments, Needs, Op, Saved, op


# --------------------------------------------------------------------------- parts
def _check(op: Op, a: Arguments) -> None:
    check(op, a, None, a.weight.shape[0] - a.durations)


def _operands(a: Arguments) -> tuple:
    return operands(a, a.symbols.new_zeros(a.am.shape[:2]), a.lm.shape[1], False, a.durations)


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> Sequence[Tensor]:
    px, *rest = launch(kernels, a, _operands(a), a.am.shape[0] * a.am.shape[1] * a.lm.shape[1], keep)
    return px[:, :, :-1].contiguous(), *rest


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], s: Saved, needs: Needs
) -> Sequence[Tensor | None]:
    gx, *others = grads
    chunks = getattr(s.normaliser, "chunks", None)
    return kernels.backward(F.pad(gx, (0, 1)), *others, *_operands(s), s.normaliser, needs, chunks)


# --------------------------------------------------------------------------- the op
@op(
    FAMILY,
    autocast="weight bias",  # the activation is computed in the dtype that its operands have
    keeps={"normaliser": Annotated[Tensor, "B T S+1", torch.float64]},
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
    *,
    durations: Annotated[int, ">= 1"],
    termination_symbol: int,
    boundary: Annotated[Tensor, "B 4", int] | None = None,
    activation: Annotated[Literal["tanh", "relu"], ACTIVATIONS] = "tanh",
    keep_logits: bool | None = None,
    dropout_p: Annotated[float, ">= 0 and < 1"] = 0.0,
    dropout_seed: Annotated[Tensor, "1", torch.int64] | None = None,
) -> tuple[
    Annotated[Tensor, "symbol_logprobs: B T S", "wide am + lm + weight"],
    Annotated[Tensor, "blank_logprobs: B T S+1", "wide am + lm + weight"],
    Annotated[Tensor, "duration_logprobs: B T S+1 durations", "wide am + lm + weight"],
]:
    """Returns the log-probabilities of symbol, blank and durations of a TDT joiner, without B × T × S × V logits.

    Args:
        am, lm, symbols, termination_symbol, boundary, activation, dropout_p, dropout_seed: as for
            :func:`fastasr.ops.rnnt_joiner`, with V tokens.
        weight: (V + durations, D); bias: (V + durations,) or None: the output layer, in the dtype of am + lm, except
            under autocast, which casts them.
        durations: N, the number of outputs behind the tokens.
        keep_logits: keep logits for the backward (4 B T (S + 1) (V + D) bytes) or compute them again; None: by their
            size.
    Returns:
        (B, T, S), (B, T, S + 1) and (B, T, S + 1, N), float32 (float64 for float64), which ``tdt_lattice`` takes. All
        are -inf outside the boundary, symbol_logprobs at s_end too. Rows outside it, and in the backward pass
        rows whose gradients are all 0, are not computed.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match; symbols or boundary out of range, for CPU tensors outside
            ``torch.compile`` (see ``rnnt_joiner``).
    """
    starts = symbols.new_zeros(am.shape[:2])
    parts = slice(None, -durations), slice(-durations, None)
    weights = [weight[part] for part in parts]
    biases = [None if bias is None else bias[part] for part in parts]
    px, py = log_probabilities(
        am, lm, weights[0], biases[0], symbols, starts, lm.shape[1], termination_symbol, boundary, activation, False,
        dropout_p, dropout_seed,
    )  # fmt: skip
    hidden = _activation.FUNCTIONS[activation](am.unsqueeze(2) + lm.unsqueeze(1))
    if dropout_p and dropout_seed is not None:
        hidden = hidden * _weights_dropout.kept(dropout_seed, dropout_p, *hidden.shape) / (1 - dropout_p)
    logits = F.linear(hidden, weights[1], biases[1])
    pd = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    px = px[:, :, :-1]
    if boundary is None:
        return px, py, pd
    s, t = (torch.arange(n, device=am.device, dtype=torch.int64) for n in py.shape[:0:-1])
    _, inside = within(boundary, s, t[:, None], False)
    return px, py, pd.masked_fill(~inside.unsqueeze(-1), float("-inf"))
