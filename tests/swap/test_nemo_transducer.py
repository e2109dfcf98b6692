# SPDX-License-Identifier: Apache-2.0
"""NeMo's fused joint and its loss, swapped: upstream's losses and gradients without logits, and what is declined."""

import copy
import pickle
import random

import nemo_encoder
import pytest
import torch
from steps import close, moved, numbers, seeded, swapped

import fastasr

VOCABULARY, DURATIONS = 6, [0, 1, 2, 4]
LOSSES = {"rnnt": ("pytorch", {}), "tdt": ("tdt_pytorch", {"durations": DURATIONS, "sigma": 0.05})}


class Wer:
    """Stands for NeMo's metric: it keeps what it is asked to decode, and counts tokens as errors."""

    _to_sync = True

    def __init__(self):
        self.seen = []

    def update(self, predictions, predictions_lengths, targets, targets_lengths):
        frames, symbols = predictions_lengths.tolist(), targets_lengths.tolist()
        parts = zip(predictions, frames, targets, symbols, strict=True)
        self.seen += [(x[:, :t], y[:u]) for x, t, y, u in parts]
        self.counts = sum(symbols), sum(frames)

    def compute(self):
        return self.counts[0] / self.counts[1], *map(torch.tensor, self.counts)

    def reset(self):
        pass

    def get_hypotheses(self):
        return list(self.counts)


@pytest.fixture
def made(monkeypatch):
    """Returns a function that makes a joint with its loss. Upstream's losses in PyTorch sum in the default dtype."""
    joints, losses = nemo_encoder.load_transducer()
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # upstream's TDT is written for a GPU alone

    def make(kind="tdt", fused=True, dropout=0.0, activation="relu", reduction="mean_batch", **options):
        seeded("joint")
        name, more = LOSSES[kind]
        sizes = {"encoder_hidden": 5, "pred_hidden": 4, "joint_hidden": 8}
        joint = joints.RNNTJoint(
            {**sizes, "activation": activation, "dropout": dropout},
            num_classes=VOCABULARY,
            num_extra_outputs=len(more.get("durations", ())),
            fuse_loss_wer=fused,
            fused_batch_size=2,
            **options,
        )
        loss = losses.RNNTLoss(VOCABULARY, reduction, name, dict(more))
        loss._force_float32 = False
        if fused:
            joint.set_loss(loss), joint.set_wer(Wer())
        return moved(joint, 0.3), loss

    return make


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def batch(frames=(7, 5, 6), symbols=(3, 1, 0)):
    draw = numbers("batch")
    width, length = max(symbols) + 1, max(frames) + 1  # one frame and one symbol of padding for all
    x = {
        "encoder_outputs": torch.randn(len(frames), 5, length, generator=draw, dtype=torch.float64),
        "decoder_outputs": torch.randn(len(frames), 4, width + 1, generator=draw, dtype=torch.float64),
    }
    return {name: t.to(torch.get_default_dtype()) for name, t in x.items()} | {
        "encoder_lengths": torch.tensor(frames),
        "transcripts": torch.randint(0, VOCABULARY, (len(frames), width), generator=draw),
        "transcript_lengths": torch.tensor(symbols),
    }


def of(joint, inputs, **options):
    """Returns the loss and the gradients of inputs and parameters."""
    names = "encoder_outputs", "decoder_outputs"
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    loss, *_ = joint(**{**inputs, **leaves}, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel()).view_as(loss)
    return loss.detach(), torch.autograd.grad((loss * weights).sum(), [*leaves.values(), *joint.parameters()])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("reduction", ["mean_batch", "mean_volume", "sum", None], ids=str)
def test_losses_and_gradients_are_upstreams(made, kind, reduction, dtype):
    activation = "tanh" if reduction == "sum" else "relu"
    theirs, _ = made(kind, reduction=reduction, activation=activation)
    ours = copy.deepcopy(theirs)
    report = fastasr.accelerate(ours)
    assert {row.class_name for row in report.replaced} >= {"RNNTJoint", "RNNTLoss"}
    tolerance = 1e-10 if dtype is torch.float64 else 2e-5
    without_symbols = () if reduction == "mean_volume" else (batch((3, 1), (0, 0)),)
    for call in (batch(), batch((4,), (2,)), *without_symbols):
        (found, ours_grads), (expected, their_grads) = of(ours, call), of(theirs, call)
        close(found, expected, tolerance)
        close(ours_grads, their_grads, tolerance, least=1e-3)


