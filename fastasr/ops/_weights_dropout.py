# SPDX-License-Identifier: Apache-2.0
"""Dropout without a mask in memory: whether an attention weight is kept is a hash of a seed and its place.

The kernels compute the same hash (csrc/cpu/attention/weights_dropout.h, kernels/_weights_dropout.py), forward and again
backward, so all backends keep the same weights for one seed. A weight has the row n = (b H + h) T + i and the key j;
elsewhere n and j are an element's row and column. All arithmetic is on unsigned 32-bit words; s0 and s1 are the lower
and the upper word of the seed:

    mix(x) = x ^ x >> 16 after x <- (x ^ x >> 16) M1, x <- (x ^ x >> 15) M2
    a = mix(mix(n ^ s0) ^ s1)                c = mix(mix(n ^ ~s1) + s0 + G)
    z = a + j G,  z <- (z ^ z >> 16) M1,  z <- (z ^ z >> 15 ^ c) M2
    the weight is kept where z >> 1 >= floor(2^31 p)

G = 0x9e3779b9 is the golden ratio; M1 = 0x7feb352d, M2 = 0x846ca68b and the shifts are Wellons's "lowbias32". For one
seed both a and c are bijections of n: no two rows of a call share either word.
"""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
STEP, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


def draw_seed(device: torch.device) -> Tensor:
    """Draws a seed (1,) from torch's generator of the device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device, dtype=torch.int64)


def kept(seed: Tensor, p: float, *shape: int) -> Tensor:
    """Returns bool of this shape, (B, H, queries, keys) of weights: True where an element is kept."""
    low, high = seed & _WORD, seed >> 32 & _WORD
    n = torch.arange(math.prod(shape[:-1]), device=seed.device, dtype=torch.int64) & _WORD
    first = _mixed(_mixed(n ^ low) ^ high)
    second = _mixed(_mixed(n ^ high ^ _WORD) + low + STEP & _WORD)
    z = first[:, None] + torch.arange(shape[-1], device=seed.device, dtype=torch.int64) * STEP & _WORD
    z = (z ^ z >> 16) * FIRST & _WORD
    z = (z ^ z >> 15 ^ second[:, None]) * SECOND & _WORD
    return (z >> 1 >= int(p * 2**31)).reshape(shape)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ x >> 16) * FIRST & _WORD
    x = (x ^ x >> 15) * SECOND & _WORD
    return x ^ x >> 16
