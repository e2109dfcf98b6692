# SPDX-License-Identifier: Apache-2.0
"""One native call gives what streaming_forward gives, chunk after chunk, for any streams at a time."""

import copy
import random
from functools import cache

import pytest
import torch
import zipformers
from steps import relative
from torch.autograd import forward_ad

from fastasr.asr.export import StreamingEncoderWrapper
from fastasr.asr.streaming import EagerBackend
from fastasr.asr.streaming.native import NativeBackend
from fastasr.ops import _dispatch, _reduced_weights

LIMIT = 5e-6  # relative to the rms of the output, in fp32
ROUNDED = {
    "bf16": 1.5e-3,
    "fp16": 2e-4,
    # without VNNI the kernels of x86 round inputs to 7 bits
    "int8": 5e-3 if _dispatch.native_build_info().get("simd_set") in ("avx2", "avx512") else 4e-3,
}  # the documented change by rounded weights, in int8 of inputs as well
# from the model's own code with equally rounded weights: some native products round their inputs too
ROUNDS_INPUTS = {"bf16": not _reduced_weights.why_not("bf16"), "fp16": False, "int8": True}
OWN_CODE = {kind: ROUNDED[kind] if both else LIMIT for kind, both in ROUNDS_INPUTS.items()}
every_format = pytest.mark.parametrize("weights", ["fp32", *ROUNDED])


@cache
def _published(size):
    return zipformers.published(size)


@cache
def _odd():
    return zipformers.odd()


@torch.no_grad()
def _reference(model, chunk_size, left, chunks):
    """Returns outputs in float64 of a batch of streams, and their states."""
    encoder = copy.copy(model.encoder)
    encoder.chunk_size, encoder.left_context_frames = (chunk_size,), (left,)
    wrapper = copy.deepcopy(StreamingEncoderWrapper(encoder, model.encoder_embed)).double()
    states = wrapper.get_init_states(len(chunks[0]))
    states = [state.double() if state.is_floating_point() else state for state in states]
    outputs = []
    for x in chunks:
        lengths = torch.full((len(x),), x.shape[1])
        y, _, states = wrapper(x.double(), lengths, states)
        outputs.append(y)
    return outputs, states


@pytest.mark.parametrize(
    ("size", "chunk_size", "left", "steps"),
    [("small", 16, 64, 7), ("medium", 16, 128, 4), ("large", 32, 128, 3), ("small", 64, 256, 3)],
)
def test_published_sizes(size, chunk_size, left, steps):
    """The memory is within the documented bounds as well."""
    model = _published(size)
    backend = NativeBackend(model, chunk_size, left, max_streams=1)
    chunks = zipformers.features(1, steps, chunk_size)
    expected, states = _reference(model, chunk_size, left, chunks)
    for x, y in zip(chunks, expected, strict=True):
        assert relative(backend.step(x, [0]), y) <= LIMIT
    for got, state in zip(backend.export_states(0)[:-1], states[:-1], strict=True):
        assert relative(got, state) <= 3 * LIMIT
    assert backend.export_states(0)[-1].tolist() == [steps * chunk_size]
    assert backend.streams_bytes <= 10e6
    assert backend.weights_bytes - sum(4 * p.numel() for p in model.parameters()) <= 5e6


@pytest.mark.parametrize(
    ("size", "weights"),
    [("small", "bf16"), ("small", "fp16"), ("small", "int8"), ("medium", "bf16"), ("large", "int8")],
)
def test_rounded_weights(size, weights):
    """The result is that of the model's own code with equally rounded weights, to the accuracy of fp32 where inputs are
    not rounded. The test also measures the memory.
    """
    model = _published(size)
    backend, rounded = (kind(model, 16, 128, weights=weights) for kind in (NativeBackend, EagerBackend))
    chunks = zipformers.features(1, 2, 16)
    exact, _ = _reference(model, 16, 128, chunks)
    for x, y in zip(chunks, exact, strict=True):
        got = backend.step(x, [0])
        assert relative(got, rounded.step(x, [0]).double()) <= OWN_CODE[weights]
        assert 1e-5 < relative(got, y) <= ROUNDED[weights]
    parameters = sum(p.numel() for m in (model.encoder, model.encoder_embed) for p in m.parameters())
    assert backend.weights_bytes <= {"bf16": 2, "fp16": 2, "int8": 1}[weights] * parameters + 6e6


