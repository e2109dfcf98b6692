# SPDX-License-Identifier: Apache-2.0
"""FastConformer without padding: a recording's output and gradients are those of the recording alone, in our encoder
and in transformers' swapped one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ragged_cases import each_of
from steps import as_on_cpu, close, gradients_by_name, moved, numbers, same_gradients, seeded, step
from tiny_parakeet import SIZES, STILL

import fastasr
from fastasr.models.common import ragged
from fastasr.models.fast_conformer import FastConformerEncoder

LENGTHS = {
    "mixed": [75, 50, 9, 1, 700, 33],
    "with an empty mask": [40, 0, 90],
    "one recording": [37],
    "one frame": [1, 1, 20],
    "equal": [64, 64, 64],
    "short ones that share a call": [90, 85, 80, 17, 24, 30, 1, 2],
}
KINDS = "ours", "swapped"
by_one_call_or_copies = pytest.mark.usefixtures("one_call_or_copies")
both = pytest.mark.parametrize("kind", KINDS)


def upstream(**options):
    transformers = pytest.importorskip("transformers")
    seeded(0)
    config = transformers.ParakeetEncoderConfig(**{**SIZES, **STILL, **options})
    model = moved(transformers.ParakeetEncoder(config), 0.03)
    for layer in model.layers:  # statistics of no default value
        layer.conv.norm.running_mean.normal_(0.0, 0.1)
        layer.conv.norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


def without_padding(model, kind):
    """Returns (a copy of the model that leaves padding out, its output for features and mask as a function)."""
    if kind == "swapped":
        model = copy.deepcopy(model)
        report = fastasr.accelerate(model, ragged=True)
        assert report.ragged == {"": None}
        return model, lambda x, mask: model(x, mask).last_hidden_state
    ours = FastConformerEncoder.from_config(model.config)
    ours.load_state_dict(model.state_dict())
    ours.to(next(model.parameters()).dtype).train(model.training).ragged = True
    return ours, lambda x, mask: ours(x, mask)[0]


def batch(lengths, dtype=torch.float64, more=5):
    """Returns features, 0 in padding, and the mask."""
    frames = max(lengths) + more
    x = torch.randn(len(lengths), frames, SIZES["num_mel_bins"], generator=numbers(1)).to(dtype)
    mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
    return x * mask[..., None], mask.long()


def out_frames(length):
    return -(-length // 8)


@each_of(LENGTHS, "kind", KINDS)
def test_each_recording_as_alone(lengths, kind):
    model = upstream().double()
    _, run = without_padding(model, kind)
    x, mask = batch(lengths)
    with torch.no_grad():
        found = run(x, mask)
        assert found.shape[:2] == (len(lengths), out_frames(x.shape[1]))
        for i, n in enumerate(lengths):
            if n:
                alone = model(x[i : i + 1, :n], torch.ones(1, n).long()).last_hidden_state[0]
                close(found[i, : len(alone)], alone, 1e-11)
            assert not found[i, out_frames(n) :].any()


@by_one_call_or_copies
@both
def test_padding_is_not_read(kind):
    """Upstream's front end reads one frame of it."""
    _, run = without_padding(upstream().double(), kind)
    x, mask = batch(LENGTHS["short ones that share a call"])
    with torch.no_grad():
        assert torch.equal(run(x, mask), run(x.masked_fill(mask[..., None] == 0, torch.nan), mask))


@each_of(LENGTHS, "kind", KINDS)
def test_gradients_as_of_each_recording_alone(lengths, kind):
    """With frozen statistics, which BatchNorm has in eval mode."""
    model = upstream().double()
    ours, run = without_padding(model, kind)
    x, mask = batch(lengths)
    weight = torch.randn(
        len(lengths), out_frames(x.shape[1]), SIZES["hidden_size"], generator=numbers(2)
    ).double()
    x.requires_grad_()
    found = gradients_by_name(ours, (run(x, mask) * weight).sum(), x)
    expected = 0.0
    for i, n in enumerate(lengths):
        if n:
            alone = model(x[i : i + 1, :n], torch.ones(1, n).long()).last_hidden_state
            expected = expected + (alone * weight[i, : alone.shape[1]]).sum()
    same_gradients(found, gradients_by_name(model, expected, x))


