# SPDX-License-Identifier: Apache-2.0
"""The CTC loss of an encoder's output. Graves et al., "Connectionist temporal classification" (2006)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor


class CtcLoss:
    """CTC's part of AsrModel, for models with ``blank_id`` and ``ctc_output``, which returns log-probabilities."""

    ctc_output: Any
    blank_id: int

    def forward_ctc(
        self,
        encoder_out: Tensor,
        encoder_out_lens: Tensor,
        targets: Tensor,
        target_lengths: Tensor,
        reduction: str = "sum",
    ) -> Tensor:
        """Returns the CTC loss. targets: (batch, longest), or all sequences joined, (sum of target_lengths,)."""
        return self._ctc_loss(
            self.ctc_output(encoder_out), encoder_out_lens, targets, target_lengths, reduction
        )

    def _ctc_loss(
        self, log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, reduction: str
    ) -> Tensor:
        return F.ctc_loss(
            log_probs.transpose(0, 1),
            targets.cpu(),
            lengths.cpu(),
            target_lengths.cpu(),
            blank=self.blank_id,
            reduction=reduction,
        )
