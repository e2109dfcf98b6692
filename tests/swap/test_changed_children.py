# SPDX-License-Identifier: Apache-2.0
"""Whatever users change in a part of a model, before the swap or after it, the swapped model does what upstream does.

The test walks every module inside a tiny model of every framework (tests/families.py), so every child that one of our
forwards reads, and applies every change that fits it. Hooks must be called as often as upstream calls them.
"""

import contextlib
import copy
import functools
import importlib.util
import random
import re

import families
import pytest
import torch
from families import FAMILIES
from steps import moved, seeded, swapped
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_map

import fastasr
from fastasr.swap import binding, rules
from fastasr.testing.tape import TapeRecorder

TOLERANCE = 2e-4  # of the largest element; a change that is ignored shows by 1e-2 or more


# --------------------------------------------------------------------------- the changes
# Each takes (model, path, seen), changes the module at the path and returns what undoes a change of the process.
# ``seen`` is a list: hooks append to it.
def _replace(model, path, module):
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _scaled(value, factor):
    """Returns ``value`` with its floating tensors times ``factor``."""
    if isinstance(value, torch.Tensor):
        return value * factor if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_scaled(v, factor) for v in value))
    return type(value)(_scaled(v, factor) for v in value) if isinstance(value, (tuple, list)) else value


def _hook(register, scaled, everywhere=False):
    """Returns the change that registers a hook, which scales its argument of this number behind the module, for the
    module or for all of its class."""

    def change(model, path, seen):
        place = model.get_submodule(path)

        def hook(module, *values):
            if everywhere and type(module) is not type(place):
                return None
            seen.append(register)
            return _scaled(values[scaled], 1.25)

        handle = getattr(nn_module if everywhere else place, register)(hook)
        return handle.remove if everywhere else None

    change.__name__ = register
    return change


forward_hook = _hook("register_forward_hook", 1)
pre_hook = _hook("register_forward_pre_hook", 0)
backward_hook = _hook("register_full_backward_hook", 0)
backward_pre_hook = _hook("register_full_backward_pre_hook", 0)
global_hook = _hook("register_module_forward_hook", 1, everywhere=True)
global_backward_hook = _hook("register_module_full_backward_hook", 0, everywhere=True)


def patched_forward(model, path, seen):
    module = model.get_submodule(path)
    own = module.forward

    def forward(*args, **kwargs):
        seen.append("patched")
        return _scaled(own(*args, **kwargs), 1.25)

    module.forward = forward


def another_layer(model, path, seen):
    """Replaces a layer of WavLM by code that takes the arguments of upstream's encoder and no others."""
    module = model.get_submodule(path)

    def forward(hidden_states, attention_mask=None, position_bias=None, index=0):
        seen.append("another layer")
        assert attention_mask is None or attention_mask.shape == hidden_states.shape[:2]
        return module.feed_forward(hidden_states), position_bias

    module.forward = forward


def changed_in_place(model, path, seen):
    """Writes into the results, as ``x = layer(x); x += y`` does."""
    module = model.get_submodule(path)
    own = module.forward

    def scaled(value):
        return value.mul_(1.25) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    module.forward = lambda *args, **kwargs: tree_map(scaled, own(*args, **kwargs))


def works_in_place(model, path, seen):
    model.get_submodule(path).inplace = True


def subclass(model, path, seen):
    """Puts a module of a subclass in the place, with the same parts. It has the same name, as loralib's Linear."""
    module = model.get_submodule(path)
    binding.unbind(module)
    kind = type(module)

    def forward(self, *args, **kwargs):
        seen.append("subclass")
        return _scaled(kind.forward(self, *args, **kwargs), 1.25)

    other = object.__new__(type(kind.__name__, (kind,), {"forward": forward}))
    vars(other).update(vars(module))
    _replace(model, path, other)


class Wrapper(nn.Module):
    """Stands in the place of a module, as adapters do: it has none of the attributes that ours may read."""

    def __init__(self, base, seen):
        super().__init__()
        self.base, self.seen = base, lambda: seen.append("wrapper")
        self.training = base.training

    def forward(self, *args, **kwargs):
        self.seen()
        return _scaled(self.base(*args, **kwargs), 1.25)


def wrapped(model, path, seen):
    _replace(model, path, Wrapper(model.get_submodule(path), seen))


