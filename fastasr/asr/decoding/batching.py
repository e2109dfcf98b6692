# SPDX-License-Identifier: Apache-2.0
"""Joins the states of several streams into that of one batch, and splits it again. A stream can therefore join or leave
a search between any two calls.

Each field of a state is a list or a tensor with an entry for each stream.
"""

from dataclasses import fields
from typing import Any

import torch


def join_states(states: Any) -> Any:
    """Returns the state of one batch with the streams of ``states`` in their order. ``split_state`` undoes it."""
    if not states:
        raise ValueError("join_states: expected at least one state, got none")
    kind = type(states[0])
    if any(type(state) is not kind for state in states):
        found = sorted({type(state).__name__ for state in states})
        raise ValueError(f"join_states: states must be of one search, got {', '.join(found)}")
    joined: dict[str, Any] = {}
    for field in fields(kind):
        parts = [getattr(state, field.name) for state in states]
        if isinstance(parts[0], torch.Tensor):
            joined[field.name] = torch.cat(parts)
        else:
            joined[field.name] = [entry for part in parts for entry in part]
    return kind(**joined)


def split_state(state: Any) -> list:
    """Returns one state per stream, each for a batch of one."""
    parts = [list(_entries(getattr(state, field.name))) for field in fields(state)]
    names = [field.name for field in fields(state)]
    return [type(state)(**dict(zip(names, row, strict=True))) for row in zip(*parts, strict=True)]


def _entries(value: Any) -> Any:
    return value.split(1) if isinstance(value, torch.Tensor) else ([entry] for entry in value)
