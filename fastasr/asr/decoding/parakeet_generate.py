# SPDX-License-Identifier: Apache-2.0
"""``generate`` of Parakeet's transducers after the encoder, by :mod:`fastasr.models.transducer.parakeet_steps`."""

from typing import Any

import torch
from torch import Tensor

from fastasr.asr.decoding.results import frames_of
from fastasr.models.transducer.parakeet_steps import generate_steps
from fastasr.models.transducer.predictors import ParakeetPredictor


@torch.inference_mode()
def parakeet_generate(
    model: Any, encoder_out: Tensor, encoder_out_lens: Tensor | None = None, max_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns ``sequences`` and ``durations`` (batch, 1 + steps), blanks included, as transformers' ``generate`` does.

    Args:
        model: a FastConformerRNNT or FastConformerTDT, or transformers' ParakeetForRNNT or ParakeetForTDT.
        encoder_out: (batch, frames, channels), the encoder's output; encoder_out_lens: (batch,), None: all frames.
        max_length: the most columns; None: the model's ``max_symbols_per_step`` per frame.

    Raises:
        TypeError: the model computes another function, or is in training mode.
    """
    predictor = ParakeetPredictor(model)
    search = predictor.require_search("parakeet_generate")
    lengths = torch.tensor(
        frames_of("parakeet_generate", encoder_out, encoder_out_lens, len(encoder_out)),
        dtype=torch.int64,
        device="cpu",
    )
    first = torch.full(
        (len(encoder_out), 1), predictor.blank_id, device=encoder_out.device, dtype=torch.int64
    )
    limit = predictor.most_symbols * encoder_out.shape[1] if max_length is None else max_length
    frames = predictor.project(encoder_out)
    steps = generate_steps(predictor, search, frames, lengths, first, max(limit - 1, 0))
    sequences = torch.cat((first, steps.tokens), 1)
    return sequences, torch.cat((torch.zeros_like(first), steps.moves), 1)
