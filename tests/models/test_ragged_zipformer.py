# SPDX-License-Identifier: Apache-2.0
"""Zipformer's encoder without padding: a recording's output and gradients are those of the recording alone."""

import copy
import random
import sys

import pytest
import torch
from ragged_cases import each_of
from steps import as_on_cpu, close, gradients_by_name, moved, numbers, same_gradients, seeded, set_batch_count

import fastasr
from fastasr.models.common.ragged import Packing
from fastasr.models.zipformer import Zipformer, checkpoint, ragged
from fastasr.ops import whitening_gradient

SIZES = {
    "downsampling_factor": (1, 2, 4),
    "encoder_dim": (24, 32, 16),
    "num_encoder_layers": 1,
    "encoder_unmasked_dim": (16, 20, 12),
    "query_head_dim": 8,
    "value_head_dim": 6,
    "num_heads": 2,
    "feedforward_dim": 32,
    "cnn_module_kernel": (7, 5, 3),
    "pos_dim": 16,
    "warmup_batches": 10.0,
}
LENGTHS = {
    "mixed": [75, 50, 9, 1, 150, 33],
    "longer than a chunk": [75, 50, 9, 33],
    "with an empty mask": [40, 0, 90],
    "one recording": [37],
    "one frame": [1, 1, 20],
    "equal": [64, 64, 64],
    "short ones that share a call": [90, 85, 17, 24, 30, 1, 2],
}
by_one_call_or_copies = pytest.mark.usefixtures("one_call_or_copies")
causal_or_not = pytest.mark.parametrize("causal", [False, True])


def encoder(causal=False, **options):
    seeded(0)
    chunks = {"causal": True, "chunk_size": (8,), "left_context_frames": (32,)} if causal else {}
    model = set_batch_count(Zipformer(**SIZES, **chunks, **options), 20000.0)
    return moved(model, 0.03).eval()


def batch(lengths, dtype=torch.float64, more=5):
    """Returns frames, their numbers and the mask. Padding holds noise."""
    frames = max(lengths) + more
    x = torch.randn(frames, len(lengths), SIZES["encoder_dim"][0], generator=numbers(1)).to(dtype)
    lengths = torch.tensor(lengths)
    return x, lengths, torch.arange(frames) >= lengths[:, None]


def without_padding(model):
    model = copy.deepcopy(model)
    model.ragged = True
    return model


def without_regularisers(model, balancers=False):
    """They change gradients by what a whole batch holds. ``balancers`` stay if True."""
    for module in model.modules():
        if type(module).__name__ == "Balancer" and not balancers:
            del module.prob  # a schedule, which is a module
            module.prob = 0.0
        elif type(module).__name__ == "Whiten":
            module.grad_scale = 0.0
    return model


def alone(model, x, length):
    return model(x[:length], torch.tensor([length]))[0]


