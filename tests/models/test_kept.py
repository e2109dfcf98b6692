# SPDX-License-Identifier: Apache-2.0
"""What is kept between calls is made again after every write to the parameters: each kind of it, each way to write."""

import copy
import gc
import pickle
import weakref
from functools import partial

import mega_decoders
import pytest
import torch
from packed_layers import zipformer_layer
from steps import numbers, relative, seeded
from tiny_emformer_rnnt import tiny
from tiny_parakeet import SIZES, STILL
from tiny_recogniser import RECOGNISER, STREAMING

import fastasr
from fastasr.asr import decoding, recogniser
from fastasr.asr.streaming import EagerBackend, StreamingEncoder
from fastasr.models import emformer, emformer_rnnt, fast_conformer
from fastasr.models.emformer import packed_step, stream
from fastasr.models.fast_conformer.positions import table
from fastasr.models.mega import decoding as mega_decoding
from fastasr.models.zipformer import ZipformerEncoderLayer, native_layer
from fastasr.models.zipformer.layer import _stream_by_submodules
from fastasr.ops import _dispatch, _kept, _reduced_weights

pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="the native library is not built")
LIMIT = 2e-5  # relative to the rms of each result
CHUNK = 8


# --------------------------------------------------------------------------- the kinds
# Each has make() -> module, ``kept(module)``, which returns the results of what is kept, and ``truth(module)``, which
# computes the same from the parameters as they are.
class StreamingLayer:
    @staticmethod
    def make():
        return zipformer_layer(causal=True)

    @staticmethod
    def _chunk(layer):
        draw = partial(torch.randn, generator=numbers("chunk"))
        shapes = (6, 2, 12), (1, 2, 6, 15), (6, 2, 10), (6, 2, 10), (2, 20, 3), (2, 20, 3)
        return draw(4, 2, 20), draw(1, 13, 8), [draw(shape) for shape in shapes], 6, None

    @classmethod
    def kept(cls, layer):
        found = native_layer.step(layer, *cls._chunk(layer), partial(_stream_by_submodules, layer))
        assert found is not None, native_layer.why_not(layer)
        return found

    @classmethod
    def truth(cls, layer):
        return _stream_by_submodules(layer, *cls._chunk(layer))


class WholeLayer:
    """In int8: in float32 the call reads the parameters themselves."""

    @staticmethod
    def make():
        layer = zipformer_layer(dim=64, num_heads=4, feedforward_dim=128)
        for name in ("in_proj", "out_proj"):
            _reduced_weights.keep(layer.feed_forward2.get_submodule(name).weight, "int8")
        return layer

    @staticmethod
    def _call(layer):
        draw = partial(torch.randn, generator=numbers("call"))
        return draw(40, 2, 64), draw(1, 79, 8), -1, None, None, None

    @classmethod
    def kept(cls, layer):
        by_submodules = partial(ZipformerEncoderLayer._encode_by_submodules, layer, False)
        if native_layer.why_not(layer)["forward"] is None:
            by_submodules(*cls._call(layer))  # measures the products
        found = native_layer.encode(layer, *cls._call(layer), by_submodules)
        assert found is not None, native_layer.why_not(layer)
        return [found]

    @classmethod
    def truth(cls, layer):
        layer = copy.deepcopy(layer)
        for name in ("in_proj", "out_proj"):
            _reduced_weights.keep(layer.feed_forward2.get_submodule(name).weight, "int8")
        return [ZipformerEncoderLayer._encode_by_submodules(layer, False, *cls._call(layer))]


class EmformerLayer:
    @staticmethod
    def make():
        layer = emformer.EmformerLayer(
            24, 3, 70, segment_length=4, left_context_length=6, max_memory_size=3
        ).eval()
        for parameter in layer.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        return layer

    @staticmethod
    def _segment(layer):
        draw = partial(torch.randn, generator=numbers("segment"))
        state = [*(draw(n, 2, 24) for n in (3, 6, 6)), torch.full((1, 2), 9, dtype=torch.int32)]
        shared = stream.Step(layer, 4, 2, torch.full((2,), 4), state[3], torch.device("cpu"))
        return draw(4, 2, 24), draw(2, 2, 24), state, draw(1, 2, 24), shared

    @classmethod
    def kept(cls, layer):
        found = packed_step.step(layer, *cls._segment(layer), partial(stream.infer_by_operations, layer))
        assert found is not None, packed_step.why_not(layer)
        return found

    @classmethod
    def truth(cls, layer):
        return stream.infer_by_operations(layer, *cls._segment(layer))


