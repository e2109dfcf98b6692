# SPDX-License-Identifier: Apache-2.0
"""Swapped models under forward-mode differentiation and torch.func give what upstream's own code gives there, or raise
an error as upstream does; and afterwards they compute what they computed before."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import families
import pytest
import tiny_emformer_rnnt
import tiny_parakeet
import tiny_zipformer
import torch
from steps import close, cotangent, moved, numbers, seeded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from upstream_precision import computing_in

import fastasr

READ_BY_UPSTREAM = {  # Upstream's own code reads values of tensors, or deep copies them.
    "e-branchformer", "espnet conformer", "espnet transformer", "fireredasr", "funasr", "mega", "mega rotary",
    "mimi", "parakeet rnn-t",
    "parakeet tdt", "phi-4", "seamless m4t", "torchaudio conformer", "w2v-bert", "wav2vec2", "wav2vec2 large",
    "wav2vec2's copies", "zipformer", "zipformer recogniser", "zipformer, ragged",
    "owsm", "qwen2.5-omni", "qwen3-asr", "qwen3-omni", "speecht5",
}  # fmt: skip
# float32 through a whole model; a tangent that is lost is off by its own size
TOLERANCE = 1e-3


class Call(NamedTuple):
    """A model, its input, and ``run(model, x)``, which may be a method behind ``torch.func.functional_call``."""

    model: torch.nn.Module
    x: torch.Tensor
    run: Callable


def zipformer():
    x, lengths = tiny_zipformer.batch()
    return Call(tiny_zipformer.tiny(), x, lambda call, x: call(x, lengths)[0])


def parakeet():
    module = pytest.importorskip("transformers")
    model = module.ParakeetEncoder(module.ParakeetEncoderConfig(**tiny_parakeet.SIZES, **tiny_parakeet.STILL))
    x = torch.randn(3, 75, tiny_parakeet.SIZES["num_mel_bins"], generator=numbers(1))
    mask = (torch.arange(75) < torch.tensor([75, 50, 9])[:, None]).long()
    return Call(model, x, lambda call, x: call(x, attention_mask=mask).last_hidden_state)


def emformer():
    module = pytest.importorskip("torchaudio.models.emformer")
    x = torch.randn(3, 23, 12, generator=numbers(1))
    sizes = {"left_context_length": 5, "right_context_length": 2, "max_memory_size": 2}
    model = module.Emformer(12, 3, 20, 2, 4, **sizes)
    return Call(model, x, lambda call, x: call(x, torch.tensor([21, 15, 9]))[0])


def emformer_rnnt():
    module = pytest.importorskip("torchaudio.models.rnnt")
    model = tiny_emformer_rnnt.tiny(module, transformer_dropout=0.0, lstm_dropout=0.0)
    x, targets = torch.randn(2, 36, 6, generator=numbers(1)), torch.randint(8, (2, 5), generator=numbers(1))
    lengths = torch.tensor([32, 20]), targets.int(), torch.tensor([5, 3], dtype=torch.int32)
    return Call(model, x, lambda call, x: call(x, *lengths)[0])


def e_branchformer():
    module = pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder")
    sizes = {"output_size": 24, "attention_heads": 3, "cgmlp_linear_units": 36, "cgmlp_conv_kernel": 7}
    still = dict.fromkeys(("dropout_rate", "positional_dropout_rate", "attention_dropout_rate"), 0.0)
    options = {"num_blocks": 2, "linear_units": 28, "use_ffn": True, "macaron_ffn": True}
    x = torch.randn(3, 47, 20, generator=numbers(1))
    model = module.EBranchformerEncoder(20, **sizes, **options, **still)
    return Call(model, x, lambda call, x: call(x, torch.tensor([47, 40, 21]))[0])


def mega():
    module = pytest.importorskip("espnet2.asr_transducer.decoder.mega_decoder")
    sizes = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 20, "num_heads": 2}
    labels = torch.randint(1, 12, (3, 9), generator=numbers(1))
    model = module.MEGADecoder(12, **sizes, num_blocks=2, max_positions=24)
    x = torch.zeros(3, 9, 16)
    return Call(model, x, lambda call, x: call(labels) + x)


FAMILIES = zipformer, parakeet, emformer, emformer_rnnt, e_branchformer, mega


# --------------------------------------------------------------------------- calls
def _output(call: Call, parameters: dict, x: torch.Tensor) -> torch.Tensor:
    """Runs the model with these parameters in the place of its own, with the same draws in every call."""

    def forward(*args, **kwargs):
        return torch.func.functional_call(call.model, parameters, args, kwargs)

    seeded("draws")
    return call.run(forward, x)


def _parameters(call: Call) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in call.model.named_parameters()}


def _tangents(call: Call) -> dict[str, torch.Tensor]:
    return {name: 0.1 * cotangent(p, name) for name, p in _parameters(call).items()}


def _tangent(call: Call) -> torch.Tensor:
    return cotangent(call.x, "x")


# --------------------------------------------------------------------------- transforms
def dual_input(call: Call) -> tuple[torch.Tensor, ...]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(_output(call, {}, forward_ad.make_dual(call.x, _tangent(call)))))


def dual_input_without_gradients(call: Call) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return dual_input(call)


def dual_parameters_without_gradients(call: Call) -> tuple[torch.Tensor, ...]:
    tangents = _tangents(call)
    with torch.no_grad(), forward_ad.dual_level():
        pairs = _parameters(call).items()
        parameters = {name: forward_ad.make_dual(p, tangents[name]) for name, p in pairs}
        return tuple(forward_ad.unpack_dual(_output(call, parameters, call.x)))


def jvp_of_the_input(call: Call) -> tuple[torch.Tensor, ...]:
    return torch.func.jvp(lambda x: _output(call, {}, x), (call.x,), (_tangent(call),))


def jvp_of_the_parameters(call: Call) -> tuple[torch.Tensor, ...]:
    return torch.func.jvp(lambda p: _output(call, p, call.x), (_parameters(call),), (_tangents(call),))


def grad(call: Call) -> tuple[torch.Tensor, ...]:
    def loss(parameters, x):
        y = _output(call, parameters, x)
        return (y * cotangent(y)).sum()

    parameters, x = torch.func.grad(loss, (0, 1))(_parameters(call), call.x)
    return _flat(parameters.values()), x


def vmap_of_the_input(call: Call) -> tuple[torch.Tensor, ...]:
    return (torch.func.vmap(lambda x: _output(call, {}, x), randomness="same")(_inputs(call)),)


def _inputs(call: Call) -> torch.Tensor:
    return torch.stack([call.x, call.x + 0.1 * _tangent(call)])


def _flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


# --------------------------------------------------------------------------- the same without transforms
def _slope_along_input(call: Call) -> tuple[torch.Tensor, ...]:
    return _slope(call, lambda step: _output(call, {}, call.x + step * _tangent(call)))


def _slope_along_parameters(call: Call) -> tuple[torch.Tensor, ...]:
    tangents = _tangents(call)

    def at(step):
        return _output(
            call, {name: p + step * tangents[name] for name, p in _parameters(call).items()}, call.x
        )

    return _slope(call, at)


def _slope(call: Call, at: Callable[[float], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return at(0.0), (at(1e-6) - at(-1e-6)) / 2e-6


def _gradients(call: Call) -> tuple[torch.Tensor, ...]:
    parameters = {name: p.requires_grad_() for name, p in _parameters(call).items()}
    x = call.x.clone().requires_grad_()
    y = _output(call, parameters, x)
    leaves = [*parameters.values(), x]
    *found, dx = torch.autograd.grad(y, leaves, cotangent(y), materialize_grads=True)
    return _flat(found), dx


def _loop(call: Call) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return (torch.stack([_output(call, {}, x) for x in _inputs(call)]),)


TRANSFORMS = {
    dual_input: _slope_along_input,
    dual_input_without_gradients: _slope_along_input,
    dual_parameters_without_gradients: _slope_along_parameters,
    jvp_of_the_input: _slope_along_input,
    jvp_of_the_parameters: _slope_along_parameters,
    grad: _gradients,
    vmap_of_the_input: _loop,
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_swapped_as_upstream(family, mode):
    seeded(0)
    upstream = family()
    moved(upstream.model, 0.03).train(mode == "train")
    ours = upstream._replace(model=copy.deepcopy(upstream.model))
    wide = upstream._replace(model=copy.deepcopy(upstream.model).double(), x=upstream.x.double())
    assert fastasr.accelerate(ours.model).replaced
    with torch.no_grad():
        before = _output(ours, {}, ours.x)
    done = []
    for transform, plain in TRANSFORMS.items():
        try:
            found = transform(ours)
        except (RuntimeError, NotImplementedError):
            with pytest.raises((RuntimeError, NotImplementedError)):  # upstream cannot do it either
                transform(upstream)
            continue
        with computing_in(torch.float64):
            expected = plain(wide)
        for one, other in zip(found, expected, strict=True):
            assert one is not None, f"{transform.__name__}: there is no tangent"
            close(one.double(), other, TOLERANCE, transform.__name__)
        done.append(transform)
    if mode == "eval":
        assert set(done) >= set(TRANSFORMS) - {dual_input, grad}  # which need gradients that are made by hand
    with torch.no_grad():
        assert torch.equal(_output(ours, {}, ours.x), before)


@torch.no_grad()
def test_vmap_of_a_mask():
    """Gemma 4's attention reads its mask, which it cannot under vmap."""
    model, run = families.make("gemma 4")
    fastasr.accelerate(model.eval())
    attention = next(m for m in model.modules() if type(m).__name__ == "Gemma4AudioAttention")
    calls, forward = [], attention.forward
    vars(attention)["forward"] = lambda **call: calls.append(call) or forward(**call)
    run(model)
    vars(attention)["forward"] = forward
    call = calls[0]

    def output(x, mask):
        return attention(**call | {"hidden_states": x, "attention_mask": mask})[0]

    x = torch.stack([call["hidden_states"], 2 * call["hidden_states"]])
    masks = torch.stack([call["attention_mask"]] * 2)
    expected = torch.stack([output(*pair) for pair in zip(x, masks, strict=True)])
    torch.testing.assert_close(torch.func.vmap(output)(x, masks), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["granite speech", "gemma 4", "gemma 3n"])
