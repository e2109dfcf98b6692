# SPDX-License-Identifier: Apache-2.0
"""The attention decoder: a Transformer that reads the encoder's output and predicts token after token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.asr.recogniser.absolute_position import PositionalEncoding
from fastasr.asr.recogniser.label_smoothing import LabelSmoothingLoss
from fastasr.asr.recogniser.multi_head_attention import MultiHeadAttention
from fastasr.models.common.sequences import make_pad_mask, pad_sequences, subsequent_mask


class Swish(torch.nn.Module):
    """x -> x sigmoid(x)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class DecoderLayer(torch.nn.Module):
    """x (target, batch, d_model) -> same shape.

    Self-attention, attention over the memory and a feed-forward block follow each other. Each normalises its input and
    adds its output to it.
    """

    def __init__(
        self,
        d_model: int = 512,
        attention_dim: int = 512,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        memory_dim: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.norm_self_attn = torch.nn.LayerNorm(d_model)
        self.self_attn = MultiHeadAttention(d_model, attention_dim, num_heads, dropout=0.0)
        self.norm_src_attn = torch.nn.LayerNorm(d_model)
        self.src_attn = MultiHeadAttention(
            d_model, attention_dim, num_heads, memory_dim=memory_dim, dropout=0.0
        )
        self.norm_ff = torch.nn.LayerNorm(d_model)
        self.feed_forward = torch.nn.Sequential(
            torch.nn.Linear(d_model, feedforward_dim),
            Swish(),
            torch.nn.Dropout(dropout),
            torch.nn.Linear(feedforward_dim, d_model),
        )
        self.dropout = torch.nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_attn_mask: Tensor | None = None,
    ) -> Tensor:
        """memory is (source, batch, memory_dim); the masks are (batch, 1 or target, source), True at hidden sources."""
        if memory is None:
            raise ValueError("DecoderLayer: memory (source, batch, memory_dim) is needed, got None")
        normed = self.norm_self_attn(x)
        x = x + self.dropout(self.self_attn(normed, normed, normed, attn_mask=attn_mask))
        x = x + self.dropout(self.src_attn(self.norm_src_attn(x), memory, memory, attn_mask=memory_attn_mask))
        return x + self.dropout(self.feed_forward(self.norm_ff(x)))


class TransformerDecoder(torch.nn.Module):
    """Tokens x (batch, target), which begin with the start of the sentence -> logits (batch, target, vocab_size) of the
    next token.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        num_decoder_layers: int = 6,
        attention_dim: int = 512,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        memory_dim: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, d_model)
        self.pos = PositionalEncoding(d_model, dropout_rate=0.1)
        self.num_layers = num_decoder_layers
        self.layers = torch.nn.ModuleList(
            DecoderLayer(d_model, attention_dim, num_heads, feedforward_dim, memory_dim, dropout)
            for _ in range(num_decoder_layers)
        )
        self.output_layer = torch.nn.Linear(d_model, vocab_size)

    def forward(self, x: Tensor, x_lens: Tensor, memory: Any = None, memory_lens: Any = None) -> Tensor:
        """x_lens (batch,) are the lengths of x; memory (batch, source, memory_dim) and memory_lens (batch,) are the
        encoder's output."""
        target = x.shape[1]
        hidden = make_pad_mask(x_lens, target).unsqueeze(1) | ~subsequent_mask(target, device=x.device)
        memory_hidden = None
        if memory is not None:
            memory_hidden = make_pad_mask(memory_lens, memory.shape[1]).unsqueeze(1)
            memory = memory.transpose(0, 1)
        x = self.pos(self.embed(x)).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, attn_mask=hidden, memory=memory, memory_attn_mask=memory_hidden)
        return self.output_layer(x.transpose(0, 1))


class AttentionDecoderModel(torch.nn.Module):
    """The attention decoder with its losses.

    Args:
        sos_id, eos_id: tokens before and after every sentence.
        ignore_id: marks padding among the targets; it must not be a token.
    """

    def __init__(
        self,
        vocab_size: int,
        decoder_dim: int = 512,
        num_decoder_layers: int = 6,
        attention_dim: int = 512,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        memory_dim: int = 512,
        sos_id: int = 1,
        eos_id: int = 1,
        dropout: float = 0.1,
        ignore_id: int = -1,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self.eos_id = eos_id
        self.sos_id = sos_id
        self.ignore_id = ignore_id
        self.decoder = TransformerDecoder(
            vocab_size=vocab_size,
            d_model=decoder_dim,
            num_decoder_layers=num_decoder_layers,
            attention_dim=attention_dim,
            num_heads=num_heads,
            feedforward_dim=feedforward_dim,
            memory_dim=memory_dim,
            dropout=dropout,
        )
        self.loss_fun = LabelSmoothingLoss(ignore_id, label_smoothing, reduction="none")

    def calc_att_loss(
        self, encoder_out: Tensor, encoder_out_lens: Tensor, ys: list[list[int]], reduction: str = "sum"
    ) -> Tensor:
        """encoder_out (batch, frames, memory_dim), ys (one list of tokens per sequence) -> the smoothed cross entropy.

        It is a sum, or has the shape (batch * (longest + 1),) for the reduction ``none``.
        """
        if reduction not in ("sum", "none"):
            raise ValueError(f"AttentionDecoderModel: reduction must be sum or none, got {reduction!r}")
        logits, targets = self._logits(encoder_out, encoder_out_lens, ys)
        loss = self.loss_fun(logits, targets)
        return loss.sum() if reduction == "sum" else loss

    def nll(self, encoder_out: Tensor, encoder_out_lens: Tensor, ys: list[list[int]]) -> Tensor:
        """Returns the negative log-likelihood of every token and of the end, (batch, longest + 1); 0 at padding."""
        logits, targets = self._logits(encoder_out, encoder_out_lens, ys)
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=self.ignore_id, reduction="none")

    def _logits(
        self, encoder_out: Tensor, encoder_out_lens: Tensor, ys: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        device = encoder_out.device
        inputs, lengths = pad_sequences(ys, self.eos_id, sos_id=self.sos_id, device=device)
        targets, _ = pad_sequences(ys, self.ignore_id, eos_id=self.eos_id, device=device)
        return self.decoder(inputs, lengths, encoder_out, encoder_out_lens), targets
