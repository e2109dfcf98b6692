# SPDX-License-Identifier: Apache-2.0
"""ESPnet's MEGA decoder and fastasr's, tiny, with parameters far from their initial values."""

import contextlib

import pytest
import torch
from steps import moved, numbers, seeded

ARGUMENTS = {
    "vocab_size": 30,
    "block_size": 24,
    "linear_size": 40,
    "qk_size": 16,
    "v_size": 32,
    "num_heads": 3,
    "max_positions": 40,
    "num_blocks": 2,
}
DROPOUT = {
    "dropout_rate": 0.2,
    "embed_dropout_rate": 0.1,
    "att_dropout_rate": 0.3,
    "ema_dropout_rate": 0.25,
    "ffn_dropout_rate": 0.15,
}


def upstream(**arguments):
    from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder

    seeded(0)
    # fresh ones are ill-conditioned, because biases are zero, and so is the padding's embedding
    return moved(MEGADecoder(**{**ARGUMENTS, **arguments}), 0.3, 1)


def ours(theirs, **arguments):
    from fastasr.models.mega import MEGADecoder

    model = MEGADecoder(**{**ARGUMENTS, **arguments}).to(theirs.embed.weight.dtype)
    model.load_state_dict(theirs.state_dict())
    return model.train(theirs.training)


def pair(**arguments):
    """Returns fastasr's decoder and ESPnet's, with the same parameters."""
    theirs = upstream(**arguments)
    return ours(theirs, **arguments), theirs


def labels(batch=3, length=12):
    """Returns sequences that begin with blank, which is also the padding behind the shorter ones."""
    generator = numbers(2)
    result = torch.randint(1, 30, (batch, length), generator=generator)
    result[:, 0] = 0
    for row in range(1, batch):
        result[row, length - 2 * row :] = 0
    return result


@contextlib.contextmanager
def in_fp64():
    """Runs the convolution and the softmax in float64, which ESPnet's code computes in float32 whatever
    the model is.
    """
    softmax = torch.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda self: self.double())
        patch.setattr(torch, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