def low_rank_by_loralib(model, path, seen):
    import loralib

    module = model.get_submodule(path)
    if type(module) is nn.Embedding:
        other = loralib.Embedding(module.num_embeddings, module.embedding_dim, r=2)
        other.padding_idx = module.padding_idx
    else:
        other = loralib.Linear(module.in_features, module.out_features, r=2, bias=module.bias is not None)
    other.load_state_dict(module.state_dict(), strict=False)
    with torch.no_grad():
        other.lora_B.normal_(std=0.3)
        other.lora_A.normal_(std=0.3)
    _replace(model, path, other.train(module.training))


def low_rank_by_peft(model, path, seen):
    import peft

    config = peft.LoraConfig(r=2, target_modules=[path], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    for parameter in model.parameters():
        parameter.requires_grad_()


def old_weight_norm(model, path, seen):
    with contextlib.suppress(FutureWarning):
        torch.nn.utils.weight_norm(model.get_submodule(path))
    with torch.no_grad():
        model.get_submodule(path).weight_g.mul_(1.25)


def new_weight_norm(model, path, seen):
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule(path))
    with torch.no_grad():
        model.get_submodule(path).parametrizations.weight.original0.mul_(1.25)


def spectral_norm(model, path, seen):
    torch.nn.utils.parametrizations.spectral_norm(model.get_submodule(path))


def counted(model, path, seen):
    """Sees every access to the weight: one to a spectral norm is a step of it in training."""

    class Scaled(nn.Module):
        def forward(self, weight):
            seen.append("weight")
            return 1.25 * weight

    torch.nn.utils.parametrize.register_parametrization(model.get_submodule(path), "weight", Scaled())


def identity(model, path, seen):
    _replace(model, path, nn.Identity())


def another_activation(model, path, seen):
    _replace(model, path, nn.Hardtanh(-0.5, 0.25))


def longer(model, path, seen):
    model.get_submodule(path).append(nn.Hardtanh(-0.5, 0.25))


def other_epsilon(model, path, seen):
    model.get_submodule(path).eps = 0.1


def transposed(model, path, seen):
    """Makes a parameter of a view, which has the old one's address."""
    module = model.get_submodule(path)
    module.weight = nn.Parameter(module.weight.detach().t())


def transposed_in_place(model, path, seen):
    weight = model.get_submodule(path).weight
    weight.data = weight.data.t()


def without_padding(model, path, seen):
    """Puts torch's own convolution in the place of upstream's, which pads."""
    conv = model.get_submodule(path).conv
    other = nn.Conv1d(
        conv.in_channels, conv.out_channels, conv.kernel_size, padding="same", groups=conv.groups, bias=False
    )
    other.load_state_dict(conv.state_dict())
    _replace(model, path, other)


def with_bias(model, path, seen):
    module = model.get_submodule(path)
    if module.bias is not None:
        raise ValueError("has a bias")
    module.bias = nn.Parameter(torch.randn(module.weight.shape[0]))


def drops_channels(model, path, seen):
    """Draws one number for each row of the last dimension of what the module gets."""
    _replace(model, path, nn.Dropout1d(0.3).train(model.get_submodule(path).training))


def compiled(model, path, seen):
    _replace(model, path, torch.compile(model.get_submodule(path), backend="eager"))


def scripted(model, path, seen):
    module = model.get_submodule(path)
    binding.unbind(module)
    _replace(model, path, torch.jit.script(module))


def lazy(model, path, seen):
    """Puts a layer in the place whose first call draws its weights."""
    module = model.get_submodule(path)
    _replace(model, path, nn.LazyLinear(module.out_features).train(module.training))


def shorter(model, path, seen):
    del model.get_submodule(path)[-1]


def reordered(model, path, seen):
    layers = model.get_submodule(path)
    layers[-1], layers[-2] = layers[-2], layers[-1]


def frozen(model, path, seen):
    model.get_submodule(path).requires_grad_(False)


def tied(model, path, seen):
    """Gives the layer the weight of the last other one of its class and shape."""
    module = model.get_submodule(path)
    for other in reversed(list(model.modules())):
        if type(other) is type(module) and other is not module and other.weight.shape == module.weight.shape:
            module.weight = other.weight
            return


def other_dtype(model, path, seen):
    """Upstream raises an error in most places; where it does not, the values agree."""
    model.get_submodule(path).double()