class NormOfFrames(torch.nn.BatchNorm1d):
    """BatchNorm whose statistics leave out the frames where ``valid`` (B, T) is False."""

    def forward(self, z):
        z = z.transpose(1, 2)
        y = F.batch_norm(
            z[self.valid],
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.1,
            self.eps,
        )
        return torch.zeros_like(z).masked_scatter(self.valid[..., None], y).transpose(1, 2)


@each_of(LENGTHS, "kind", KINDS)
def test_statistics_in_training_are_those_of_the_frames_that_exist(lengths, kind):
    if lengths == [37]:
        lengths = [37, 1]  # one frame alone has no variance
    model = upstream().double().train()
    ours, run = without_padding(model, kind)
    x, mask = batch(lengths)
    valid = torch.arange(out_frames(x.shape[1])) < torch.tensor([out_frames(n) for n in lengths])[:, None]
    for layer in model.layers:
        layer.conv.norm.__class__ = NormOfFrames
        layer.conv.norm.valid = valid
    y, expected = run(x, mask), model(x, mask).last_hidden_state
    close(y[valid], expected[valid], 1e-11)
    weight = torch.randn(y.shape, generator=numbers(2)).double() * valid[..., None]
    same_gradients(
        gradients_by_name(ours, (y * weight).sum()), gradients_by_name(model, (expected * weight).sum())
    )
    for a, b in zip(ours.layers, model.layers, strict=True):
        close(a.conv.norm.running_mean, b.conv.norm.running_mean, 1e-11)
        close(a.conv.norm.running_var, b.conv.norm.running_var, 1e-11)
        assert a.conv.norm.num_batches_tracked == 1


@both
@pytest.mark.parametrize("training", [False, True])
def test_autocast(kind, training):
    """The error of bfloat16 is that of the padded batch."""
    lengths = LENGTHS["mixed"]
    model = upstream().train(training)
    if training:
        for layer in model.layers:
            layer.conv.norm.eval()
    x, mask = batch(lengths, torch.float32)
    ours, run = without_padding(model, kind)
    for a, b in zip(ours.layers, model.layers, strict=True):
        a.conv.norm.train(b.conv.norm.training)
    valid = torch.arange(out_frames(x.shape[1])) < torch.tensor([out_frames(n) for n in lengths])[:, None]
    exact = copy.deepcopy(model).double()(x.double(), mask).last_hidden_state[valid]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(x, mask).last_hidden_state[valid].double()
        found = run(x, mask)[valid].double()
    assert (found - exact).norm() <= 1.2 * (theirs - exact).norm()
    if training:
        found.sin().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


@both
def test_float32(kind):
    model = upstream()
    _, run = without_padding(model, kind)
    x, mask = batch(LENGTHS["mixed"], torch.float32)
    with torch.no_grad():
        found, expected = run(x, mask), model(x, mask).last_hidden_state
    for i, n in enumerate(LENGTHS["mixed"]):
        close(found[i, : out_frames(n)], expected[i, : out_frames(n)])


