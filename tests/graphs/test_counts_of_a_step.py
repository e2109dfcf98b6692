# SPDX-License-Identifier: Apache-2.0
"""What a training step and a call in inference ask of a GPU's host, counted without a GPU: operator calls that reach a
backend, launches of Triton kernels, and nodes of autograd. Where the host is slower than the GPU, these are the time.
The GPU's share is counted as kernels: launches, and operator calls that are neither views nor allocations.

The models have the layers of Zipformer-M and of a FastConformer of 110M parameters, and few channels, which are
multiples of 16 where theirs are. Python's random numbers are constant, so that no regulariser of the Zipformer acts, or
every one, whatever the order of the draws.
"""

import random
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from recorded import graphed, reasons
from steps import Calls, seeded

import fastasr
from fastasr.benchmarks import upstream
from fastasr.models import zipformer
from fastasr.models.e_branchformer import EBranchformerEncoder, layer
from fastasr.models.fast_conformer import FastConformerEncoder, masks
from fastasr.ops import _linear

pytest.importorskip("triton")
from fastasr.testing.fake_gpu import models_on_fake_gpu
from fastasr.testing.tape import TapeRecorder

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="counts are those of torch 2.13"
)

ZIPFORMER = upstream.MEDIUM | {
    "encoder_dim": (64, 64, 64, 128, 64, 64), "encoder_unmasked_dim": (32, 32, 32, 64, 32, 32), "pos_dim": 16,
    "query_head_dim": (16,), "value_head_dim": (8,), "num_heads": (4,), "feedforward_dim": (64, 64, 64, 128, 64, 64),
}  # fmt: skip
LAYER_NORM = torch.nn.functional.layer_norm
GROWTH = 1.02  # counts may grow by this factor
NEVER, ALWAYS = 0.999, 0.0  # random numbers with which nothing acts that has a rate, or everything


class Counts(NamedTuple):
    forward: int  # operator calls of a pass
    backward: int
    launches: int  # of both passes
    nodes: int
    kernels: int


# Case -> training or not, the random number, and the counts. A change that lowers a count lowers it here. In training
# 101 of the forward calls make results of ops out of views, so that callers may change them in place. torch's BatchNorm
# would be one call here, and several kernels on a GPU.
CASES = {
    "zipformer, inference": (False, NEVER, Counts(3078, 0, 257, 0, 1558)),
    "zipformer, training, nothing acts": (True, NEVER, Counts(3812, 6291, 752, 2878, 4620)),
    "zipformer, training, everything acts": (True, ALWAYS, Counts(4465, 13256, 1924, 3467, 6991)),
    "fast_conformer, inference": (False, NEVER, Counts(1918, 0, 173, 0, 834)),
    "fast_conformer, training": (True, NEVER, Counts(2214, 4282, 637, 2006, 2452)),
}


# Kernels of a recorded training step of the encoder and its front end, of torch and of fastasr.
RECORDED = {"torch": 1281, "fastasr": 2025}
MOST_RECORDED = 3350
# The same of a call in inference.
INFERENCE = {
    "zipformer": {"torch": 404, "fastasr": 388},
    "fast_conformer": {"torch": 231, "fastasr": 175},
    "e_branchformer": {"torch": 324, "fastasr": 204},
}
# Kernels of a recorded training step of a FastConformer.
PADDED = {"torch": 847, "fastasr": 522}
# Kernels of one of an E-Branchformer on a row. A dropout is four of torch's here, and two on a GPU.
ON_A_ROW = {"torch": 1302, "fastasr": 703}


