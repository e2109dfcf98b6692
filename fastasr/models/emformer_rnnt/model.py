# SPDX-License-Identifier: Apache-2.0
"""The transducer: transcription, prediction and joint network, as ``torchaudio.models.RNNT``."""

from typing import Any

import torch
from torch import Tensor, nn

from fastasr import rnnt
from fastasr.models.common.plain import is_plain, is_watched
from fastasr.models.emformer_rnnt.joiner import Joiner
from fastasr.models.emformer_rnnt.predictor import Predictor, State
from fastasr.models.emformer_rnnt.transcriber import EmformerEncoder


class RNNT(nn.Module):
    """A transducer, which consists of a transcriber (``forward(input, lengths)``, ``infer(input, lengths, states)``), a
    predictor and a joiner. Methods, shapes and the state dict are torchaudio's; ``loss`` is an addition of fastasr."""

    transcriber: Any  # an EmformerEncoder, or a module with its ``forward`` and ``infer``
    joiner: Any

    def __init__(self, transcriber: nn.Module, predictor: nn.Module, joiner: nn.Module) -> None:
        super().__init__()
        self.transcriber = transcriber
        self.predictor = predictor
        self.joiner = joiner

    def forward(
        self,
        sources: Tensor,
        source_lengths: Tensor,
        targets: Tensor,
        target_lengths: Tensor,
        predictor_state: State | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """Returns the logits of the whole lattice.

        Args:
            sources: (B, T, D), utterances followed by their right context; source_lengths: (B,), their valid frames.
            targets: (B, U), labels; target_lengths: (B,).
            predictor_state: the state that the previous call returned, or None.
        Returns:
            Logits (B, T', U, num_symbols), the lengths of both encodings, and the predictor's state.
        """
        encodings, source_lengths = self.transcriber(input=sources, lengths=source_lengths)
        predicted, target_lengths, state = self.predictor(
            input=targets, lengths=target_lengths, state=predictor_state
        )
        logits, source_lengths, target_lengths = self.join(
            encodings, source_lengths, predicted, target_lengths
        )
        return logits, source_lengths, target_lengths, state

    def loss(
        self,
        sources: Tensor,
        source_lengths: Tensor,
        targets: Tensor,
        target_lengths: Tensor,
        blank: int = -1,
        reduction: str = "mean",
    ) -> Tensor:
        """Returns the transducer loss without storing the logits.

        Args:
            sources, source_lengths: as in ``forward``.
            targets: (B, U), labels without a blank in front; target_lengths: (B,).
            blank: the label of blank; a negative one counts from the end. The predictor starts from it. torchaudio's
                recipes use the last label.
            reduction: "mean" over the batch, "sum", or "none".
        Returns:
            A scalar, or (B,) for "none".
        Raises:
            ValueError: blank is not a label.
        """
        linear: Any = self.joiner.linear
        if not -linear.out_features <= blank < linear.out_features:
            raise ValueError(f"RNNT.loss: blank: expected a label below {linear.out_features}, got {blank}")
        blank %= linear.out_features
        encodings, lengths = self.transcriber(sources, source_lengths)
        starts = targets.new_full((targets.shape[0], 1), blank)
        predicted, _, _ = self.predictor(torch.cat((starts, targets), 1), target_lengths + 1)
        zeros = torch.zeros_like(lengths, dtype=torch.int64)
        boundary = torch.stack((zeros, zeros, target_lengths.to(zeros), lengths.to(zeros)), 1)
        targets, activation = targets.to(torch.int64), self.joiner.activation
        if is_watched(self.joiner) or not (
            is_plain(linear, nn.Linear) and is_plain(activation, nn.ReLU, nn.Tanh)
        ):
            logits, *_ = self.joiner(encodings, lengths, predicted, target_lengths + 1)
            loss: Any = rnnt.rnnt_loss(logits, targets, blank, boundary, reduction=reduction)
            return loss
        return rnnt.joiner_loss(
            encodings,
            predicted.contiguous(),
            linear.weight,
            linear.bias,
            targets,
            blank,
            boundary,
            reduction=reduction,
            activation="relu" if type(activation) is nn.ReLU else "tanh",
        )

    def transcribe(self, sources: Tensor, source_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns encodings (B, T', D) of whole utterances and their lengths. Right context follows each utterance."""
        return self.transcriber(sources, source_lengths)

    def transcribe_streaming(
        self, sources: Tensor, source_lengths: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, State]:
        """Returns the encodings of a stream's next segment, their lengths, and the transcriber's state."""
        return self.transcriber.infer(sources, source_lengths, state)

    def predict(
        self, targets: Tensor, target_lengths: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, State]:
        """Returns the encodings (B, U, D) of labels (B, U), the lengths, and the predictor's state."""
        return self.predictor(input=targets, lengths=target_lengths, state=state)

    def join(
        self,
        source_encodings: Tensor,
        source_lengths: Tensor,
        target_encodings: Tensor,
        target_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the logits (B, T, U, num_symbols) and both lengths."""
        return self.joiner(
            source_encodings=source_encodings,
            source_lengths=source_lengths,
            target_encodings=target_encodings,
            target_lengths=target_lengths,
        )


def emformer_rnnt_model(
    *,
    input_dim: int,
    encoding_dim: int,
    num_symbols: int,
    segment_length: int,
    right_context_length: int,
    time_reduction_input_dim: int,
    time_reduction_stride: int,
    transformer_num_heads: int,
    transformer_ffn_dim: int,
    transformer_num_layers: int,
    transformer_dropout: float,
    transformer_activation: str,
    transformer_left_context_length: int,
    transformer_max_memory_size: int,
    transformer_weight_init_scale_strategy: str | None,
    transformer_tanh_on_mem: bool,
    symbol_embedding_dim: int,
    num_lstm_layers: int,
    lstm_layer_norm: bool,
    lstm_layer_norm_epsilon: float,
    lstm_dropout: float,
) -> RNNT:
    """Returns an RNN-T with an Emformer as transcriber, as ``torchaudio.models.emformer_rnnt_model`` does.

    ``transcribe`` takes utterances followed by ``right_context_length`` frames. ``transcribe_streaming`` takes
    segments of ``segment_length`` frames followed by ``right_context_length`` frames.

    Args:
        input_dim: channels of the features. encoding_dim: channels of both encodings. num_symbols: number of labels,
            the blank included.
        segment_length, right_context_length: in frames of features.
        time_reduction_input_dim: channels of a frame before ``time_reduction_stride`` of them are joined to one.
        transformer_*: arguments of :class:`fastasr.models.emformer.Emformer`; the left context counts frames after the
            reduction.
        symbol_embedding_dim: channels of a label's embedding and units of the LSTM layers. num_lstm_layers,
            lstm_layer_norm, lstm_layer_norm_epsilon, lstm_dropout: see
            :class:`fastasr.models.emformer_rnnt.Predictor`.
    """
    transcriber = EmformerEncoder(
        input_dim=input_dim,
        output_dim=encoding_dim,
        segment_length=segment_length,
        right_context_length=right_context_length,
        time_reduction_input_dim=time_reduction_input_dim,
        time_reduction_stride=time_reduction_stride,
        transformer_num_heads=transformer_num_heads,
        transformer_ffn_dim=transformer_ffn_dim,
        transformer_num_layers=transformer_num_layers,
        transformer_dropout=transformer_dropout,
        transformer_activation=transformer_activation,
        transformer_left_context_length=transformer_left_context_length,
        transformer_max_memory_size=transformer_max_memory_size,
        transformer_weight_init_scale_strategy=transformer_weight_init_scale_strategy,
        transformer_tanh_on_mem=transformer_tanh_on_mem,
    )
    predictor = Predictor(
        num_symbols,
        encoding_dim,
        symbol_embedding_dim=symbol_embedding_dim,
        num_lstm_layers=num_lstm_layers,
        lstm_hidden_dim=symbol_embedding_dim,
        lstm_layer_norm=lstm_layer_norm,
        lstm_layer_norm_epsilon=lstm_layer_norm_epsilon,
        lstm_dropout=lstm_dropout,
    )
    return RNNT(transcriber, predictor, Joiner(encoding_dim, num_symbols))


def emformer_rnnt_base(num_symbols: int) -> RNNT:
    """Returns ``torchaudio.models.emformer_rnnt_base``: 20 Emformer layers and three LSTM layers of 512 channels."""
    return emformer_rnnt_model(
        input_dim=80,
        encoding_dim=1024,
        num_symbols=num_symbols,
        segment_length=16,
        right_context_length=4,
        time_reduction_input_dim=128,
        time_reduction_stride=4,
        transformer_num_heads=8,
        transformer_ffn_dim=2048,
        transformer_num_layers=20,
        transformer_dropout=0.1,
        transformer_activation="gelu",
        transformer_left_context_length=30,
        transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise",
        transformer_tanh_on_mem=True,
        symbol_embedding_dim=512,
        num_lstm_layers=3,
        lstm_layer_norm=True,
        lstm_layer_norm_epsilon=1e-3,
        lstm_dropout=0.3,
    )
