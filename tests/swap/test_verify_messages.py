# SPDX-License-Identifier: Apache-2.0
"""What a user sees of a verification: its progress, the note of an error, and an end by Ctrl-C that leaves no trace."""

import io
import random
import re
import signal
import sys
import traceback
import types

import numpy as np
import pytest
import torch
from steps import seeded
from tiny_parakeet import SIZES

import fastasr
from fastasr import _left
from fastasr.models.common import attention_dropout, ragged
from fastasr.ops import _reduced_weights
from fastasr.swap.progress import Progress
from fastasr.swap.state import ModelState

transformers = pytest.importorskip("transformers", reason="upstream's package is not installed")


@pytest.fixture
def model():
    seeded("messages")
    config = transformers.ParakeetEncoderConfig(**SIZES | {"num_hidden_layers": 1})
    return transformers.ParakeetEncoder(config).eval()


@pytest.fixture
def inputs():
    return {"input_features": torch.randn(2, 30, SIZES["num_mel_bins"])}


@pytest.fixture(autouse=True)
def _python_hears_ctrl_c():
    """What a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Standard error, as the progress sees it: pytest has another one in the test than here."""
    stream = Terminal()
    monkeypatch.setattr("fastasr.swap.progress.sys", types.SimpleNamespace(stderr=stream))
    monkeypatch.setattr("fastasr.swap.progress._INTERVAL", -1.0)
    monkeypatch.setenv("COLUMNS", "60")
    return stream


# --- progress


def test_progress_on_a_terminal(model, inputs, terminal):
    report = fastasr.accelerate(model, verify=inputs)
    text = terminal.getvalue()
    shown = [line for line in text.split("\r\x1b[K") if line]
    total = len(report.replaced)
    assert [re.match(r"verifying (\d+)/(\d+), module ", line).groups() for line in shown] == [
        (str(i + 1), str(total)) for i in range(total)
    ]
    assert all(len(line) < 60 and "\n" not in line for line in shown)
    assert any(line.endswith("layers.0.self_attn.q_proj") for line in shown)
    assert text.endswith("\r\x1b[K")


def test_a_long_path_is_cut_in_the_middle(terminal):
    with Progress(12) as progress:
        progress.step("first." + "x" * 90 + ".last")
    line = terminal.getvalue().split("\r\x1b[K")[1]
    assert len(line) == 59
    assert line.startswith("verifying 1/12, module first.x")
    assert line.endswith("x.last")


@pytest.mark.parametrize("stream", [io.StringIO, lambda: None])
def test_no_progress_elsewhere(model, inputs, monkeypatch, stream):
    monkeypatch.setattr("fastasr.swap.progress._INTERVAL", -1.0)
    monkeypatch.setattr(sys, "stderr", stream())
    fastasr.accelerate(model, verify=inputs)
    assert sys.stderr is None or sys.stderr.getvalue() == ""


def test_a_short_verification_shows_none(terminal, monkeypatch):
    monkeypatch.setattr("fastasr.swap.progress._INTERVAL", 60.0)
    with Progress(2) as progress:
        progress.step("a")
    assert terminal.getvalue() == ""


# --- inputs that the model does not take


def test_an_error_of_the_model_says_whose_inputs_they_were(model):
    forwards = [vars(m).get("forward") for m in model.modules()]
    with pytest.raises(RuntimeError) as caught:
        fastasr.accelerate(model, verify={"input_features": torch.randn(2, 30, 7)})
    text = "".join(traceback.format_exception(caught.value))
    assert "fastasr's verify ran ParakeetEncoder on upstream's code with the given inputs" in text
    assert "the inputs: input_features=float32 (2, 30, 7)" in text
    assert "ParakeetEncoder.forward takes (input_features, attention_mask=None" in text
    assert "The model is as it was before the call." in text
    assert [vars(m).get("forward") for m in model.modules()] == forwards


@pytest.mark.parametrize(
    ("inputs", "shown"),
    [
        ((torch.zeros(2, 3), 5), "float32 (2, 3), int"),
        (torch.zeros(3, dtype=torch.int32), "int32 (3,)"),
        (lambda model: model(), "function"),
    ],
)
def test_forms_of_inputs_in_the_note(inputs, shown):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises((TypeError, RuntimeError)) as caught:
        fastasr.verify(model, inputs)
    (note,) = caught.value.__notes__
    assert f"the inputs: {shown}\n" in note
    assert "Sequential.forward takes (input)" in note