class MegaDecoder:
    make = staticmethod(mega_decoders.ours)

    @staticmethod
    def kept(decoder):
        found = mega_decoding.step(decoder, torch.tensor([[3], [5]]), decoder.init_state(2))
        assert found is not None, mega_decoding.why_not(decoder)
        return [found[0]]

    @staticmethod
    def truth(decoder):
        states = decoder.init_state(2)
        return [mega_decoders.block_by_block(decoder, torch.tensor([[3], [5]]), states)[0]]


class Search:
    """Greedy search. Its copies serve a loop over the model's own modules by their predictions."""

    @staticmethod
    def frames(model):
        width = 14 if isinstance(model, emformer_rnnt.RNNT) else 24
        return torch.randn(2, 12, width, generator=numbers("frames"))

    @classmethod
    def kept(cls, model):
        assert not decoding.GreedySearch(model).reason
        return cls.found(model)

    @classmethod
    def truth(cls, model):
        with fastasr.backend("eager"):
            return cls.found(copy.deepcopy(model))

    @classmethod
    def found(cls, model):
        search = decoding.GreedySearch(model)
        found = search.result(search.advance(search.start(2), cls.frames(model)))
        return [torch.tensor(found.scores), *map(torch.tensor, found.tokens)]


class AsrSearch(Search):
    @staticmethod
    def make():
        model = recogniser.AsrModel(**RECOGNISER | STREAMING | {"vocab_size": 12, "context_size": 2}).eval()
        for part in (model.joiner, model.decoder):
            for parameter in part.parameters():
                parameter.data.normal_(std=0.5)
        return model


class RnntSearch(Search):
    @staticmethod
    def make():
        model = tiny(emformer_rnnt).eval()
        for part in (model.predictor, model.joiner):
            for parameter in part.parameters():
                parameter.data.normal_(std=0.6)
        return model


class ParakeetEncoder:
    """Upstream's encoder, swapped: projected positions."""

    @staticmethod
    def make():
        transformers = pytest.importorskip("transformers")
        model = transformers.ParakeetEncoder(transformers.ParakeetEncoderConfig(**SIZES | STILL)).eval()
        for layer in model.layers:
            for parameter in layer.self_attn.parameters():
                parameter.data.normal_(std=0.5)
        assert fastasr.accelerate(model).replaced
        return model

    @staticmethod
    def kept(model):
        x = torch.randn(2, 50, 16, generator=numbers("features"))
        return [
            model(input_features=x, attention_mask=torch.ones(2, 50, dtype=torch.int64)).last_hidden_state
        ]

    @classmethod
    def truth(cls, model):
        with fastasr.eager_mode(model):
            return cls.kept(model)


class Positions:
    """The table of positions, of a buffer."""

    @staticmethod
    def make():
        return fast_conformer.positions.FastConformerPositions(600)

    @staticmethod
    def kept(module):
        return [module(torch.zeros(1, 7, 600))]

    @staticmethod
    def truth(module):
        return [table(7, module.inv_freq, torch.float32).unsqueeze(0)]


class Engine:
    """Its truth is an engine that calls a copy of the model's own code, with copies of the matrices rounded alike."""

    def __init__(self, backend, weights):
        self.backend, self.weights, self.engines = backend, weights, weakref.WeakKeyDictionary()

    def make(self):
        model = recogniser.AsrModel(**RECOGNISER | STREAMING | {"vocab_size": 12}).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        return model

    def features(self):
        return torch.randn(1, 2 * CHUNK + 13, 80, generator=numbers("features"))

    def kept(self, model):
        engine = self.engines.get(model)
        if engine is None:
            made = {"backend": self.backend, "weights": self.weights}
            engine = self.engines[model] = StreamingEncoder.from_model(model, CHUNK, 16, **made)
        with engine:
            return [engine.step(self.features(), [engine.open()])[0]]

    def truth(self, model):
        backend = EagerBackend(copy.deepcopy(model), CHUNK, 16, self.weights)
        return [backend.step(self.features(), [0])]


