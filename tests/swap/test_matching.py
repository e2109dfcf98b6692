# SPDX-License-Identifier: Apache-2.0
"""Known code is swapped wherever it lives; everything else is declined with a reason."""

import ast
import inspect
import random

import families
import pytest
import torch
from steps import close, seeded
from tiny_zipformer import from_file, plain_swoosh
from torch.nn.utils import parametrizations, weight_norm

import fastasr
from fastasr.models.zipformer.layer import constant_attention_in_eval
from fastasr.swap.source_hash import fingerprint


def _reason(module, **options):
    """Returns why the only module of a model was declined; its forward must be its own afterwards."""
    report = fastasr.accelerate(torch.nn.Sequential(module), **options)
    assert report["0"].status == "skipped"
    assert "fastasr" not in repr(vars(module).get("forward"))
    return report["0"].reason


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Returns recipe(edit) -> modules scaling, subsampling, zipformer of a recipe folder made from the installed
    package.

    ``edit`` changes the text of a file. Like those of icefall's folders, the modules import each other by bare name.
    """
    import zipformer.modules.scaling
    import zipformer.modules.subsampling
    import zipformer.modules.zipformer

    loaded = []

    def make(edit=lambda name, text: text):
        folder = tmp_path / f"recipe{len(loaded)}"
        folder.mkdir()
        result = []
        for name in ("scaling", "subsampling", "zipformer"):
            text = inspect.getsource(getattr(zipformer.modules, name))
            text = text.replace("from zipformer.modules.scaling import", f"from {folder.name}_scaling import")
            path = folder / f"{folder.name}_{name}.py"
            path.write_text(edit(name, text))
            result.append(from_file(path, monkeypatch))
        loaded.append(result)
        return result

    return make


def _one_of_each(scaling, subsampling, zipformer):
    with plain_swoosh():
        return torch.nn.ModuleDict(
            {
                "swoosh_l": scaling.SwooshL(),
                "swoosh_r": scaling.SwooshR(),
                "fused_l": scaling.ActivationDropoutAndLinear(4, 3, activation="SwooshL"),
                "fused_r": scaling.ActivationDropoutAndLinear(4, 3, activation="SwooshR"),
                "norm": scaling.BiasNorm(4),
                "bypass": zipformer.BypassModule(4),
                "balancer": scaling.Balancer(4, channel_dim=-1),
                "convnext": subsampling.ConvNeXt(4, kernel_size=(3, 3)),
                "embed": subsampling.Conv2dSubsampling(9, 4, 2, 3, 4),
                "convolution": zipformer.ConvolutionModule(4, 3, causal=False),
                "weights": zipformer.RelPositionMultiheadAttentionWeights(4, 6, 2, 3, 2),
                "whiten": scaling.Whiten(1, 5.0, (0.025, 0.25), 0.01),
                "self_attention": zipformer.SelfAttention(4, 2, 3),
                "nonlin_attention": zipformer.NonlinAttention(4, 3),
                "layer": zipformer.ZipformerEncoderLayer(4, 6, 2, 3, 2, 2, 8, cnn_module_kernel=3),
                "linear": torch.nn.Linear(4, 3),
            }
        )


def _reformat(name, text):
    """Reformats the code without comments and blank lines, with other annotations and quotes, and ``nn`` for
    ``torch.nn``.
    """
    text = ast.unparse(ast.parse(text)).replace("torch.Tensor", "Tensor").replace("torch.nn.", "nn.")
    return f"from torch import nn, Tensor\n{text}"


@pytest.mark.parametrize("edit", [lambda name, text: text, _reformat], ids=["copied", "reformatted"])
def test_copies_in_a_recipe_folder_are_swapped(recipe, edit):
    model = _one_of_each(*recipe(edit))
    report = fastasr.accelerate(model)
    parts = ("conv.3", "conv.6", "conv.9", "convnext", "convnext.activation", "out", "out_norm")
    inner = {"convnext.activation", *(f"embed.{part}" for part in parts)}
    inner |= {
        f"{path}.{part}"
        for path in ("convolution", "self_attention", "nonlin_attention")
        for part in ("in_proj", "out_proj")
    }
    inner |= {"weights.in_proj", "weights.linear_pos"}
    regularisers = ("Balancer", "Whiten")
    inner |= {path for path, module in model.named_modules() if type(module).__name__ in regularisers}
    inner = {path for path in inner if not path.startswith("layer.")}
    replaced = {row.path for row in report.replaced}
    assert {path for path in replaced if not path.startswith("layer.")} == {*model.keys(), *inner}
    skipped = {
        type(module).__name__
        for path, module in model.layer.named_modules()
        if f"layer.{path}" not in replaced and path
    }
    assert skipped == {"FeedforwardModule", "ScheduledFloat", "Identity", "Sigmoid", "Tanh", "Conv1d"}


BALANCED, WHITENED = {"balancer", "convnext", "embed", "convolution"}, {"convolution", "whiten"}
NO_WHITENING = (
    "if not x.requires_grad or random.random() > self.prob or grad_scale == 0:\n            return "
)
# file, its text, another text, what is no longer known; both activations are spelled out in the fused forward
EDITS = {
    "the score of a masked position": (
        "zipformer", "masked_fill(attn_mask, -1000)", "masked_fill(attn_mask, -10000)", {"weights"},
    ),
    "a constant of the activation": (
        "scaling", "0.08 * x - 0.035", "0.08 * x - 0.036", {"swoosh_l", "fused_l", "fused_r"},
    ),
    "the derivative": ("scaling", "deriv = 0.92 - inv_denom", "deriv = 0.9 - inv_denom", {"fused_l", "fused_r"}),
    "the norm's formula": ("scaling", "x - bias) ** 2", "x - bias) ** 4", {"norm"}),
    "how often a limit applies": ("scaling", "prob: float = 0.6", "prob: float = 0.7", {"norm", "bypass"}),
    "what a limit does": ("scaling", "x_grad > 0, x < ctx.min", "x_grad > 0, x > ctx.min", {"norm", "bypass"}),
    "the bypass": ("zipformer", "(src - src_orig) * bypass_scale", "(src - src_orig) / bypass_scale", {"bypass"}),
    "how a scale is drawn": ("zipformer", "> skip_rate", ">= skip_rate", {"bypass"}),
    "the layer of the front end": ("subsampling", "x = bypass + x\n", "x = bypass - x\n", {"convnext", "embed"}),
    "the front end": ("subsampling", "reshape(b, t, c * f)", "reshape(b, t, f * c)", {"embed"}),
    "what a regulariser does to strides": (
        "scaling", "if not x.requires_grad or (\n", "if not x.view(-1).requires_grad or (\n", BALANCED,
    ),
    "what a balancer does to gradients": ("scaling", "loss = m_loss + r_loss", "loss = m_loss - r_loss", BALANCED),
    "the convolution module": ("zipformer", "x, s = x.chunk(2", "s, x = x.chunk(2", {"convolution"}),
    "what whitening returns": ("scaling", f"{NO_WHITENING}_no_op(x)", f"{NO_WHITENING}2 * x", WHITENED),
    "what whitening does to gradients": (
        "scaling", "penalty_grad = penalty_grad * scale", "penalty_grad = penalty_grad / scale", WHITENED,
    ),
    "the order of the thirds": ("zipformer", "s, x, y = x.chunk(3", "x, s, y = x.chunk(3", {"nonlin_attention"}),
    "what is done with the weights": (
        "zipformer", "x = self.whiten(x)\n\n", "x = 2 * self.whiten(x)\n\n", {"self_attention"},
    ),
    "the layer": (
        "zipformer", "src = self.bypass_mid(src_orig, src)", "src = self.bypass_mid(src, src_orig)", {"layer"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_edited_copies_are_declined(recipe, what):
    file, old, new, affected = EDITS[what]

    def edit(name, text):
        if name != file:
            return text
        assert old in text
        return text.replace(old, new)

    model = _one_of_each(*recipe(edit))
    report = fastasr.accelerate(model)
    declined = set(model.keys()) - {row.path for row in report.replaced}
    if "swoosh_l" in affected:
        affected = affected | {"convnext", "embed"}  # they run a SwooshL
    assert declined == affected
    for path in affected - {"convnext", "embed", "convolution"}:
        assert "is no known version" in report[path].reason


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_layer_whose_constant_attention_acts_in_eval_mode(recipe, training):
    """icefall's layer before March 2024 does this, and so do its recipes that keep that layer."""

    def edit(name, text):
        if name != "zipformer":
            return text
        old = "elif self.training and random.random() < float(self.const_attention_rate)"
        assert old in text
        return text.replace(old, old.replace("self.training", "not self.training"))

    scaling, _, zipformer = recipe(edit)
    with plain_swoosh():
        layer = zipformer.ZipformerEncoderLayer(8, 6, 2, 4, 2, 4, 16, cnn_module_kernel=3)
    layer.const_attention_rate = scaling.ScheduledFloat((0.0, 0.5), default=0.5)
    layer.train(training)
    x, pos_emb = torch.randn(5, 2, 8), torch.randn(1, 9, 6)
    for seed in range(6):
        results = []
        for forward in (type(layer).forward, constant_attention_in_eval):
            seeded(seed)
            with torch.no_grad():
                results.append((forward(layer, x, pos_emb), random.getstate()))
        close(results[1][0], results[0][0], what="output")
        assert results[1][1] == results[0][1]