# --- Ctrl-C


class Interrupter:
    """Presses Ctrl-C before the given line, counted over all lines of fastasr.swap and contextlib that run."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_filename
        return self.line if "fastasr/swap" in name or name.endswith("contextlib.py") else None

    def line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self.line

    def run(self, function):
        tracing = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        finally:
            sys.settrace(tracing)


def world(model):
    """Returns what a verification could leave changed."""
    tensors = {
        name: (id(t), t.data_ptr(), t.dtype, t.tolist())
        for name, t in model.state_dict(keep_vars=True).items()
    }
    modules = [(m.training, {name: id(value) for name, value in vars(m).items()}) for m in model.modules()]
    flags = (
        ragged._all_padded,
        _left.is_ignored(),
        _reduced_weights.is_suspended(),
        attention_dropout._as_upstream,
    )
    modes = torch.is_grad_enabled(), torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    return tensors, modules, flags, modes, torch.get_rng_state().tolist(), random.getstate()


def test_ctrl_c_at_any_line_leaves_no_trace(model, inputs):
    fastasr.accelerate(model, only="layers*")
    model.train()
    draw, ended = random.Random(int(torch.randint(1 << 30, (1,)))), 0
    counter = Interrupter(-1)
    before = world(model)  # From the same random numbers each run has the same lines.
    counter.run(lambda: fastasr.verify(model, inputs))
    assert world(model) == before
    for at in sorted(draw.sample(range(100, counter.lines), 12)):
        interrupter = Interrupter(at)
        try:
            interrupter.run(lambda: fastasr.verify(model, inputs))
        except KeyboardInterrupt:
            ended += 1
        else:
            assert interrupter.lines < at  # a later run has fewer lines
        assert world(model) == before, at
    assert ended > 6


def test_ctrl_c_in_accelerate_undoes_the_swap(model, inputs):
    before = world(model)

    def press(model):
        result = model(**inputs)
        signal.raise_signal(signal.SIGINT)
        return result

    with pytest.raises(KeyboardInterrupt):
        fastasr.accelerate(model, verify=press)
    assert world(model) == before


def test_a_second_ctrl_c_ends_it_at_once(model, inputs):
    ran = []

    def press(model):
        signal.raise_signal(signal.SIGINT)
        ran.append(1)
        signal.raise_signal(signal.SIGINT)
        ran.append(2)

    before = world(model)
    with pytest.raises(KeyboardInterrupt):
        fastasr.accelerate(model, verify=press)
    assert ran == [1]
    assert world(model) == before


def test_a_handler_of_the_users_is_kept(model, inputs, monkeypatch):
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(len(pressed)))
    try:
        handler = signal.getsignal(signal.SIGINT)
        fastasr.accelerate(model, verify=lambda m: (signal.raise_signal(signal.SIGINT), m(**inputs)))
        assert signal.getsignal(signal.SIGINT) is handler
        assert pressed == [0]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert fastasr.verify(model, inputs).ok
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# --- NumPy's generator, whose state is read in two ways


@pytest.mark.parametrize("odd", [False, True])
def test_numpys_generator(odd):
    """An odd number of normal numbers leaves one in store, which is not in the generator's memory."""
    np.random.seed(3)
    if odd:
        np.random.randn()

    def state():
        return str(np.random.get_state(legacy=False))

    before = state()
    for change in (np.random.randn, np.random.rand, lambda: np.random.seed(4), lambda: np.random.randn(2)):
        with ModelState(torch.nn.Module()) as kept:
            change()
            assert state() != before
            kept.restore()
            assert state() == before
            change()
            change()
        assert state() == before


def test_inputs_with_nan_are_refused():
    """With NaN in both results every comparison would hold. Masks may hold infinities."""
    model, inputs = torch.nn.Linear(4, 4), torch.ones(2, 4)
    fastasr.accelerate(model, verify=inputs)
    fastasr.restore(model)
    inputs[1, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"verify: inputs: expected numbers, got NaN in a tensor of shape \(2, 4\)"
    ):
        fastasr.accelerate(model, verify=(inputs,))
    assert "forward" not in vars(model)
