# SPDX-License-Identifier: Apache-2.0
"""The predictors that searches use, each with its joint network: icefall's (AsrModel: a predictor without state),
torchaudio's RNN-T (LSTM layers between LayerNorms), transformers' Parakeet (torch's LSTM; RNN-T and TDT).

A search with their weights runs by :mod:`fastasr.models.transducer.label_looping`.
"""

import abc
import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.common.linear import Linear
from fastasr.models.common.module_state import ModuleState
from fastasr.models.common.plain import any_watched, has_known_forward, is_plain
from fastasr.models.transducer import label_looping
from fastasr.models.transducer.label_looping import LabelLooping, Weights

_NO_TOKEN = -1  # It stands before the first token and embeds as zeros.
_AGREEMENT = 1e-4  # The logits may differ this much from the modules' own, relative to the largest.
_ACTIVATIONS = {torch.nn.ReLU: "relu", torch.nn.Tanh: "tanh"}


@contextlib.contextmanager
def _unrounded_products() -> Iterator[None]:
    """Turns TF32 off: its errors exceed _AGREEMENT. On a GPU torch's LSTM uses TF32 by default, within cuDNN."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.enabled, matmul.fp32_precision
    cudnn.enabled, matmul.fp32_precision = False, "ieee"
    try:
        yield
    finally:
        cudnn.enabled, matmul.fp32_precision = before


class _UnknownModules(Exception):
    """Says why the weights of a predictor cannot be read."""


@contextlib.contextmanager
def _failures_as_unknown() -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as failure:
        why_not = f"its modules are not those of a known transducer: {failure}"
        raise _UnknownModules(why_not) from failure


class Predictor(abc.ABC):
    """A predictor and its joint network. The state of a sequence ends with the predictor's output, which is all of it
    if the predictor keeps nothing between its steps.

    Attributes:
        skipped: a token that counts as blank; -1: none. context_size: the tokens that a step reads.
        durations: the values of a TDT's durations. most_symbols: labels of a frame, unless the caller says otherwise.
    """

    blank_id: int
    skipped = -1
    context_size = 1
    durations: tuple[int, ...] = ()
    most_symbols = 1

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def first_context(self) -> list[int]:
        """Returns the tokens that a step reads before the first token is found."""
        return [_NO_TOKEN] * (self.context_size - 1) + [self.blank_id]

    @property
    @abc.abstractmethod
    def device(self) -> torch.device: ...

    @abc.abstractmethod
    def project(self, encoder_out: Tensor) -> Tensor:
        """Frames (..., channels) -> (..., J) on the predictor's device."""

    def prepare(self, name: str) -> None:  # noqa: B027
        """Reads what ``step`` needs as it is now. Raises TypeError, for the caller's ``name``, if that is not there."""

    @abc.abstractmethod
    def step(self, contexts: Sequence[Sequence[int]], states: Sequence[Tensor | None]) -> Tensor:
        """Returns states (rows, floats) after the last of each row's tokens; None is the state before the first."""

    @abc.abstractmethod
    def join(self, frames: Tensor, states: Tensor) -> Tensor:
        """Returns the logits (rows, tokens + durations) of projected frames (rows, J) and states (rows, floats)."""

    def find_search(self, format: str = "fp32") -> tuple[LabelLooping | None, str]:
        """Returns greedy search with the weights as they are now, None if they cannot be read; and why it does not run
        natively, or ""."""
        return None, self.why_not_native()

    def require_search(self, name: str, format: str = "fp32") -> LabelLooping:
        """Returns the same search. Raises TypeError, for the caller's ``name``, if the weights cannot be read."""
        search, why_not = self.find_search(format)
        if search is None:
            raise TypeError(f"{name}: this {type(self.model).__name__} cannot be searched: {why_not}")
        return search

    def why_not_native(self) -> str:
        """Returns why greedy search cannot run natively now, as far as that shows without running the modules, or
        ""."""
        return "the model is not made of modules of a known transducer"


