# SPDX-License-Identifier: Apache-2.0
"""Utterances in batches of a total duration, in an order that a seed and the epoch decide."""

import random

import torch

from fastasr.decoding.chunks import SILENCE

BUCKETS = 12  # of similar length, within which the order is drawn


def epoch_batches(seconds, max_duration, seed, epoch):
    """Lists of indices into ``seconds``: each batch lasts ``max_duration`` seconds at most, padding included, or is one
    utterance.
    """
    draw = random.Random(f"{seed} {epoch}")
    by_length = sorted(range(len(seconds)), key=lambda i: (seconds[i], i))
    size = -(-len(by_length) // BUCKETS) or 1
    buckets = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    batches = []
    for bucket in buckets:
        draw.shuffle(bucket)
        batch = []
        for index in bucket:
            longest = max([seconds[index], *(seconds[i] for i in batch)])
            if batch and longest * (len(batch) + 1) > max_duration:
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
    draw.shuffle(batches)
    return batches


def collate(features):
    """(batch, longest, bins), padded with silence, and lengths."""
    lengths = torch.tensor([len(f) for f in features])
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=SILENCE), lengths


def spec_augment(x, lengths, draw, time_masks=2, frequency_masks=2, widest_time=0.12, widest_frequency=0.2):
    """SpecAugment without time warp: stretches of time and of channels get the sequence's mean. In place."""
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
