# SPDX-License-Identifier: Apache-2.0
"""Trains in one process or in several, which ``torchrun`` starts and DDP or FSDP2 joins.

Every process knows the whole batch and takes its share of it. Losses are divided by the whole batch's frames, so the
gradients equal those of a single process.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass
class World:
    """The position of this process among all processes of the run."""

    rank: int = 0
    size: int = 1
    kind: str = "ddp"  # or "fsdp"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(kind: str, device: torch.device) -> World:
    """Returns the World that ``torchrun`` has set up, or that of a single process."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(device=device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), kind, device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: Any, world: World) -> Any:
    """Returns the model to call in training. FSDP2 changes ``model`` itself."""
    if world.size == 1:
        return model
    if world.kind == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    scalars = {p for p in model.parameters() if p.ndim == 0}  # FSDP2 cannot shard scalars
    encoder = model.encoder
    for stack in encoder.emformer_layers if hasattr(encoder, "emformer_layers") else encoder.encoders:
        fully_shard(stack, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    return model


def average_ignored_gradients(model: torch.nn.Module, world: World) -> None:
    """Averages the gradients of the parameters that FSDP2 does not shard, since FSDP2 leaves these out."""
    if world.size == 1 or world.kind != "fsdp":
        return
    grads = [p.grad for p in model.parameters() if not isinstance(p, DTensor) and p.grad is not None]
    if grads:
        joined = torch.stack(grads)
        dist.all_reduce(joined)
        for grad, value in zip(grads, (joined / world.size).unbind(), strict=True):
            grad.copy_(value)


def total(values: Sequence[float], world: World) -> list[float]:
    """Returns the sums of a list of numbers over all processes."""
    if world.size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def local(x: Tensor) -> Tensor:
    """Returns this process's shard of a tensor that may be sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x: Tensor) -> Tensor:
    """Returns the whole of a tensor that may be sharded. All processes must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """Shards the whole tensor x as ``parameter`` is sharded."""
    x = x.to(parameter.device)
    if isinstance(parameter, DTensor) and x.ndim:
        return distribute_tensor(x, parameter.device_mesh, parameter.placements)
    return x.clone()
