# SPDX-License-Identifier: Apache-2.0
"""A swapped causal encoder in chunks: its layers get windows where upstream makes a mask of time by time, unless one
of them needs the mask."""

import copy

import pytest
import torch
from largest import Largest
from steps import close, draws, moved, numbers, same_step, seeded, swapped
from tiny_zipformer import TINY, plain_swoosh, set_batch_count
from upstream_precision import computing_in
from zipformer.modules import zipformer

import fastasr
from fastasr.models.common import ragged
from fastasr.models.zipformer import layer as layer_module
from fastasr.models.zipformer import stack
from fastasr.swap import binding
from fastasr.swap.rules.zipformer import encoder as rules
from fastasr.swap.rules.zipformer.encoder import why_not

FRAMES, LENGTHS = 203, torch.tensor([203, 60, 1])
PADDING = torch.arange(FRAMES) >= LENGTHS[:, None]
LAYER = "encoders.1.encoder.layers.0"
CHUNKS = {
    "one size": {"chunk_size": (8,), "left_context_frames": (16,)},
    "all that is before": {"chunk_size": (8,), "left_context_frames": (-1,)},
    "drawn": {"chunk_size": (4, 8, -1), "left_context_frames": (12, 24, -1)},
}


def upstream(**options):
    seeded(0)
    with plain_swoosh():
        chunks = {"causal": True, **CHUNKS["one size"], **options}
        encoder = zipformer.Zipformer(**{**TINY, **chunks}, dropout=0.5)
    return set_batch_count(moved(encoder, 0.05), 2000.0).eval()


def source(dtype=torch.float32):
    return torch.randn(FRAMES, len(LENGTHS), 32, generator=numbers(1)).to(dtype)


def makes_a_mask(encoder, *arguments):
    """Runs the encoder. Says whether it calls the function that makes upstream's mask."""
    calls, make = [], type(encoder)._get_attn_mask
    encoder._get_attn_mask = lambda *args: calls.append(args) or make(encoder, *args)
    y, _ = encoder(*arguments)
    del encoder._get_attn_mask
    return y, bool(calls)