class TorchPredictor(Predictor):
    """The predictor of a PyTorch model, whose weights searches read while its modules compute the formulas of
    ``Weights``: no other classes, no hooks, no training mode. ``names`` are the modules by which a model of the kind is
    known: the predictor, the joint network, and others."""

    names: tuple[str, ...]

    def parts(self) -> tuple[Any, Any]:
        """Returns the modules: the predictor and the joint network."""
        return getattr(self.model, self.names[0]), getattr(self.model, self.names[1])

    @property
    def device(self) -> torch.device:
        return next(self.parts()[1].parameters()).device

    def find_search(self, format: str = "fp32") -> tuple[LabelLooping | None, str]:
        parts = self.parts()
        kept = _KEPT.setdefault(parts[0], {})
        if format not in kept or not kept[format].fresh(parts):
            kept[format] = _Kept(self, format)
        search = kept[format].search
        return search, kept[format].why_not if search is None else search.why_not

    @torch.no_grad()
    def why_not_native(self) -> str:
        try:
            return label_looping.why_not_native(self._read_known()) or label_looping.why_not_now()
        except _UnknownModules as why_not:
            return str(why_not)

    @_failures_as_unknown()
    def _read_known(self) -> Weights:
        parts = self.parts()
        if any(part.training for part in parts):
            raise _UnknownModules("it is in training mode")
        if any(any_watched(part.modules()) or not has_known_forward(part) for part in parts):
            raise _UnknownModules("a submodule has hooks or another forward")
        return self.read_weights()

    @torch.no_grad()
    @_unrounded_products()
    @_failures_as_unknown()
    def read_checked(self) -> Weights:
        """Returns the weights, after comparing their results with the modules'."""
        w = self._read_known()
        tokens = [self.blank_id, (self.blank_id + 1) % len(w.embedding)]
        state, outputs = w.embedding.new_zeros(1, w.floats), []
        for context in (self.first_context, [*self.first_context, tokens[1]][1:]):
            last = torch.tensor([context], device=state.device, dtype=torch.int64)
            state = label_looping.predict(w, last, state)
            outputs.append(state[:, -len(w.linear[0]) :])
        g = torch.cat(outputs)
        f = torch.arange(1.0, g.numel() + 1, dtype=torch.float32, device="cpu").sin_().view_as(g).to(g)
        expected = self.call_modules(f, tokens)
        error = (label_looping.join(w, f, g) - expected).abs().max() / expected.abs().max()
        if not error <= _AGREEMENT:
            raise _UnknownModules("its modules compute something else")
        return w

    @abc.abstractmethod
    def read_weights(self) -> Weights:
        """Returns their weights as the search takes them."""

    @abc.abstractmethod
    def call_modules(self, frames: Tensor, tokens: list[int]) -> Tensor:
        """Returns the modules' logits of projected frames (U, J), each with the predictor's output behind one of the
        first tokens of a sequence, U."""


class StatelessPredictor(TorchPredictor):
    """The predictor of icefall's AsrModel, or of anything with its ``decoder`` and ``joiner``. Steps call its modules,
    whatever they compute."""

    names = "decoder", "joiner"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.blank_id = model.decoder.blank_id
        self.skipped = getattr(model, "unk_id", self.blank_id)
        self.context_size = model.decoder.context_size

    def project(self, encoder_out: Tensor) -> Tensor:
        return self.model.joiner.encoder_proj(encoder_out.to(self.device))

    def step(self, contexts: Sequence[Sequence[int]], states: Sequence[Tensor | None]) -> Tensor:
        decoder, joiner = self.parts()
        y = torch.tensor(contexts, device=self.device, dtype=torch.int64)
        return joiner.decoder_proj(decoder(y, need_pad=False).squeeze(1))

    def join(self, frames: Tensor, states: Tensor) -> Tensor:
        return self.model.joiner(frames, states, project_input=False)

    def read_weights(self) -> Weights:
        decoder, joiner = self.parts()
        return Weights(
            embedding=_plain(decoder.embedding, torch.nn.Embedding).weight,
            layers=(),
            linear=_linear(joiner.decoder_proj),
            head=_linear(joiner.output_linear),
            activation="tanh",
            convolution=_convolution(decoder.conv) if self.context_size > 1 else None,
            context=self.context_size,
        )

    def call_modules(self, frames: Tensor, tokens: list[int]) -> Tensor:
        seen, size = self.first_context[:-1] + tokens, self.context_size
        return self.join(frames, self.step([seen[i : i + size] for i in range(len(tokens))], ()))


