# SPDX-License-Identifier: Apache-2.0
"""Groups utterances into batches of a given duration. The seed and the epoch decide the order."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from fastasr.asr.decoding.chunks import SILENCE

BUCKETS = 12  # groups of utterances of similar length; the order is random within a group


def epoch_batches(seconds: Sequence[float], max_duration: float, seed: int, epoch: int) -> list[list[int]]:
    """Returns the batches as lists of indices into ``seconds``. A batch lasts at most ``max_duration`` seconds, padding
    included, or has one utterance.
    """
    draw = random.Random(f"{seed} {epoch}")
    by_length = sorted(range(len(seconds)), key=lambda i: (seconds[i], i))
    size = -(-len(by_length) // BUCKETS) or 1
    buckets = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    batches = []
    for bucket in buckets:
        draw.shuffle(bucket)
        batch: list[int] = []
        for index in bucket:
            longest = max([seconds[index], *(seconds[i] for i in batch)])
            if batch and longest * (len(batch) + 1) > max_duration:
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
    draw.shuffle(batches)
    return batches


def collate(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the features (batch, longest, bins), padded with silence, and their lengths."""
    lengths = torch.tensor([len(f) for f in features], dtype=torch.int64, device="cpu")
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=SILENCE), lengths


def spec_augment(
    x: Tensor,
    lengths: Tensor,
    draw: random.Random,
    time_masks: int = 2,
    frequency_masks: int = 2,
    widest_time: float = 0.12,
    widest_frequency: float = 0.2,
) -> Tensor:
    """Applies SpecAugment without time warp in place: spans of time and of channels get the sequence's mean."""
    for sequence, length in zip(x, lengths.tolist(), strict=True):
        mean = sequence[:length].mean()
        for _ in range(frequency_masks):
            width = draw.randint(0, round(widest_frequency * x.shape[2]))
            first = draw.randint(0, x.shape[2] - width)
            sequence[:length, first : first + width] = mean
        for _ in range(time_masks):
            width = draw.randint(0, round(widest_time * length))
            first = draw.randint(0, length - width)
            sequence[first : first + width] = mean
    return x
