# SPDX-License-Identifier: Apache-2.0
"""warp-rnnt's ``rnnt_loss``, on CPU and GPU."""

from torch import Tensor

from fastasr.rnnt import lengths


def rnnt_loss(
    log_probs: Tensor,
    labels: Tensor,
    frames_lengths: Tensor,
    labels_lengths: Tensor,
    average_frames: bool = False,
    reduction: str | None = None,
    blank: int = 0,
    gather: bool = False,
    fastemit_lambda: float = 0.0,
    compact: bool = False,
) -> Tensor:
    """Returns ``warp_rnnt.rnnt_loss`` of log-probabilities (B, T, U + 1, V).

    ``gather`` only chooses how warp-rnnt works. ``average_frames`` divides each loss by its frames; ``reduction`` is
    None ("none"), "mean" (over the batch) or "sum". ``compact`` inputs are not supported.
    """
    op = "compat.warp_rnnt.rnnt_loss"
    if compact:
        raise NotImplementedError(f"fastasr.{op}: compact: expected False, got True")
    loss = lengths.rnnt_losses(
        *(op, log_probs, labels, frames_lengths, labels_lengths, blank),
        fused_log_softmax=False,
        fastemit_lambda=fastemit_lambda,
    )
    loss = loss / frames_lengths.to(loss) if average_frames else loss
    name = "none" if reduction is None else "mean_batch" if reduction == "mean" else reduction
    return lengths.reduced(op, loss, labels_lengths, name)
