# SPDX-License-Identifier: Apache-2.0
"""Whatever the code of a model does while it is verified, the model, random states and modes are as before, to the bit.

The models hold modules that meddle: with weights, gradients, flags, lists, hooks, random numbers and torch's modes,
when their mode changes, when they run and when somebody reads their attributes, and that raise errors at any of these.
"""

import collections
import random
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import seeded
from tiny_parakeet import SIZES

import fastasr
from fastasr.ops import _reduced_weights
from fastasr.swap.state import ModelState

pytest.importorskip("transformers", reason="upstream's package is not installed")
scaling = pytest.importorskip("zipformer.modules.scaling", reason="upstream's package is not installed")


def picture(model):
    """Returns all that can be compared of a model and of what surrounds it, in plain values."""
    seen = set()

    def of(value):
        if isinstance(value, torch.Tensor):
            found = [type(value).__name__, id(value), value.data_ptr(), value.dtype, tuple(value.stride())]
            found += [value.is_leaf, value.requires_grad, value.detach().contiguous().numpy().tobytes()]
            if value.is_leaf:
                found += [of(value.grad), of(value._backward_hooks)]
            return found
        if isinstance(value, (int, float, str, bool, type(None))):
            return value
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
            return id(value)
        if id(value) in seen:
            return id(value)
        seen.add(id(value))
        if isinstance(value, dict):
            return [id(value), *((str(key), of(held)) for key, held in value.items())]
        if isinstance(value, (list, tuple, set, collections.deque)):
            return [id(value), *map(of, value)]
        if isinstance(value, torch.Generator):
            return value.get_state().tolist()
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, np.ndarray):
            return value.tobytes()
        return [type(value).__name__, id(value), of(vars(value))] if hasattr(value, "__dict__") else id(value)

    modes = (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
        torch.is_anomaly_enabled(),
        torch.backends.mkldnn.enabled,
    )
    generators = random.getstate(), torch.get_rng_state().tolist(), [str(s) for s in np.random.get_state()]
    hooks = len(torch.nn.modules.module._global_forward_hooks)
    return {name: of(module) for name, module in model.named_modules()}, modes, generators, hooks


def different(before, after):
    """Returns the parts of two pictures that differ."""
    names = [n for n in {*before[0], *after[0]} if before[0].get(n) != after[0].get(n)]
    return names + [i for i in (1, 2, 3) if before[i] != after[i]]


class Clock:
    """Counts what meddlers do, where no state of a model is kept, and raises an error at the chosen time."""

    now, at, error = 0, None, None

    @classmethod
    def tick(cls):
        cls.now += 1
        if cls.now == cls.at:
            raise cls.error(f"at {cls.now}")


def _merge(m):
    m.merged = not m.merged
    m.weight.data += 1.0 if m.merged else -1.0  # which is not exact


def _register(m):
    m.register_buffer(f"late{len(m._buffers)}", torch.ones(2))


def _accumulate(m):
    with torch.no_grad():
        if m.weight.grad is None:
            m.weight.grad = torch.ones_like(m.weight)
        else:
            m.weight.grad.add_(1)


def _in_place(m):
    with torch.no_grad():
        m.weight.mul_(1.25)
        m.steps.add_(1)


def _flag(m):
    m.plain.flag += 1
    m.plain.inner.flag = m.merged
    m.numbers[0] += 1


def _collect(m):
    m.log.append(m.training)
    m.table["calls"] = m.table.get("calls", 0) + 1
    m.table.setdefault("tensors", []).append(m.weight.detach().clone())
    m.kinds.add(len(m.kinds))
    m.recent.append(torch.zeros(1))


def _hook(m):
    m.register_forward_hook(lambda *_: None)
    m.register_state_dict_pre_hook(lambda *_: None)
    if m.weight.requires_grad:
        m.weight.register_hook(lambda g: g)


def _draw(m):
    random.random(), np.random.rand(), torch.rand(1)
    m.own.random(), torch.rand(1, generator=m.generator)


def _structure(m):
    m.add_module(f"extra{len(m._modules)}", torch.nn.Linear(1, 1))
    m.unregistered[0].eval()
    m.unregistered[0].weight.data.zero_()


def _own_modes(m):
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("medium")
    torch.set_anomaly_enabled(not torch.is_anomaly_enabled())
    torch.nn.modules.module.register_module_forward_hook(lambda *_: None)


