# SPDX-License-Identifier: Apache-2.0
"""One decoding step of all blocks at once."""


def step(decoder, labels, states):
    """``decoder.inference(labels, states)`` for labels (B, 1), or None where no kernel does the whole step."""


def stack(states):
    """Histories (T_i, H) as one (B, max T, H), zeros in front of the shorter; None where no kernel does it."""
