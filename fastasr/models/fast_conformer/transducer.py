# SPDX-License-Identifier: Apache-2.0
"""The encoder with a transducer: RNN-T (Graves, 2012) or TDT (Xu et al., 2023), whose labels and blanks
have durations. ``fastasr.asr.decoding`` searches these models."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.common import plumbing
from fastasr.models.common.plain import is_plain
from fastasr.models.fast_conformer.encoder import FastConformerEncoder
from fastasr.ops._joiner import Activation
from fastasr.rnnt import lengths, tdt_joiner_loss, tdt_loss

# A loss takes the joint network's two summands, labels, and the lengths of frames and labels.
Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

ACTIVATIONS = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}


class FastConformerPredictor(torch.nn.Module):
    """The prediction network: tokens (B, U) -> (B, U, hidden)."""

    def __init__(self, vocabulary: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, hidden)
        self.lstm = torch.nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.decoder_projector = torch.nn.Linear(hidden, hidden)

    def forward(self, input_ids: Tensor) -> Tensor:
        return plumbing.linear(self.decoder_projector, self.lstm(self.embedding(input_ids))[0])


class FastConformerJoint(torch.nn.Module):
    """The joint network: head(activation(sum of both))."""

    def __init__(self, hidden: int, outputs: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]()
        self.head = torch.nn.Linear(hidden, outputs)

    def forward(self, decoder_hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return plumbing.linear(self.head, self.activation(encoder_hidden_states + decoder_hidden_states))


class FastConformerRNNT(torch.nn.Module):
    """Loads the state dicts of transformers' ``ParakeetForRNNT``.

    Args:
        encoder: a FastConformerEncoder.
        vocabulary: the number of tokens, blank included.
        hidden, layers: the width of prediction and joint network, and the LSTM's layers.
        blank: the blank token; None: the last one.
        activation: the joint network's activation, "relu" or "tanh".
        max_symbols_per_step: labels on a frame after which greedy search moves on.
    """

    durations: tuple[int, ...] = ()

    def __init__(
        self,
        encoder: FastConformerEncoder,
        vocabulary: int,
        hidden: int = 640,
        layers: int = 2,
        blank: int | None = None,
        activation: Activation = "relu",
        max_symbols_per_step: int = 10,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"{type(self).__name__}: activation: expected relu or tanh, got {activation!r}")
        self.blank_token_id = vocabulary - 1 if blank is None else blank
        self.hidden_act, self.max_symbols_per_step = activation, max_symbols_per_step
        self.encoder = encoder
        self.encoder_projector = torch.nn.Linear(encoder.subsampling.linear.out_features, hidden)
        self.decoder = FastConformerPredictor(vocabulary, hidden, layers)
        self.joint = FastConformerJoint(hidden, vocabulary + len(self.durations), activation)

    @classmethod
    def from_config(cls, config: Any) -> "FastConformerRNNT":
        """Returns a model of the sizes of a transformers ``ParakeetRNNTConfig``, or ``ParakeetTDTConfig`` for a TDT."""
        more = {"durations": config.durations} if issubclass(cls, FastConformerTDT) else {}
        return cls(
            FastConformerEncoder.from_config(config.encoder_config),
            config.vocab_size,
            hidden=config.decoder_hidden_size,
            layers=config.num_decoder_layers,
            blank=config.blank_token_id,
            activation=config.hidden_act,
            max_symbols_per_step=config.max_symbols_per_step,
            **more,
        )

    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, *, labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (logits (B, T, U + 1, outputs) for labels (B, U), mask (B, T) or None). A TDT's outputs are tokens,
        then durations."""
        frames, mask, contexts = self._joined(input_features, attention_mask, labels)
        return self.joint(contexts.unsqueeze(1), frames.unsqueeze(2)), mask

    def loss(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor,
        label_lengths: Tensor | None = None,
        reduction: str = "mean_volume",
    ) -> Tensor:
        """Returns the loss of labels (B, U), of which ``label_lengths`` (B,) count, without logits.

        Args:
            label_lengths: None: all labels count. Behind its end a sequence may hold any tokens.
            reduction: transformers': mean_volume, mean_batch, mean, sum or none.
        """
        call = self._call(input_features, attention_mask, labels, label_lengths)
        head = self._plain_head()
        if head is None:
            losses = lengths.rnnt_losses("rnnt_loss", self._logits(call), *call[2:], self.blank_token_id)
        else:
            operands = *call[:2], head.weight, head.bias, *call[2:]
            losses = lengths.joiner_losses(*operands, self.blank_token_id, activation=self.hidden_act)
        return lengths.reduced("rnnt.joiner_loss", losses, call[-1], reduction)

    def _joined(
        self, input_features: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns the joint network's two summands, (B, T, hidden) and (B, U + 1, hidden), and the mask between."""
        x, mask = self.encoder(input_features, attention_mask)
        contexts = self.decoder(F.pad(labels, (1, 0), value=self.blank_token_id))
        return plumbing.linear(self.encoder_projector, x), mask, contexts

    def _plain_head(self) -> torch.nn.Linear | None:
        """Returns the joint network's last layer, or None where the losses must call the network."""
        joint, activation = self.joint, ACTIVATIONS[self.hidden_act]
        plain = is_plain(joint, FastConformerJoint) and is_plain(joint.activation, activation)
        return joint.head if plain and is_plain(joint.head, torch.nn.Linear) else None

    def _logits(self, call: Call) -> Tensor:
        frames, contexts, *_ = call
        return self.joint(contexts.unsqueeze(1), frames.unsqueeze(2))

    def _call(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        label_lengths: Tensor | None,
    ) -> Call:
        """Returns the joint network's summands, labels, and lengths of frames and labels."""
        frames, mask, contexts = self._joined(input_features, attention_mask, labels)
        ends = labels.new_full((len(labels),), frames.shape[1]) if mask is None else mask.sum(-1)
        symbols = labels.new_full((len(labels),), labels.shape[1]) if label_lengths is None else label_lengths
        return frames, contexts, labels, ends, symbols


class FastConformerTDT(FastConformerRNNT):
    """Loads the state dicts of transformers' ``ParakeetForTDT``. ``durations``: how many frames a label or a blank may
    take."""

    def __init__(
        self,
        encoder: FastConformerEncoder,
        vocabulary: int,
        *args: Any,
        durations: Sequence[int] = (0, 1, 2, 3, 4),
        **kwargs: Any,
    ) -> None:
        self.durations = tuple(durations)
        super().__init__(encoder, vocabulary, *args, **kwargs)

    def loss(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor,
        label_lengths: Tensor | None = None,
        reduction: str = "mean",
        sigma: float = 0.0,
    ) -> Tensor:
        """Does the same for a TDT. ``sigma`` is subtracted from the tokens' log-probabilities, as transformers does."""
        call = self._call(input_features, attention_mask, labels, label_lengths)
        head = self._plain_head()
        if head is None:
            tokens, durations = self._logits(call).tensor_split((-len(self.durations),), -1)
            return tdt_loss(
                tokens, durations, *call[2:], self.blank_token_id, self.durations, sigma, reduction
            )
        return tdt_joiner_loss(
            *call[:2],
            head.weight,
            head.bias,
            *call[2:],
            self.blank_token_id,
            self.durations,
            sigma,
            reduction,
            activation=self.hidden_act,
        )