class ReducedProduct:
    @staticmethod
    def make():
        layer = torch.nn.Linear(72, 100)
        _reduced_weights.keep(layer.weight, "int8")
        return layer

    @staticmethod
    def kept(layer):
        x = torch.randn(9, 72, generator=numbers("x"))
        assert _reduced_weights.copy_of(layer.weight) is not None
        return [fastasr.ops.linear(x, layer.weight, layer.bias)]

    @classmethod
    def truth(cls, layer):
        layer = copy.deepcopy(layer)
        _reduced_weights.keep(layer.weight, "int8")
        return cls.kept(layer)


KINDS = {
    "a streaming layer of Zipformer": StreamingLayer,
    "a whole layer of Zipformer": WholeLayer,
    "a layer of Emformer": EmformerLayer,
    "a decoder's step": MegaDecoder,
    "an AsrModel's search": AsrSearch,
    "an RNN-T's search": RnntSearch,
    "projected positions": ParakeetEncoder,
    "a table of positions": Positions,
    "a native engine": Engine("native", "fp32"),
    "an eager engine": Engine("eager", "bf16"),
    "a product in int8": ReducedProduct,
}


# --------------------------------------------------------------------------- the writes
def _tensors(module):
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


def _each(write):
    def change(module):
        for t in _tensors(module):
            write(t)

    return change


def _changed(t):
    return t.detach() * 1.1 + 0.003


def _numpy(t):
    t.detach().numpy()[...] *= 1.1


def _new_data(t):
    t.data = _changed(t)


def _merge(t):
    """Adds a product of low rank, as a merge of adapters."""
    if t.dim() == 2:
        draw = partial(torch.randn, generator=numbers(f"merge {tuple(t.shape)}"))
        t.data += 0.05 * draw(len(t), 2) @ draw(2, t.shape[1])
    else:
        t.data += 0.01


def _load_state_dict(module):
    module.load_state_dict({name: _changed(t) for name, t in module.state_dict().items()})


def _assign(module):
    """Puts other parameters in the places."""
    module.load_state_dict({name: _changed(t) for name, t in module.state_dict().items()}, assign=True)


def _under_no_grad(t):
    with torch.no_grad():
        t.copy_(_changed(t))


def _write_shared(arrays):
    for array in arrays:
        array *= 1.1


def _other_process(module):
    """Another process writes to the memory that it shares with this one."""
    arrays = [t.detach().numpy() for t in _tensors(module)]
    child = torch.multiprocessing.get_context("fork").Process(target=_write_shared, args=(arrays,))
    child.start()
    child.join()
    assert child.exitcode == 0


WRITES = {
    "data.mul_": _each(lambda t: t.data.mul_(1.1)),
    "data.copy_": _each(lambda t: t.data.copy_(_changed(t))),
    "numpy": _each(_numpy),
    "data =": _each(_new_data),
    "merge": _each(_merge),
    "load_state_dict": _load_state_dict,
    "assign": _assign,
    "copy_": _each(_under_no_grad),
    "process": _other_process,
}


