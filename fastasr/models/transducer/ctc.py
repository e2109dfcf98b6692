# SPDX-License-Identifier: Apache-2.0
"""CTC's loss of an encoder's output. Graves et al., "Connectionist temporal classification" (2006)."""

import torch.nn.functional as F


class CtcLoss:
    """CTC's part of AsrModel, written for models with ``blank_id`` and ``ctc_output``, to log-probabilities."""

    def forward_ctc(self, encoder_out, encoder_out_lens, targets, target_lengths, reduction="sum"):
        """CTC's loss. targets: (batch, longest), or all sequences in a row, (sum of target_lengths,)."""
        return self._ctc_loss(
            self.ctc_output(encoder_out), encoder_out_lens, targets, target_lengths, reduction
        )

    def _ctc_loss(self, log_probs, lengths, targets, target_lengths, reduction):
        return F.ctc_loss(
            log_probs.transpose(0, 1),
            targets.cpu(),
            lengths.cpu(),
            target_lengths.cpu(),
            blank=self.blank_id,
            reduction=reduction,
        )