class RecurrentPredictor(TorchPredictor):
    """A predictor of LSTM layers. ``step`` and ``join`` compute with the weights."""

    weights: Weights  # as ``prepare`` has read them

    def prepare(self, name: str) -> None:
        self.weights = self.require_search(name).weights

    def step(self, contexts: Sequence[Sequence[int]], states: Sequence[Tensor | None]) -> Tensor:
        first = self.weights.embedding.new_zeros(self.weights.floats)
        rows = torch.stack([first if state is None else state for state in states])
        return label_looping.predict(
            self.weights, torch.tensor(contexts, device=rows.device, dtype=torch.int64), rows
        )

    def join(self, frames: Tensor, states: Tensor) -> Tensor:
        return label_looping.join(self.weights, frames, states[:, -frames.shape[1] :])


class RNNTPredictor(RecurrentPredictor):
    """The predictor of torchaudio's RNN-T, ours or theirs. Its blank is the last symbol."""

    names = "predictor", "joiner", "transcriber"
    most_symbols = 10

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.blank_id = model.joiner.linear.out_features - 1

    def project(self, encoder_out: Tensor) -> Tensor:
        return encoder_out.to(self.device)

    def read_weights(self) -> Weights:
        predictor, joiner = self.parts()
        table = _plain(predictor.embedding, torch.nn.Embedding).weight
        layers, first = tuple(predictor.lstm_layers), _norm(predictor.input_layer_norm)
        normalised = type(layers[0].g_norm) is torch.nn.LayerNorm
        kind = torch.nn.LayerNorm if normalised else torch.nn.Identity
        norms = [(_plain(layer.g_norm, kind), _plain(layer.c_norm, kind)) for layer in layers]
        eps = {norm.eps for pair in norms for norm in pair} if normalised else {0.0}
        if len(eps) > 1:
            raise _UnknownModules("the norms of its LSTM layers differ in eps")
        return Weights(
            embedding=F.layer_norm(table, table.shape[1:], *first),
            layers=tuple(map(self._layer, layers)),
            linear=_linear(predictor.linear),
            head=_linear(joiner.linear),
            activation=_activation(joiner.activation),
            norm=_norm(predictor.output_layer_norm),
            gate_norms=tuple((*_norm(g)[:2], *_norm(c)[:2]) for g, c in norms) if normalised else (),
            gate_eps=eps.pop(),
        )

    @staticmethod
    def _layer(layer: Any) -> tuple[Tensor, ...]:
        (w_ih, b_ih), (w_hh, b_hh) = _linear(layer.x2g), _linear(layer.p2g)
        return w_ih, w_hh, b_ih, b_hh

    def call_modules(self, frames: Tensor, tokens: list[int]) -> Tensor:
        y = torch.tensor([tokens], device=frames.device, dtype=torch.int64)
        outputs = self.model.predictor(y, torch.full_like(y[:, 0], len(tokens)), None)[0][0]
        one = torch.ones_like(y[0])
        return self.model.joiner(frames[:, None], one, outputs[:, None], one)[0][:, 0, 0]