def test_vmap_of_the_models(kind):
    """torch.func.stack_module_state stacks buffers too, such as Granite's offsets of positions."""
    model, run = families.make(kind)
    fastasr.accelerate(model)
    other = moved(copy.deepcopy(model), 0.05)
    parameters, buffers = torch.func.stack_module_state([model, other])
    whole = torch.nn.ModuleList([model])
    whole.forward = lambda: run(model)[0]

    def output(*states):
        named = {f"0.{name}": t for state in states for name, t in state.items()}
        return torch.func.functional_call(whole, named, ())

    found = torch.func.vmap(output, randomness="same")(parameters, buffers)
    close(found, torch.stack([run(model)[0], run(other)[0]]), TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["parakeet", "parakeet, ragged", "nemo local", "granite speech", "gemma 4", "zipformer, causal"]
)
def test_without_values(kind):
    """Tensors of the meta device have shapes alone, with which tools count memory and operations."""
    model, run = families.make(kind)
    fastasr.accelerate(model, **families.SWAP.get(kind, {}))
    expected = run(model)[0]
    for module in model.to("meta").modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                vars(module)[name] = value.to("meta")
    for cell in run.__closure__:
        cell.cell_contents = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.to("meta"), cell.cell_contents
        )
    found = run(model)[0]
    assert (found.device.type, found.shape, found.dtype) == ("meta", expected.shape, expected.dtype)


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(families.FAMILIES.keys() - READ_BY_UPSTREAM))
def test_fake_mode(kind):
    """Estimators of memory run a model with its weights in FakeTensorMode. Nothing of that call may stay."""
    model, run = families.make(kind)
    expected = run(model)
    fastasr.accelerate(model, **families.SWAP.get(kind, {}))
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = run(model)
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in expected]
    for y, of_upstream in zip(run(model), expected, strict=True):
        close(y, of_upstream, TOLERANCE)