def quantised(model, path, seen):
    if any(type(m) is nn.MultiheadAttention for m in model.modules()):
        raise ValueError("upstream's attention reads the weight itself")
    if hasattr(model, "fused_batch_size"):
        raise ValueError("the scale depends on the recordings of a call, and upstream's are fewer")
    torch.ao.quantization.quantize_dynamic(model, {path}, dtype=torch.qint8, inplace=True)


OF_CONVOLUTIONS = (
    *("in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "dilation", "groups", "padding_mode"),
)


def _convolution(name, **changed):
    """Returns the change that puts a convolution in the place with these options, or with functions of the module's
    own, and with its weights if they fit."""

    def change(model, path, seen):
        module = model.get_submodule(path)
        options = {option: getattr(module, option) for option in OF_CONVOLUTIONS}
        for option, value in changed.items():
            options[option] = value(options[option]) if callable(value) else value
        other = type(module)(**options, bias=module.bias is not None)
        if other.weight.shape == module.weight.shape:
            other.load_state_dict(module.state_dict())
        _replace(model, path, other.train(module.training))

    change.__name__ = name
    return change


CONVOLUTIONS = (
    _convolution("padded to the same length", padding="same"),
    _convolution("padded nowhere", padding="valid"),
    _convolution("padded in a circle", padding_mode="circular"),
    _convolution("dilated", padding="same", dilation=2),
    _convolution("even taps", padding="same", kernel_size=lambda taps: [k + 1 for k in taps]),
    _convolution("fewer taps", padding="same", kernel_size=lambda taps: [max(1, k - 2) for k in taps]),
    _convolution("strided", stride=lambda strides: [s + 1 for s in strides]),
    _convolution("other groups", groups=lambda groups: 2 if groups == 1 else 1),
)
ANY = (
    forward_hook,
    pre_hook,
    backward_hook,
    backward_pre_hook,
    global_hook,
    global_backward_hook,
    patched_forward,
    changed_in_place,
    subclass,
    wrapped,
)
LOW_RANK = {"loralib": low_rank_by_loralib, "peft": low_rank_by_peft}
LINEAR = (*(change for package, change in LOW_RANK.items() if importlib.util.find_spec(package)), quantised)
WEIGHTS = (old_weight_norm, new_weight_norm, spectral_norm, counted, frozen, tied, other_dtype)
ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid)
ONLY_IN = {  # quantised layers have no gradients
    **dict.fromkeys((backward_hook, backward_pre_hook, global_backward_hook, frozen, drops_channels), True),
    quantised: False,
}


def changes(module):
    """Yields the changes that make sense for this module."""
    kind = type(module)
    yield from ANY
    if kind in (nn.Linear, nn.Embedding):
        yield from (change for change in LINEAR if kind is nn.Linear or change is low_rank_by_loralib)
    if kind in (nn.Linear, nn.Conv1d, nn.Conv2d):
        yield from (*WEIGHTS, with_bias)
    if kind is nn.Dropout:
        yield drops_channels
    if kind in (nn.Conv1d, nn.Conv2d):
        yield from CONVOLUTIONS
        yield from (change for change in LINEAR if change is low_rank_by_peft)
    if hasattr(module, "inplace"):
        yield works_in_place
    if kind in (nn.LayerNorm, nn.BatchNorm1d, nn.Embedding):
        yield from (frozen, other_dtype)
    if kind is nn.Dropout or kind.__name__ in ("SwooshL", "SwooshR", "Identity", "Balancer", "Whiten"):
        yield identity
    if kind is nn.Sequential:
        yield longer
    if kind in ACTIVATIONS or kind.__name__ in ("Swish", "SiLUActivation", "GELUActivation"):
        yield from (identity, another_activation)


# --------------------------------------------------------------------------- the walk
DRAWN = 20  # cases of a model; all of them in long runs
_LAYER = re.compile(r"\b(\w*layers|mega_blocks|(?<!encoder\.)encoders)\.\d+")


def places(model):
    """Yields (path, module) of a module of each kind of place: of equal layers the last one stands for all."""
    found = {}
    for path, module in model.named_modules():
        if path and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            found[_LAYER.sub(r"\1.#", path)] = path, module
    return found.values()