@pytest.mark.parametrize("weights", ROUNDED)
def test_rounded_weights_of_odd_sizes(weights):
    model = _odd()
    backend, rounded = (kind(model, 4, 8, weights=weights) for kind in (NativeBackend, EagerBackend))
    for x in zipformers.features(1, 9, 4):
        assert relative(backend.step(x, [0]), rounded.step(x, [0]).double()) <= OWN_CODE[weights]


@pytest.mark.parametrize("kind", [NativeBackend, EagerBackend])
def test_weights_beyond_fp16_are_refused(kind):
    model = copy.deepcopy(_odd())
    weight = model.encoder.encoders[0].layers[0].feed_forward1.in_proj.weight
    with torch.no_grad():
        weight[3, 5] = -65504.0
        kind(model, 4, 8, weights="fp16")
        weight[3, 5] = 7e4
    name = r"encoders.0.layers.0.feed_forward1.in_proj.weight holds 70000, .* fp16 end at 65504"
    with pytest.raises(ValueError, match=name):
        kind(model, 4, 8, weights="fp16")
    x = zipformers.features(1, 1, 4)[0]
    assert kind(model, 4, 8, weights="bf16").step(x, [0]).isfinite().all()


@pytest.mark.parametrize(("chunk_size", "left"), [(2, 2), (4, 8), (6, 6), (10, 40), (8, 0)])
def test_odd_sizes(chunk_size, left):
    """Chunks repeat often enough that the rings turn over; a left context is shorter than a chunk, or absent."""
    model = _odd()
    backend = NativeBackend(model, chunk_size, left, max_streams=3)
    chunks = zipformers.features(2, 23, chunk_size)
    expected, states = _reference(model, chunk_size, left, chunks)
    got = [backend.step(x, [2, 0]) for x in chunks]
    assert relative(torch.cat(got), torch.cat(expected)) <= LIMIT
    for stream, slot in ((0, 2), (1, 0)):
        exported = backend.export_states(slot)
        for i, (ours, state) in enumerate(zip(exported[:-2], states[:-2], strict=True)):
            state = state.select(0 if i % 6 > 3 else 1, stream)
            assert ours.numel() == state.numel()
            if state.numel():
                assert relative(ours.flatten(), state.flatten()) <= 10 * LIMIT
        assert relative(exported[-2][0], states[-2][stream]) <= 3 * LIMIT
        assert exported[-1] == states[-1][stream]


@every_format
def test_streams_come_and_go(weights):
    """Any streams of any age share a call, in any order: each has the bits that it has alone."""
    chunk_size, left, slots = 4, 8, 4
    model = _odd()
    backend = NativeBackend(model, chunk_size, left, weights, max_streams=slots)
    alone = NativeBackend(model, chunk_size, left, weights, max_streams=1)
    draw = random.Random(torch.initial_seed())
    age, heard, said = [0] * slots, [[] for _ in range(slots)], [[] for _ in range(slots)]

    def check(slot):
        alone.reset(0)
        for x, y in zip(heard[slot], said[slot], strict=True):
            assert torch.equal(alone.step(x[None], [0])[0], y)

    for step in range(60):
        chosen = draw.sample(range(slots), draw.randint(1, slots))
        x = zipformers.features(len(chosen), 1, chunk_size, seed=step)[0]
        for slot, row, y in zip(chosen, x, backend.step(x, chosen), strict=True):
            heard[slot].append(row)
            said[slot].append(y)
            age[slot] += 1
        if draw.random() < 0.1:
            slot = draw.randrange(slots)
            check(slot)
            backend.reset(slot)
            heard[slot], said[slot] = [], []
    for slot in range(slots):
        check(slot)


