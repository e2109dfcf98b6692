# SPDX-License-Identifier: Apache-2.0
"""verify catches kernels that compute something else, undoes them, and leaves no trace of its runs."""

import copy
import inspect
import random

import pytest
import torch
from steps import seeded
from tiny_zipformer import from_file, training_step

import fastasr
from fastasr import ops
from fastasr.swap import binding


def _break(monkeypatch, op, change):
    """Replaces ops.<op> by change(op)."""
    original = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args, **kwargs: change(original, *args, **kwargs))


def test_everything_verifies(model, inputs):
    report = fastasr.accelerate(model, verify=inputs)
    assert report.ok, str(report)
    assert report.verified
    assert len(report.replaced) > 40
    for row in reached(report):
        assert row.errors["values"] < 1e-5
        # these contain upstream's modules, which are verified by themselves
        if row.class_name == "ZipformerEncoderLayer":
            assert row.errors["gradients"] == row.errors["upstream_gradients"]
        # of larger errors verify judges: whitening loses digits of both there
        elif row.errors["upstream_gradients"] < 1e-5:
            assert row.errors["gradients"] < 1e-4, row


def reached(report):
    """Returns the replaced modules that inference runs: all but one, which ConvNeXt calls in training alone."""
    missed = {row.path for row in report.replaced if row.errors is None}
    assert missed == {"encoder_embed.convnext.out_whiten"}
    return [row for row in report.replaced if row.path not in missed]


@pytest.mark.parametrize("seed", range(8))
def test_regularisers_that_adapt_do_not_change_the_outcome(model, inputs, seed):
    """Whitening lowers its own probability as it runs; both sides start from the same one."""
    fastasr.accelerate(model, only="encoder_embed*")
    seeded(seed)
    report = fastasr.verify(model, inputs)
    assert report.ok, str(report)


@pytest.mark.parametrize("form", ["tuple", "dict", "callable"])
def test_forms_of_inputs(model, inputs, form):
    x, lens = inputs
    given = {"tuple": (x, lens), "dict": {"x": x, "x_lens": lens}, "callable": lambda m: m(x, x_lens=lens)}[
        form
    ]
    fastasr.accelerate(model, only="*norm")
    assert all(row.errors for row in fastasr.verify(model, given, gradients=False).rows)


def test_bad_inputs(model, inputs):
    fastasr.accelerate(model)
    with pytest.raises(TypeError, match="inputs must be a tensor, a tuple, a dict or a callable, got int"):
        fastasr.verify(model, 3)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        fastasr.verify(None, inputs)