def test_fingerprints_do_not_depend_on_the_folder(recipe):
    from zipformer.modules.scaling import BiasNorm

    copied = recipe()[0].BiasNorm
    assert copied is not BiasNorm
    assert fingerprint([copied.forward], copied) == fingerprint([BiasNorm.forward], BiasNorm)


def test_a_docstring_may_start_further_left_than_its_function(tmp_path, monkeypatch):
    """Some recipes have such docstrings."""
    code = [
        "class Module:\n",
        "    def forward(self, x):\n",
        '        """What\n  it does."""\n',
        "        return x\n",
    ]
    found = set()
    for docstring in (True, False):
        path = tmp_path / f"docstring_{docstring}.py"
        path.write_text("".join(code if docstring else [*code[:2], code[3]]))
        module = from_file(path, monkeypatch)
        found.add(fingerprint([module.Module.forward], module.Module))
    assert len(found) == 1


def test_code_without_source_is_declined():
    namespace = {"torch": torch}
    code = "class BiasNorm(torch.nn.Module):\n    num_channels = 4\n    channel_dim = -1\n"
    exec(code + "    def forward(self, x):\n        return x\n", namespace)
    module = namespace["BiasNorm"]()
    module.bias = torch.nn.Parameter(torch.zeros(4))
    module.log_scale = torch.nn.Parameter(torch.zeros(()))
    assert "source cannot be read" in _reason(module)