class ParakeetPredictor(RecurrentPredictor):
    """The predictor of transformers' ParakeetForRNNT and ParakeetForTDT, and of our FastConformerRNNT and
    FastConformerTDT."""

    names = "decoder", "joint", "encoder_projector"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = getattr(model, "config", model)  # ours is its own
        self.blank_id = config.blank_token_id
        self.durations = tuple(getattr(config, "durations", ()))
        self.most_symbols = model.max_symbols_per_step

    def project(self, encoder_out: Tensor) -> Tensor:
        return self.model.encoder_projector(encoder_out.to(self.device))

    def read_weights(self) -> Weights:
        decoder, joint = self.parts()
        lstm = _plain(decoder.lstm, torch.nn.LSTM)
        if lstm.bidirectional or lstm.proj_size or not lstm.bias:
            raise _UnknownModules("its LSTM has two directions, a projection or no biases")
        return Weights(
            embedding=_plain(decoder.embedding, torch.nn.Embedding).weight,
            layers=tuple(map(tuple, lstm.all_weights)),
            linear=_linear(decoder.decoder_projector),
            head=_linear(joint.head),
            activation=_activation(joint.activation),
        )

    def call_modules(self, frames: Tensor, tokens: list[int]) -> Tensor:
        outputs = self.model.decoder(torch.tensor([tokens], device=frames.device, dtype=torch.int64))[0]
        return self.model.joint(encoder_hidden_states=frames, decoder_hidden_states=outputs)


def find_predictor(model: Any) -> TorchPredictor | None:
    """Returns the predictor of a model, or None if the model is of no known kind."""
    for kind in (ParakeetPredictor, RNNTPredictor, StatelessPredictor):
        if all(isinstance(getattr(model, name, None), torch.nn.Module) for name in kind.names):
            try:
                return kind(model)
            except AttributeError:
                return None
    return None


# --------------------------------------------------------------------------- weights that are kept
class _Kept:
    """The search with a model's weights, or why there is none, until the modules change."""

    def __init__(self, predictor: TorchPredictor, format: str) -> None:
        parts = predictor.parts()
        self._parts = [weakref.ref(part) for part in parts]
        self._states = [ModuleState(part) for part in parts]
        self._watched = [state.watched() for state in self._states]
        self.search: LabelLooping | None = None
        self.why_not = ""
        try:
            weights = predictor.read_checked()
            if not all(state.traceable() for state in self._states):
                raise _UnknownModules("parameters were made in inference mode, where changes leave no trace")
            self.search = LabelLooping(weights, format)
        except _UnknownModules as why_not:
            self.why_not = str(why_not)

    def fresh(self, parts: tuple[Any, Any]) -> bool:
        return (
            self.search is not None
            and all(ref() is part for ref, part in zip(self._parts, parts, strict=True))
            and not any(part.training for part in parts)
            and not any_watched(parts)
            and all(map(has_known_forward, parts))
            and self._watched == [state.watched() for state in self._states]
            and all(state.unchanged() for state in self._states)
        )


# the predictor's module -> format -> _Kept
_KEPT: weakref.WeakKeyDictionary[Any, dict[str, "_Kept"]] = weakref.WeakKeyDictionary()


def release(predictor: TorchPredictor) -> None:
    """Frees the copies of a predictor's weights."""
    _KEPT.pop(predictor.parts()[0], None)


def _plain(module: torch.nn.Module, *kinds: type) -> Any:
    if not is_plain(module, *kinds):
        raise _UnknownModules(
            f"a submodule is a {type(module).__name__}, expected a plain {kinds[0].__name__}"
        )
    return module


def _linear(module: Any) -> tuple[Tensor, Tensor]:
    """Returns weight and bias."""
    weight, bias = _plain(module, torch.nn.Linear, Linear).weight, module.bias
    return weight, torch.zeros_like(weight[:, 0]) if bias is None else bias


def _norm(module: Any) -> tuple[Tensor, Tensor, float]:
    """Returns weight, bias and eps of a LayerNorm."""
    if _plain(module, torch.nn.LayerNorm).weight is None or module.bias is None:
        raise _UnknownModules("a LayerNorm lacks weight or bias")
    return module.weight, module.bias, module.eps


def _convolution(module: Any) -> Tensor:
    if _plain(module, torch.nn.Conv1d).bias is not None:
        raise _UnknownModules("the predictor's convolution has a bias")
    return module.weight


def _activation(module: torch.nn.Module) -> str:
    if not is_plain(module, *_ACTIVATIONS):
        raise _UnknownModules(
            f"the joint network's activation is {type(module).__name__}, expected ReLU or Tanh"
        )
    return _ACTIVATIONS[type(module)]
