# SPDX-License-Identifier: Apache-2.0
"""A small AsrModel of the PyPI package ``zipformer``, a batch for it, and one training step."""

from pathlib import Path

from steps import moved, seeded, set_batch_count

from fastasr.asr.audio import features, recordings

VOCABULARY = 64
CONFIG = {
    "downsampling_factor": "1,2",
    "encoder_dim": "24,32",
    "num_encoder_layers": "1,1",
    "encoder_unmasked_dim": "24,24",
    "query_head_dim": "8",
    "pos_head_dim": "4",
    "value_head_dim": "6",
    "num_heads": "2,2",
    "feedforward_dim": "32,48",
    "cnn_module_kernel": "7,7",
    "pos_dim": 16,
    "chunk_size": "-1",
    "left_context_frames": "-1",
    "vocab_size": VOCABULARY,
    "decoder_dim": 32,
    "joiner_dim": 48,
}


def model(**changes):
    """Returns AsrModel with every parameter moved, in training mode."""
    from zipformer.modules.model import AsrModel

    seeded(0)
    return set_batch_count(moved(AsrModel(**{**CONFIG, **changes}), 0.05), 20000.0)


def batch(cache: Path):
    """Returns features and characters of prompts as tokens, or of a generated signal and random tokens where there are
    none.
    """
    speech = recordings.load(None, cache, 2.0, lambda text: None, count=3)
    x, lengths = features.batch(speech.utterances)
    tokens = []
    for index, clip in enumerate(speech.utterances):
        text = clip.text.lower()[: 12 + 3 * index] or "".join(
            chr(97 + (7 * i + index) % 26) for i in range(15)
        )
        tokens.append([1 + ord(c) % (VOCABULARY - 1) for c in text])
    return x, lengths, tokens


def step(asr, inputs, reduction="sum", **scales):
    """Returns (losses, gradients by parameter) of a step with its own seed."""
    seeded(1)
    asr.zero_grad()
    x, lengths, tokens = inputs
    simple, pruned, *_ = asr(x, lengths, [list(t) for t in tokens], reduction=reduction, **scales)
    (0.5 * simple + pruned).backward()
    gradients = {name: p.grad.clone() for name, p in asr.named_parameters() if p.grad is not None}
    return (simple.detach(), pruned.detach()), gradients