@pytest.fixture
def norm():
    from zipformer.modules.scaling import BiasNorm

    return BiasNorm(8)


@pytest.fixture
def fused():
    from zipformer.modules.scaling import ActivationDropoutAndLinear

    with plain_swoosh():
        return ActivationDropoutAndLinear(6, 4)


def test_hooks(norm):
    def watch(*_):
        return None

    handle = norm.register_forward_hook(watch)
    assert "has a forward hook" in _reason(norm)
    assert "watch" in _reason(norm)
    handle.remove()
    norm.register_forward_pre_hook(watch)
    assert "has a forward pre-hook" in _reason(norm)


def test_weight_norm_and_parametrizations(model):
    before = len(fastasr.explain(model).replaced)
    parametrizations.weight_norm(model.encoder_embed.out)
    weight_norm(model.encoder.encoders[0].layers[0].feed_forward1.in_proj)
    report = fastasr.accelerate(model)
    assert len(report.replaced) == before - 2
    assert "has parametrizations on weight" in report["encoder_embed.out"].reason
    assert "pre-hook" in report["encoder.encoders.0.layers.0.feed_forward1.in_proj"].reason


def test_a_forward_replaced_on_the_instance(norm):
    def quiet(x):
        return x

    norm.forward = quiet
    assert _reason(norm) == f"its forward was already replaced on this instance, by {quiet.__qualname__}"
    assert norm.forward is quiet


