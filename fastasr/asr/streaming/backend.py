# SPDX-License-Identifier: Apache-2.0
"""The interface of streaming backends, and the simplest backend, which calls the model's own ``streaming_forward``.

A backend holds the states of ``max_streams`` slots. A call takes the next chunk of any slots, in any order:

    s[slot], y = streaming_forward(x, s[slot])        for every slot of the call

The left context is masked per slot where a stream has not had the frames yet, so a call may mix streams of any age.
"""

import abc
import copy
from typing import Any

import torch
from torch import Tensor

from fastasr.asr.export.wrappers import PAD_LENGTH, StreamingEncoderWrapper
from fastasr.asr.streaming.packing import matrices
from fastasr.models.zipformer.stream_states import batch_dimension
from fastasr.ops import _weight_formats


class Backend(abc.ABC):
    """Holds the states of ``max_streams`` slots and runs chunks of them.

    Args:
        model: a model in eval mode and float32 with ``encoder`` and ``encoder_embed``.
        chunk_size, left_context_frames: frames of the encoder, 20 ms each.
        weights: "fp32", "bf16", "fp16" or "int8", the storage of the large matrices.
        threads: threads of a call on a CPU.

    ``streams_bytes`` counts the bytes of all states, ``weights_bytes`` those of the backend's own copy of the weights,
    and ``released`` those of the model's weights that the backend has freed.
    """

    name = "backend"
    streams_bytes = 0
    weights_bytes = 0
    released = 0

    @abc.abstractmethod
    def __init__(
        self,
        model: Any,
        chunk_size: int,
        left_context_frames: int,
        weights: str = "fp32",
        max_streams: int = 1,
        threads: int = 1,
    ) -> None: ...  # every backend takes these arguments

    @abc.abstractmethod
    def load(self, model: Any) -> Any:
        """Reads the weights of ``model``, which may have changed since the constructor. Streams go on."""

    @abc.abstractmethod
    def reset(self, slot: int) -> None:
        """Puts the slot to the beginning of a stream."""

    @abc.abstractmethod
    def step(self, features: Tensor, slots: list[int]) -> Tensor:
        """features (n, 2 chunk_size + 13, bins), float32, slots: n of them, each once -> (n, chunk_size / 2, channels),
        float32, which the next call does not touch.
        """

    @abc.abstractmethod
    def export_states(self, slot: int) -> list[Tensor]:
        """Returns upstream's list of states for a batch of one: six tensors per layer, the front end's left padding and
        processed_lens."""

    @abc.abstractmethod
    def import_states(self, slot: int, states: list[Tensor]) -> None:
        """Copies states from ``export_states`` or from upstream's wrapper into the slot."""


