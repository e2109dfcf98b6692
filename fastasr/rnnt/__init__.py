# SPDX-License-Identifier: Apache-2.0
"""Transducer (RNN-T) losses: k2's functions by name, argument and result, and the joiner fused with its loss.

``pruned_joiner_loss``, ``joiner_loss``, ``tdt_joiner_loss``, ``ctc_loss`` and the alignments (``rnnt_align``,
``joiner_align``, ``tdt_align``, ``tdt_joiner_align``, ``ctc_align``) are fastasr's, ``tdt_loss`` is transformers'; all
others are k2's, with ``zero_infinity`` and ``fastemit_lambda`` added. ``fastasr.compat.k2`` puts them under the name
``k2``. See docs/rnnt.md.
"""

from fastasr.rnnt.align import Alignment, ctc_align, joiner_align, rnnt_align, tdt_align, tdt_joiner_align
from fastasr.rnnt.ctc import ctc_loss
from fastasr.rnnt.joiner import joiner_loss, pruned_joiner_loss
from fastasr.rnnt.logprobs import (
    get_hat_logprobs_pruned,
    get_rnnt_logprobs,
    get_rnnt_logprobs_joint,
    get_rnnt_logprobs_pruned,
    get_rnnt_logprobs_smoothed,
)
from fastasr.rnnt.losses import rnnt_loss, rnnt_loss_pruned, rnnt_loss_simple, rnnt_loss_smoothed
from fastasr.rnnt.pruning import do_rnnt_pruning, get_rnnt_prune_ranges, get_rnnt_prune_ranges_deprecated
from fastasr.rnnt.recursion import joint_mutual_information_recursion, mutual_information_recursion
from fastasr.rnnt.tdt import tdt_joiner_loss, tdt_loss

__all__ = [
    "Alignment",
    "ctc_align",
    "ctc_loss",
    "do_rnnt_pruning",
    "get_hat_logprobs_pruned",
    "get_rnnt_logprobs",
    "get_rnnt_logprobs_joint",
    "get_rnnt_logprobs_pruned",
    "get_rnnt_logprobs_smoothed",
    "get_rnnt_prune_ranges",
    "get_rnnt_prune_ranges_deprecated",
    "joiner_align",
    "joiner_loss",
    "joint_mutual_information_recursion",
    "mutual_information_recursion",
    "pruned_joiner_loss",
    "rnnt_align",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
    "tdt_align",
    "tdt_joiner_align",
    "tdt_joiner_loss",
    "tdt_loss",
]