@each_of(LENGTHS, "causal", [False, True])
def test_each_recording_as_alone(lengths, causal):
    model = encoder(causal).double()
    x, x_lens, mask = batch(lengths)
    with torch.no_grad():
        found, counts = without_padding(model)(x, x_lens, mask)
        assert torch.equal(counts, (x_lens + 1) // 2)
        assert found.shape[:2] == ((len(x) + 1) // 2, len(lengths))
        for i, n in enumerate(lengths):
            if n:
                close(found[: counts[i], i], alone(model, x[:, i : i + 1], n)[:, 0], 1e-11)
            assert not found[counts[i] :, i].any()


@each_of(LENGTHS, "causal", [False, True])
def test_gradients_as_of_each_recording_alone(lengths, causal):
    model = without_regularisers(encoder(causal).double())
    ours = without_padding(model)
    x, x_lens, mask = batch(lengths)
    x.requires_grad_()
    y = ours(x, x_lens, mask)[0]
    weight = torch.randn(y.shape, generator=numbers(2)).double()
    found = gradients_by_name(ours, (y * weight).sum(), x)
    loss = 0.0
    for i, n in enumerate(lengths):
        if n:
            y = alone(model, x[:, i : i + 1], n)
            loss = loss + (y * weight[: len(y), i : i + 1]).sum()
    expected = gradients_by_name(model, loss, x)
    same_gradients(found, expected)


@each_of([[37], [150], [40, 40, 40], [1, 1]], "causal", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_training_step_as_without_padding(lengths, causal, seed):
    """Where lengths are equal, every draw is that of the batch without padding: dropped channels, sequences and layers,
    dropout, and the regularisers' calls."""
    model = encoder(causal).double().train()
    if max(lengths) == 1:  # Whiten's change has no direction, see the test below
        without_regularisers(model, balancers=True)
    results = []
    for each, more in ((without_padding(model), 5), (model, 0)):
        x, x_lens, mask = batch(lengths, more=5)
        x, mask = x[: max(lengths) + more].detach().requires_grad_(), mask[:, : max(lengths) + more]
        seeded(seed)
        y = each(x, x_lens, mask)[0][: (lengths[0] + 1) // 2]
        loss = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
        found = gradients_by_name(each, loss, x)
        found["x"] = found["x"][: lengths[0]]
        results.append((y.detach(), found, torch.get_rng_state(), random.getstate()))
    (y, found, state, of_python), (expected_y, expected, *states) = results
    assert torch.equal(state, states[0])
    assert of_python == states[1]
    close(y, expected_y, 1e-10)
    same_gradients(found, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_whitening_of_two_frames_has_no_direction(groups):
    """Of centred frames ±a, S = 2aaᵀ and w d = 2|a|², so v = a (S − w d I) is 0: Whiten scales its rounding up to the
    share ``grad_scale`` of the gradient, in float64 too. With several groups, of which each has its S but all one d, v
    is not 0. A last bit more or less in x then changes nothing."""
    of_rounding = []
    for seed in range(8):
        x, g = torch.randn(2, 2, 8, generator=numbers(seed)).double()
        one, other = (whitening_gradient(g, x * (1 + e), groups, 0.0, 0.02)[0] - g for e in (0.0, 1e-15))
        of_rounding.append((one - other).norm() / g.norm())
    assert max(of_rounding) > 1e-3 if groups == 1 else max(of_rounding) < 1e-10


@by_one_call_or_copies
@causal_or_not
def test_a_training_step_of_unequal_lengths(causal):
    """Each sequence is dropped or kept as a whole."""
    model = without_padding(encoder(causal).train())
    x, x_lens, mask = batch(LENGTHS["mixed"], torch.float32)
    for seed in range(4):
        seeded(seed)
        y = model(x, x_lens, mask)[0]
        (g,) = torch.autograd.grad(y.sin().sum(), model.encoders[1].encoder.layers[0].norm.bias)
        assert y.isfinite().all()
        assert g.isfinite().all()
    packing = Packing([3, 0, 2], x.device)
    assert packing.repeated(torch.tensor([[1.0], [5.0], [2.0]])).flatten().tolist() == [1, 1, 1, 2, 2]


def test_a_convolution_of_another_class():
    """It is called for each recording, and sees no frames of its neighbours."""
    model = encoder().double()
    for stack in model.encoders:
        layer = getattr(stack, "encoder", stack).layers[0]
        layer.conv_module1.depthwise_conv = torch.nn.Sequential(layer.conv_module1.depthwise_conv)
    x, x_lens, mask = batch(LENGTHS["mixed"])
    with torch.no_grad():
        found, counts = without_padding(model)(x, x_lens, mask)
        for i, n in enumerate(LENGTHS["mixed"]):
            close(found[: counts[i], i], alone(model, x[:, i : i + 1], n)[:, 0], 1e-11)


def test_autocast():
    """The error of bfloat16 is that of the padded batch."""
    model = encoder()
    x, x_lens, mask = batch(LENGTHS["mixed"], torch.float32)
    ours = without_padding(model)
    with torch.no_grad():
        exact = [
            alone(copy.deepcopy(model).double(), x[:, i : i + 1].double(), n)[:, 0]
            for i, n in enumerate(x_lens)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(x, x_lens, mask)[0]
            theirs = [alone(model, x[:, i : i + 1], n)[:, 0] for i, n in enumerate(x_lens)]
    found = torch.cat([found[: len(e), i] for i, e in enumerate(exact)]).double()
    exact, theirs = torch.cat(exact), torch.cat(theirs).double()
    assert (found - exact).norm() <= 1.2 * (theirs - exact).norm()


@pytest.mark.gpu
@causal_or_not
def test_on_a_gpu(causal, monkeypatch):
    """The errors of values and gradients in float32 are those of the CPU; autocast runs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(ragged, "LEAST_ON_GPU", 0)
    model = without_padding(without_regularisers(encoder(causal)))
    x, x_lens, mask = batch(LENGTHS["mixed"], torch.float32)

    def results(device, dtype):
        ours = copy.deepcopy(model).to(device, dtype)
        frames = x.to(device, dtype).requires_grad_()
        y = ours(frames, x_lens.to(device), mask.to(device))[0]
        assert not y.detach().transpose(0, 1)[mask[:, ::2].to(device)].any()
        found = {"y": y.detach()} | gradients_by_name(ours, y.sin().sum(), frames)
        return {name: value.cpu() for name, value in found.items()}

    as_on_cpu(results, "y", "frames")


def test_long_recordings_without_weights_in_memory(monkeypatch):
    layers = sys.modules["fastasr.models.zipformer.layer"]
    monkeypatch.setattr(layers, "MOST_WEIGHT_BYTES", 0)
    monkeypatch.setattr(layers, "MOST_WEIGHT_BYTES_WITH_GRADIENTS", 0)
    test_each_recording_as_alone(LENGTHS["mixed"], False)
    test_gradients_as_of_each_recording_alone(LENGTHS["mixed"], False)
    test_a_training_step_as_without_padding([40, 40, 40], False, 0)
    attention = sys.modules["fastasr.models.zipformer.attention"]
    monkeypatch.setattr(attention, "PENALISED_CALLS", 1.0)
    monkeypatch.setattr(attention, "SCORE_LIMIT", 0.1)
    for seed in range(3):  # some skip positions
        test_a_training_step_as_without_padding([40, 40, 40], False, seed)


def test_a_gpu_computes_padding_where_that_takes_less_time(monkeypatch, caplog):
    monkeypatch.setattr("fastasr.models.common.ragged.on_gpu", lambda device: True)
    ours = without_padding(encoder())
    x, x_lens, mask = batch(LENGTHS["mixed"], torch.float32)
    with torch.no_grad():
        assert ours(x, x_lens, mask)[0][-1].any()
    assert ours(x, x_lens, mask)[0][-1].any()
    assert caplog.text.count("on a GPU that takes less time") == 1
    assert "on a GPU" in fastasr.why(ours)["forward"]
    monkeypatch.setattr(ragged, "LEAST_ON_GPU", 100)
    assert not ours(x, x_lens, mask)[0][-1].any()


@pytest.mark.parametrize(
    "why", ["a forward hook", "a backward hook", "a hook of a stack", "a mask with holes"]
)
def test_calls_that_need_padding_say_so(why, caplog):
    model = encoder()
    ours = without_padding(model)
    x, x_lens, mask = batch(LENGTHS["mixed"], torch.float32)
    expected = "encoders.0.layers.0.norm has a hook"
    with torch.no_grad():
        assert not ours(x, x_lens, mask)[0][-1].any()  # a hook that comes after a call is seen too
    if why == "a forward hook":
        ours.encoders[0].layers[0].norm.register_forward_hook(lambda module, inputs, y: None)
    elif why == "a backward hook":
        hooked = copy.deepcopy(ours.encoders[0].layers[0])
        hooked.norm.register_full_backward_hook(lambda module, given, got: None)
        ours.encoders[0].layers[0] = hooked
    elif why == "a hook of a stack":
        ours.encoders[1].register_forward_pre_hook(of_fsdp)
        expected = "encoders.1 has a hook, but packed frames do not call it"
    else:
        mask[0, 3] = True
        expected = "not one of lengths"
    with torch.no_grad():
        assert torch.equal(ours(x, x_lens, mask)[0], model(x, x_lens, mask)[0])
    assert expected in caplog.text


def of_fsdp(module, inputs):
    """Stands for a hook of FSDP."""


of_fsdp.__module__ = "torch.distributed.fsdp"


def test_activation_checkpointing_around_the_encoder():
    model = without_padding(encoder().double().train())
    x, x_lens, mask = batch(LENGTHS["mixed"])
    x.requires_grad_()
    results = []
    for call in (model, lambda *inputs: checkpoint(model, *inputs)):
        seeded(3)
        results.append(gradients_by_name(model, call(x, x_lens, mask)[0].sin().sum(), x))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
