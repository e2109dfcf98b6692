# SPDX-License-Identifier: Apache-2.0
"""The reference of verify is the user's model as it is: with forwards, hooks, parametrizations and adapters that the
user gave to modules inside swapped ones. What a swapped forward overlooks is rolled back, what it runs is kept."""

import types

import families
import pytest
import torch
from ambient import ambient
from steps import close, seeded
from tiny_parakeet import SIZES
from torch.nn.utils import parametrize

import fastasr
from fastasr import ops


def _emformer():
    emformer = pytest.importorskip("torchaudio.models.emformer")
    model = emformer.Emformer(
        12, 3, 20, 1, 4, left_context_length=5, right_context_length=2, max_memory_size=2
    )
    return model, (torch.randn(2, 18, 12), torch.tensor([16, 9]))


def _parakeet():
    transformers = pytest.importorskip("transformers")
    model = transformers.ParakeetEncoder(
        transformers.ParakeetEncoderConfig(**SIZES | {"num_hidden_layers": 1})
    )
    return model, (torch.randn(2, 40, SIZES["num_mel_bins"]),)


MODELS = {"Emformer": _emformer, "Parakeet": _parakeet}


def _linears(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def _forward_around_its_own(linear):
    own = linear.forward
    linear.forward = lambda x: 2 * own(x)


def _forward_as_a_default(linear):
    linear.forward = lambda x, own=linear.forward: own(x) + 0.5


def _forward_with_a_captured_weight(linear):
    weight = linear.weight
    linear.forward = lambda x: torch.nn.functional.linear(x, weight) - 1


def _method(linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.abs(), self.bias)

    linear.forward = types.MethodType(forward, linear)


def _adapter_beside_it(linear):
    own, adapter = linear.forward, torch.nn.Linear(linear.in_features, linear.out_features)
    linear.forward = lambda x: own(x) + adapter(x)


def _hook(linear):
    linear.register_forward_hook(lambda module, args, y: -y)


def _pre_hook(linear):
    linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


class _Double(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def _parametrization(linear):
    parametrize.register_parametrization(linear, "weight", _Double())


def _hook_of_a_gradient(linear):
    linear.weight.register_hook(lambda gradient: 3 * gradient)


CHANGES = (
    _forward_around_its_own,
    _forward_as_a_default,
    _forward_with_a_captured_weight,
    _method,
    _adapter_beside_it,
    _hook,
    _pre_hook,
    _parametrization,
    _hook_of_a_gradient,
)


def _outputs(model, inputs):
    """Returns the output and the gradients of the parameters."""
    with torch.random.fork_rng():
        seeded("outputs")
        y = model(*inputs)
    y = y[0] if isinstance(y, tuple) else getattr(y, "last_hidden_state", y)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(y.sin().sum(), parameters, materialize_grads=True)
    return [y.detach(), *gradients]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("when", ["before the swap", "after the swap"])
def test_what_runs_afterwards_is_the_users_model(name, change, when):
    seeded(3)
    model, inputs = MODELS[name]()
    model.eval()
    if when == "after the swap":
        fastasr.accelerate(model)
    for linear in _linears(model):
        change(linear)
    with fastasr.eager_mode(model):
        expected = _outputs(model, inputs)
    if when == "after the swap":
        report = fastasr.verify(model, inputs)
    else:
        report = fastasr.accelerate(model, verify=inputs)
    assert report.verified
    for row in report.rows:
        assert "float64" not in row.reason
        if row.errors:
            assert row.errors["upstream_values"] < 1e-4
    largest = max(g.abs().max() for g in expected[1:])
    found = _outputs(model, inputs)
    close(found[0], expected[0], 1e-4)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a - b).abs().max() < 1e-3 * largest


def test_each_run_gets_the_inputs_as_they_came(monkeypatch):
    """fastasr's forward overwrites its input here, after which upstream's code runs in float64 on inputs near it."""
    scaling = pytest.importorskip("zipformer.modules.scaling", reason="upstream's package is not installed")
    model, x = torch.nn.Sequential(scaling.BiasNorm(8)), torch.randn(3, 8)
    fastasr.accelerate(model)
    ours, given = ops.bias_norm, x.clone()

    def overwriting(x, *args, **kwargs):
        y = ours(x, *args, **kwargs) * (1 + 1e-6)  # so far off that the runs near it are needed
        x.zero_()
        return y

    monkeypatch.setattr(ops, "bias_norm", overwriting)
    row = fastasr.verify(model, x, gradients=False)["0"]
    assert row.errors["upstream_values"] < 1e-6
    assert 5e-7 < row.errors["values"] < 2e-6
    assert torch.equal(x, given)


@pytest.mark.parametrize("factor", [2.0, 2.1])
def test_a_result_in_the_memory_of_the_input(factor, monkeypatch):
    scaling = pytest.importorskip("zipformer.modules.scaling", reason="upstream's package is not installed")
    model, x = torch.nn.Sequential(scaling.BiasNorm(8)), torch.randn(3, 8)
    fastasr.accelerate(model)
    monkeypatch.setattr(scaling.BiasNorm, "forward", lambda self, x: x.mul_(2))
    monkeypatch.setattr(ops, "bias_norm", lambda x, *args, **kwargs: x.mul_(factor))
    assert fastasr.verify(model, x, gradients=False).ok == (factor == 2)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_without_a_run_in_float64_the_report_says_so(factor, monkeypatch):
    """The forward of a submodule multiplies by a float32 tensor that it holds where nothing can be exchanged."""
    scaling = pytest.importorskip("zipformer.modules.scaling", reason="upstream's package is not installed")
    norm, x = scaling.BiasNorm(8), torch.randn(3, 8)
    model = torch.nn.Sequential(norm)
    fastasr.accelerate(model)
    held, upstream = (torch.eye(8),), scaling.BiasNorm.forward
    monkeypatch.setattr(scaling.BiasNorm, "forward", lambda self, x: upstream(self, x) @ held[0] * factor)
    row = fastasr.verify(model, x)["0"]
    if factor == 1.0:
        assert "inference compared without a run in float64: RuntimeError: expected" in row.reason
        assert "training compared without a run in float64" in row.reason
    else:
        assert row.status == "rolled back"


# In float64 upstream makes zeros, masks and tables in float32, or NaN at padding, which other layers get.
@pytest.mark.parametrize("name", ["nemo joint", "mega rotary", "gemma 3n"])
def test_layers_that_are_more_exact_stay(name):
    with ambient(torch.float64):
        model, run = families.make(name)
    report = fastasr.accelerate(model.double(), verify=run)
    assert not report.rolled_back, report
    assert ("NaN" in str(report.to_dict())) == (name == "gemma 3n")
