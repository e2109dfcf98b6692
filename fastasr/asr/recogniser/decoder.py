# SPDX-License-Identifier: Apache-2.0
"""The transducer's prediction network: the last few tokens, embedded and convolved. It has no recurrence.

    d[u] = relu(Conv1d(embedding(y[u - context_size + 1]), ..., embedding(y[u])))

Ghodsi et al., "RNN-transducer with stateless prediction network" (2020), with a grouped convolution over the context.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.zipformer.balancer import Balancer

CHANNELS_PER_GROUP = 4


class Decoder(torch.nn.Module):
    """y (batch, tokens) of ints -> (batch, tokens, decoder_dim).

    Args:
        vocab_size: number of tokens, blank included.
        decoder_dim: channels of the embedding and of the output; a multiple of 4 if context_size is above 1.
        blank_id: the blank token.
        context_size: number of tokens that an output depends on; 1 is a bigram.
    """

    def __init__(self, vocab_size: int, decoder_dim: int, blank_id: int, context_size: int) -> None:
        super().__init__()
        if context_size < 1:
            raise ValueError(f"Decoder: context_size must be at least 1, got {context_size}")
        if context_size > 1 and decoder_dim % CHANNELS_PER_GROUP:
            raise ValueError(
                f"Decoder: decoder_dim must be a multiple of {CHANNELS_PER_GROUP}, got {decoder_dim}"
            )
        if not 0 <= blank_id < vocab_size:
            raise ValueError(f"Decoder: blank_id must be in [0, {vocab_size}), got {blank_id}")
        self.embedding = torch.nn.Embedding(vocab_size, decoder_dim)
        self.balancer = _keeps_its_size(decoder_dim)
        self.blank_id = blank_id
        self.context_size = context_size
        self.vocab_size = vocab_size
        self.conv: torch.nn.Module
        self.balancer2: torch.nn.Module
        if context_size > 1:
            self.conv = torch.nn.Conv1d(
                decoder_dim, decoder_dim, context_size, groups=decoder_dim // CHANNELS_PER_GROUP, bias=False
            )
            self.balancer2 = _keeps_its_size(decoder_dim)
        else:
            self.conv = torch.nn.Identity()
            self.balancer2 = torch.nn.Identity()

    def forward(self, y: Tensor, need_pad: bool = True) -> Tensor:
        """Negative tokens stand for the context before a sentence and embed as zeros. With ``need_pad``, zeros are put
        before y; without it, y must have exactly ``context_size`` tokens and gives one output.
        """
        embedded = self.embedding(y.to(torch.int64).clamp(min=0)) * (y >= 0).unsqueeze(-1)
        embedded = self.balancer(embedded)
        if self.context_size == 1:
            return embedded
        channels_first = embedded.transpose(1, 2)  # [N, C, U]
        if need_pad:
            channels_first = F.pad(channels_first, (self.context_size - 1, 0))
        elif y.shape[1] != self.context_size:
            raise ValueError(
                f"Decoder: y must have context_size = {self.context_size} tokens without need_pad, "
                f"got shape {tuple(y.shape)}"
            )
        return self.balancer2(F.relu(self.conv(channels_first).transpose(1, 2)))


def _keeps_its_size(channels: int) -> Balancer:
    """Returns a balancer that keeps the embeddings' size, since averages of checkpoints suffer if it drifts."""
    return Balancer(
        channels, channel_dim=-1, min_positive=0.0, max_positive=1.0, min_abs=0.5, max_abs=1.0, prob=0.05
    )