def outcome(model, run, training, seen):
    """Returns (tensors, names) of a call: outputs and, in training, gradients; or the error that it raises."""
    del seen[:]
    model.train(training)
    model.zero_grad(set_to_none=True)
    seeded("call")
    try:
        with torch.set_grad_enabled(training), fastasr.upstream_draws():
            found = {f"output {i}": y for i, y in enumerate(run(model))}
            if training:
                sum(
                    (y * torch.linspace(0.5, 1.5, y.numel()).view_as(y)).sum() for y in found.values()
                ).backward()
    except Exception as error:
        return error, None
    found = {name: y.detach() for name, y in found.items()}
    if training:
        found |= {name: p.grad for name, p in model.named_parameters()}
    return found, sorted(seen)


def compare(ours, theirs, tolerance=TOLERANCE, counted=True):
    """Returns what differs, or "". ``counted``: hooks must be called as often as upstream calls them."""
    (found, calls), (expected, calls_there) = ours, theirs
    if isinstance(expected, Exception):
        return ""  # upstream does not run it
    if isinstance(found, RuntimeError) and re.search("modified inplace|Please clone", str(found)):
        return ""  # torch's own error for a view that upstream's result is not, or is in another layout of memory
    if isinstance(found, Exception):
        return f"raises {type(found).__name__}: {found}"
    if found.keys() != expected.keys():
        return f"has other parameters: {found.keys() ^ expected.keys()}"
    for kind in ("output", ""):
        pairs = [(n, found[n], e) for n, e in expected.items() if n.startswith("output") == bool(kind)]
        if missing := [n for n, f, e in pairs if (f is None) != (e is None)]:
            return f"has gradients for other parameters: {missing}"
        pairs = [(n, f, e) for n, f, e in pairs if e is not None]
        largest = max((e.abs().max().item() for _, _, e in pairs), default=0.0)
        for name, f, e in pairs:
            error = (f - e).abs().max().item() if f.shape == e.shape else float("inf")
            if not error <= tolerance * max(largest, 1e-6):
                return f"{name} is off by {error / max(largest, 1e-6):.1e}"
    if calls == calls_there if counted else set(calls) == set(calls_there):
        return ""
    return f"hooks are called {len(calls)} times, upstream's {len(calls_there)}"


def changed_both_ways(make, path, change, after, training, swap, **options):
    """Returns what differs between upstream's model and the swapped one, both changed at ``path``."""
    results = []
    for is_swapped in (False, True):
        model, run = make()
        seen = []
        model.train(training)
        seeded("change")
        if is_swapped and after:
            fastasr.accelerate(model, **swap)
            outcome(model, run, training, seen)  # native layers and searches are kept from the first call on
            seeded("change")
        undo = None
        try:
            try:
                undo = change(model, path, seen)
            except (RuntimeError, ValueError, AttributeError) as error:
                if not is_swapped:
                    return None  # the change does not fit this module
                return f"cannot be changed: {error}"
            if is_swapped and not after:
                fastasr.accelerate(model, **swap)
            results.append(outcome(model, run, training, seen))
        finally:
            if undo is not None:
                undo()
    return compare(results[1], results[0], **options)


# NeMo's fused joint calls its parts for some recordings at a time, ours for the whole batch. The pruned loss and the
# regularisers of a recogniser multiply differences of rounding.
OPTIONS = {"nemo joint": {"counted": False}, "zipformer recogniser": {"tolerance": 1e-3}}


def modes(name):
    """Packed frames of a Zipformer draw other random numbers in training."""
    return (False,) if name == "zipformer, ragged" else (False, True)


def every_case(model, name):
    """Returns (path, change, whether it comes after the swap, whether in training mode)."""
    return [
        (path, change, after, training)
        for path, module in places(model)
        for change in changes(module)
        for after in (False, True)
        for training in modes(name)
        if ONLY_IN.get(change, training) == training
    ]


def check(name, count=None):
    """Asserts that all cases of a model, or ``count`` that are drawn by the run's seed, are as upstream."""
    model, run = families.make(name)
    options, swap = OPTIONS.get(name, {}), families.SWAP.get(name, {})
    ours = swapped(model, **swap)
    theirs = copy.deepcopy(model)  # ESPnet keeps the attention weights of the last call
    for training in modes(name):
        expected = outcome(theirs, run, training, [])
        assert not isinstance(expected[0], Exception), expected
        problem = compare(outcome(ours, run, training, []), expected, **options)
        assert not problem, f"without a change {problem}"
    cases = every_case(model, name)
    if count is not None and count < len(cases):
        seeded(name)
        cases = random.sample(cases, count)
    failures = []
    for path, change, after, training in cases:
        # A number in the middle between two steps of int8 rounds to either, but not in three models.
        for noise in (0.0, 1e-3, 2e-3) if change is quantised else (0.0,):
            near = moved(copy.deepcopy(model), noise, "again") if noise else model
            make = functools.partial(copy.deepcopy, (near, run))
            problem = changed_both_ways(make, path, change, after, training, swap, **options)
            if not problem:
                break
        if problem:
            mode = "training" if training else "eval"
            order = "after the swap" if after else "before the swap"
            failures.append(f"{path}: {change.__name__} {order}, in {mode}: {problem}")
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n".join(failures)


