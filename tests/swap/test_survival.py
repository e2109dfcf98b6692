# SPDX-License-Identifier: Apache-2.0
"""A swapped model survives copies, pickles, compilation, checkpointing and autocast."""

import copy
import io
import pickle

import families
import pytest
import torch
from steps import close, cotangent, numbers, same_gradients, seeded, swapped
from tiny_zipformer import plain_swoosh, training_step
from torch.utils.checkpoint import checkpoint

import fastasr
from fastasr.models.zipformer import checkpoint as replaying_checkpoint
from fastasr.swap import binding


def _swapped(model):
    return [name for name, module in model.named_modules() if binding.bound_forward(module) is not None]


def test_deepcopy_is_swapped_and_independent(model, inputs):
    fastasr.accelerate(model)
    twin = copy.deepcopy(model)
    assert _swapped(twin) == _swapped(model)
    for module in twin.modules():
        if binding.bound_forward(module) is not None:
            assert vars(module)["forward"].__self__ is module
    with torch.no_grad():
        expected = model.eval()(*inputs)[0]
        for p in model.parameters():
            p.zero_()
        assert torch.equal(twin.eval()(*inputs)[0], expected)
    fastasr.restore(twin)
    assert _swapped(model)
    assert not _swapped(twin)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickled_model_loads_unswapped_and_can_be_swapped_again(model, inputs, how):
    paths = [row.path for row in fastasr.accelerate(model).replaced]
    with torch.no_grad():
        expected = model.eval()(*inputs)[0]
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert not _swapped(loaded)
    with torch.no_grad():
        close(loaded(*inputs)[0], expected)
    assert [row.path for row in fastasr.accelerate(loaded).replaced] == paths
    with torch.no_grad():
        assert torch.equal(loaded(*inputs)[0], expected)


def test_the_pickle_of_a_swapped_model_does_not_need_fastasr(model):
    fastasr.accelerate(model)
    names = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            names.add(module)
            return super().find_class(module, name)

    Reader(io.BytesIO(pickle.dumps(model))).load()
    assert not any(name.startswith("fastasr") for name in names)


def _parts(model):
    """Returns name -> (module, number of arguments, channels), one of each swapped kind."""
    layer = model.encoder.encoders[0].layers[0]
    fused = layer.feed_forward1.out_proj
    return {
        "bias_norm": (layer.norm, 1, 32),
        "bypass": (layer.bypass_mid, 2, 32),
        "swoosh": (model.encoder_embed.conv[3], 1, 32),
        "swoosh_linear": (fused, 1, fused.weight.shape[1]),
        "linear": (layer.feed_forward1.in_proj, 1, 32),
    }


@pytest.mark.parametrize("part", ["bias_norm", "bypass", "swoosh", "swoosh_linear", "linear"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compile_fullgraph(model, part, training):
    """The model compiles without a graph break, at two lengths, with gradients."""
    fastasr.accelerate(model)
    module, count, channels = _parts(model.train(training))[part]
    # Limits on parameters and scheduled rates draw from Python's random in training, as upstream: a graph break.
    fullgraph = not (training and part in ("bias_norm", "bypass", "swoosh_linear"))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=fullgraph, backend="aot_eager")
    for length in (9, 14):
        args = [torch.randn(length, 2, channels, requires_grad=True) for _ in range(count)]
        results = []
        for run in (module, compiled):
            seeded(3)
            y = run(*args)
            results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), args)])
        for a, b in zip(*results, strict=True):
            close(b, a, what=part)


def test_compile_of_the_whole_model(model, inputs):
    fastasr.accelerate(model)
    model.eval()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        close(compiled(*inputs)[0], model(*inputs)[0])


def test_compiled_whitening(model):
    """Whether it acts is drawn, which breaks the graph before it; torch.compile cannot trace what follows."""
    fastasr.accelerate(model)
    whiten = next(m for m in model.train().modules() if type(m).__name__ == "Whiten")
    whiten.prob = whiten.min_prob = whiten.max_prob = 1
    whiten.grad_scale, whiten.whitening_limit = 0.1, 1.0
    x = torch.randn(9, 2, 32, requires_grad=True)
    torch._dynamo.reset()
    results = []
    for run in (whiten, torch.compile(whiten, backend="aot_eager")):
        seeded(3)
        results.append(torch.autograd.grad(run(x).sin().sum(), x)[0])
    close(results[1], results[0])


