# SPDX-License-Identifier: Apache-2.0
"""NeMo's ``RNNTLoss`` (nemo.collections.asr.losses.rnnt), for RNN-T and TDT."""

import random
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastasr.rnnt import lengths, tdt_loss

RNNT = ("default", "rnnt", "warprnnt", "warprnnt_numba", "pytorch")
TDT = ("tdt", "tdt_pytorch")


class RNNTLoss(nn.Module):
    """The loss of a joint's outputs, logits or log-probabilities.

    Args:
        num_classes: the number of tokens without blank, which is the index of blank.
        reduction: "mean_batch", "mean_volume", "mean", "sum" or "none" (None).
        loss_name: a name of RNNT or of TDT.
        loss_kwargs: ``fastemit_lambda`` and ``clamp``; of a TDT ``durations``, ``sigma``, ``fastemit_lambda`` and
            ``omega`` (the chance of a call to be the RNN-T loss of the tokens); a ``clamp`` of a TDT must be -1.
    """

    def __init__(
        self,
        num_classes: int,
        reduction: str | None = "mean_batch",
        loss_name: str = "default",
        loss_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if loss_name not in (*RNNT, *TDT):
            names = ", ".join((*RNNT, *TDT))
            raise ValueError(
                f"fastasr.compat.nemo.RNNTLoss: loss_name: expected one of {names}, got {loss_name!r}"
            )
        self.blank, self.reduction, self.options = num_classes, reduction or "none", dict(loss_kwargs or {})
        self.is_tdt = loss_name in TDT
        if self.is_tdt and self.options.pop("clamp", -1) > 0:
            raise ValueError("fastasr.compat.nemo.RNNTLoss: clamp: expected -1 for a TDT, got more than 0")

    def forward(
        self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        op, options = "compat.nemo.RNNTLoss", dict(self.options)
        ends = targets, input_lengths, target_lengths, self.blank
        if self.is_tdt:
            durations, omega = options.pop("durations"), options.pop("omega", 0.0)
            tokens = log_probs[..., : self.blank + 1]
            if random.random() >= omega:
                steps = log_probs[..., self.blank + 1 :]
                loss = tdt_loss(tokens, steps, *ends, durations, reduction=self.reduction, **options)
                return self._scaled(loss)
            log_probs = tokens
            options.pop("sigma", None)
        loss = lengths.rnnt_losses(op, log_probs, *ends, **options)
        return self._scaled(lengths.reduced(op, loss, target_lengths, self.reduction))

    def _scaled(self, loss: Tensor) -> Tensor:
        """Multiplies the value by 1 + λ of FastEmit, as NeMo does; the gradients have the factor already."""
        return loss + self.options.get("fastemit_lambda", 0.0) * loss.detach()