@pytest.mark.parametrize("padding", [None, PADDING], ids=["", "padded"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@torch.no_grad()
def test_inference(chunks, padding):
    theirs = upstream(**chunks).double()
    ours = copy.deepcopy(theirs)
    report = fastasr.accelerate(ours)
    assert report[""].rule == "zipformer.causal_encoder"
    x = source(torch.float64)
    for seed in range(3):
        results = []
        for each in (theirs, ours):
            seeded(seed)
            results.append((*each(x, LENGTHS, padding), draws()))
        (expected, expected_lengths, expected_draws), (y, lengths, drawn) = results
        close(y, expected, 1e-10)
        assert torch.equal(lengths, expected_lengths)
        assert drawn == expected_draws
    _, masked = makes_a_mask(ours, x, LENGTHS, padding)
    assert not masked
    assert fastasr.restore(ours) == len(report.replaced)
    seeded(2)
    y, masked = makes_a_mask(ours, x, LENGTHS, padding)
    assert masked
    assert torch.equal(y, expected)


@torch.no_grad()
def test_inference_in_float32():
    """Layers that have measured their products compute the second call in another way."""
    theirs = upstream()
    ours = swapped(theirs)
    expected = theirs(source(), LENGTHS, PADDING)[0]
    for _ in range(2):
        close(ours(source(), LENGTHS, PADDING)[0], expected, 1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_memory_and_gradients(monkeypatch, training):
    """Neither a mask nor weights of time by time are in memory, with gradients or without."""
    monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES", 0)
    monkeypatch.setattr(layer_module, "MOST_WEIGHT_BYTES_WITH_GRADIENTS", 0)
    monkeypatch.setattr("random.random", lambda: 0.9)  # the penalty on large scores would form them all
    encoder = upstream().train(training)
    fastasr.accelerate(encoder)
    sizes = []
    for frames in (400, 800):
        with Largest() as largest, torch.set_grad_enabled(training):
            y, _ = encoder(torch.randn(frames, 1, 32), torch.tensor([frames]))
            if training:
                y.sum().backward()
        sizes.append(largest.elements)
    assert sizes[0] < 400 * 400
    assert sizes[1] <= 2.1 * sizes[0]


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_training_steps(chunks):
    """Feature masks, dropped layers and regularisers are drawn as upstream draws them."""
    theirs = upstream(**chunks).double().train()
    ours = swapped(theirs)
    call = source(torch.float64), LENGTHS, PADDING
    for seed in range(4):
        with computing_in(torch.float64):
            same_step(ours, theirs, *call, tolerance=1e-10, seed=seed, share=1.0)


def test_training_step_in_float32():
    theirs = upstream().train()
    ours = swapped(theirs)
    same_step(ours, theirs, source(), LENGTHS, PADDING, tolerance=1e-3, seed=1, share=1.0)


def hooked(path):
    return lambda encoder: encoder.get_submodule(path).register_forward_hook(lambda *call: None)


def patched(path):
    def patch(encoder):
        module = encoder.get_submodule(path)
        module.forward = type(module).forward.__get__(module)
        module.forward = lambda *args, forward=module.forward, **kwargs: forward(*args, **kwargs)

    return patch


def replaced(encoder):
    encoder.encoders[0].layers[0] = copy.deepcopy(encoder.encoders[0].layers[0])
    fastasr.restore(encoder.encoders[0].layers[0])


NEED_THE_MASK = {
    "a layer that was restored": (
        lambda encoder: fastasr.restore(encoder.get_submodule(LAYER)), f"{LAYER} is not swapped",
    ),
    "another layer": (replaced, "encoders.0.layers.0 is not swapped"),
    "attention that was restored": (
        lambda encoder: binding.unbind(encoder.get_submodule(LAYER).self_attn_weights),
        f"{LAYER}.self_attn_weights is not swapped",
    ),
    "a layer's hook": (hooked(LAYER), f"{LAYER} or its self_attn_weights has a hook"),
    "attention's hook": (hooked(f"{LAYER}.self_attn_weights"), f"{LAYER} or its self_attn_weights has a hook"),
    "a stack's hook": (hooked("encoders.0"), "encoders.0 has a hook"),
    "an inner stack's hook": (hooked("encoders.1.encoder"), "encoders.1.encoder has a hook"),
    "a patched layer": (patched(LAYER), f"{LAYER} is not swapped"),
    "a patched stack": (patched("encoders.1"), "submodule encoders.1 runs code that is not upstream's"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), NEED_THE_MASK.values(), ids=NEED_THE_MASK)
@torch.no_grad()
def test_what_happens_after_the_swap(change, reason):
    encoder = upstream().double()
    x = source(torch.float64)
    expected = encoder(x, LENGTHS, PADDING)[0]
    fastasr.accelerate(encoder)
    assert why_not(encoder) is None
    change(encoder)
    assert why_not(encoder).startswith(reason)
    y, masked = makes_a_mask(encoder, x, LENGTHS, PADDING)
    assert masked
    close(y, expected, 1e-10)


@pytest.mark.parametrize("excluded", [LAYER, "*self_attn_weights", zipformer.Zipformer])
@torch.no_grad()
def test_what_is_excluded(excluded):
    encoder = upstream().double()
    x = source(torch.float64)
    expected = encoder(x, LENGTHS, PADDING)[0]
    report = fastasr.accelerate(encoder, exclude=excluded)
    assert (report[""].status == "replaced") == isinstance(excluded, str)
    y, masked = makes_a_mask(encoder, x, LENGTHS, PADDING)
    assert masked
    close(y, expected, 1e-10)


class OtherStack(zipformer.ZipformerEncoder):
    def forward(self, src, **call):
        return 2 * super().forward(src, **call)


class OtherMask(zipformer.Zipformer):
    def _get_attn_mask(self, x, chunk_size, left_context_chunks):
        return super()._get_attn_mask(x, chunk_size, left_context_chunks)


def test_unknown_code_is_declined():
    encoder = upstream()
    encoder.encoders[0].__class__ = OtherStack
    row = fastasr.accelerate(encoder)[""]
    assert row.status == "skipped"
    assert row.reason.startswith("submodule encoders.0 runs code that is not upstream's")
    encoder = upstream()
    encoder.__class__ = OtherMask
    row = fastasr.accelerate(encoder)[""]
    assert row.status == "skipped"
    assert row.reason == "OtherMask is a subclass of Zipformer that overrides _get_attn_mask"


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_verify_compares_windows(chunks):
    encoder = upstream(**chunks)
    report = fastasr.accelerate(encoder, verify=(source(), LENGTHS, PADDING))
    assert report.ok, str(report)
    assert {"values", "gradients"} <= report[""].errors.keys()


def test_verify_finds_other_windows(monkeypatch):
    def narrower(*args, left_context_chunks, **call):
        return stack.in_windows(*args, left_context_chunks=left_context_chunks - 1, **call)

    monkeypatch.setattr(rules, "in_windows", narrower)
    report = fastasr.accelerate(upstream(), verify=(source(), LENGTHS, PADDING))
    assert [row.path for row in report.rolled_back] == [""]


@torch.no_grad()
def test_without_padding_or_with_it():
    theirs = upstream().double()
    ours = copy.deepcopy(theirs)
    x = source(torch.float64)
    report = fastasr.accelerate(ours, ragged=True)
    assert report.ragged == {"": None}
    assert report[""].rule == "zipformer.causal_encoder"
    close(ours(x, LENGTHS, PADDING)[0][:102, 0], theirs(x, LENGTHS, PADDING)[0][:, 0], 1e-10)
    with ragged.padded():
        y, masked = makes_a_mask(ours, x, LENGTHS, PADDING)
    assert not masked
    close(y, theirs(x, LENGTHS, PADDING)[0], 1e-10)
    assert fastasr.verify(ours, (x, LENGTHS, PADDING)).ok
    assert fastasr.explain(ours).ragged == {"": None}


@torch.no_grad()
def test_compiled_and_exported():
    encoder = upstream()
    inputs = source(), LENGTHS, PADDING
    expected = encoder(*inputs)[0]
    fastasr.accelerate(encoder)
    close(torch.compile(encoder, backend="aot_eager")(*inputs)[0], expected, 1e-5)
    program = torch.export.export(encoder, inputs, strict=False)
    close(program.module()(*inputs)[0], expected, 1e-5)


def test_copies_are_swapped_and_independent():
    encoder = upstream()
    fastasr.accelerate(encoder)
    twin = copy.deepcopy(encoder)
    fastasr.restore(encoder)
    assert vars(twin)["forward"].__self__ is twin
    assert why_not(twin) is None


def test_an_encoder_without_chunks_stays_upstreams():
    encoder = upstream(causal=False, chunk_size=(-1,))
    report = fastasr.accelerate(encoder)
    assert report[""].reason == "container: see its submodules"
    assert "forward" not in vars(encoder)