@pytest.mark.parametrize(("threads", "weights"), [(2, "fp32"), (3, "fp32"), (2, "bf16"), (2, "int8")])
def test_threads_change_no_bit(threads, weights):
    model = _published("small")
    chunks = zipformers.features(3, 3, 16)
    one = NativeBackend(model, 16, 64, weights, max_streams=3)
    many = NativeBackend(model, 16, 64, weights, max_streams=3, threads=threads)
    torch.set_num_threads(threads)
    for x in chunks:
        assert torch.equal(one.step(x, [0, 1, 2]), many.step(x, [0, 1, 2]))


@every_format
def test_not_a_number_stays_in_its_stream(weights):
    model = _odd()
    backend, clean = (NativeBackend(model, 4, 8, weights, max_streams=2) for _ in range(2))
    for step, x in enumerate(zipformers.features(2, 8, 4)):
        expected = clean.step(x, [0, 1])
        if step < 2:
            x[0] = float("nan")
        y = backend.step(x, [0, 1])
        assert torch.equal(y[1], expected[1])
    backend.reset(0)
    clean.reset(0)
    x = zipformers.features(1, 1, 4, seed=1)[0]
    assert torch.equal(backend.step(x, [0]), clean.step(x, [0]))


def test_other_numbers_of_bins():
    """The front end's linear layer takes other numbers as well: 79 to 82 bins become 19."""
    model, chunk_size = _odd(), 4
    for bins in (79, 82):
        backend = NativeBackend(model, chunk_size, 8)
        chunks = zipformers.features(1, 2, chunk_size, bins=bins)
        expected, _ = _reference(model, chunk_size, 8, chunks)
        for x, y in zip(chunks, expected, strict=True):
            assert relative(backend.step(x, [0]), y) <= LIMIT


def test_released_weights():
    model = copy.deepcopy(_odd())
    x = zipformers.features(1, 1, 4)[0]
    backend, other = (NativeBackend(model, 4, 8) for _ in range(2))
    expected = other.step(x, [0])
    size = sum(4 * p.numel() for m in (model.encoder, model.encoder_embed) for p in m.parameters())
    backend.release(model)
    assert backend.released == size
    assert all(p.numel() == 0 for p in model.encoder.parameters())
    assert torch.equal(backend.step(x, [0]), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 3}, "chunk_size must be an int of 2 or more that each of .1, 2. divides, got 3"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"left_context_frames": 7}, "left_context_frames must be"),
        ({"left_context_frames": -1}, "left_context_frames must be"),
        ({"weights": "fp8"}, "weights must be one of fp32, bf16, fp16, int8, got 'fp8'"),
        ({"max_streams": 0}, "max_streams must be an int of 1 or more, got 0"),
        ({"threads": 1.5}, "threads must be an int of 1 or more, got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NativeBackend(_odd(), **{"chunk_size": 4, "left_context_frames": 8, **arguments})


def test_bad_models():
    with pytest.raises(ValueError, match="training mode"):
        NativeBackend(copy.deepcopy(_odd()).train(), 4, 8)
    with pytest.raises(NotImplementedError, match="float32 on the CPU"):
        NativeBackend(copy.deepcopy(_odd()).double(), 4, 8)
    model = copy.deepcopy(_odd())
    model.encoder.causal = False
    with pytest.raises(ValueError, match="not causal"):
        NativeBackend(model, 4, 8)


def test_bad_steps():
    backend = NativeBackend(_odd(), 4, 8, max_streams=2)
    x = zipformers.features(2, 1, 4)[0]
    for slots in ([0, 0], [0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="slots must be different ones below 2"):
            backend.step(x, slots)
    for wrong in (x[:1], x[:, 1:], x[..., :40], x[0]):
        with pytest.raises(ValueError, match="step: features must be"):
            backend.step(wrong, [0, 1])
    with pytest.raises(ValueError, match=r"float32 on the CPU, got torch.float64"):
        backend.step(x.double(), [0, 1])
    assert backend.step(x[:0], []).shape == (0, 2, 52)


def test_tangents_are_refused():
    backend, x = NativeBackend(_odd(), 4, 8), zipformers.features(1, 1, 4)[0]
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="step: not possible under forward-mode differentiation"):
            backend.step(x, [0])