@pytest.mark.parametrize("kind", LOSSES)
def test_no_logits(made, kind, monkeypatch):
    joint, _ = made(kind)
    fastasr.accelerate(joint)
    monkeypatch.setattr(type(joint), "joint_after_projection", None)
    assert of(joint, batch())[0].isfinite()


@pytest.mark.parametrize("kind", LOSSES)
def test_given_logits(made, kind, dtype):
    """A joint that is not fused returns its logits, and the loss of these is swapped."""
    joint, theirs = made(kind, fused=False)
    reason = fastasr.explain(joint)[""].reason
    assert reason == "fuse_loss_wer is False: the joint returns its logits, from which the loss is computed"
    ours = copy.deepcopy(theirs)
    assert fastasr.accelerate(ours)[""].status == "replaced"
    call = batch()
    logits = joint(encoder_outputs=call["encoder_outputs"], decoder_outputs=call["decoder_outputs"][..., :-1])
    ends = call["transcripts"], call["encoder_lengths"], call["transcript_lengths"]
    names = "targets", "input_lengths", "target_lengths"
    grads = []
    for loss in (ours, theirs):
        leaf = logits.detach().requires_grad_()
        value = loss(log_probs=leaf, **dict(zip(names, ends, strict=True)))
        grads += [(value.detach(), torch.autograd.grad(value, leaf)[0])]
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-10 if dtype is torch.float64 else 2e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_word_error_rate(made, keep):
    theirs, _ = made("rnnt")
    ours = swapped(theirs)
    call = batch() | {"compute_wer": True, "keep_hypotheses": keep}
    found, expected = (joint.train()(**call) for joint in (ours, theirs))
    close(found[0].detach(), expected[0].detach())
    assert found[1:] == expected[1:]
    for (x, y), (a, b) in zip(ours.wer.seen, theirs.wer.seen, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    assert ours.hypotheses == theirs.hypotheses
    evaluation = call | {"decoder_outputs": None}
    assert ours(**evaluation) == theirs(**evaluation)


def numba(loss, **options):
    """Gives the loss the attributes of upstream's numba loss, which is not written for processors."""
    core = type("TDTLossNumba", (torch.nn.Module,), {"__module__": type(loss._loss).__module__})()
    vars(core).update(vars(loss._loss) | {"fastemit_lambda": 0.0, "clamp": 0.0, "omega": 0.0} | options)
    loss._loss = core


def test_omega_draws_for_each_part(made):
    """With the chance omega, a part of the batch has the loss of an RNN-T without durations."""
    joint, loss = made(reduction=None)
    fastasr.accelerate(joint)
    with_durations = of(joint, batch())[0]
    numba(loss, omega=2.0)
    without = of(joint, batch())[0]
    loss._loss.omega = 0.5
    for seed in range(8):
        random.seed(seed)
        drawn = [random.uniform(0, 1) < 0.5 for _ in range(2)]
        random.seed(seed)
        of_sequences = torch.tensor(drawn).repeat_interleave(2)[:3]
        close(of(joint, batch())[0], torch.where(of_sequences, without, with_durations))


def test_more_logits_than_tokens(made):
    """Upstream's RNN-T normalises all of its logits, whatever the number of tokens."""
    _, theirs = made("rnnt", reduction="sum")
    ours = copy.deepcopy(theirs)
    assert fastasr.accelerate(ours).replaced
    logits = torch.randn(2, 4, 3, VOCABULARY + 3, generator=numbers("logits"))
    call = torch.tensor([[1, 2], [3, 0]]), torch.tensor([4, 3]), torch.tensor([2, 1])
    names = "log_probs", "targets", "input_lengths", "target_lengths"
    inputs = dict(zip(names, (logits, *call), strict=True))
    close(ours(**inputs), theirs(**inputs))


def test_fastemit(made):
    """Upstream's value has the factor that the gradients of symbols have."""
    joint, loss = made(reduction=None)
    fastasr.accelerate(joint)
    plain, gradients = of(joint, batch())
    numba(loss, fastemit_lambda=0.25)
    value, scaled = of(joint, batch())
    close(value, 1.25 * plain)
    assert not torch.equal(gradients[0], scaled[0])


def test_dropout(made):
    """The kernel draws dropout itself; inside upstream_draws it is upstream's."""
    theirs, _ = made(dropout=0.5)
    ours = swapped(theirs)
    results = []
    for joint in (ours, theirs):
        with fastasr.upstream_draws():
            seeded("dropout")
            results.append(of(joint.train(), batch())[0])
    close(*results)
    assert of(ours.train(), batch())[0] != of(ours.train(), batch())[0]
    close(of(ours.eval(), batch())[0], of(theirs.eval(), batch())[0])


def test_what_is_declined(made):
    def reason(joint):
        return fastasr.explain(joint)[""].reason

    assert "masking_prob is 0.5" in reason(made(masking_prob=0.5)[0])
    joint, loss = made()
    joint.temperature = 2.0
    assert "temperature is 2.0, expected 1" in reason(joint)
    assert "joint_net.0 is a Sigmoid, expected ReLU or Tanh" in reason(made(activation="sigmoid")[0])
    joint, loss = made()
    numba(loss, clamp=0.1)
    assert "clamps the gradients of its logits to 0.1" in reason(joint)
    assert "clamps the gradients of a TDT's logits to 0.1" in fastasr.explain(joint)["_loss"].reason
    joint, loss = made()
    loss._loss = torch.nn.Identity()
    assert "the loss is a Identity, expected RNNTLossNumba" in reason(joint)
    joint, loss = made()
    joint.adapter_layer = torch.nn.ModuleDict()
    assert "adapter_layer" in reason(joint)
    sizes = {"encoder_hidden": 5, "pred_hidden": 4, "joint_hidden": 8, "activation": "relu"}
    sampled = nemo_encoder.load_transducer()[0].SampledRNNTJoint(sizes, VOCABULARY, 3)
    assert "has buffers this class does not have upstream: blank_id" in reason(sampled)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_head_that_lost_its_bias(made, kind):
    theirs, _ = made(kind)
    ours = swapped(theirs)
    for joint in (ours, theirs):
        joint.joint_net[-1].bias = None
    (found, ours_grads), (expected, their_grads) = of(ours, batch()), of(theirs, batch())
    close(found, expected, 2e-5)
    close(ours_grads, their_grads, 2e-5, least=1e-3)


def test_hooks_and_restore(made):
    """What comes after the swap and needs logits runs upstream's code."""
    joint, _ = made()
    expected = of(joint, batch())[0]
    report = fastasr.accelerate(joint)
    computed = []
    handle = joint.joint_net[-1].register_forward_hook(lambda *_: computed.append(1))
    close(of(joint, batch())[0], expected)
    assert computed
    handle.remove()
    computed.clear()
    close(of(joint, batch())[0], expected)
    assert not computed
    assert fastasr.restore(joint) == len(report.replaced)
    assert torch.equal(of(joint, batch())[0], expected)


def test_compiled_calls_of_upstreams_code(made):
    """In these upstream decodes for the word error rate. NeMo wraps its forward by a type check."""
    joint, _ = made("rnnt")
    fastasr.accelerate(joint.train())
    call = batch() | {"compute_wer": True}
    expected = joint(**call)
    torch._dynamo.reset()
    found = torch.compile(joint, backend="eager", dynamic=True)(**call)
    close(found[0].detach(), expected[0].detach())
    assert found[1:] == expected[1:]


def test_a_pickled_joint_can_be_swapped_again(made):
    joint, _ = made()
    paths = [row.path for row in fastasr.accelerate(joint).replaced]
    loaded = pickle.loads(pickle.dumps(joint))
    assert [row.path for row in fastasr.accelerate(loaded).replaced] == paths
    assert torch.equal(of(loaded, batch())[0], of(joint, batch())[0])