class EagerBackend(Backend):
    """Calls the model's own ``streaming_forward`` on its device, with copies of its matrices rounded to ``weights``.

    It is the fallback of the other backends and their reference in tests. It does not change the model.
    """

    name = "eager"

    def __init__(
        self,
        model: Any,
        chunk_size: int,
        left_context_frames: int,
        weights: str = "fp32",
        max_streams: int = 1,
        threads: int = 1,
        scratch: int = 0,
    ) -> None:
        self._options = chunk_size, left_context_frames, weights
        wrapper = self.load(model)
        self.device = next(model.encoder.parameters()).device
        self.frames = 2 * chunk_size + PAD_LENGTH
        self.threads = threads
        # The lengths stay on the CPU: reading one would make a GPU wait.
        self._lengths = torch.tensor([self.frames], dtype=torch.int64, device="cpu")
        self._age = torch.arange(
            left_context_frames - 1, -1, -1, device=self.device, dtype=torch.int64
        ).unsqueeze(0)
        self._unpadded = torch.zeros(1, chunk_size, dtype=torch.bool, device=self.device)
        self._one = wrapper.get_init_states(1, self.device)
        count = len(self._one)
        self._dims = [batch_dimension(i, count) for i in range(count)]
        self._states = [
            torch.cat([state] * (max_streams + scratch), dim=dim)
            for state, dim in zip(self._one, self._dims, strict=True)
        ]
        self.streams_bytes = sum(state.numel() * state.element_size() for state in self._states)

    def load(self, model: Any) -> StreamingEncoderWrapper:
        *frames, weights = self._options
        if weights != "fp32":
            _weight_formats.check("EagerBackend", weights, matrices(model.encoder))
            model = EncoderPair(model.encoder, model.encoder_embed)
            model = copy.deepcopy(model)
            _round_matrices(model.encoder, weights)
            self.weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        wrapper = streaming_wrapper(model, *frames)
        self.encoder, self.encoder_embed = wrapper.encoder, wrapper.encoder_embed
        return wrapper

    def reset(self, slot: int) -> None:
        for state, dim in zip(self._states, self._dims, strict=True):
            state.select(dim, slot).zero_()

    @torch.inference_mode()
    def step(self, features: Tensor, slots: list[int]) -> Tensor:
        index = torch.tensor(slots, device=self.device, dtype=torch.int64)
        with _threads(self.threads), torch.autocast(self.device.type, enabled=False):
            return self._advance(features.to(self.device), index)

    def _advance(self, features: Tensor, index: Tensor) -> Tensor:
        """Runs a chunk of the slots in ``index``, (n,). A CUDA graph records this method."""
        states = [s.index_select(dim, index) for s, dim in zip(self._states, self._dims, strict=True)]
        y, states = self._chunk(features, states)
        for all_slots, new, dim in zip(self._states, states, self._dims, strict=True):
            all_slots.index_copy_(dim, index, new)
        return y

    def _chunk(self, features: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        n = features.shape[0]
        lengths = self._lengths.expand(n)
        processed = states[-1]
        x, lengths, left_pad = self.encoder_embed.streaming_forward(features, lengths, states[-2])
        unseen = processed.unsqueeze(1) <= self._age
        mask = torch.cat([unseen, self._unpadded.expand(n, -1)], dim=1)
        y, _, layers = self.encoder.streaming_forward(x.transpose(0, 1), lengths, states[:-2], mask)
        return y.transpose(0, 1).contiguous(), [*layers, left_pad, processed + x.shape[1]]

    def export_states(self, slot: int) -> list[Tensor]:
        return [
            state.narrow(dim, slot, 1).clone() for state, dim in zip(self._states, self._dims, strict=True)
        ]

    def import_states(self, slot: int, states: list[Tensor]) -> None:
        check_states(states, self._one)
        for all_slots, state, dim in zip(self._states, states, self._dims, strict=True):
            all_slots.narrow(dim, slot, 1).copy_(state)


def check_states(states: list[Tensor], expected: Any) -> None:
    """Raises ValueError unless ``states`` is a list of tensors with the shapes of ``expected``, the initial states."""
    if len(states) != len(expected):
        raise ValueError(f"import_states: expected {len(expected)} tensors, got {len(states)}")
    for i, (state, like) in enumerate(zip(states, expected, strict=True)):
        if not isinstance(state, torch.Tensor) or state.shape != like.shape:
            found = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
            raise ValueError(f"import_states: state {i} must be {tuple(like.shape)}, got {found}")


def streaming_wrapper(model: Any, chunk_size: int, left_context_frames: int) -> StreamingEncoderWrapper:
    """Returns upstream's streaming wrapper of the model. It holds a shallow copy of the encoder, so the model keeps its
    own chunk sizes."""
    encoder = copy.copy(model.encoder)
    encoder.chunk_size, encoder.left_context_frames = (chunk_size,), (left_context_frames,)
    return StreamingEncoderWrapper(encoder, model.encoder_embed)


class EncoderPair(torch.nn.Module):
    """The two parts of a model that a streaming engine uses."""

    def __init__(self, encoder: Any, encoder_embed: Any) -> None:
        super().__init__()
        self.encoder, self.encoder_embed = encoder, encoder_embed


@torch.no_grad()
def _round_matrices(encoder: Any, weights: str) -> None:
    """Rounds the encoder's matrices as storage does, in int8 with a scale per row: w = s round(w / s),
    s = max|w| / 127.
    """
    for _, matrix in matrices(encoder):
        if weights == "int8":
            scale = matrix.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
            matrix.copy_((matrix / scale).round() * scale)
        else:
            matrix.copy_(matrix.bfloat16() if weights == "bf16" else matrix.half())


class _threads:
    """Sets the number of torch's CPU threads inside the block."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        if self.before != self.count:
            torch.set_num_threads(self.count)

    def __exit__(self, *_: Any) -> None:
        if self.before != self.count:
            torch.set_num_threads(self.before)
