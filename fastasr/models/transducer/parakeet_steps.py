# SPDX-License-Identifier: Apache-2.0
"""Greedy search of Parakeet's transducers as ``generate`` of transformers does it, with its peculiarities.

TDT moves by the index of the duration and has no limit of labels per frame, ended sequences go on until all have ended,
and the length limit counts blanks.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastasr.models.transducer.label_looping import TOKENS, Rules

if TYPE_CHECKING:
    from fastasr.models.transducer.label_looping import LabelLooping, Steps
    from fastasr.models.transducer.predictors import ParakeetPredictor

_STEPS_AT_ONCE = 128  # This many steps' logits are in memory at once, 4 MB for a sequence.


def generate_steps(
    predictor: "ParakeetPredictor",
    search: "LabelLooping",
    frames: Tensor,
    lengths: Tensor,
    first: Tensor,
    most_steps: int,
) -> "Steps":
    """Returns the Steps of a Parakeet's search behind the tokens ``first`` (batch, 1) in projected frames."""
    durations = len(predictor.durations)
    rules = Rules(
        blank=predictor.blank_id,
        durations=tuple(range(durations)),
        most_symbols=0 if durations else predictor.most_symbols,
        together=True,
    )
    state, counters = search.start(len(first), [rules.blank])
    counters[:, TOKENS:] = first
    return search.search(frames, lengths, rules, state, counters, most_steps)


@torch.no_grad()
def no_duration_wins(model: Any, frames: Tensor, first: Tensor, steps: "Steps") -> bool:
    """Says whether at none of the steps behind the tokens ``first`` (batch, 1) a duration's logit is larger than all of
    the tokens, so that the largest of all logits is the token's. ``model`` is transformers'; each step's logits are
    computed anew, all at once, which takes a small part of the search's time."""
    blank, tokens = steps.tokens == model.config.blank_token_id, model.config.vocab_size
    labels = torch.nn.utils.rnn.pad_sequence([t[~b] for t, b in zip(steps.tokens, blank, strict=True)], True)
    contexts = model.decoder(torch.cat((first, labels), 1), cache=None)
    before, at = (~blank).cumsum(1) - (~blank).long(), steps.moves.cumsum(1) - steps.moves
    at = at.clamp(max=frames.shape[1] - 1)
    rows = torch.arange(len(first), dtype=torch.int64, device=first.device).unsqueeze(1)
    for one in range(0, at.shape[1], _STEPS_AT_ONCE):
        part = slice(one, one + _STEPS_AT_ONCE)
        logits = model.joint(
            encoder_hidden_states=frames[rows, at[:, part]],
            decoder_hidden_states=contexts[rows, before[:, part]],
        )
        largest = (logits[..., :tokens].amax(-1), logits[..., tokens:].amax(-1))
        if not (largest[0] >= largest[1]).all():  # A NaN fails too.
            return False
    return True
