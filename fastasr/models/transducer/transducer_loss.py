# SPDX-License-Identifier: Apache-2.0
"""Zipformer's transducer loss: smoothed loss, windows, joiner and pruned loss, without the joiner's logits.

Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training" (2022). Upstream's
``AsrModel.forward_transducer`` in ``zipformer.modules.model`` stores the logits (B, T, R, V) of the pruned windows.
"""

from typing import Any

import torch
from torch import Tensor

from fastasr import _left, rnnt
from fastasr.models.common.plain import is_plain, is_plain_named
from fastasr.models.common.sequences import pad_sequences


class TransducerLoss:
    """The transducer's part of AsrModel, for models with ``decoder``, ``joiner``, ``simple_am_proj`` and
    ``simple_lm_proj``.
    """

    decoder: Any
    joiner: Any
    simple_am_proj: torch.nn.Module
    simple_lm_proj: torch.nn.Module

    def forward_transducer(
        self,
        encoder_out: Tensor,
        encoder_out_lens: Tensor,
        y: list[list[int]],
        prune_range: int = 5,
        am_scale: float = 0.0,
        lm_scale: float = 0.0,
        reduction: str = "sum",
    ) -> tuple[Tensor, Tensor]:
        """Returns (simple loss, pruned loss), in float32.

        Args:
            encoder_out: (B, T, C); encoder_out_lens: (B,).
            y: one list of tokens per sequence.
            prune_range: positions per frame that the pruned loss keeps.
            am_scale, lm_scale: weights of the two models alone in the simple loss.
            reduction: over the sequences: none, which gives losses (B,), mean or sum.
        Raises:
            ValueError: ``reduction`` is another, or a length or a token is out of range.
        """
        blank, device = self.decoder.blank_id, encoder_out.device
        contexts, _ = pad_sequences(y, blank, sos_id=blank, device=device)
        symbols, lengths = pad_sequences(y, 0, device=device)
        boundary = torch.zeros(len(y), 4, dtype=torch.int64, device=device)
        boundary[:, 2] = lengths
        boundary[:, 3] = encoder_out_lens

        decoder_out = self.decoder(contexts)
        lm, am = self.simple_lm_proj(decoder_out), self.simple_am_proj(encoder_out)
        found: Any = rnnt.rnnt_loss_smoothed(
            lm.float(),
            am.float(),
            symbols,
            blank,
            lm_only_scale=lm_scale,
            am_only_scale=am_scale,
            boundary=boundary,
            reduction=reduction,
            return_grad=True,
        )
        simple, occupation = found
        px_grad, py_grad = occupation
        ranges = rnnt.get_rnnt_prune_ranges(px_grad, py_grad, boundary, prune_range)
        joiner = self.joiner
        options: Any = {"boundary": boundary, "reduction": reduction}
        if not is_plain(joiner.output_linear, torch.nn.Linear) or not is_plain_named(
            joiner, ("Joiner",), self
        ):
            _left.note(
                self, "the joiner has hooks or is no plain one: its logits are formed", "forward_transducer"
            )
            ams, lms = rnnt.do_rnnt_pruning(
                joiner.encoder_proj(encoder_out), joiner.decoder_proj(decoder_out), ranges
            )
            logits = joiner(ams, lms, project_input=False).float()
            loss: Any = rnnt.rnnt_loss_pruned(logits, symbols, ranges, blank, **options)
            return simple, loss
        pruned: Any = rnnt.pruned_joiner_loss(
            joiner.encoder_proj(encoder_out),
            joiner.decoder_proj(decoder_out),
            joiner.output_linear.weight,
            joiner.output_linear.bias,
            symbols,
            ranges,
            blank,
            **options,
        )
        return simple, pruned.float()