# --------------------------------------------------------------------------- the tests
def _differ(got, expected):
    """Returns the largest relative rms difference."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        return float("inf")
    return max(relative(a, b) for a, b in zip(got, expected, strict=True) if b.numel())


def _made(kind):
    seeded("module")
    return kind.make()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_write_is_noticed(kind, write):
    kind, module = KINDS[kind], _made(KINDS[kind])
    if write == "process":
        module.share_memory()
    if write in ("load_state_dict", "assign") and not module.state_dict():
        pytest.skip("its buffer is in no state dict")
    if write == "assign" and kind in (WholeLayer, ReducedProduct):
        pytest.skip("a copy in int8 is its parameter's")
    before = kind.kept(module)
    assert _differ(before, kind.truth(module)) <= LIMIT
    WRITES[write](module)
    after = kind.truth(module)
    assert _differ(before, after) > 50 * LIMIT  # it matters
    assert _differ(kind.kept(module), after) <= LIMIT
    assert _differ(kind.kept(module), after) <= LIMIT


@pytest.mark.parametrize("kind", [name for name in KINDS if "positions" not in name])
@torch.no_grad()
def test_refresh_serves_a_write_to_one_element(kind):
    kind, module = KINDS[kind], _made(KINDS[kind])
    kind.kept(module)
    for t in _tensors(module):
        if t.numel():
            t.detach().numpy().flat[t.numel() // 3] += 0.5
    assert fastasr.refresh(module) > 0
    assert _differ(kind.kept(module), kind.truth(module)) <= LIMIT
    assert fastasr.refresh(torch.nn.Linear(2, 2)) == 0  # another model


@pytest.mark.parametrize("kind", [StreamingLayer, EmformerLayer, MegaDecoder, ParakeetEncoder])
@torch.no_grad()
def test_a_copy_keeps_what_is_its_own(kind):
    model = _made(kind)
    kind.kept(model)
    twin = copy.deepcopy(model)
    for t in _tensors(model):
        t.data.mul_(1.1)
    for one in (twin, model):
        assert _differ(kind.kept(one), kind.truth(one)) <= LIMIT
    assert _differ(kind.kept(twin), kind.kept(model)) > 50 * LIMIT
    pickle.dumps(model)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_kept_is_freed_with_the_model(kind):
    module = _made(KINDS[kind])
    KINDS[kind].kept(module)
    ids = set(map(id, _tensors(module)))
    records = weakref.WeakSet(record for record in set(_kept._every) if not ids.isdisjoint(record._ids))
    assert records
    parameters = [weakref.ref(t) for t in _tensors(module)]
    del module
    gc.collect()
    assert not records
    assert not any(ref() is not None for ref in parameters)


@torch.no_grad()
def test_an_engine_follows_a_model_in_training_elsewhere_and_one_whose_weights_are_freed():
    kind = KINDS["a native engine"]
    model = _made(kind)
    before = kind.kept(model)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert _differ(before, kind.truth(model)) > 50 * LIMIT
    model.train()
    model.double()
    after = kind.kept(model)
    assert _differ(after, kind.truth(model.float().eval())) <= LIMIT
    StreamingEncoder.from_model(model, CHUNK, 16, release_weights=True)
    assert _differ(kind.kept(model), after) <= LIMIT


MASK_WRITES = {
    "in inference mode": lambda mask: mask[0, 0, :, 3:].fill_(False),
    "numpy": lambda mask: mask.numpy()[0, 0, 2].fill(False),
    "one pair": lambda mask: mask.numpy()[1, 0, 4].__setitem__(1, False),
}


@pytest.mark.parametrize("write", MASK_WRITES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_write_to_a_mask_is_noticed(write, inference):
    module = fast_conformer.FastConformerAttention(24, 3).eval()
    with torch.inference_mode(inference), torch.no_grad():
        x, positions = torch.randn(2, 9, 24), torch.randn(1, 17, 24)
        mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
        before = module(x, positions, mask)[0]
        MASK_WRITES[write](mask)
        after = module(x, positions, mask.clone())[0]
        assert _differ([before], [after]) > LIMIT
        assert torch.equal(module(x, positions, mask)[0], after)


@torch.no_grad()
def test_an_engine_lives_on_without_its_model():
    model = _made(KINDS["a native engine"])
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    features = KINDS["a native engine"].features()
    engine = StreamingEncoder.from_model(model, CHUNK, 16, backend="native")
    first = engine.step(features, [engine.open()])[0]
    del model
    gc.collect()
    assert not any(ref() is not None for ref in parameters)
    assert all(torch.equal(engine.step(features, [engine.open()])[0], first) for _ in range(3))


def test_a_smaller_tensor_at_the_same_address_has_changed():
    """What lay behind it may be nobody's memory."""
    large, small = torch.nn.Parameter(torch.randn(1 << 15)), torch.nn.Parameter(torch.randn(3))
    record = _kept.Originals([small, large])
    assert record.unchanged([small, large])
    large.data = large.data[: 1 << 10]
    assert not record.unchanged([small, large])
