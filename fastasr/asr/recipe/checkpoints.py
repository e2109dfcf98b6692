# SPDX-License-Identifier: Apache-2.0
"""Reads and writes checkpoints. A checkpoint is written to another file and renamed, so it is complete at any moment.

The entries ``model`` and ``model_avg`` are state dicts as in icefall's checkpoints.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastasr import files
from fastasr.asr.recipe.parallel import full, like

NAME = "last.pt"
NEEDED = ("model", "model_avg", "arguments", "units", "step", "features")


def save(path: Path | str, content: dict[str, Any]) -> None:
    """Writes ``content`` and replaces ``path`` at the end, so a killed process leaves the previous checkpoint. Raises
    OSError if there is no room for it."""
    with files.replacing(path) as unfinished:
        try:
            torch.save(content, unfinished)
        except RuntimeError as error:  # torch's writer does not say what the system said
            raise OSError(
                f"{path} cannot be written, is the disk full? {str(error).splitlines()[0]}"
            ) from None


def load(path: Path | str) -> dict[str, Any]:
    """Returns the content that ``save`` wrote. Raises ValueError for a missing, damaged or foreign file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its class depends on where torch's unpickler fails
        reason = next(iter(str(error).splitlines()), "it is empty")
        raise ValueError(f"the checkpoint {path} is damaged: {type(error).__name__}: {reason}") from None
    missing = [name for name in NEEDED if not isinstance(found, dict) or name not in found]
    if missing:
        raise ValueError(f"{path} is no checkpoint of this recipe: it lacks {', '.join(missing)}")
    return found


def model_state(model: torch.nn.Module, values: Iterable[Tensor] | None = None) -> dict[str, Tensor]:
    """Returns the state dict with unsharded tensors. ``values``, if given, replace the parameters in their order."""
    state = {name: full(tensor).detach() for name, tensor in model.state_dict().items()}
    if values is not None:
        for (name, _), value in zip(model.named_parameters(), values, strict=True):
            state[name] = full(value).detach()
    return state


def load_parameters(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Loads a state dict strictly into a model that may be sharded."""
    expected = model.state_dict()
    if set(expected) != set(state):
        raise ValueError(
            f"the checkpoint is of another model: {sorted(set(expected) ^ set(state))[:4]} differ"
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"the checkpoint is of another model: {name} is {tuple(state[name].shape)}, expected "
                    f"{tuple(tensor.shape)}"
                )
            tensor.copy_(like(state[name], tensor))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    return {
        "group": {name: value for name, value in group.items() if name != "params"},
        "state": [{k: full(v) for k, v in optimizer.state[p].items()} for p in group["params"]],
    }


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    group = optimizer.param_groups[0]
    if len(state["state"]) != len(group["params"]):
        raise ValueError("the checkpoint's optimizer is of another model")
    device = group["params"][0].device
    group.update({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in state["group"].items()})
    for p, values in zip(group["params"], state["state"], strict=True):
        optimizer.state[p] = {name: like(value, p) for name, value in values.items()}
