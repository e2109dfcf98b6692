# SPDX-License-Identifier: Apache-2.0
"""The whole recogniser: front end, Zipformer, and any of a transducer, CTC and an attention decoder.

Pruned transducer: Kuang et al. (2022). CTC: Graves et al. (2006). Consistency-regularised CTC: Yao et al., "CR-CTC"
(2024). It masks two copies of a batch differently, and each copy also learns from the other's output:

    cr = sum over copies, frames, tokens of  exp(q) (q - p)

where p are a copy's log-probabilities and q those of the other copy, without gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.asr.recogniser.attention_decoder import AttentionDecoderModel
from fastasr.asr.recogniser.ctc import CtcLoss
from fastasr.asr.recogniser.decoder import Decoder
from fastasr.asr.recogniser.joiner import Joiner
from fastasr.asr.recogniser.time_warp import time_warp
from fastasr.models.common.sequences import check_frames, make_pad_mask, pad_sequences
from fastasr.models.transducer.transducer_loss import TransducerLoss
from fastasr.models.zipformer.encoder import Zipformer, int_tuple
from fastasr.models.zipformer.initial_scale import ScaledLinear
from fastasr.models.zipformer.schedules import ScheduledFloat
from fastasr.models.zipformer.subsampling import Conv2dSubsampling


class AsrModel(TransducerLoss, CtcLoss, torch.nn.Module):
    """Features (batch, time, feature_dim) and tokens -> losses.

    The encoder's arguments are Zipformer's. At least one of ``use_transducer`` and ``use_ctc`` must be set.

    Args:
        blank_id, vocab_size: the blank token, and the number of tokens including it.
        decoder_dim, context_size, joiner_dim: arguments of the transducer's prediction network and joiner.
        attention_decoder_..., sos_id, eos_id, ignore_id, label_smoothing: arguments of the attention decoder.
    """

    def __init__(
        self,
        feature_dim: int = 80,
        downsampling_factor: Any = (2, 4),
        encoder_dim: Any = 384,
        num_encoder_layers: Any = 4,
        encoder_unmasked_dim: Any = 256,
        query_head_dim: Any = 24,
        pos_head_dim: Any = 4,
        value_head_dim: Any = 12,
        num_heads: Any = 8,
        feedforward_dim: Any = 1536,
        cnn_module_kernel: Any = 31,
        pos_dim: int = 192,
        dropout: Any = None,
        warmup_batches: float = 4000.0,
        causal: bool = False,
        chunk_size: Any = (-1,),
        left_context_frames: Any = (-1,),
        use_ctc: bool = False,
        blank_id: int = 0,
        vocab_size: int = 500,
        use_transducer: bool = True,
        decoder_dim: int = 512,
        context_size: int = 2,
        joiner_dim: int = 512,
        use_attention_decoder: bool = False,
        attention_decoder_dim: int = 512,
        attention_decoder_num_layers: int = 2,
        attention_decoder_attention_dim: int = 512,
        attention_decoder_num_heads: int = 8,
        attention_decoder_feedforward_dim: int = 2048,
        sos_id: int = 1,
        eos_id: int = 2,
        ignore_id: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not (use_transducer or use_ctc):
            raise ValueError("AsrModel: use_transducer or use_ctc must be set")
        self.blank_id = blank_id
        self.vocab_size = vocab_size
        widths = int_tuple("encoder_dim", encoder_dim)
        self.encoder_embed = Conv2dSubsampling(
            feature_dim, widths[0], dropout=ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
        )
        self.encoder = Zipformer(
            downsampling_factor=downsampling_factor,
            encoder_dim=encoder_dim,
            num_encoder_layers=num_encoder_layers,
            encoder_unmasked_dim=encoder_unmasked_dim,
            query_head_dim=query_head_dim,
            pos_head_dim=pos_head_dim,
            value_head_dim=value_head_dim,
            num_heads=num_heads,
            feedforward_dim=feedforward_dim,
            cnn_module_kernel=cnn_module_kernel,
            pos_dim=pos_dim,
            dropout=dropout,
            warmup_batches=warmup_batches,
            causal=causal,
            chunk_size=chunk_size,
            left_context_frames=left_context_frames,
        )
        self.encoder_out_dim = max(widths)
        self.use_transducer = use_transducer
        self.decoder: Any = None
        self.joiner: Any = None
        if use_transducer:
            self.decoder = Decoder(vocab_size, decoder_dim, blank_id, context_size)
            self.joiner = Joiner(self.encoder_out_dim, decoder_dim, joiner_dim, vocab_size)
            self.simple_am_proj = ScaledLinear(self.encoder_out_dim, vocab_size, initial_scale=0.25)
            self.simple_lm_proj = ScaledLinear(decoder_dim, vocab_size, initial_scale=0.25)
        self.use_ctc = use_ctc
        self.ctc_output = None
        if use_ctc:
            self.ctc_output = torch.nn.Sequential(
                torch.nn.Dropout(p=0.1),
                torch.nn.Linear(self.encoder_out_dim, vocab_size),
                torch.nn.LogSoftmax(dim=-1),
            )
        self.use_attention_decoder = use_attention_decoder
        self.attention_decoder: Any = None
        if use_attention_decoder:
            self.attention_decoder = AttentionDecoderModel(
                vocab_size=vocab_size,
                decoder_dim=attention_decoder_dim,
                num_decoder_layers=attention_decoder_num_layers,
                attention_dim=attention_decoder_attention_dim,
                num_heads=attention_decoder_num_heads,
                feedforward_dim=attention_decoder_feedforward_dim,
                memory_dim=self.encoder_out_dim,
                sos_id=sos_id,
                eos_id=eos_id,
                ignore_id=ignore_id,
                label_smoothing=label_smoothing,
            )

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        y: list[list[int]],
        prune_range: int = 5,
        am_scale: float = 0.0,
        lm_scale: float = 0.0,
        use_cr_ctc: bool = False,
        use_spec_aug: bool = False,
        spec_augment: Any = None,
        supervision_segments: Tensor | None = None,
        time_warp_factor: int = 80,
        reduction: str = "sum",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns the (simple, pruned, CTC, attention decoder, consistency) losses, empty tensors for absent parts.

        Args:
            x: (batch, time, feature_dim); x_lens: (batch,), frames before padding. The largest must be ``time``.
            y: one list of tokens per sequence.
            prune_range, am_scale, lm_scale: see ``forward_transducer``.
            use_cr_ctc: whether to use consistency-regularised CTC. The batch is then doubled and the losses are halved.
            use_spec_aug, spec_augment, supervision_segments, time_warp_factor: with CR-CTC, both copies get the same
                time warp, and then ``spec_augment``, which must not warp time itself, masks each of them.
            reduction: "sum" over the batch; "mean", only without an attention decoder: the transducer's losses over the
                sequences, CTC's as ``torch.nn.functional.ctc_loss`` does, the consistency's over all elements; or
                "none": (batch,) of the transducer and of CTC, (batch * (longest + 1),) of the attention decoder,
                (batch, frames, vocab_size) of the consistency, with CR-CTC's copies counted in ``batch``.
        Raises:
            ValueError: shapes do not match, a token is not in [0, vocab_size), a sequence is too short for a frame of
                output, ``reduction`` is unknown, or CR-CTC lacks ``use_ctc`` or arguments of ``use_spec_aug``.
        """
        self._check(x, x_lens, y)
        if use_cr_ctc:
            x, x_lens, y = self._twice(
                x, x_lens, y, use_spec_aug, spec_augment, supervision_segments, time_warp_factor
            )
        encoder_out, encoder_out_lens = self.forward_encoder(x, x_lens)
        share = 0.5 if use_cr_ctc else 1.0
        simple = pruned = ctc = attention = consistency = torch.empty(0, dtype=torch.float32, device="cpu")
        if self.use_transducer:
            simple, pruned = self.forward_transducer(
                encoder_out,
                encoder_out_lens,
                y,
                prune_range=prune_range,
                am_scale=am_scale,
                lm_scale=lm_scale,
                reduction=reduction,
            )
            simple, pruned = simple * share, pruned * share
        if self.use_ctc:
            targets, target_lengths = pad_sequences(y, 0)
            if use_cr_ctc:
                ctc, consistency = self.forward_cr_ctc(
                    encoder_out, encoder_out_lens, targets, target_lengths, reduction
                )
                ctc, consistency = ctc * share, consistency * share
            else:
                ctc = self.forward_ctc(encoder_out, encoder_out_lens, targets, target_lengths, reduction)
        if self.use_attention_decoder:
            attention = share * self.attention_decoder.calc_att_loss(
                encoder_out, encoder_out_lens, y, reduction=reduction
            )
        return simple, pruned, ctc, attention, consistency

    def forward_encoder(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Features (batch, time, feature_dim) -> (batch, frames, channels), lengths.

        Raises ValueError when a sequence is too short for a frame of output.
        """
        check_frames("AsrModel", x, x_lens)
        x, x_lens = self.encoder_embed(x, x_lens)
        out, lengths = self.encoder(x.transpose(0, 1), x_lens, make_pad_mask(x_lens, x.shape[1]))
        return out.transpose(0, 1), lengths

    def forward_cr_ctc(
        self,
        encoder_out: Tensor,
        encoder_out_lens: Tensor,
        targets: Tensor,
        target_lengths: Tensor,
        reduction: str = "sum",
    ) -> tuple[Tensor, Tensor]:
        """Returns (CTC loss, consistency loss) of a batch whose second half is another view of its first half."""
        if encoder_out.shape[0] % 2:
            raise ValueError(f"AsrModel: CR-CTC needs an even batch, got {encoder_out.shape[0]} sequences")
        log_probs = self.ctc_output(encoder_out)
        ctc = self._ctc_loss(log_probs, encoder_out_lens, targets, target_lengths, reduction)
        other = log_probs.detach().roll(log_probs.shape[0] // 2, dims=0)
        consistency = F.kl_div(log_probs, other, reduction="none", log_target=True)  # [2N, T, V]
        padding = make_pad_mask(encoder_out_lens, log_probs.shape[1]).unsqueeze(-1)
        consistency = consistency.masked_fill(padding, 0.0)
        if reduction != "none":
            consistency = consistency.sum() if reduction == "sum" else consistency.mean()
        return ctc, consistency

    def _check(self, x: Tensor, x_lens: Tensor, y: list[list[int]]) -> None:
        if x.ndim != 3 or x_lens.ndim != 1 or not x.shape[0] == x_lens.shape[0] == len(y):
            raise ValueError(
                f"AsrModel: expected x (batch, time, features), x_lens (batch,) and a list of tokens per sequence, got "
                f"shapes {tuple(x.shape)} and {tuple(x_lens.shape)} and {len(y)} lists"
            )
        for tokens in y:
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(f"AsrModel: tokens must be in [0, {self.vocab_size}), got {token}")

    def _twice(
        self,
        x: Tensor,
        x_lens: Tensor,
        y: list[list[int]],
        use_spec_aug: bool,
        spec_augment: Any,
        supervision_segments: Tensor | None,
        time_warp_factor: int,
    ) -> tuple[Tensor, Tensor, list[list[int]]]:
        if not self.use_ctc:
            raise ValueError("AsrModel: use_cr_ctc needs a model with use_ctc")
        if use_spec_aug:
            if spec_augment is None or supervision_segments is None:
                raise ValueError("AsrModel: use_spec_aug needs spec_augment and supervision_segments")
            if (spec_augment.time_warp_factor or 0) >= 1:
                raise ValueError(
                    "AsrModel: spec_augment must not warp time: the two copies are warped as one"
                )
            x = time_warp(x, time_warp_factor=time_warp_factor, supervision_segments=supervision_segments)
        x = x.repeat(2, 1, 1)
        return (spec_augment(x) if use_spec_aug else x), x_lens.repeat(2), [*y, *y]
