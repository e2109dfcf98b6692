# SPDX-License-Identifier: Apache-2.0
"""Groups utterances into batches of a given duration. The seed and the epoch decide the order."""

import bisect
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastasr.asr.decoding.chunks import SILENCE

GROUPS = 12  # of utterances of similar length; the order is random within a group
BUCKETS = 24  # With shapes="buckets" an epoch has at most one shape more.
CANDIDATES = 512  # quantiles of the lengths among which the edges of buckets are sought


class Batch(NamedTuple):
    """The utterances of a batch, and the length to which it is padded, in the unit of the utterances' lengths."""

    indices: list[int]
    length: float


def epoch_batches(
    seconds: Sequence[float],
    max_duration: float,
    seed: int,
    epoch: int,
    shapes: str = "any",
    buckets: int = BUCKETS,
) -> list[Batch]:
    """Returns the batches of an epoch, with indices into ``seconds``; every utterance is in one of them. A batch lasts
    at most ``max_duration`` seconds, padding included, or has one utterance. Both may be in another unit, as frames.

    shapes: "any", or "buckets" for recorded encoders. Then a batch is as long as the upper edge of its bucket
        (:func:`edges`), and each of a bucket's batches has as many utterances as ``max_duration`` allows. What is left
        of a bucket goes into the next longer one, so only the last batch of the longest bucket may be smaller, and it
        has the same shape in every epoch: all epochs of the same utterances have the same ``buckets`` + 1 shapes, or
        fewer.
    """
    if shapes not in ("any", "buckets"):
        raise ValueError(f'epoch_batches: shapes: expected "any" or "buckets", got {shapes!r}')
    draw = random.Random(f"{seed} {epoch}")
    by_length = sorted(range(len(seconds)), key=lambda i: (seconds[i], i))
    if shapes == "any":
        size = -(-len(by_length) // GROUPS) or 1
        groups = (by_length[i : i + size] for i in range(0, len(by_length), size))
        found = [batch for group in groups for batch in _filled(group, seconds, max_duration, draw)]
    else:
        found = []
        left: list[int] = []
        for edge in edges(seconds, buckets):
            end = bisect.bisect_right(by_length, edge, key=lambda i: seconds[i])
            bucket, by_length = by_length[:end], by_length[end:]
            draw.shuffle(bucket)
            bucket, size = left + bucket, int(max_duration // edge) or 1
            whole = len(bucket) // size * size
            found += [Batch(bucket[i : i + size], edge) for i in range(0, whole, size)]
            left = bucket[whole:]
        if left:
            found.append(Batch(left, edge))
    draw.shuffle(found)
    return found


def _filled(
    group: list[int], seconds: Sequence[float], max_duration: float, draw: random.Random
) -> Iterator[Batch]:
    """Yields batches of a group's utterances in random order."""
    draw.shuffle(group)
    batch: list[int] = []
    longest = 0.0
    for index in group:
        with_it = max(longest, seconds[index])
        if batch and with_it * (len(batch) + 1) > max_duration:
            yield Batch(batch, longest)
            batch, with_it = [], seconds[index]
        batch.append(index)
        longest = with_it
    yield Batch(batch, longest)


def edges(seconds: Sequence[float], buckets: int = BUCKETS) -> list[float]:
    """Returns the upper edges of at most so many buckets, in rising order, for which the padding is least. Each edge is
    one of the lengths, and of more than ``CANDIDATES`` utterances one of their quantiles.
    """
    if buckets < 1:
        raise ValueError(f"edges: buckets: expected a number of at least 1, got {buckets}")
    ordered, count = sorted(seconds), min(len(seconds), CANDIDATES)
    if not ordered:
        return []
    ends = torch.arange(1, count + 1, dtype=torch.int64, device="cpu") * len(ordered) // count
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    lengths = torch.tensor(ordered, dtype=torch.float64, device="cpu")[ends - 1]
    # [i, j]: the padded seconds of a bucket with the utterances from candidate i to candidate j
    cost = ((ends - begins[:, None]) * lengths).masked_fill_(ends <= begins[:, None], float("inf"))
    least = cost[0]  # of all utterances up to candidate j
    before: list[Tensor] = []  # for each further bucket, the last candidate in the bucket before
    for _ in range(min(buckets, count) - 1):
        least, last = (cost[1:] + least[:-1, None]).min(0)
        before.append(last)
    chosen = [count - 1]
    for last in reversed(before):
        chosen.append(int(last[chosen[-1]]))
    return sorted({ordered[int(ends[i]) - 1] for i in chosen})


def collate(features: list[Tensor], least: int = 0) -> tuple[Tensor, Tensor]:
    """Returns features (batch, longest, bins), padded with silence to at least ``least`` frames, and their lengths."""
    lengths = torch.tensor([len(f) for f in features], dtype=torch.int64, device="cpu")
    x = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=SILENCE)
    more = max(0, least - x.shape[1])
    return torch.nn.functional.pad(x, (0, 0, 0, more), value=SILENCE), lengths


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