def _replace(m):
    m.weight = torch.nn.Parameter(m.weight.detach() * 0.5)


def _move(m):
    m.weight.data = m.weight.data.clone() * 2


def _freeze(m):
    m.weight.requires_grad_(not m.weight.requires_grad)


def _mode(m):
    m.unregistered[0].train(not m.unregistered[0].training)
    vars(m)["training"] = not m.training


ACTIONS = (
    _merge,
    _register,
    _accumulate,
    _in_place,
    _flag,
    _collect,
    _hook,
    _draw,
    _structure,
    _own_modes,
    _replace,
    _move,
    _freeze,
    _mode,
)


class Meddler(torch.nn.Linear):
    """A linear layer whose ``actions`` run at ``train``, ``eval``, ``forward`` and the reading of attributes."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.actions, self.merged, self.log, self.table, self.kinds = {}, False, [], {}, {0}
        self.recent, self.numbers = collections.deque(maxlen=2), np.zeros(2)
        self.plain = types.SimpleNamespace(flag=0, inner=types.SimpleNamespace(flag=None))
        self.own, self.generator = random.Random(1), torch.Generator().manual_seed(1)
        self.unregistered = [torch.nn.Linear(1, 1)]
        self.register_buffer("steps", torch.zeros(()))

    def _act(self, event):
        actions = vars(self).get("actions", {}).get(event, ())
        if not actions or vars(self).get("acting"):
            return
        vars(self)["acting"] = True
        try:
            for action in actions:
                Clock.tick()
                action(self)
        finally:
            vars(self)["acting"] = False

    def train(self, mode=True):
        self._act("train" if mode else "eval")
        return super().train(mode)

    def forward(self, x):
        self._act("forward")
        return super().forward(x) + 0 * self.steps

    def __getattr__(self, name):
        if name == "bias":
            self._act("getattr")
        return super().__getattr__(name)


def meddling(actions):
    """Returns a model with meddlers inside swapped layers and beside them, and its inputs."""
    from transformers import ParakeetEncoderConfig
    from transformers.models.parakeet.modeling_parakeet import ParakeetEncoderFeedForward

    seeded("meddling")
    config = ParakeetEncoderConfig(**SIZES)
    layer, size = ParakeetEncoderFeedForward(config), SIZES["hidden_size"]
    layer.linear1 = Meddler(size, SIZES["intermediate_size"])
    model = torch.nn.Sequential(
        layer, scaling.BiasNorm(size), Meddler(size, size), torch.nn.Linear(size, size)
    )
    model.append(ParakeetEncoderFeedForward(config))
    _meddle(model, actions)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    return model, torch.randn(3, size)


events = st.dictionaries(
    st.sampled_from(("train", "eval", "forward", "getattr")),
    st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=4),
    min_size=1,
)
errors = st.one_of(st.none(), st.tuples(st.integers(1, 60), st.sampled_from((ValueError, KeyboardInterrupt))))
properties = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))


def _meddle(model, actions):
    for module in model.modules():
        if isinstance(module, Meddler):
            module.actions = actions


def _run_until(error, run):
    Clock.now, (Clock.at, Clock.error) = 0, error or (None, None)
    try:
        return run()
    except (ValueError, KeyboardInterrupt):
        return None
    finally:
        Clock.at = None


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__.strip("_"))
def test_each_action(action):
    model, x = meddling({})
    fastasr.accelerate(model)
    _meddle(model, {event: [action] for event in ("train", "eval", "forward", "getattr")})
    before = picture(model)
    assert fastasr.verify(model, x).ok
    assert different(before, picture(model)) == []
    _meddle(model, {"forward": [action]})
    before = picture(model)
    with ModelState(model):
        model(x)
        assert different(before, picture(model)) != []  # it would show


@properties
@given(actions=events, error=errors, training=st.booleans())
def test_verify(actions, error, training):
    model, x = meddling({})
    fastasr.accelerate(model.train(training))
    _meddle(model, actions)
    before = picture(model)
    _run_until(error, lambda: fastasr.verify(model, x, rollback=False))
    assert different(before, picture(model)) == []


@properties
@given(actions=events, error=errors, training=st.booleans())
def test_accelerate(actions, error, training):
    model, x = meddling({})
    model.train(training)
    _meddle(model, actions)
    before = picture(model)
    report = _run_until(error, lambda: fastasr.accelerate(model, verify=x))
    if report is not None:
        assert report.verified
        fastasr.restore(model)
    assert different(before, picture(model)) == []


def _adapted():
    """Returns a model whose swapped layers hold adapters that ``eval`` merges into their weights, and its inputs."""
    loralib = pytest.importorskip("loralib", reason="the package is not installed")
    from transformers import ParakeetEncoder, ParakeetEncoderConfig

    seeded("adapted")
    encoder = ParakeetEncoder(ParakeetEncoderConfig(**SIZES))
    size, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    for layer in encoder.layers:
        layer.self_attn.q_proj = loralib.Linear(size, size, r=4)
        layer.self_attn.relative_k_proj = loralib.Linear(size, size, r=4, bias=False)
        layer.feed_forward1.linear1 = loralib.Linear(size, inner, r=4)
    for name, p in encoder.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p)
    return encoder, {"input_features": torch.randn(2, 60, SIZES["num_mel_bins"])}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_adapters_that_are_merged_into_weights(mode):
    model, inputs = _adapted()
    getattr(model, mode)()
    before = picture(model)
    report = fastasr.accelerate(model, verify=inputs)
    assert report.ok, str(report)
    assert "gradients" in report["layers.0.self_attn"].errors
    fastasr.restore(model)
    assert different(before, picture(model)) == []
    fastasr.accelerate(model)
    with torch.no_grad():
        swapped = model.eval()(**inputs).last_hidden_state
        fastasr.restore(model)
        torch.testing.assert_close(swapped, model(**inputs).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_training_is_compared_with_the_adapter_beside_the_weight(monkeypatch):
    """The module is compared in the modes in which the user's model runs: merged in eval, not merged in training."""
    model, inputs = _adapted()
    found = set()
    layer = model.layers[0].self_attn.q_proj
    own = type(layer).forward

    def forward(self, x):
        if self is layer:
            found.add((self.training, self.merged))
        return own(self, x)

    monkeypatch.setattr(type(layer), "forward", forward)
    fastasr.accelerate(model.eval(), verify=inputs)
    assert found == {(False, True), (True, False)}


