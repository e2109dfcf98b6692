# SPDX-License-Identifier: Apache-2.0
"""Joins the streaming states of several utterances to those of one batch, and splits them again.

A list of states has six tensors per layer of the encoder (cached_key, cached_nonlin_attn, cached_val1, cached_val2,
cached_conv1, cached_conv2), then the front end's left padding, then the number of processed frames, (batch,).
"""

import torch
from torch import Tensor

from fastasr.models.zipformer.stack import STATES_PER_LAYER

BATCH_DIMENSIONS = (1, 1, 1, 1, 0, 0)  # batch dimension of each tensor of a layer


def batch_dimension(index: int, count: int) -> int:
    """Returns the batch dimension of state ``index`` in a list of ``count`` states."""
    return 0 if index >= count - 2 else BATCH_DIMENSIONS[index % STATES_PER_LAYER]


def _check(name: str, states: list[Tensor]) -> None:
    if len(states) < 2 or (len(states) - 2) % STATES_PER_LAYER:
        raise ValueError(
            f"{name}: expected {STATES_PER_LAYER} states per layer and 2 more, got {len(states)}"
        )


def stack_states(state_list: list[list[Tensor]]) -> list[Tensor]:
    """Joins a list of states, each with its own batch, to the states of one batch. ``unstack_states`` undoes it."""
    if not state_list:
        raise ValueError("stack_states: expected at least one list of states, got none")
    for states in state_list:
        _check("stack_states", states)
    count = len(state_list[0])
    if any(len(states) != count for states in state_list):
        raise ValueError(
            f"stack_states: states must be of one model, got lengths {list(map(len, state_list))}"
        )
    return [
        torch.cat([states[i] for states in state_list], dim=batch_dimension(i, count)) for i in range(count)
    ]


def unstack_states(batch_states: list[Tensor]) -> list[list[Tensor]]:
    """Returns one list of states per utterance, each with a batch of one. It undoes ``stack_states``."""
    _check("unstack_states", batch_states)
    count, batch = len(batch_states), batch_states[-1].shape[0]
    pieces = [state.chunk(batch, dim=batch_dimension(i, count)) for i, state in enumerate(batch_states)]
    return [[piece[n] for piece in pieces] for n in range(batch)]