@pytest.mark.parametrize("name", FAMILIES)
def test_changed_children(name):
    check(name, DRAWN)


@pytest.mark.parametrize(
    ("name", "path", "change"),
    [
        ("phi-4", "encoders.0.conv.dropout", drops_channels),
        ("granite speech", "layers.1.conv.dropout", drops_channels),
        ("granite speech 5", "layers.2.self_attn.v_proj", with_bias),
        ("gemma 3n", "conformer.1.attention.pre_attn_norm", identity),
        ("gemma 3n", "conformer.1.attention.relative_position_embedding", wrapped),
        ("gemma 3n", "conformer.0.lconv1d", wrapped),
        ("gemma 3n", "conformer.0.lconv1d.depthwise_conv1d", wrapped),
        ("gemma 3n", "conformer.1.lconv1d.pre_layer_norm", other_epsilon),
        ("phi-4", "encoders.0.conv.glu", wrapped),
        ("wavlm", "layers.2", wrapped),
        ("wavlm", "layers.1", another_layer),
        ("torchaudio wavlm", "encoder.transformer.layers.1", another_layer),
        ("granite speech", "layers.1.conv.depth_conv", without_padding),
        ("parakeet", "subsampling.layers", shorter),
        ("parakeet", "subsampling.layers", reordered),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_changed_child(name, path, change, after):
    assert not changed_both_ways(lambda: families.make(name), path, change, after, True, {})


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("nemo local", "layers.1.self_attn.linear_pos"),
        ("zipformer", "encoder.encoders.1.encoder.layers.0.feed_forward1.in_proj"),
        ("zipformer, causal", "encoders.1.encoder.layers.0.feed_forward1.in_proj"),
    ],
)
@pytest.mark.parametrize("change", [transposed, transposed_in_place])
def test_a_transposed_weight(name, path, change):
    """What is kept of the weight is computed anew."""
    assert not changed_both_ways(lambda: families.make(name), path, change, True, False, {})


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (compiled, "conv_module1.balancer2"),
        (scripted, "nonlin_attention.in_proj"),
        (lazy, "nonlin_attention.in_proj"),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_changed_child_of_a_layer_that_is_packed(change, path, after):
    make, path = functools.partial(families.make, "zipformer, causal"), f"encoders.0.layers.0.{path}"
    assert not changed_both_ways(make, path, change, after, False, {})


def test_checks_compute_no_parametrization():
    make = functools.partial(families.make, "emformer stream")
    assert not changed_both_ways(make, "emformer_layers.1.attention.out_proj", counted, True, True, {})


@pytest.mark.parametrize("name", FAMILIES)
def test_longer_sequences(name):
    model, run = families.make(name)
    swap = families.SWAP.get(name, {})
    for path in [path for path, module in places(model) if type(module) is nn.Sequential]:
        problem = changed_both_ways(lambda: (copy.deepcopy(model), run), path, longer, True, False, swap)
        assert not problem, f"{path}: {problem}"


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_every_changed_child(name):
    check(name)


def test_every_rule_has_a_model():
    """A rule without a model would not be walked."""
    found = set()
    for name in FAMILIES:
        model, _ = families.make(name)
        found |= {row.rule for row in fastasr.accelerate(model, ragged=True).replaced}
        model, _ = families.make(name)
        found |= {row.rule for row in fastasr.accelerate(model, graphs=TAPES).replaced}
    missing = {rule.name for family in rules.FAMILIES for rule in family} - found
    assert missing <= NOT_INSTALLED, missing


# Checkouts of icefall and ZipVoice have some, and one is no framework's.
NOT_INSTALLED = {
    "zipformer.asr_model",
    "recorded.FastConformerEncoder",
    "recorded.TTSZipformer",
    "recorded.TTSZipformerTwoStream",
}
TAPES = fastasr.Graphs(recorder=TapeRecorder)