def test_compiled_balancer(model):
    fastasr.accelerate(model)
    balancer = next(m for m in model.train().modules() if type(m).__name__ == "Balancer")
    del balancer.prob  # a schedule
    balancer.prob, balancer.min_positive = 1.0, 0.9
    shape = [3] * 4 if balancer.channel_dim == 1 else [9, 2, 3]
    shape[balancer.channel_dim] = balancer.num_channels
    x = torch.randn(shape, requires_grad=True)
    torch._dynamo.reset()
    runs = balancer, torch.compile(balancer, backend="aot_eager")
    expected, found = (torch.autograd.grad(run(x).sin().sum(), x)[0] for run in runs)
    close(found, expected)
    assert not torch.equal(expected, x.cos())  # It acts.


def test_a_compiled_module_notices_a_later_swap():
    from zipformer.modules.scaling import BiasNorm

    norm = BiasNorm(16).eval()
    compiled = torch.compile(norm, backend="aot_eager")
    x = torch.randn(5, 16)
    with torch.no_grad():
        expected = compiled(x)
        fastasr.accelerate(compiled)
        close(compiled(x), expected)
    assert binding.bound_forward(norm) is not None


def test_upstream_with_its_own_compiled_swoosh(inputs):
    """As shipped, upstream wraps its Swoosh functions in torch.compile; the swap looks through it."""
    from zipformer.modules.scaling import ActivationDropoutAndLinear, SwooshL, SwooshR

    shipped = torch.nn.Sequential(
        SwooshL(), SwooshR(), ActivationDropoutAndLinear(6, 4, activation="SwooshR")
    )
    with plain_swoosh():
        plain = torch.nn.Sequential(
            SwooshL(), SwooshR(), ActivationDropoutAndLinear(6, 4, activation="SwooshR")
        )
    plain.load_state_dict(shipped.state_dict())
    report = fastasr.accelerate(shipped, verify=(torch.randn(7, 6),))
    assert [row.class_name for row in report.replaced] == ["SwooshL", "SwooshR", "ActivationDropoutAndLinear"]
    x = torch.randn(7, 6)
    close(shipped.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole_layer", [False, True])
def test_activation_checkpointing(model, whole_layer, reentrant):
    """What is recomputed in the backward has the gradients that it has without checkpointing: a feed-forward module by
    torch's checkpointing, which does not replay Python's random and so runs without upstream's regularisers, and a
    layer with them.
    """
    fastasr.accelerate(model.train())
    stack = model.encoder.encoders[0]
    module, replayed = stack.layers[0], replaying_checkpoint
    if not whole_layer:
        module, replayed = module.feed_forward1, checkpoint
        module.hidden_balancer = module.out_whiten = torch.nn.Identity()
    results = []
    for run in (module, lambda *args: replayed(module, *args, use_reentrant=reentrant)):
        module.zero_grad()
        x = torch.randn(9, 2, 32, generator=numbers(0)).requires_grad_()
        seeded(5)
        y = run(*((x, stack.encoder_pos(x)) if whole_layer else (x,)))
        y.backward(cotangent(y))
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_autocast_bf16_training(model, inputs):
    fastasr.accelerate(model)
    reference = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients, _ = training_step(model, inputs, seed=0)
    full, _, _ = training_step(reference, inputs, seed=0)
    assert torch.isfinite(loss)
    close(loss.float(), full, tolerance=0.1)
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert all(g.dtype == torch.float32 for g in gradients.values())


def test_half_precision_model(model, inputs):
    x, lens = inputs
    model = model.bfloat16().eval()
    with torch.no_grad():
        expected = model(x.bfloat16(), lens)[0]
        fastasr.accelerate(model)
        actual = model(x.bfloat16(), lens)[0]
    assert actual.dtype == expected.dtype
    close(actual.float(), expected.float(), tolerance=0.05)


def test_moving_to_another_dtype_after_the_swap(model, inputs):
    fastasr.accelerate(model)
    x, lens = inputs
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)[0]
        close(model.double()(x.double(), lens)[0].float(), expected)


@pytest.mark.parametrize("name", ["parakeet", "zipformer", "gemma 4", "granite speech", "mega"])
def test_replicas_of_data_parallel(name):
    """A replica, whose parameters are plain tensors, computes with its own and hands their gradients back."""
    theirs, run = families.make(name)
    ours = swapped(theirs)
    results = []
    for model in (theirs, ours):
        replica = _replica(model)
        seeded("call")
        y = run(replica)[0]
        y.backward(cotangent(y))
        results.append(
            {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
    same_gradients(results[1], results[0], 1e-4)
    fastasr.restore(ours)
    assert "_replicate_for_data_parallel" not in vars(ours)


def _replica(model):
    """Does what nn.DataParallel does for another device, with parameters of other values."""
    replicas = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, 1.25 * parameter)
    return replicas[model]