def test_extra_parameters_buffers_and_submodules(norm, fused):
    norm.gain = torch.nn.Parameter(torch.ones(8))
    assert "parameters this class does not have upstream: gain" in _reason(norm)
    del norm.gain
    norm.register_buffer("running", torch.zeros(8))
    assert "buffers this class does not have upstream: running" in _reason(norm)
    fused.lora = torch.nn.Linear(6, 4)
    assert "a submodule this class does not have upstream: lora (Linear)" in _reason(fused)


def test_wrong_shapes_and_dtypes(norm, fused):
    norm.bias = torch.nn.Parameter(torch.zeros(9))
    assert _reason(norm) == "bias has shape (9,), expected (8,)"
    fused.weight = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)
    assert _reason(fused) == "weight is torch.int8, expected a floating-point type"


def test_missing_attributes_and_odd_values(norm, fused):
    del norm.channel_dim
    assert "lacks an attribute of upstream's BiasNorm" in _reason(norm)
    fused.activation = "Tanh"
    assert "activation is 'Tanh'" in _reason(fused)
    fused.activation = "SwooshR"
    assert _reason(fused) == "forward_func is _swooshl, expected _swooshr"
    fused.activation, fused.dropout_p = "SwooshL", "often"
    assert "dropout_p is a str" in _reason(fused)


