# SPDX-License-Identifier: Apache-2.0
"""ModelState restores every kind of tensor and of held object, shares copies with the whole model, and survives an
interruption."""

import collections
import functools
import types
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastasr.swap.state import ModelState, TorchModes


def _bits(t):
    return t.detach().resolve_conj().contiguous().flatten().view(torch.uint8).tolist()


TENSORS = {
    "float32 with NaN and -0": lambda: torch.tensor([float("nan"), -0.0, 1.0]),
    "bfloat16": lambda: torch.randn(5).bfloat16(),
    "float16": lambda: torch.randn(5).half(),
    "float64, strided": lambda: torch.randn(4, 6, dtype=torch.float64).t()[::2],
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "complex, conjugated": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "bool": lambda: torch.tensor([True, False]),
    "int64 scalar": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 3),
    "whole words": lambda: torch.tensor([float("nan"), -0.0, 1.0, 2.0]).view(2, 2),
    "whole words, not at the start of one": lambda: torch.randn(9)[1:],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_values_of_a_tensor(kind):
    model = torch.nn.Module()
    model.register_buffer("tensor", TENSORS[kind]())
    tensor = model.tensor
    before, pointer = _bits(tensor), tensor.data_ptr()
    for change in (
        lambda: tensor.data.unsqueeze(-1)[..., :1, :1].zero_() if tensor.dim() else tensor.data.zero_(),
        lambda: setattr(tensor, "data", torch.ones(7, dtype=tensor.dtype)),
        lambda: setattr(model, "tensor", None),
        lambda: delattr(model, "tensor"),
    ):
        with ModelState(model):
            change()
        assert model.tensor is tensor
        assert _bits(tensor) == before
        assert tensor.data_ptr() == pointer


def test_tensors_made_in_inference_mode():
    with torch.inference_mode():
        model = torch.nn.BatchNorm1d(3)
    before = _bits(model.running_mean)
    with ModelState(model), torch.inference_mode():
        model(torch.randn(4, 3))
        assert _bits(model.running_mean) != before
    assert _bits(model.running_mean) == before


def test_what_belongs_to_a_tensor():
    p = torch.nn.Parameter(torch.randn(3))
    p.grad, p.note = torch.ones(3), "note"
    model, grad = torch.nn.ParameterList([p]), p.grad
    with ModelState(model):
        p.sum().backward()
        p.grad = None
        p.note, p.other = None, 1
        p.register_hook(lambda g: 2 * g)
        p.register_post_accumulate_grad_hook(lambda p: None)
        p.requires_grad_(False)
    assert p.grad is grad
    assert grad.tolist() == [1, 1, 1]
    assert vars(p) == {"note": "note"}
    assert p.requires_grad
    assert p._backward_hooks is None
    assert not p._post_accumulate_grad_hooks
    assert torch.autograd.grad(p.sum(), p)[0].tolist() == [1, 1, 1]


def test_a_buffer_that_got_a_graph():
    model = torch.nn.Module()
    model.register_buffer("mean", torch.zeros(2))
    with ModelState(model), torch.enable_grad():
        model.mean.mul_(torch.ones(2, requires_grad=True))
    assert model.mean.is_leaf
    assert not model.mean.requires_grad


def test_lazy_modules():
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.LazyBatchNorm1d())
    for run in range(2):
        with ModelState(model):
            model(torch.randn(3, 5 + run))
            assert type(model[0]) is torch.nn.Linear
        assert type(model[0]) is torch.nn.LazyLinear
        assert model[0].has_uninitialized_params()


def test_scripted_modules():
    model = torch.nn.Sequential(
        torch.jit.script(torch.nn.Sequential(torch.nn.BatchNorm1d(3))), torch.nn.ReLU()
    )
    before = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    with ModelState(model):
        model(torch.randn(4, 3))
        model.eval()
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == before
    assert all(module.training for module in model.modules())


class Slotted:
    __slots__ = ("count", "other")

    def __init__(self):
        self.count = 0


@dataclass
class Helper:
    count: int = 0
    inner: object = None


class Strict(collections.OrderedDict):
    def update(self, *_):
        raise TypeError("as transformers' outputs do")


def _counter():
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        return None if hook.silent else count

    hook.silent = False
    return hook


def _default(x=None, calls=[0]):  # noqa: B006
    calls[0] += 1


