# SPDX-License-Identifier: Apache-2.0
"""NeMo's ``RNNTLoss`` (nemo.collections.asr.losses.rnnt), for RNN-T and TDT."""

import random
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastasr.rnnt import _arguments, lengths, tdt_loss

RNNT = ("default", "rnnt", "warprnnt", "warprnnt_numba", "pytorch")
TDT = ("tdt", "tdt_pytorch")
OPTIONS = {
    False: ("fastemit_lambda", "clamp"),
    True: ("durations", "sigma", "fastemit_lambda", "omega", "clamp"),
}
OP = "compat.nemo.RNNTLoss"


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
        _arguments.choice(OP, "loss_name", loss_name, (*RNNT, *TDT))
        self.reduction = _arguments.choice(OP, "reduction", reduction or "none", lengths.REDUCTIONS)
        self.blank, self.is_tdt, self.options = num_classes, loss_name in TDT, dict(loss_kwargs or {})
        for name in self.options:
            _arguments.choice(OP, "loss_kwargs", name, OPTIONS[self.is_tdt])
        if self.is_tdt and "durations" not in self.options:
            raise ValueError(f"fastasr.{OP}: loss_kwargs: expected durations for a TDT, got {self.options}")
        if self.is_tdt and self.options.pop("clamp", -1) > 0:
            raise ValueError(f"fastasr.{OP}: clamp: expected -1 for a TDT, got more than 0")

    def forward(
        self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        options = dict(self.options)
        targets = targets[:, : log_probs.shape[-2] - 1]  # NeMo cuts padding off too
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
        loss = lengths.rnnt_losses(OP, log_probs, *ends, **options)
        return self._scaled(lengths.reduced(OP, loss, target_lengths, self.reduction))

    def _scaled(self, loss: Tensor) -> Tensor:
        """Multiplies the value by 1 + λ of FastEmit, as NeMo does; the gradients have the factor already."""
        return loss + self.options.get("fastemit_lambda", 0.0) * loss.detach()
