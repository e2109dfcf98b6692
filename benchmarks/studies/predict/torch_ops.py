# SPDX-License-Identifier: Apache-2.0
"""The predicted time of torch's own operations: those between our kernels, and those of a formula in their place.

At best a formula takes the time of torch.compile's best code: operations between two products are one kernel that reads
and writes each tensor once at the speed of a copy, and products run at a share of the peak. In eager each operation
reads and writes its tensors, which is still optimistic: few operations are more than one kernel here.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import prod

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastasr.benchmarks.studies.predict.cards import Card

START = 1.5  # µs from the end of a kernel to the work of the next one's first programs
# Shares of the peak, which products reach at best and in eager. A depthwise convolution's are of float32 multiply-adds.
# In eager and bfloat16, one that is channels last is cuDNN's: reported as 1.2 times as fast as torch's own kernels, and
# 3.9 at best (pytorch/pytorch#91735). Any other is torch's own, with about 15 or more instructions for a multiply-add:
# this model gives it at most 14 % of the peak.
SHARES = {
    "product": (0.7, 0.7),
    "attention": (0.5, 0.5),  # torch's fused attention with an additive mask
    "depthwise": (0.5, 0.25),
    "own depthwise": (0.5, 0.15),
}
FREE = ("empty", "new_empty", "promote_types", "aminmax", "_local_scalar_dense", "detach", "lift_fresh")
SCANS = ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "topk", "_fft")


@dataclass
class Operation:
    """One operation. ``inputs`` and ``outputs`` are bytes by storage; ``rate`` says at which rate it multiplies.

    ``again`` are the bytes that each of its kernels but the first reads once more.
    """

    name: str
    inputs: dict[int, int]
    outputs: dict[int, int]
    flops: int
    rate: str | None  # of SHARES, "scan", or None for what can be fused
    kernels: int = 1
    again: int = 0

    def microseconds(self, card: Card, eager: bool = False) -> float:
        """Returns the time of the operation alone."""
        bytes_ = sum(self.inputs.values()) + sum(self.outputs.values()) + (self.kernels - 1) * self.again
        products = self.flops / self._rate(card, eager) / 1e6 if self.flops else 0.0
        return self.kernels * START + max(bytes_ / card.memory / 1e3, products)

    def _rate(self, card: Card, eager: bool) -> float:
        vector = card.processors * card.ghz / 1e3 * 256 / card.fma  # TFLOP/s of float32
        return SHARES[self.rate][eager] * (vector if "depthwise" in self.rate else card.peak)


class Recorder(TorchDispatchMode):
    """Lists the operations that read or write memory inside the ``with`` block."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.kept: list[torch.Tensor] = []  # so that no storage is named twice

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten.mm.dtype:  # the CPU has none, and nobody reads the numbers
            a, b, dtype = arguments
            result = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
        else:
            result = function(*arguments, **(options or {}))
        name = function._schema.name.removeprefix("aten::")
        given = [t for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        view = not function._schema.is_mutable and {storage_of(t) for t in made} <= {
            storage_of(t) for t in given
        }
        if view or name.startswith(FREE):
            return result
        self.kept += given + made
        rate = self._rate(name, given)
        count = flop_registry.get(function.overloadpacket) if rate else None
        flops = count(*arguments, **(options or {}), out_val=result) if count else 0
        if rate == "attention" and not flops:
            q, _, v = given[:3]
            flops = 2 * prod(q.shape[:-1]) * v.shape[-2] * (q.shape[-1] + v.shape[-1])
        if rate in ("depthwise", "own depthwise"):  # the channels of a group are multiplied alone
            backward = "backward" in name
            weight, rows = (given[2], given[0]) if backward else (given[1], made[0])
            flops = (4 if backward else 2) * rows.numel() * prod(weight.shape[1:])
        # a gradient each, for which the outputs' is read again; those of weight and bias of a norm are one kernel
        kernels = {"convolution_backward": len(made), "native_layer_norm_backward": min(len(made), 2)}
        again = given[0].nbytes if given else 0
        self.operations.append(
            Operation(name, _bytes(given), _bytes(made), flops, rate, kernels.get(name, 1), again)
        )
        return result

    @staticmethod
    def _rate(name: str, given: list[torch.Tensor]) -> str | None:
        if "scaled_dot_product" in name:
            return "attention"
        if "convolution" in name:
            weight = next(t for t in reversed(given) if t.dim() == given[0].dim())
            if weight.shape[1] > 1 or given[0].shape[1] == 1:
                return "product"
            last = given[0].dim() == 4 and given[0].is_contiguous(memory_format=torch.channels_last)
            return "depthwise" if last else "own depthwise"
        if name.startswith(SCANS):
            return "scan"
        return "product" if name.split("_")[0] in ("mm", "bmm", "addmm", "baddbmm") else None


def storage_of(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


def _bytes(tensors: list[torch.Tensor]) -> dict[int, int]:
    found: dict[int, int] = defaultdict(int)
    for t in tensors:
        bytes_ = min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
        found[storage_of(t)] = max(found[storage_of(t)], bytes_)
    return found


def compiled(operations: list[Operation], results: set[int], card: Card) -> float:
    """Returns the microseconds of the operations if what lies between products is one kernel for each depth."""
    depth: dict[int, int] = defaultdict(int)  # products before a tensor, by storage
    levels: dict[int, list[Operation]] = defaultdict(list)
    total = 0.0
    for operation in operations:
        here = max((depth[name] for name in operation.inputs), default=0)
        if operation.rate is None:
            levels[here].append(operation)
        else:
            total += operation.microseconds(card)
        for name in operation.outputs:
            depth[name] = max(depth[name], here + (operation.rate is not None))
    outside = {name for o in operations if o.rate for name in o.inputs} | results
    readers: dict[int, set[int]] = defaultdict(set)
    for level, fused in levels.items():
        for name in (name for o in fused for name in o.inputs):
            readers[name].add(level)
    for level, fused in levels.items():
        made: dict[int, int] = {}
        read: dict[int, int] = {}
        for o in fused:
            read |= {name: size for name, size in o.inputs.items() if name not in made}
            made |= o.outputs
        written = {name: size for name, size in made.items() if name in outside or readers[name] - {level}}
        total += START + (sum(read.values()) + sum(written.values())) / card.memory / 1e3
    return total