HELD = {
    "number": (0, lambda m: setattr(m, "held", m.held + 1), lambda held: held),
    "list": ([1, [2]], lambda m: (m.held.append(3), m.held[1].clear()), str),
    "dict": ({"a": {"b": 1}}, lambda m: (m.held.pop("a").clear(), m.held.update(c=1)), str),
    "order of a dict": ({"a": 1, "b": 2}, lambda m: m.held.update(a=m.held.pop("a")), str),
    "defaultdict": (collections.defaultdict(list), lambda m: m.held["a"].append(1), str),
    "strict dict": (Strict(a=1), lambda m: m.held.pop("a"), str),
    "set": ({1, 2}, lambda m: m.held.symmetric_difference_update({1, 3}), lambda held: sorted(held)),
    "deque": (collections.deque([1, 2], maxlen=2), lambda m: m.held.append(3), str),
    "array": (np.zeros(3), lambda m: m.held.__setitem__(0, 1.0), str),
    "helper": (
        Helper(0, Helper()),
        lambda m: (setattr(m.held, "count", 1), setattr(m.held.inner, "count", 2)),
        str,
    ),
    "slots": (
        Slotted(),
        lambda m: (setattr(m.held, "count", 1), setattr(m.held, "other", 1)),
        lambda h: (h.count, hasattr(h, "other")),
    ),
    "namespace": (types.SimpleNamespace(a=1), lambda m: setattr(m.held, "b", 2), str),
    "module in a list": (
        [torch.nn.BatchNorm1d(2)],
        lambda m: m.held[0](torch.randn(3, 2)),
        lambda h: str(h[0].state_dict()),
    ),
    "variable of a function": (_counter(), lambda m: m.held(), lambda h: h.__closure__[0].cell_contents),
    "attribute of a function": (_counter(), lambda m: setattr(m.held, "silent", True), lambda h: h.silent),
    "default of a function": (_default, lambda m: m.held(), lambda h: str(h.__defaults__)),
    "partial": (functools.partial(_default, calls=[5]), lambda m: m.held(), lambda h: str(h.keywords)),
    "torch's generator": (
        torch.Generator(),
        lambda m: torch.rand(1, generator=m.held),
        lambda h: h.get_state().tolist(),
    ),
    "NumPy's generator": (
        np.random.default_rng(0),
        lambda m: m.held.random(),
        lambda h: str(h.bit_generator.state),
    ),
    "NumPy's old generator": (
        np.random.RandomState(0),
        lambda m: m.held.rand(),
        lambda h: str(h.get_state()),
    ),
}


@pytest.mark.parametrize("kind", HELD)
def test_what_a_module_holds(kind):
    held, change, view = HELD[kind]
    model = torch.nn.Module()
    model.held = held
    before = view(held)
    with ModelState(model):
        change(model)
        assert view(model.held) != before
    assert model.held is held
    assert view(held) == before


def test_a_part_shares_the_copies_of_the_whole_and_leaves_the_rest_to_it():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[0].above = [model]  # registered nowhere
    whole = ModelState(model)
    part = ModelState(model[0], whole=whole)
    for p in model[0].parameters():
        assert part.tensors[id(p)].saved is whole.tensors[id(p)].saved
    assert id(model[1].weight) not in part.tensors
    model[0].weight.data += 1
    changed = ModelState(model[0], whole=whole)
    assert changed.tensors[id(model[0].weight)].saved is not whole.tensors[id(model[0].weight)].saved
    assert changed.tensors[id(model[0].bias)].saved is whole.tensors[id(model[0].bias)].saved


def test_it_keeps_nothing_alive_afterwards():
    model = torch.nn.Linear(3, 3)
    with ModelState(model):
        pass
    alive = weakref.ref(model)
    del model
    assert alive() is None


def test_an_interruption_of_the_restoring_itself(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    before = [p.tolist() for p in model.parameters()]
    restored = []
    original = TorchModes.restore

    def interrupted(modes):
        restored.append(modes)
        if len(restored) == 1:
            raise KeyboardInterrupt
        original(modes)

    random = torch.get_rng_state()
    monkeypatch.setattr(TorchModes, "restore", interrupted)
    state = ModelState(model)
    torch.rand(1)
    for p in model.parameters():
        p.data.zero_()
    with pytest.raises(KeyboardInterrupt), state:
        pass
    assert [p.tolist() for p in model.parameters()] == before
    assert torch.equal(torch.get_rng_state(), random)


MODES = {
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "gradients": (lambda: torch._C._set_grad_enabled(False), torch.is_grad_enabled),
    "products": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "anomalies": (lambda: torch.set_anomaly_enabled(True), torch.is_anomaly_enabled),
    "oneDNN": (
        lambda: setattr(torch.backends.mkldnn, "enabled", False),
        lambda: torch.backends.mkldnn.enabled,
    ),
    "cuDNN": (
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
        lambda: torch.backends.cudnn.benchmark,
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_modes(name):
    change, get = MODES[name]
    before = get()
    with ModelState(torch.nn.Module()):
        change()
        assert get() != before
    assert get() == before
