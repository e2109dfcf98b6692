# SPDX-License-Identifier: Apache-2.0
"""TorchScript and ONNX: upstream's code inside eager_mode, an error that names it outside."""

import copy
import io
import pickle

import pytest
import torch
from families import FAMILIES
from steps import close, moved, numbers, seeded
from tiny_zipformer import plain_swoosh

import fastasr
from fastasr.swap.binding import ExportError

HELP = "with fastasr.eager_mode"


@pytest.fixture
def head():
    """Returns modules that upstream itself can script: norm, linear, activation."""
    from zipformer.modules.scaling import BiasNorm, SwooshR

    seeded(0)
    with plain_swoosh():
        return torch.nn.Sequential(torch.nn.Linear(12, 8), BiasNorm(8), SwooshR()).eval()


@pytest.fixture
def x():
    return torch.randn(5, 12, generator=numbers(0))


def test_script_inside_eager_mode(head, x):
    expected = head(x)
    fastasr.accelerate(head)
    with fastasr.eager_mode(head):
        scripted = torch.jit.script(head)
    close(scripted(x), expected)
    close(head(x), expected)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    close(torch.jit.load(file)(x), expected)


def test_script_outside_raises(head):
    fastasr.accelerate(head)
    with pytest.raises(ExportError, match=HELP):
        torch.jit.script(head)
    with pytest.raises(ExportError, match=HELP):
        torch.jit.script(copy.deepcopy(head))


@pytest.mark.parametrize("first", ["swapped", "plain"])
def test_script_after_a_partial_swap_raises_whichever_came_first(first, x):
    """Instances of one class share a scripted type, so a half-swapped model would compile one of the two."""
    from zipformer.modules.scaling import BiasNorm

    pair = torch.nn.Sequential(BiasNorm(12), BiasNorm(12)).eval()
    fastasr.accelerate(pair, only="0" if first == "swapped" else "1")
    with pytest.raises(ExportError, match=HELP):
        torch.jit.script(pair)
    fastasr.restore(pair)
    close(torch.jit.script(pair)(x), pair(x))


def test_a_loaded_pickle_can_be_scripted(head, x):
    fastasr.accelerate(head)
    loaded = pickle.loads(pickle.dumps(head))
    close(torch.jit.script(loaded)(x), head(x))


def test_trace(head, x):
    expected = head(x)
    fastasr.accelerate(head)
    with pytest.raises(ExportError, match=HELP):
        torch.jit.trace(head, (x,))
    with fastasr.eager_mode(head):
        traced = torch.jit.trace(head, (x,))
    close(traced(x), expected)


def test_trace_of_the_whole_model(model, inputs):
    model.eval()
    fastasr.accelerate(model)
    with pytest.raises(ExportError, match=HELP):
        torch.jit.trace(model, inputs)
    with torch.no_grad():
        expected = model(*inputs)[0]
        with fastasr.eager_mode(model):
            traced = torch.jit.trace(model, inputs, check_trace=False)
        close(traced(*inputs)[0], expected)


def test_onnx_by_tracing(head, x):
    pytest.importorskip("onnx")
    fastasr.accelerate(head)
    with pytest.raises(ExportError, match=HELP):
        torch.onnx.export(head, (x,), io.BytesIO(), dynamo=False)
    with fastasr.eager_mode(head):
        file = io.BytesIO()
        torch.onnx.export(head, (x,), file, dynamo=False)
    assert file.getvalue()


def test_onnx_by_export(head, x):
    pytest.importorskip("onnxscript")
    fastasr.accelerate(head)
    with pytest.raises(Exception, match="eager_mode"):
        torch.onnx.export(head, (x,), dynamo=True, verbose=False)
    with fastasr.eager_mode(head):
        program = torch.onnx.export(head, (x,), dynamo=True, verbose=False)
    assert program.model is not None


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(head, x, strict):
    """torch.export keeps fastasr's ops in the program."""
    expected = head(x)
    fastasr.accelerate(head)
    program = torch.export.export(head, (x,), strict=strict)
    assert any("fastasr" in str(node.target) for node in program.graph.nodes)
    close(program.module()(x), expected)


class Run(torch.nn.Module):
    def __init__(self, model, run):
        super().__init__()
        self.model, self.run = model, run

    def forward(self):
        return self.run(self.model)