def test_subclasses(norm):
    from zipformer.modules.scaling import BiasNorm

    class Loud(BiasNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(BiasNorm):
        label = "same code under another name"

    assert _reason(Loud(8)) == "Loud is a subclass of BiasNorm that overrides forward"
    assert fastasr.accelerate(Named(8)).replaced


def test_a_helper_overridden_in_a_subclass():
    from zipformer.modules.zipformer import BypassModule

    class Fixed(BypassModule):
        def _get_bypass_scale(self, batch_size):
            return self.bypass_scale * 0.5

    assert _reason(Fixed(8)) == "Fixed is a subclass of BypassModule that overrides _get_bypass_scale"


def test_a_class_patched_as_a_whole(norm, monkeypatch):
    monkeypatch.setattr(type(norm), "forward", lambda self, x: x)
    assert "is no known version of BiasNorm" in _reason(norm)


def test_an_unrelated_class_of_the_same_name():
    class BiasNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale

    assert "lacks an attribute of upstream's BiasNorm" in _reason(BiasNorm())


loaded = families.without_init
# classes of one framework with the names of another's, or of torch's
NAMESAKES = {
    "linear layer": lambda: loaded("speechbrain.nnet.linear").Linear(3, input_size=4),
    "feed-forward": lambda: loaded("fireredasr.models.module.transformer_decoder").PositionwiseFeedForward(
        4, 8
    ),
    "front end": lambda: loaded("fireredasr.models.module.conformer_encoder").Conv2dSubsampling(20, 4),
    "joint": lambda: loaded("gigaam.decoder").RNNTJoint(4, 5, 6, 7),
    "attention": lambda: families.load_openai_whisper().MultiHeadAttention(4, 2),
}


@pytest.mark.parametrize("name", NAMESAKES)
def test_namesakes_of_other_frameworks(name):
    """They have no rule: the report does not tell how they differ from the other framework's class."""
    assert _reason(NAMESAKES[name]()) == "container: see its submodules"


def test_copies_in_other_frameworks():
    """FunASR has ESPnet's code of this class."""
    home = loaded("funasr.models.transformer.positionwise_feed_forward")
    feed_forward = home.PositionwiseFeedForward(4, 8, 0.1)
    row = fastasr.accelerate(feed_forward)[""]
    assert (row.status, row.rule) == ("replaced", "espnet.positionwise_feed_forward")


def test_linear_alone_is_left_alone_and_subclasses_too(norm):
    class Adapted(torch.nn.Linear):
        pass

    assert _reason(torch.nn.Linear(3, 3)) == "is replaced only beside other classes, which this model lacks"
    report = fastasr.accelerate(torch.nn.Sequential(norm, Adapted(3, 3), torch.nn.Linear(3, 3)))
    assert "is a subclass of torch.nn.Linear" in report["1"].reason
    assert report["2"].status == "replaced"


def test_convnext_with_another_convolution(model):
    embed = model.encoder_embed
    embed.convnext.pointwise_conv1.stride = (2, 2)
    report = fastasr.explain(model)
    assert "pointwise_conv1 has another stride" in report["encoder_embed.convnext"].reason
    embed.convnext.pointwise_conv1.stride = (1, 1)
    embed.convnext.hidden_balancer.forward = lambda x: x + 1
    report = fastasr.explain(model)
    assert "hidden_balancer runs code that is not upstream's" in report["encoder_embed.convnext"].reason


def setting(path, value):
    """Returns a change that sets the attribute of a module or of a part."""
    part, _, name = path.rpartition(".")
    return lambda module: setattr(module.get_submodule(part), name, value)


def without(name):
    return lambda module: delattr(module, name)


class Causal(torch.nn.Conv2d):
    pass


class Residual(torch.nn.Sequential):
    pass


class Adapted(torch.nn.Linear):
    pass


Conv1d = type("Conv1d", (torch.nn.Conv1d,), {})
EXTRA = (
    setting("extra", torch.nn.Linear(3, 3)),
    "has a submodule this class does not have upstream: extra (Linear)",
)
HOLDS = "submodule conv holds Conv2d, ScaleGrad, Balancer, SwooshR, "
FRONT_END = {
    "a longer stack": (lambda m: m.conv.append(torch.nn.Identity()), f"{HOLDS}Conv2d, Balancer, SwooshR"),
    "a subclass": (setting("conv.4", Causal(4, 8, 3, stride=2)), f"{HOLDS}Causal"),
    "another activation": (setting("conv.6", torch.nn.ReLU()), f"{HOLDS}Conv2d, Balanc"),
    "a forward": (setting("conv.2.forward", lambda x: x.view(-1)), "submodule conv.2 runs code that is not upstream's"),
    "the container": (
        lambda m: setattr(m, "conv", Residual(*m.conv)), "submodule conv is a Residual, expected Sequential",
    ),
    "one more": EXTRA,
    "the layer": (setting("convnext", torch.nn.Identity()), "submodule convnext is a Identity, expected ConvNeXt"),
    "a part of the layer": (
        setting("convnext.out_balancer.forward", lambda x: x.view(-1)),
        "submodule convnext: submodule out_balancer runs code that is not upstream's",
    ),
    "no norm": (without("out_norm"), "lacks an attribute of upstream's Conv2dSubsampling"),
}  # fmt: skip


@pytest.mark.parametrize(("alter", "reason"), FRONT_END.values(), ids=FRONT_END)
def test_an_altered_front_end(model, alter, reason):
    alter(model.encoder_embed)
    row = fastasr.explain(model)["encoder_embed"]
    assert row.status == "skipped"
    assert row.reason.startswith(reason)


def test_a_front_end_of_another_class(model):
    class Conv2dSubsampling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU())

    class Padded(type(model.encoder_embed)):
        def forward(self, x, x_lens):
            return super().forward(torch.nn.functional.pad(x, (0, 0, 3, 3)), x_lens + 6)

    assert _reason(Conv2dSubsampling()) == "lacks the submodules out"  # as ESPnet's class of this name has
    model.encoder_embed.__class__ = Padded
    row = fastasr.accelerate(model)["encoder_embed"]
    assert row.reason == "Padded is a subclass of Conv2dSubsampling that overrides forward"


def test_any_projection_behind_the_convolutions(model):
    model.encoder_embed.out.__class__ = Adapted
    report = fastasr.explain(model)
    assert report["encoder_embed"].status == "replaced"
    assert report["encoder_embed.out"].status == "skipped"


