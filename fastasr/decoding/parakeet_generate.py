# SPDX-License-Identifier: Apache-2.0
"""Greedy search of Parakeet's transducers as ``generate`` of transformers does it, with what is peculiar to it.

TDT moves by the index of the duration and has no limit of labels per frame, ended sequences go on until all have ended,
and the length limit counts blanks.
"""

import torch

from fastasr.decoding.label_looping import TOKENS, Rules
from fastasr.decoding.looping_transducers import Parakeet, Unserved
from fastasr.decoding.results import frames_of

_STEPS_AT_ONCE = 128  # whose logits are in memory at once, 4 MB for a sequence of Parakeet's


def steps_of_generate(transducer, looping, frames, lengths, first, most_steps):
    """Returns the Steps of a Parakeet, whose search is ``looping``, behind the tokens ``first`` (batch, 1) in projected
    frames."""
    durations = len(transducer.durations)
    rules = Rules(
        blank=transducer.blank_id,
        durations=tuple(range(durations)),
        most_symbols=0 if durations else transducer.most_symbols,
        together=True,
    )
    state, counters = looping.start(len(first), [rules.blank])
    counters[:, TOKENS:] = first
    return looping.search(frames, lengths, rules, state, counters, most_steps)


@torch.no_grad()
def no_duration_wins(model, frames, first, steps):
    """Says whether at none of the steps behind the tokens ``first`` (batch, 1) a duration's logit is larger than all of
    the tokens, so that the largest of all logits is the token's. ``model`` is transformers'; each step's logits are
    computed anew, all at once, which takes a small part of the search's time."""
    blank, tokens = steps.tokens == model.config.blank_token_id, model.config.vocab_size
    labels = torch.nn.utils.rnn.pad_sequence([t[~b] for t, b in zip(steps.tokens, blank, strict=True)], True)
    contexts = model.decoder(torch.cat((first, labels), 1), cache=None)
    before, at = (~blank).cumsum(1) - (~blank).long(), steps.moves.cumsum(1) - steps.moves
    at = at.clamp(max=frames.shape[1] - 1)
    rows = torch.arange(len(first)).unsqueeze(1)
    for one in range(0, at.shape[1], _STEPS_AT_ONCE):
        part = slice(one, one + _STEPS_AT_ONCE)
        logits = model.joint(
            encoder_hidden_states=frames[rows, at[:, part]],
            decoder_hidden_states=contexts[rows, before[:, part]],
        )
        largest = (logits[..., :tokens].amax(-1), logits[..., tokens:].amax(-1))
        if not (largest[0] >= largest[1]).all():  # a NaN is not
            return False
    return True


@torch.inference_mode()
def parakeet_generate(model, encoder_out, encoder_out_lens=None, max_length=None):
    """Returns ``sequences`` and ``durations`` (batch, 1 + steps), blanks included, as transformers' ``generate`` does.

    Args:
        model: a FastConformerRNNT or FastConformerTDT, or transformers' ParakeetForRNNT or ParakeetForTDT.
        encoder_out: (batch, frames, channels), the encoder's output; encoder_out_lens: (batch,), None: all frames.
        max_length: the most columns; None: the model's ``max_symbols_per_step`` per frame.

    Raises:
        TypeError: the model computes something else, or is in training mode.
    """
    transducer = Parakeet(model)
    try:
        looping = transducer.looping()
    except Unserved as reason:
        name = type(model).__name__
        raise TypeError(f"parakeet_generate: this {name} cannot be searched: {reason}") from None
    lengths = torch.tensor(
        frames_of("parakeet_generate", encoder_out, encoder_out_lens, len(encoder_out)), dtype=torch.int64
    )
    first = torch.full((len(encoder_out), 1), transducer.blank_id, device=encoder_out.device)
    limit = transducer.most_symbols * encoder_out.shape[1] if max_length is None else max_length
    frames = transducer.projected(encoder_out)
    steps = steps_of_generate(transducer, looping, frames, lengths, first, max(limit - 1, 0))
    sequences = torch.cat((first, steps.tokens), 1)
    return sequences, torch.cat((torch.zeros_like(first), steps.moves), 1)
