# SPDX-License-Identifier: Apache-2.0
"""The transducer: transcription, prediction and joint network, as ``torchaudio.models.RNNT``."""

import torch
from torch import Tensor, nn

from fastasr import rnnt
from fastasr.models.emformer_rnnt.predictor import State


class RNNT(nn.Module):
    """A transducer of a transcriber (``forward(input, lengths)``, ``infer(input, lengths, states)``), a predictor and a
    joiner. Methods, shapes and the state dict are torchaudio's; ``loss`` is ours."""

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
        """Logits of the whole lattice.

        Args:
            sources: (B, T, D), followed by their right context; source_lengths: (B,), their valid frames.
            targets: (B, U), labels; target_lengths: (B,).
            predictor_state: what the call before returned, or None.
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
        """The transducer loss, without logits in memory.

        Args:
            sources, source_lengths: as in ``forward``.
            targets: (B, U), labels without a blank in front; target_lengths: (B,).
            blank: the label of blank, from the end when negative; the predictor starts from it. torchaudio's recipes
                take the last.
            reduction: "mean" over the batch, "sum", or "none".
        Returns:
            A scalar, or (B,) for "none".
        Raises:
            ValueError: blank is no label.
        """
        linear = self.joiner.linear
        if not -linear.out_features <= blank < linear.out_features:
            raise ValueError(f"RNNT.loss: blank: expected a label below {linear.out_features}, got {blank}")
        blank %= linear.out_features
        encodings, lengths = self.transcriber(sources, source_lengths)
        starts = targets.new_full((targets.shape[0], 1), blank)
        predicted, _, _ = self.predictor(torch.cat((starts, targets), 1), target_lengths + 1)
        zeros = torch.zeros_like(lengths, dtype=torch.int64)
        boundary = torch.stack((zeros, zeros, target_lengths.to(zeros), lengths.to(zeros)), 1)
        return rnnt.joiner_loss(
            encodings,
            predicted.contiguous(),
            linear.weight,
            linear.bias,
            targets.to(torch.int64),
            blank,
            boundary,
            reduction=reduction,
            activation="relu" if isinstance(self.joiner.activation, nn.ReLU) else "tanh",
        )

    def transcribe(self, sources: Tensor, source_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodings (B, T', D) of whole utterances, followed by their right context, and their lengths."""
        return self.transcriber(sources, source_lengths)

    def transcribe_streaming(
        self, sources: Tensor, source_lengths: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, State]:
        """Encodings of the next segment of a stream, its lengths, and the transcriber's state."""
        return self.transcriber.infer(sources, source_lengths, state)

    def predict(
        self, targets: Tensor, target_lengths: Tensor, state: State | None
    ) -> tuple[Tensor, Tensor, State]:
        """Encodings (B, U, D) of labels (B, U), the lengths, and the predictor's state."""
        return self.predictor(input=targets, lengths=target_lengths, state=state)

    def join(
        self,
        source_encodings: Tensor,
        source_lengths: Tensor,
        target_encodings: Tensor,
        target_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, T, U, num_symbols), and both lengths."""
        return self.joiner(
            source_encodings=source_encodings,
            source_lengths=source_lengths,
            target_encodings=target_encodings,
            target_lengths=target_lengths,
        )