class CountingTapes(TapeRecorder):
    """Counts the launches of Triton kernels in what is recorded."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.launches = gpu, 0

    def rehearse(self, function):
        super().rehearse(function)
        self.gpu.launches.clear()  # they hold tensors

    def record(self, function, recording):
        before = len(self.gpu.launches)
        found = super().record(function, recording)
        self.launches += len(self.gpu.launches) - before
        return found


def nodes(root):
    found, left = set(), [root]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left.extend(following for following, _ in node.next_functions)
    return found


def model_and_inputs(name, **changes):
    seeded(0)
    if name == "zipformer":
        sizes = ZIPFORMER | changes
        return upstream.steady(upstream.Encoder(sizes, zipformer)), upstream.example(2, 48)
    if name == "e_branchformer":
        sizes = {"output_size": 64, "attention_heads": 2, "cgmlp_linear_units": 128, "num_blocks": 17}
        model = EBranchformerEncoder(80, **sizes, linear_units=128, use_ffn=True, macaron_ffn=True)
        return model, (torch.randn(2, 64, 80), torch.tensor([64, 48]))
    sizes = {"width": 64, "layers": 17, "heads": 2, "hidden": 128, "channels": 16, "layer_drop": 0.0}
    valid = torch.arange(64) < torch.tensor([[64], [48]])
    return FastConformerEncoder(**sizes), (torch.randn(2, 64, 80), valid)


def norm_as_on_cuda(x, *arguments):
    """Computes LayerNorm in float32 under autocast, which CUDA's rules ask for and the CPU's do not."""
    if not torch.is_autocast_enabled("cpu"):
        return LAYER_NORM(x, *arguments)
    with torch.autocast("cpu", enabled=False):
        return LAYER_NORM(x.float(), *arguments)


def step(model, inputs, training):
    """Returns the calls of both passes, under autocast, and the nodes between them."""
    ahead, back = Calls(), Calls()
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16), ahead:
        y = model(*inputs)[0]
    if not training:
        return ahead, back, set()
    total = y.float().sum()
    between = nodes(total.grad_fn)
    with back:
        total.backward()
    return ahead, back, between


@pytest.mark.parametrize("case", CASES)
def test_counts_do_not_grow(case, monkeypatch):
    training, drawn, counts = CASES[case]
    model, inputs = model_and_inputs(case.partition(",")[0])
    model.train(training)
    monkeypatch.setattr(masks, "on_gpu", lambda device: True)  # a GPU computes less for padding
    monkeypatch.setattr(torch.nn.functional, "layer_norm", norm_as_on_cuda)
    monkeypatch.setattr(random, "random", lambda: drawn)
    with models_on_fake_gpu() as gpu:
        step(model, inputs, training)  # the first call fills caches
        model.zero_grad(set_to_none=True)
        gpu.launches.clear()
        ahead, back, between = step(model, inputs, training)
    kernels = ahead.kernels + back.kernels + len(gpu.launches)
    ahead, back = ahead.found, back.found
    found = Counts(ahead.total(), back.total(), len(gpu.launches), len(between), kernels)
    limits = [int(GROWTH * count) for count in counts]
    assert all(count <= limit for count, limit in zip(found, limits, strict=True)), (
        f"{found}, limits {limits}\nforward: {ahead.most_common(20)}\nbackward: {back.most_common(20)}\n"
        f"nodes: {Counter(type(node).__name__ for node in between).most_common(20)}\n"
        f"launches: {Counter(launch.name for launch in gpu.launches).most_common(20)}"
    )


def kernels_of(tapes):
    """Returns the kernels of what was recorded, and torch's calls by name."""
    calls = Counter(call[0]._schema.name for tape in tapes.tapes for call in tape.calls)
    del calls["aten::as_strided_"]  # a view
    return {"torch": calls.total(), "fastasr": tapes.launches}, calls


@pytest.mark.parametrize("chunk_size", [None, 32, pytest.param(-1, marks=pytest.mark.long)])
def test_a_zipformer_on_a_row(chunk_size, monkeypatch):
    monkeypatch.setattr(_linear, "MANY_ROWS", 0)
    chunks = {"causal": True, "chunk_size": (chunk_size,), "left_context_frames": (128,)}
    model, inputs = model_and_inputs("zipformer", **({} if chunk_size is None else chunks))
    model = model.train().encoder
    x, lengths = torch.randn(64, 2, 64), torch.tensor([64, 48])
    inputs = x, lengths, torch.arange(64) >= lengths[:, None]
    found = {}
    for on_a_row in (True, False):
        with models_on_fake_gpu() as gpu:
            tapes = CountingTapes(gpu)
            room = {"frames": 256, "recordings": 2, "longest": 128}  # of features, two for a frame of x
            options = room if on_a_row else {}
            model.ragged = on_a_row
            graphs = fastasr.Graphs(recorder=lambda tapes=tapes: tapes, after=0, **options)
            fastasr.accelerate(model, ragged=on_a_row, graphs=graphs)
            with torch.autocast("cpu", torch.bfloat16):
                model(*inputs)
        (kind,) = fastasr.graph_state(model)[""]
        assert kind.recorded == 1, kind.reason
        found[on_a_row] = kernels_of(tapes)
        fastasr.restore(model)
    (row, calls_of_row), (padded, calls) = found[True], found[False]
    more = calls_of_row - calls
    gathers = len(model.encoders)  # the masks of channels, which frames of one recording share
    most = sum(padded.values()) + gathers
    assert sum(row.values()) <= most, f"{row}, padded {padded}\n{more.most_common(30)}"


