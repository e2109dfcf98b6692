# SPDX-License-Identifier: Apache-2.0
"""Beam search of torchaudio's RNN-T, with its hypotheses and scores: ``torchaudio.models.RNNTBeamSearch``.

Per frame, hypotheses emit labels until none of the extended ones can beat the ``beam_width`` best that have ended the
frame with a blank; those with the same labels are one, whose probability is the sum. The hypotheses of a frame go
through the networks together. The last label is the blank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (labels, with the blank they start from; the predictor's output (1, D) and state; log-probability)
Hypothesis = tuple[list[int], Tensor, list[list[Tensor]], float]


def _per_label(hypothesis: Hypothesis) -> float:
    return hypothesis[3] / (len(hypothesis[0]) + 1)


class RNNTBeamSearch(torch.nn.Module):
    """Beam search of ``model``, an RNNT of ours or of torchaudio's.

    Args:
        blank: the label that hypotheses start from. temperature: divides the logits.
        hypo_sort_key: ranks the hypotheses of a frame; None: log-probability per label.
        step_max_tokens: labels that a frame may emit.
    """

    def __init__(
        self,
        model: Any,
        blank: int,
        temperature: float = 1.0,
        hypo_sort_key: Callable[[Hypothesis], float] | None = None,
        step_max_tokens: int = 100,
    ) -> None:
        super().__init__()
        self.model = model
        self.blank = blank
        self.temperature = temperature
        self.hypo_sort_key = _per_label if hypo_sort_key is None else hypo_sort_key
        self.step_max_tokens = step_max_tokens

    @torch.no_grad()
    def forward(self, input: Tensor, length: Tensor, beam_width: int) -> list[Hypothesis]:
        """Returns the ``beam_width`` best hypotheses of an utterance, best first.

        Args:
            input: (T, D) or (1, T, D), frames followed by their right context; length: () or (1,).
        Raises:
            ValueError: input or length has another shape.
        """
        encodings, _ = self.model.transcribe(*_one_utterance(input, length))
        return self._search(encodings, None, beam_width)

    @torch.no_grad()
    def infer(
        self,
        input: Tensor,
        length: Tensor,
        beam_width: int,
        state: list[list[Tensor]] | None = None,
        hypothesis: list[Hypothesis] | None = None,
    ) -> tuple[list[Hypothesis], list[list[Tensor]]]:
        """Returns the best hypotheses after the next segment of a stream, and the transcriber's state.

        Args:
            input, length: frames of the segment and their number, as for ``forward``.
            state, hypothesis: the state and hypotheses that the previous call returned.
        Raises:
            ValueError: input or length has another shape.
        """
        encodings, _, state = self.model.transcribe_streaming(*_one_utterance(input, length), state)
        return self._search(encodings, hypothesis, beam_width), state

    def _search(
        self, encodings: Tensor, hypotheses: list[Hypothesis] | None, beam_width: int
    ) -> list[Hypothesis]:
        one = torch.ones(1, dtype=torch.int64, device=encodings.device)
        if hypotheses is None:
            predicted, _, state = self.model.predict(one.new_full((1, 1), self.blank), one, None)
            hypotheses = [([self.blank], predicted[0], state, 0.0)]
        for t in range(encodings.shape[1]):
            hypotheses = self._frame(encodings[:, t : t + 1], hypotheses, beam_width)
        return hypotheses

    def _frame(self, encoding: Tensor, hypotheses: list[Hypothesis], beam_width: int) -> list[Hypothesis]:
        ended: dict[tuple[int, ...], Hypothesis] = {}  # ended by a blank, in rising order of score
        for emitted in range(self.step_max_tokens + 1):
            scores = self._log_probs(encoding, hypotheses)
            scores += torch.tensor([h[3] for h in hypotheses], dtype=torch.float32, device="cpu").unsqueeze(1)
            for hypothesis, score in zip(hypotheses, scores[:, -1], strict=True):
                labels, predicted, state, _ = hypothesis
                before = ended.pop(tuple(labels), None)
                if before is not None:
                    score = torch.tensor(before[3], dtype=torch.float32, device="cpu").logaddexp(score)
                ended[tuple(labels)] = (labels, predicted, state, score.item())
            order = (
                torch.tensor([h[3] for h in ended.values()], dtype=torch.float32, device="cpu")
                .argsort()
                .tolist()
            )
            found = list(ended.values())
            ended = {tuple(found[i][0]): found[i] for i in order}
            if emitted == self.step_max_tokens:
                break
            bar = -float("inf") if len(ended) < beam_width else found[order[-beam_width]][3]
            hypotheses = self._extended(hypotheses, scores[:, :-1], bar, beam_width)
            if not hypotheses:
                break
        found = list(ended.values())
        ranks = torch.tensor([self.hypo_sort_key(h) for h in found], dtype=torch.float32, device="cpu")
        return [found[i] for i in ranks.topk(min(beam_width, len(found))).indices.tolist()]

    def _log_probs(self, encoding: Tensor, hypotheses: list[Hypothesis]) -> Tensor:
        """Returns log-probabilities (hypotheses, labels) on the host."""
        predicted = torch.stack([h[1] for h in hypotheses])
        one = torch.ones(1, dtype=torch.int64, device=encoding.device)
        logits, _, _ = self.model.join(encoding, one, predicted, one.expand(len(hypotheses)))
        return (logits[:, 0, 0] / self.temperature).log_softmax(-1).cpu()

    def _extended(
        self, hypotheses: list[Hypothesis], scores: Tensor, bar: float, beam_width: int
    ) -> list[Hypothesis]:
        """Returns the best ``beam_width`` hypotheses with one more label whose scores are above ``bar``."""
        best, places = scores.flatten().topk(min(beam_width, scores.numel()))
        chosen = [
            (hypotheses[place // scores.shape[1]], place % scores.shape[1], score)
            for score, place in zip(best.tolist(), places.tolist(), strict=True)
            if score > bar
        ]
        if not chosen:
            return []
        device = chosen[0][0][1].device
        states = [
            [torch.cat(tensors) for tensors in zip(*layers, strict=True)]
            for layers in zip(*(h[2] for h, _, _ in chosen), strict=True)
        ]
        labels = torch.tensor([[label] for _, label, _ in chosen], device=device, dtype=torch.int64)
        lengths = torch.ones(len(chosen), dtype=torch.int64, device=device)
        predicted, _, states = self.model.predict(labels, lengths, states)
        return [
            (
                hypothesis[0] + [label],
                predicted[i],
                [[t[i : i + 1] for t in layer] for layer in states],
                score,
            )
            for i, (hypothesis, label, score) in enumerate(chosen)
        ]


def _one_utterance(input: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    if input.dim() != 2 and not (input.dim() == 3 and input.shape[0] == 1):
        raise ValueError(
            f"RNNTBeamSearch: input: expected shape (T, D) or (1, T, D), got {tuple(input.shape)}"
        )
    if length.numel() != 1 or length.dim() > 1:
        raise ValueError(f"RNNTBeamSearch: length: expected shape () or (1,), got {tuple(length.shape)}")
    return input if input.dim() == 3 else input.unsqueeze(0), length.reshape(1)
