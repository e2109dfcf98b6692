# SPDX-License-Identifier: Apache-2.0
"""What runs the chunks of a streaming encoder, and the plainest way of doing it: the model's own streaming_forward.

A backend holds the states of ``max_streams`` slots. A call takes the next chunk of any slots, in any order:

    s[slot], y = streaming_forward(x, s[slot])        for every slot of the call

Frames that a stream has not had yet are masked in its left context, per slot: streams of different ages go together.
"""

import abc
import copy

import torch

from fastasr.export.wrappers import PAD_LENGTH, StreamingEncoderWrapper
from fastasr.models.zipformer.stream_states import batch_dimension

WEIGHTS = ("fp32", "bf16", "int8")


class Backend(abc.ABC):
    """The states of ``max_streams`` slots and a chunk of any of them.

    Args:
        model: has ``encoder`` and ``encoder_embed``, in eval mode, in float32.
        chunk_size, left_context_frames: frames of the encoder, 20 ms each.
        weights: fp32, bf16 or int8, what the large matrices are kept in; products are summed in fp32.
        threads: of a call, on a CPU.

    ``streams_bytes`` are those of all states, ``weights_bytes`` of the weights that the backend keeps for itself, and
    ``released`` is how many of the model's own it let go.
    """

    name = "backend"
    streams_bytes = 0
    weights_bytes = 0
    released = 0

    @abc.abstractmethod
    def __init__(
        self, model, chunk_size, left_context_frames, weights="fp32", max_streams=1, threads=1
    ): ...  # what every backend takes

    @abc.abstractmethod
    def reset(self, slot):
        """The slot is at the beginning of a stream."""

    @abc.abstractmethod
    def step(self, features, slots):
        """features (n, 2 chunk_size + 13, bins), float32, slots: n of them, each once -> (n, chunk_size / 2, channels),
        float32, which the next call does not touch.
        """

    @abc.abstractmethod
    def export_states(self, slot):
        """Upstream's list of states with a batch of one: six tensors per layer, the front end's, processed_lens."""

    @abc.abstractmethod
    def import_states(self, slot, states):
        """Puts what ``export_states`` or upstream's wrapper gave into the slot."""


class EagerBackend(Backend):
    """The model's own ``streaming_forward``, on its device; of rounded copies of its matrices for bf16 and int8.

    It is the fallback of other backends and what they are tested against. The model is not changed.
    """

    name = "eager"

    def __init__(
        self, model, chunk_size, left_context_frames, weights="fp32", max_streams=1, threads=1, scratch=0
    ):
        if weights != "fp32":
            model = EncoderPair(model.encoder, model.encoder_embed)
            model = copy.deepcopy(model)
            _round_matrices(model.encoder, weights)
            self.weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        wrapper = streaming_wrapper(model, chunk_size, left_context_frames)
        self.encoder, self.encoder_embed = wrapper.encoder, wrapper.encoder_embed
        self.device = next(model.encoder.parameters()).device
        self.frames = 2 * chunk_size + PAD_LENGTH
        self.threads = threads
        # The lengths stay on the CPU: reading one would make a GPU wait.
        self._lengths = torch.tensor([self.frames])
        self._age = torch.arange(left_context_frames - 1, -1, -1, device=self.device).unsqueeze(0)
        self._unpadded = torch.zeros(1, chunk_size, dtype=torch.bool, device=self.device)
        self._one = wrapper.get_init_states(1, self.device)
        count = len(self._one)
        self._dims = [batch_dimension(i, count) for i in range(count)]
        self._states = [
            torch.cat([state] * (max_streams + scratch), dim=dim)
            for state, dim in zip(self._one, self._dims, strict=True)
        ]
        self.streams_bytes = sum(state.numel() * state.element_size() for state in self._states)

    def reset(self, slot):
        for state, dim in zip(self._states, self._dims, strict=True):
            state.select(dim, slot).zero_()

    @torch.inference_mode()
    def step(self, features, slots):
        index = torch.tensor(slots, device=self.device)
        with _threads(self.threads), torch.autocast(self.device.type, enabled=False):
            return self._advance(features.to(self.device), index)

    def _advance(self, features, index):
        """A chunk of the slots of ``index``, (n,): what a CUDA graph holds."""
        states = [s.index_select(dim, index) for s, dim in zip(self._states, self._dims, strict=True)]
        y, states = self._chunk(features, states)
        for all_slots, new, dim in zip(self._states, states, self._dims, strict=True):
            all_slots.index_copy_(dim, index, new)
        return y

    def _chunk(self, features, states):
        n = features.shape[0]
        lengths = self._lengths.expand(n)
        processed = states[-1]
        x, lengths, left_pad = self.encoder_embed.streaming_forward(features, lengths, states[-2])
        unseen = processed.unsqueeze(1) <= self._age
        mask = torch.cat([unseen, self._unpadded.expand(n, -1)], dim=1)
        y, _, layers = self.encoder.streaming_forward(x.transpose(0, 1), lengths, states[:-2], mask)
        return y.transpose(0, 1).contiguous(), [*layers, left_pad, processed + x.shape[1]]

    def export_states(self, slot):
        return [
            state.narrow(dim, slot, 1).clone() for state, dim in zip(self._states, self._dims, strict=True)
        ]

    def import_states(self, slot, states):
        check_states(states, self._one)
        for all_slots, state, dim in zip(self._states, states, self._dims, strict=True):
            all_slots.narrow(dim, slot, 1).copy_(state)


def check_states(states, expected):
    """ValueError unless ``states`` are a list of tensors shaped as ``expected``, those before the first chunk."""
    if len(states) != len(expected):
        raise ValueError(f"import_states: expected {len(expected)} tensors, got {len(states)}")
    for i, (state, like) in enumerate(zip(states, expected, strict=True)):
        if not isinstance(state, torch.Tensor) or state.shape != like.shape:
            found = tuple(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
            raise ValueError(f"import_states: state {i} must be {tuple(like.shape)}, got {found}")


def streaming_wrapper(model, chunk_size, left_context_frames):
    """Upstream's streaming wrapper of a model that keeps its own chunk sizes: the encoder in it is a shallow copy."""
    encoder = copy.copy(model.encoder)
    encoder.chunk_size, encoder.left_context_frames = (chunk_size,), (left_context_frames,)
    return StreamingEncoderWrapper(encoder, model.encoder_embed)


class EncoderPair(torch.nn.Module):
    """The parts of a model that an engine is about."""

    def __init__(self, encoder, encoder_embed):
        super().__init__()
        self.encoder, self.encoder_embed = encoder, encoder_embed


@torch.no_grad()
def _round_matrices(encoder, weights):
    """Every matrix of the encoder's layers as it is after storage in bf16, or in int8 with a scale per row,
    w = s round(w / s), s = max|w| / 127. The projection of positions, which packing computes beforehand, stays.
    """
    for name, parameter in encoder.named_parameters():
        if parameter.ndim != 2 or name.endswith("linear_pos.weight"):
            continue
        if weights == "bf16":
            parameter.copy_(parameter.bfloat16())
        else:
            scale = parameter.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
            parameter.copy_((parameter / scale).round() * scale)


class _threads:
    """torch's threads on a CPU, inside the block."""

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        self.before = torch.get_num_threads()
        if self.before != self.count:
            torch.set_num_threads(self.count)

    def __exit__(self, *_):
        if self.before != self.count:
            torch.set_num_threads(self.before)