OTHER_SIZES = "submodule depthwise_conv has other groups, stride, dilation or padding"
NO_CHUNKS = "submodule depthwise_conv is a Conv1d, expected ChunkCausalDepthwiseConv1d"
CONVOLUTION = {
    "stride": (setting("depthwise_conv.stride", (2,)), f"{OTHER_SIZES} than upstream's"),
    "padding": (setting("depthwise_conv.padding", "same"), OTHER_SIZES),
    "padding mode": (setting("depthwise_conv.padding_mode", "reflect"), OTHER_SIZES),
    "groups": (
        setting("depthwise_conv", torch.nn.Conv1d(32, 32, 7, padding=3)),
        "submodule depthwise_conv weight has shape (32, 32, 7), expected (32, 1, 7)",
    ),
    "a subclass": (
        setting("depthwise_conv.__class__", Conv1d), "submodule depthwise_conv is not a plain torch.nn.Conv1d",
    ),
    "another gate": (setting("sigmoid", torch.nn.Tanh()), "submodule sigmoid is a Tanh, expected Sigmoid"),
    "a patched gate": (
        setting("sigmoid.forward", torch.tanh), "submodule sigmoid is not a plain torch.nn.Sigmoid",
    ),
    "torch's identity": (
        setting("activation2", torch.nn.Identity()), "submodule activation2 runs code that is not upstream's",
    ),
    "a patched balancer": (
        setting("balancer2.forward", lambda x: 2 * x), "submodule balancer2 runs code that is not upstream's",
    ),
    "no whitening": (setting("whiten", torch.nn.Identity()), "submodule whiten is a Identity, expected Whiten"),
    "one more": EXTRA,
    "no balancer": (without("balancer1"), "lacks the submodules balancer1"),
    "no projection": (without("out_proj"), "lacks an attribute of upstream's ConvolutionModule"),
    "causal": (setting("causal", True), NO_CHUNKS),
}  # fmt: skip


@pytest.mark.parametrize(("alter", "reason"), CONVOLUTION.values(), ids=CONVOLUTION)
def test_an_altered_convolution_module(model, alter, reason):
    layer = model.encoder.encoders[0].layers[0]
    alter(layer.conv_module1)
    report = fastasr.explain(model)
    row = report["encoder.encoders.0.layers.0.conv_module1"]
    assert row.status == "skipped"
    assert row.reason.startswith(reason)
    assert report["encoder.encoders.0.layers.0.conv_module2"].status == "replaced"


@pytest.fixture
def causal():
    from zipformer.modules.zipformer import ConvolutionModule

    with plain_swoosh():
        return ConvolutionModule(8, 7, causal=True)


CAUSAL_CONVOLUTION = {
    "chunks are hidden": (
        setting("depthwise_conv.forward", lambda x, chunk_size=-1: x),
        "submodule depthwise_conv runs code that is not upstream's",
    ),
    "padding of the causal part": (
        setting("depthwise_conv.causal_conv.padding", (1,)),
        "submodule depthwise_conv.causal_conv has other groups, stride, dilation or",
    ),
    "a shorter causal part": (
        setting("depthwise_conv.causal_conv", torch.nn.Conv1d(8, 8, 3, groups=8)),
        "submodule depthwise_conv has convolutions of other sizes",
    ),
    "fewer scales": (
        setting("depthwise_conv.chunkwise_conv_scale", torch.nn.Parameter(torch.zeros(2, 8, 5))),
        "submodule depthwise_conv chunkwise_conv_scale has shape (2, 8, 5)",
    ),
    "no chunks": (setting("depthwise_conv", torch.nn.Conv1d(8, 8, 7, padding=3, groups=8)), NO_CHUNKS),
}  # fmt: skip


@pytest.mark.parametrize(("alter", "reason"), CAUSAL_CONVOLUTION.values(), ids=CAUSAL_CONVOLUTION)
def test_an_altered_causal_convolution_module(causal, alter, reason):
    assert fastasr.explain(causal)[""].status == "replaced"
    alter(causal)
    assert _reason(causal).startswith(reason)


def test_any_projections_of_a_convolution_module(model):
    path = "encoder.encoders.0.layers.0.conv_module1"
    model.get_submodule(path).in_proj.__class__ = Adapted
    report = fastasr.explain(model)
    assert report[path].status == "replaced"
    assert report[f"{path}.in_proj"].status == "skipped"


def test_own_classes_are_not_swapped():
    from fastasr.models.zipformer import BiasNorm

    assert _reason(BiasNorm(4)) == "is fastasr's own class already"


def test_shared_modules_are_swapped_once(norm):
    model = torch.nn.Sequential(norm, torch.nn.Sequential(norm)).eval()
    report = fastasr.accelerate(model)
    assert [row.path for row in report.replaced] == ["0"]
    x = torch.randn(3, 8)
    actual = model(x)
    fastasr.restore(model)
    close(actual, model(x))