BROKEN = {
    "bias_norm off by one part in a thousand": (
        "bias_norm",
        lambda f, *a, **k: f(*a, **k) * 1.001,
        "BiasNorm",
    ),
    "bypass with its inputs exchanged": ("bypass", lambda f, a, b, s: f(b, a, s), "BypassModule"),
    "swoosh_r as swoosh_l": ("swoosh_r", lambda f, x: ops.swoosh_l(x), "SwooshR"),
    "linear with another weight": ("linear", lambda f, x, w, b=None: f(x, w * 1.01, b), "Linear"),
    "linear that raises": ("linear", lambda f, x, w, b=None: f(x.reshape(-1), w, b), "Linear"),
    "swoosh_l with NaN": ("swoosh_l", lambda f, x: f(x) * float("nan"), "SwooshL"),
    "swoosh_r of another dtype": ("swoosh_r", lambda f, x: f(x).double(), "SwooshR"),
    "bias_norm that draws": ("bias_norm", lambda f, *a, **k: (torch.rand(1), f(*a, **k))[1], "BiasNorm"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_rolled_back(model, inputs, monkeypatch, what):
    op, change, class_name = BROKEN[what]
    _break(monkeypatch, op, change)
    report = fastasr.accelerate(model, verify=inputs)
    assert not report.ok
    modules = dict(model.named_modules())
    for row in report.rolled_back:
        assert row.reason.startswith("verification: ")
        assert binding.bound_forward(modules[row.path]) is None
    wrong = {row.path for row in report.rolled_back if row.class_name == class_name}
    assert wrong == {row.path for row in report.rows if row.class_name == class_name and row.rule}
    assert any(row.class_name == "ActivationDropoutAndLinear" for row in report.replaced)
    assert "rolled back" in str(report)


def test_a_wrong_gradient_alone_is_caught(model, inputs, monkeypatch):
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    _break(monkeypatch, "swoosh_linear", lambda f, x, *a, **k: f(Off.apply(x), *a, **k))
    report = fastasr.accelerate(model, only="*feed_forward1.out_proj", verify=inputs)
    assert len(report.rolled_back) == 2
    assert "the gradient of input 0" in report.rolled_back[0].reason


def test_a_mask_of_another_draw_is_caught(model, inputs, monkeypatch):
    def other_mask(f, x, *args, **kwargs):
        if not kwargs["training"]:
            return f(x, *args, **kwargs)
        state = torch.get_rng_state()
        torch.rand(1)
        y = f(x, *args, **kwargs)
        torch.set_rng_state(state)
        torch.rand(1, 2, x.shape[-1])
        return y

    _break(monkeypatch, "swoosh_linear", other_mask)
    report = fastasr.accelerate(model, only="*feed_forward1.out_proj", verify=inputs)
    assert len(report.rolled_back) == 2
    assert all(row.reason.startswith("verification: training: error of") for row in report.rolled_back)


def test_verify_later_rolls_back_or_only_reports(model, inputs, monkeypatch):
    count = len(fastasr.accelerate(model).replaced)
    _break(monkeypatch, "bias_norm", lambda f, *a, **k: f(*a, **k) + 1)
    report = fastasr.verify(model, inputs, rollback=False)
    assert len(report.rolled_back) == 4  # three norms, and the front end, which holds one
    assert len(fastasr.accelerate(model).replaced) == count
    report = fastasr.verify(model, inputs)
    assert len(report.rolled_back) == 4
    assert sum(binding.bound_forward(m) is not None for m in model.modules()) == count - 4
    assert len(fastasr.verify(model, inputs)) == count - 4


def test_it_leaves_no_trace(model, inputs):
    fastasr.accelerate(model)
    training_step(model, inputs, seed=0)  # leaves gradients
    model.train()
    model.encoder.eval()
    model.register_buffer("counter", torch.zeros(()))
    model.cache = {"length": 1}
    model.register_forward_pre_hook(lambda m, args: m.counter.add_(1) and m.cache.update(length=2))
    seeded(11)
    before = copy.deepcopy(model)
    for p, q in zip(before.parameters(), model.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    states = random.getstate(), torch.get_rng_state()
    forwards = {name: vars(m).get("forward") for name, m in model.named_modules()}

    assert fastasr.verify(model, inputs).ok

    assert model.cache == {"length": 1}
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert {name: vars(m).get("forward") for name, m in model.named_modules()} == forwards
    for (name, m), n in zip(model.named_modules(), before.modules(), strict=True):
        assert m.training == n.training, name
        for key, value in vars(n).items():
            if isinstance(value, (int, float, str, bool, type(None))):
                assert vars(m)[key] == value, (name, key)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    assert torch.equal(model.counter, before.counter)


def test_modules_that_the_inputs_do_not_reach_say_so(model):
    x = torch.randn(2, 60, 20)
    report = fastasr.accelerate(model, verify=lambda m: m.encoder_embed(x, torch.tensor([60, 60])))
    assert report.ok
    assert report["encoder_embed.out_norm"].errors
    row = report["encoder.encoders.0.layers.0.norm"]
    assert row.status == "replaced"
    assert row.reason.endswith("not reached by the inputs of verify")


def test_inputs_that_upstream_cannot_run_raise_and_undo_the_swap(model):
    with pytest.raises(TypeError):
        fastasr.accelerate(model, verify=(torch.randn(2, 60, 20),))
    assert not any("forward" in vars(m) for m in model.modules())


def test_upstream_that_cannot_run_is_not_called_verified(monkeypatch):
    """icefall without k2 raises ImportError in its own forward; fastasr's would work, but nothing confirms it."""
    from zipformer.modules.scaling import BiasNorm

    norm = torch.nn.Sequential(BiasNorm(8))
    fastasr.accelerate(norm)

    def unavailable(self, x):
        raise ImportError("k2")

    monkeypatch.setattr(BiasNorm, "forward", unavailable)
    with pytest.raises(ImportError):
        fastasr.verify(norm, torch.randn(3, 8))
    assert binding.bound_forward(norm[0]) is not None


def test_fp64(model, inputs):
    report = fastasr.accelerate(model.double(), verify=(inputs[0].double(), inputs[1]))
    assert report.ok, str(report)
    assert max(row.errors["values"] for row in reached(report)) < 1e-13


def test_bf16_where_upstream_cannot_train(model):
    """Its dropout mask is fp32, so outside autocast a bf16 layer runs in inference only; that much is compared."""
    layer = model.encoder.encoders[0].layers[0].to(torch.bfloat16).eval()
    parts = [layer.feed_forward1.in_proj, model.encoder_embed.conv[3], layer.feed_forward1.out_proj]
    tail = torch.nn.Sequential(*parts).eval()
    report = fastasr.accelerate(tail, verify=torch.randn(9, 2, 32, dtype=torch.bfloat16))
    assert report.ok, str(report)
    assert len(report.replaced) == 3
    assert "not compared in training: upstream raises RuntimeError" in report["2"].reason


class TestUnknownCode:
    @pytest.fixture
    def edited(self, tmp_path, monkeypatch):
        """Makes a BiasNorm whose code is of no known version, equivalent or not."""
        import zipformer.modules.scaling as upstream

        def make(old, new):
            text = inspect.getsource(upstream)
            assert old in text
            path = tmp_path / "edited_scaling.py"
            path.write_text(text.replace(old, new))
            module = from_file(path, monkeypatch)
            return torch.nn.Sequential(upstream.BiasNorm(8), module.BiasNorm(8))

        return make

    EQUIVALENT = ("assert bias.ndim == 1", "assert bias.ndim < 2")
    DIFFERENT = ("keepdim=True) ** -0.5", "keepdim=True) ** -0.51")

    def test_is_declined_by_default(self, edited):
        report = fastasr.accelerate(edited(*self.EQUIVALENT), verify=torch.randn(5, 8))
        assert report["1"].status == "skipped"
        assert "is no known version of BiasNorm" in report["1"].reason

    def test_is_accepted_when_it_verifies(self, edited):
        report = fastasr.accelerate(edited(*self.EQUIVALENT), verify=torch.randn(5, 8), strict=False)
        assert report["1"].status == "replaced"
        assert report["1"].errors

    def test_is_rolled_back_when_it_does_not(self, edited):
        model = edited(*self.DIFFERENT)
        report = fastasr.accelerate(model, verify=torch.randn(5, 8), strict=False)
        assert report["0"].status == "replaced"
        assert report["1"].status == "rolled back"
        assert "forward" not in vars(model[1])

    def test_is_rolled_back_when_the_inputs_do_not_reach_it(self, edited):
        model = edited(*self.EQUIVALENT)
        report = fastasr.accelerate(model, verify=lambda m: m[0](torch.randn(5, 8)), strict=False)
        assert report["1"].status == "rolled back"
        assert "do not reach it" in report["1"].reason
        assert "forward" not in vars(model[1])
