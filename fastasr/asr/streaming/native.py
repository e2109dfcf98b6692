# SPDX-License-Identifier: Apache-2.0
"""Runs a whole chunk of a streaming Zipformer in one native call on the CPU.

The weights are packed once, in the order in which a chunk reads them, and every stream's states live in one block of
memory that the call updates in place. See docs/kernels/zipformer_chunk.md.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastasr._transforms import is_transformed, refuse
from fastasr.asr.export.wrappers import PAD_LENGTH, width
from fastasr.asr.streaming.backend import Backend, check_states
from fastasr.asr.streaming.packing import pack
from fastasr.ops import _dispatch

_COUNTERS = 2  # frames processed; chunks behind the front of the stream's rings


class NativeBackend(Backend):
    """Runs ``model.encoder_embed`` and ``model.encoder``, which must be causal, in eval mode, in float32 on the CPU.

    weights: "fp32", "bf16", "fp16" or "int8" with a scale for each output, the storage of the encoder's matrices. In
    int8, and in bf16 where the processor multiplies it, the inputs of products are rounded as well, and the front end's
    products are among them. A call uses ``threads`` of torch's pool. A stream's bits depend neither on these nor on the
    other streams of a call.

    Raises ValueError for a model that cannot stream in chunks of this size, NotImplementedError for one that this
    backend does not support.
    """

    name = "native"

    def __init__(
        self,
        model: Any,
        chunk_size: int,
        left_context_frames: int,
        weights: str = "fp32",
        max_streams: int = 1,
        threads: int = 1,
    ) -> None:
        if reason := _dispatch.why_not_native():
            raise NotImplementedError(reason)
        for name, value in (("max_streams", max_streams), ("threads", threads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"NativeBackend: {name} must be an int of 1 or more, got {value!r}")
        self._ops, self._sizes = torch.ops.fastasr_cpu, None
        self._options = chunk_size, left_context_frames, weights
        encoder, stacks = self.load(model)
        _, _, per_stream, scratch = self._ops.zipformer_chunk_floats(self._sizes, 1)
        self._states = torch.zeros(max_streams, per_stream, dtype=torch.float32, device="cpu")
        self._counters = torch.zeros(max_streams, _COUNTERS, dtype=torch.int64, device="cpu")
        # memory, and for how many streams
        self._scratch, self._room = torch.zeros(scratch, dtype=torch.float32, device="cpu"), 1
        self._threads = threads
        self._width = width(encoder.bins)
        self._frames = 2 * chunk_size + PAD_LENGTH
        self._shapes = list(_state_shapes(encoder, stacks))
        self.weights_bytes = 4 * (self._weights.numel() + self._vectors.numel())
        self.streams_bytes = 4 * self._states.numel() + 8 * self._counters.numel()

    def load(self, model: Any) -> tuple[Any, list]:
        encoder, stacks, packed = pack(model, *self._options)
        sizes = [size for part in (encoder, *stacks) for size in part]
        if self._sizes not in (None, sizes):
            raise ValueError("NativeBackend: the model has other sizes than before: make another engine")
        self._sizes = sizes
        self._weights, self._vectors = self._ops.zipformer_chunk_pack(
            sizes, 0, 0, packed.weights, packed.biases, packed.tables
        )
        return encoder, stacks

    def reset(self, slot: int) -> None:
        self._check_slots([slot])
        self._states[slot].zero_()
        self._counters[slot].zero_()

    @torch.no_grad()
    def step(self, features: Tensor, slots: list[int]) -> Tensor:
        """Raises ValueError for features of another shape or dtype, and for slots that do not exist or are repeated."""
        if is_transformed():
            refuse("streaming.NativeBackend.step")
        slots = list(slots)
        self._check_slots(slots)
        expected = (len(slots), self._frames)
        if features.dtype != torch.float32 or not features.is_cpu:
            raise ValueError(
                f"step: features must be float32 on the CPU, got {features.dtype} on {features.device}"
            )
        bins = features.shape[2] if features.ndim == 3 else 0
        if tuple(features.shape[:2]) != expected or width(bins) != self._width:
            raise ValueError(
                f"step: features must be ({expected[0]}, {expected[1]}, bins), with bins that the front end takes, got "
                f"{tuple(features.shape)}"
            )
        if len(slots) > self._room:
            self._room = len(slots)
            self._scratch = torch.zeros(
                self._ops.zipformer_chunk_floats(self._sizes, self._room)[3],
                dtype=torch.float32,
                device="cpu",
            )
        return self._ops.zipformer_chunk_step(
            self._sizes,
            self._weights,
            self._vectors,
            self._states,
            self._counters,
            self._scratch,
            features.contiguous(),
            slots,
            self._threads,
        )

    def export_states(self, slot: int) -> list[Tensor]:
        self._check_slots([slot])
        states = [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in self._shapes]
        self._ops.zipformer_chunk_states(self._sizes, self._states, self._counters, slot, states, False)
        return [*states, self._counters[slot, :1].to(torch.int32)]

    def import_states(self, slot: int, states: list[Tensor]) -> None:
        """Raises ValueError if the shapes of the states do not fit."""
        self._check_slots([slot])
        check_states(
            states,
            [torch.empty(shape, device="meta", dtype=torch.float32) for shape in (*self._shapes, (1,))],
        )
        floats = [state.detach().to("cpu", torch.float32).contiguous() for state in states[:-1]]
        self._ops.zipformer_chunk_states(self._sizes, self._states, self._counters, slot, floats, True)
        self._counters[slot, 0] = int(states[-1])

    def release(self, model: Any) -> None:
        """Frees the parameters of ``model``, which cannot run afterwards."""
        self.released = 0
        for module in (model.encoder, model.encoder_embed):
            for parameter in module.parameters():
                self.released += parameter.numel() * parameter.element_size()
                parameter.data = parameter.data.new_empty(0)

    def _check_slots(self, slots: list[int]) -> None:
        count = len(self._states)
        if len(set(slots)) != len(slots) or not all(0 <= slot < count for slot in slots):
            raise ValueError(f"NativeBackend: slots must be different ones below {count}, got {slots}")


def _state_shapes(encoder: Any, stacks: Any) -> Iterator[tuple[int, ...]]:
    """Yields the shapes of a stream's state tensors in upstream's order, without processed_lens."""
    for stack in stacks:
        for _ in range(stack.layers):
            yield from stack.state_shapes(1, encoder.left // stack.factor)
    yield 1, encoder.maps3, 3, width(encoder.bins)
