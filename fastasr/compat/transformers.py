# SPDX-License-Identifier: Apache-2.0
"""The transducer losses of transformers, by name and argument: for its models' ``loss_function``, for example.

model.loss_function = fastasr.compat.transformers.ParakeetForTDTLoss
"""

from torch import Tensor

from fastasr.rnnt import lengths, tdt_loss

__all__ = ["ParakeetForRNNTLoss", "ParakeetForTDTLoss", "rnnt_loss", "tdt_loss"]


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank_token_id: int,
    reduction: str = "mean_volume",
) -> Tensor:
    """Returns ``transformers.loss.loss_rnnt.rnnt_loss``, which needs torchaudio; this does not."""
    op = "compat.transformers.rnnt_loss"
    target_lengths = target_lengths.to(logits.device)
    call = logits, targets.to(logits.device), logit_lengths.to(logits.device), target_lengths, blank_token_id
    return lengths.reduced(op, lengths.rnnt_losses(op, *call), target_lengths, reduction)


def ParakeetForRNNTLoss(
    logits, labels, logit_lengths, label_lengths, blank_token_id, reduction="mean_volume", **kwargs
):
    return rnnt_loss(logits, labels, logit_lengths, label_lengths, blank_token_id, reduction)


def ParakeetForTDTLoss(
    token_logits,
    duration_logits,
    labels,
    logit_lengths,
    label_lengths,
    blank_token_id,
    durations,
    sigma=0.0,
    reduction="mean",
    **kwargs,
):
    labels, *ends = (t.to(token_logits.device) for t in (labels, logit_lengths, label_lengths))
    return tdt_loss(token_logits, duration_logits, labels, *ends, blank_token_id, durations, sigma, reduction)
