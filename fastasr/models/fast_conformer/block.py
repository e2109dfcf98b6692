# SPDX-License-Identifier: Apache-2.0
"""The FastConformer block: half a feed-forward block, attention, convolution, half a feed-forward block, norm."""

import torch

from fastasr.models.fast_conformer.attention import FastConformerAttention
from fastasr.models.fast_conformer.convolution import FastConformerConvolution
from fastasr.models.fast_conformer.feed_forward import FastConformerFeedForward


class FastConformerBlock(torch.nn.Module):
    """x (B, T, width) -> same shape: x + ½ FF(LN x), x + attention(LN x), x + convolution(LN x), LN(x + ½ FF(LN x))."""

    def __init__(
        self, width, heads, hidden, taps=9, bias=True, conv_bias=True, attention_dropout=0.0, dropout=0.0
    ):
        super().__init__()
        self.feed_forward1 = FastConformerFeedForward(width, hidden, bias, dropout)
        self.self_attn = FastConformerAttention(width, heads, bias, attention_dropout)
        self.conv = FastConformerConvolution(width, taps, conv_bias)
        self.feed_forward2 = FastConformerFeedForward(width, hidden, bias, dropout)
        self.norm_feed_forward1 = torch.nn.LayerNorm(width)
        self.norm_self_att = torch.nn.LayerNorm(width)
        self.norm_conv = torch.nn.LayerNorm(width)
        self.norm_feed_forward2 = torch.nn.LayerNorm(width)
        self.norm_out = torch.nn.LayerNorm(width)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        x = hidden_states
        x = torch.add(x, self.feed_forward1(self.norm_feed_forward1(x)), alpha=0.5)  # one pass
        x = x + self.self_attn(self.norm_self_att(x), position_embeddings, attention_mask, **kwargs)[0]
        x = x + self.conv(self.norm_conv(x), attention_mask)
        x = torch.add(x, self.feed_forward2(self.norm_feed_forward2(x)), alpha=0.5)
        return self.norm_out(x)