@pytest.mark.parametrize("name", ["e-branchformer", "nemo transformer", "nemo transformer, causal"])
def test_strict_export_of_an_encoder(name):
    """A mask may be as long as the greatest length, which the exporter does not know to be the features'."""
    model, run = FAMILIES[name]()
    expected = run(model.eval())
    fastasr.accelerate(model)
    with torch.no_grad():
        program = torch.export.export(Run(model, run), (), strict=True)
    assert any("rel_attention" in str(node.target) for node in program.graph.nodes)
    close(program.module()(), expected)


@pytest.mark.parametrize("name", ["espnet conformer", "phi-4"])
def test_export_of_a_model_with_a_shared_module(name):
    """For such a model torch's exporter hands out stand-ins of all modules, of other classes."""
    model, run = FAMILIES[name]()
    expected = run(model.eval())
    fastasr.accelerate(model)
    with torch.no_grad():
        program = torch.export.export(Run(model, run), (), strict=False)
    called = {str(node.target) for node in program.graph.nodes}
    for op in ("gated_depthwise_conv", "linear_activation", "rel_attention"):
        assert f"fastasr.{op}.default" in called
    close(program.module()(), expected)


class Hidden(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, mask):
        return self.model(x, attention_mask=mask)[0]


@pytest.mark.parametrize(
    ("name", "width"), [("fastspeech2 conformer", 16), ("parakeet", 16), ("seamless m4t v2", 16)]
)
def test_an_exported_encoder_serves_any_batch(name, width):
    model, _ = FAMILIES[name]()
    moved(model, 0.05).eval()

    def batch(*lengths):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        mask = mask.unsqueeze(1).int() if name == "fastspeech2 conformer" else mask
        return torch.randn(len(lengths), max(lengths), width), mask

    free = torch.export.Dim.AUTO
    x, mask = batch(75, 50, 30)
    shapes = {0: free, 1: free}, {0: free, mask.ndim - 1: free}
    others = [batch(48, 31), batch(61, 40, 61, 9)]
    with torch.no_grad():
        expected = [Hidden(model)(x.clone(), mask) for x, mask in others]
        fastasr.accelerate(model)
        program = torch.export.export(Hidden(model), (x, mask), dynamic_shapes=shapes)
        assert any("fastasr" in str(node.target) for node in program.graph.nodes)
        for call, wanted in zip(others, expected, strict=True):
            close(program.module()(*call), wanted)


def test_scripted_submodules_are_declined(head, x):
    scripted = torch.nn.Sequential(torch.jit.script(head), torch.nn.Linear(8, 8))
    report = fastasr.accelerate(scripted)
    assert not report.replaced
    assert report["0"].reason == "compiled by TorchScript"
    close(scripted[0](x), head(x))


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features, mask):
        return self.model(input_features=features, attention_mask=mask).logits


def test_a_parakeet_to_onnx(tmp_path):
    """The encoder with its CTC head, for any batch and any length, from a swapped model."""
    from tiny_parakeet import SIZES  # here, since by this name a test needs the rules for Parakeet

    transformers = pytest.importorskip("transformers")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder = transformers.ParakeetEncoderConfig(**SIZES)
    config = transformers.ParakeetCTCConfig(vocab_size=11, pad_token_id=10, encoder_config=encoder)
    model = moved(transformers.ParakeetForCTC(config), 0.03).eval()
    fastasr.accelerate(model)

    def inputs(*lengths):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        return torch.randn(*mask.shape, SIZES["num_mel_bins"]), mask

    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("frames", min=16)}
    with fastasr.eager_mode(model), torch.no_grad():
        program = torch.onnx.export(
            Logits(model), inputs(80, 50), dynamic_shapes=(free, free), dynamo=True, verbose=False
        )
    program.save(tmp_path / "parakeet.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "parakeet.onnx")
    names = [each.name for each in session.get_inputs()]
    for lengths in ((80, 50), (133,)):
        given = inputs(*lengths)
        found = session.run(None, {n: x.numpy() for n, x in zip(names, given, strict=True)})[0]
        with torch.no_grad():
            close(torch.from_numpy(found), Logits(model)(*given), 1e-4)
