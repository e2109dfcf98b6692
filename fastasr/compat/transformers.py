# SPDX-License-Identifier: Apache-2.0
"""The transducer losses of transformers, by name and argument: for its models' ``loss_function``, for example.

model.loss_function = fastasr.compat.transformers.ParakeetForTDTLoss
"""

from collections.abc import Sequence

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
    logits: Tensor,
    labels: Tensor,
    logit_lengths: Tensor,
    label_lengths: Tensor,
    blank_token_id: int,
    reduction: str = "mean_volume",
    **kwargs: object,
) -> Tensor:
    return rnnt_loss(logits, labels, logit_lengths, label_lengths, blank_token_id, reduction)


def ParakeetForTDTLoss(
    token_logits: Tensor,
    duration_logits: Tensor,
    labels: Tensor,
    logit_lengths: Tensor,
    label_lengths: Tensor,
    blank_token_id: int,
    durations: Sequence[int],
    sigma: float = 0.0,
    reduction: str = "mean",
    **kwargs: object,
) -> Tensor:
    labels, frames, tokens = (t.to(token_logits.device) for t in (labels, logit_lengths, label_lengths))
    call = token_logits, duration_logits, labels, frames, tokens, blank_token_id, durations
    return tdt_loss(*call, sigma=sigma, reduction=reduction)