@pytest.mark.gpu
@both
def test_on_a_gpu(kind, monkeypatch):
    """The errors of values and gradients in float32 are those of the CPU; autocast runs."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = upstream()

    def results(device, dtype):
        ours, run = without_padding(copy.deepcopy(model).to(device, dtype), kind)
        ours.to(device)
        x, mask = (t.to(device) for t in batch(LENGTHS["mixed"], torch.float32))
        x = x.to(dtype).requires_grad_()
        y = run(x, mask)
        found = {"y": y.detach()} | gradients_by_name(ours, y.sin().sum(), x)
        return {name: value.cpu() for name, value in found.items()}

    as_on_cpu(results, "y", "features")


@both
def test_a_training_step_with_dropout_repeats_from_its_seed(kind):
    rates = {"dropout": 0.1, "activation_dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.3}
    ours, run = without_padding(upstream(**rates).train(), kind)
    inputs = batch(LENGTHS["mixed"], torch.float32)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = ours

        def forward(self, x, mask):
            return run(x, mask)

    model = Model()
    state = copy.deepcopy(model.state_dict())
    first, draws = step(model, *inputs)
    model.load_state_dict(state)
    again, same_draws = step(model, *inputs)
    assert draws == same_draws
    for name, value in first.items():
        assert value is None or torch.equal(value, again[name]), name
    model.load_state_dict(state)
    assert not torch.equal(step(model, *inputs, seed=1)[0]["y"], first["y"])


def swapped(**options):
    model = upstream(**options)
    fastasr.accelerate(model, ragged=True)
    return model


def test_calls_that_need_padding_say_so_and_are_upstreams(caplog):
    x, mask = batch(LENGTHS["mixed"], torch.float32)
    model, expected = swapped(), upstream()
    found = model(x, mask, output_hidden_states=True)
    assert "the call asks for output_hidden_states" in caplog.text
    close(found.hidden_states, expected(x, mask, output_hidden_states=True).hidden_states)
    caplog.clear()
    assert not model(x, mask).last_hidden_state[1, -1].any()  # transformers' own hooks stay, and do no harm
    assert not caplog.records
    seen = []
    model.layers[1].norm_conv.register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    model(x, mask)
    assert "layers.1.norm_conv has a hook" in caplog.text
    assert seen == [(len(x), out_frames(x.shape[1]), SIZES["hidden_size"])]
    now = fastasr.explain(model)
    assert now.ragged[""].startswith("layers.1.norm_conv has a hook")
    assert "runs on padding: layers.1.norm_conv has a hook" in now[""].reason


def test_upstreams_draws_need_padding(caplog):
    model = swapped(attention_dropout=0.5).train()
    with fastasr.upstream_draws():
        model(*batch(LENGTHS["mixed"], torch.float32))
    assert "drawn as upstream" in caplog.text


def test_a_batch_without_padding_runs_as_ever():
    model = swapped()
    x, mask = batch(LENGTHS["equal"], torch.float32, more=0)
    with torch.no_grad():
        expected = model(x, mask).last_hidden_state
        with ragged.padded():
            assert torch.equal(model(x, mask).last_hidden_state, expected)


def test_reports_restores_and_verifies():
    x, mask = batch(LENGTHS["mixed"], torch.float32)
    model = upstream()
    assert fastasr.accelerate(model).ragged is None
    with torch.no_grad():
        padded = model(x, mask).last_hidden_state
    report = fastasr.accelerate(model, ragged=True, verify=(x, mask))
    assert report.ok, str(report)
    assert report[""].reason == "already swapped; runs without padding"
    assert "without padding: 1 of 1 known encoders" in report.summary
    with torch.no_grad():
        assert not model(x, mask).last_hidden_state[1, -1].any()
    assert fastasr.verify(model, (x, mask)).ok
    assert fastasr.explain(model)[""].reason == "already swapped; runs without padding"
    assert fastasr.explain(model).ragged == {"": None}
    assert fastasr.explain(upstream()).ragged is None
    twin = copy.deepcopy(model)
    with fastasr.eager_mode(model), torch.no_grad():
        assert model(x, mask).last_hidden_state[1, -1].any()
    with torch.no_grad():
        assert torch.equal(model(x, mask).last_hidden_state, twin(x, mask).last_hidden_state)
    fastasr.restore(model)
    assert "forward" not in vars(model)
    fastasr.accelerate(model)
    with torch.no_grad():
        assert torch.equal(model(x, mask).last_hidden_state, padded)


def test_an_encoder_whose_attention_is_not_swapped_says_so():
    model = upstream()
    report = fastasr.accelerate(model, ragged=True, exclude="layers.1.self_attn")
    assert report.ragged == {"": "the attention of layer 1 is not swapped"}
    assert "the attention of layer 1 is not swapped" in report.summary
    with torch.no_grad():
        close(
            model(*batch([75, 50], torch.float32)).last_hidden_state[0, :9],
            upstream()(*batch([75, 50], torch.float32)).last_hidden_state[0, :9],
        )


def test_gradient_checkpointing():
    model = swapped().train()
    x, mask = batch(LENGTHS["mixed"], torch.float32)
    found = []
    for _ in range(2):
        loss = model(x, mask).last_hidden_state.sin().sum()
        found.append(gradients_by_name(model, loss))
        model.gradient_checkpointing_enable()
    for name, value in found[0].items():
        close(found[1][name], value, 1e-4, name)


def test_a_model_without_a_known_encoder_says_so():
    assert fastasr.accelerate(torch.nn.Linear(2, 2), ragged=True).ragged == {}