def test_kernels_of_a_recorded_step_do_not_grow(monkeypatch):
    monkeypatch.setattr(_linear, "MANY_ROWS", 0)  # bias gradients are added up as those of real batches
    model, inputs = model_and_inputs("zipformer")
    model.train()
    with models_on_fake_gpu() as gpu:
        tapes = CountingTapes(gpu)
        parts = [
            m for m in model.modules() if isinstance(m, zipformer.Zipformer | zipformer.Conv2dSubsampling)
        ]
        found = [graphed(m, tapes=tapes, after=0) for m in parts]
        with torch.autocast("cpu", torch.bfloat16):
            model(*inputs)
    assert len(parts) == 2
    assert not any(map(reasons, found))
    counts, calls = kernels_of(tapes)
    assert sum(counts.values()) <= MOST_RECORDED
    assert all(counts[key] <= int(GROWTH * RECORDED[key]) for key in RECORDED), (
        f"{counts}\n{calls.most_common(30)}"
    )


@pytest.fixture
def as_on_gpu(monkeypatch):
    for module in (layer, masks):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", norm_as_on_cuda)


@pytest.mark.parametrize("name", INFERENCE)
def test_kernels_of_a_recorded_call_do_not_grow(name, as_on_gpu):
    model, inputs = model_and_inputs(name)
    model.eval()
    with models_on_fake_gpu() as gpu, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tapes = CountingTapes(gpu)
        report = fastasr.accelerate(model, graphs=fastasr.Graphs(recorder=lambda: tapes, after=0))
        model(*inputs)
    assert set(report.graphs.values()) == {None}
    counts, calls = kernels_of(tapes)
    assert all(counts[key] <= int(GROWTH * INFERENCE[name][key]) for key in counts), (
        f"{counts}\n{calls.most_common(30)}"
    )


def recorded_step(name, on_a_row):
    """Returns the kernels of a recorded training step, and torch's calls by name."""
    model, inputs = model_and_inputs(name)
    model.train()
    with models_on_fake_gpu() as gpu:
        tapes = CountingTapes(gpu)
        if on_a_row:
            model.ragged = True
            options = {"frames": 128, "recordings": 2, "longest": 64, "recorder": lambda: tapes, "after": 0}
            fastasr.accelerate(model, ragged=True, graphs=fastasr.Graphs(**options))
        else:
            graphed(model, tapes=tapes, after=0)
        with torch.autocast("cpu", torch.bfloat16):
            model(*inputs)
    (kind,) = fastasr.graph_state(model)[""]
    assert kind.recorded == 1
    return kernels_of(tapes)


def test_a_recorded_row_has_no_more_kernels_than_a_padded_batch(as_on_gpu):
    padded, calls = recorded_step("fast_conformer", False)
    row, calls_of_row = recorded_step("fast_conformer", True)
    assert all(padded[key] <= int(GROWTH * PADDED[key]) for key in PADDED), (
        f"{padded}\n{calls.most_common(30)}"
    )
    more = calls_of_row - calls
    tables = 17  # of dR: attention zeroes one in each block, because some programs meet no frames
    most = sum(padded.values()) + tables
    assert sum(row.values()) <= most, f"{row}, padded {padded}\n{more.most_common(30)}"


def test_kernels_of_an_e_branchformer_on_a_row_do_not_grow(as_on_gpu, monkeypatch):
    monkeypatch.setattr(_linear, "MANY_ROWS", 0)
    row, calls = recorded_step("e_branchformer", True)
    assert all(row[key] <= int(GROWTH * ON_A_ROW[key]) for key in ON_A_ROW), f"{row}\n{calls.most_common(30)}"