def test_a_graph_from_before_runs_backward_afterwards():
    """Nothing is written that has not changed, so no version moves, and no memory."""
    model, x = meddling({"train": [_merge], "eval": [_merge]})
    fastasr.accelerate(model)
    loss = model(x).sum()
    versions = [(p._version, p.data_ptr()) for p in model.parameters()]
    fastasr.verify(model, x)
    assert versions == [(p._version, p.data_ptr()) for p in model.parameters()]
    loss.backward()


def test_inside_inference_mode():
    model, x = torch.nn.Sequential(torch.nn.BatchNorm1d(8), scaling.BiasNorm(8)), torch.randn(3, 8)
    fastasr.accelerate(model)
    before = picture(model)
    with torch.inference_mode():
        report = fastasr.verify(model, x)
    assert report["1"].errors
    assert different(before, picture(model)) == []


def test_inputs_that_the_model_changes_are_given_back():
    class Scale(torch.nn.Module):
        def forward(self, x):
            return x.mul_(2)

    model = torch.nn.Sequential(Scale(), scaling.BiasNorm(8))
    x = torch.randn(3, 8)
    given = x.clone()
    fastasr.accelerate(model, verify=(x,))
    assert torch.equal(x, given)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_an_interrupted_accelerate_is_undone(last):
    """It leaves neither swaps nor reduced weights, and keeps those that an earlier call made."""
    seeded("interrupted")
    model, runs = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).eval(), []
    report = fastasr.accelerate(model, weights="int8").weights

    def formats():
        return [c and c.format for c in map(_reduced_weights.copy_of, model.parameters())]

    before, forwards = formats(), [vars(m).get("forward") for m in model.modules()]
    assert ("int8" in before) == bool(report.reduced)

    def run(model):
        runs.append(model)
        if len(runs) == last:
            raise KeyboardInterrupt
        return model(torch.randn(5, 64))

    with pytest.raises(KeyboardInterrupt):
        fastasr.accelerate(model, verify=run, weights="int8", weights_error=1e-9)
    assert formats() == before
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    fastasr.restore(model)
