# SPDX-License-Identifier: Apache-2.0
"""``generate`` of Parakeet's transducers after the encoder, by :mod:`fastasr.models.transducer.parakeet_steps`."""

import torch

from fastasr.asr.decoding.results import frames_of
from fastasr.models.transducer.looping_transducers import Parakeet, Unserved
from fastasr.models.transducer.parakeet_steps import steps_of_generate


@torch.inference_mode()
def parakeet_generate(model, encoder_out, encoder_out_lens=None, max_length=None):
    """Returns ``sequences`` and ``durations`` (batch, 1 + steps), blanks included, as transformers' ``generate`` does.

    Args:
        model: a FastConformerRNNT or FastConformerTDT, or transformers' ParakeetForRNNT or ParakeetForTDT.
        encoder_out: (batch, frames, channels), the encoder's output; encoder_out_lens: (batch,), None: all frames.
        max_length: the most columns; None: the model's ``max_symbols_per_step`` per frame.

    Raises:
        TypeError: the model computes another function, or is in training mode.
    """
    transducer = Parakeet(model)
    try:
        looping = transducer.looping()
    except Unserved as reason:
        name = type(model).__name__
        raise TypeError(f"parakeet_generate: this {name} cannot be searched: {reason}") from None
    lengths = torch.tensor(
        frames_of("parakeet_generate", encoder_out, encoder_out_lens, len(encoder_out)),
        dtype=torch.int64,
        device="cpu",
    )
    first = torch.full(
        (len(encoder_out), 1), transducer.blank_id, device=encoder_out.device, dtype=torch.int64
    )
    limit = transducer.most_symbols * encoder_out.shape[1] if max_length is None else max_length
    frames = transducer.projected(encoder_out)
    steps = steps_of_generate(transducer, looping, frames, lengths, first, max(limit - 1, 0))
    sequences = torch.cat((first, steps.tokens), 1)
    return sequences, torch.cat((torch.zeros_like(first), steps.moves), 1)
