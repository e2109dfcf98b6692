# SPDX-License-Identifier: Apache-2.0
"""The transducers whose greedy search is label looping, and their weights: icefall's (AsrModel: a predictor without
state), torchaudio's RNN-T (LSTM layers between LayerNorms), transformers' Parakeet (torch's LSTM; RNN-T and TDT).
"""

import abc
import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.common.linear import Linear
from fastasr.models.common.module_state import ModuleState
from fastasr.models.common.plain import any_watched, has_known_forward, is_plain
from fastasr.models.transducer.label_looping import (
    LabelLooping,
    Weights,
    join,
    predict,
    why_not_native,
    why_not_now,
)

_AGREEMENT = 1e-4  # The logits may differ this much from the modules' own, relative to the largest.
_TRAINING = "it is in training mode"
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


class Unserved(Exception):
    """Says why label looping does not serve a model."""


@contextlib.contextmanager
def _as_unserved() -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as failure:
        raise Unserved(f"its modules are not those of a known transducer: {failure}") from failure


class LoopingTransducer(abc.ABC):
    """A model's predictor and joint network for label looping.

    ``looping(format)`` returns the search with the model's weights as they are now. It raises Unserved if the modules
    compute something else than its formulas: other classes, hooks, training mode.
    """

    skipped = -1
    context_size = 1
    durations: tuple[int, ...] = ()
    blank_id: int
    most_symbols = 10  # labels of a frame, unless the caller says otherwise

    def __init__(self, model: Any) -> None:
        self.model = model

    def looping(self, format: str = "fp32") -> LabelLooping:
        parts = self.parts()
        kept = _KEPT.setdefault(parts[0], {})
        if format not in kept or not kept[format].fresh(parts):
            kept[format] = _Kept(self, parts, format)
        return kept[format].result()

    @torch.no_grad()
    def why_not_native(self) -> str:
        """Returns why the native call cannot search with the modules as they are, as far as that shows without running
        them; "" if nothing is known."""
        if any(part.training for part in self.parts()):
            return _TRAINING
        try:
            return why_not_native(self._read_weights()) or why_not_now()
        except Unserved as reason:
            return str(reason)

    def _read_weights(self) -> Weights:
        if any(any_watched(part.modules()) or not has_known_forward(part) for part in self.parts()):
            raise Unserved("a submodule has hooks or another forward")
        with _as_unserved():
            return self.weights()

    def projected(self, encoder_out: Tensor) -> Tensor:
        """Frames (..., channels) -> (..., J)."""
        return encoder_out

    @_unrounded_products()
    def checked_weights(self) -> Weights:
        """Returns the weights, after comparing their results with the modules'."""
        w = self._read_weights()
        with _as_unserved():
            tokens = [self.first_token(), (self.first_token() + 1) % len(w.embedding)]
            context, state = [-1] * (w.context - 1), w.embedding.new_zeros(1, _floats(w))
            predictions = []
            for end in (1, 2):
                seen = (context + tokens[:end])[-w.context :]
                state = predict(w, torch.tensor([seen], device=state.device, dtype=torch.int64), state)
                predictions.append(state[:, -len(w.linear[0]) :])
            g = torch.cat(predictions)
            f = torch.arange(1.0, g.numel() + 1, dtype=torch.float32, device="cpu").sin_().view_as(g).to(g)
            expected = self.logits(f, self.predictions(tokens))
            error = (join(w, f, g) - expected).abs().max() / expected.abs().max()
        if not error <= _AGREEMENT:
            raise Unserved("its modules compute something else")
        return w

    @abc.abstractmethod
    def parts(self) -> tuple[Any, Any]:
        """Returns the predictor and the joint network."""

    @abc.abstractmethod
    def weights(self) -> Weights:
        """Returns their weights as the search takes them."""

    @abc.abstractmethod
    def predictions(self, tokens: list[int]) -> Tensor:
        """Returns the predictor's projected outputs (U, J) behind each of the tokens."""

    @abc.abstractmethod
    def logits(self, f: Tensor, g: Tensor) -> Tensor:
        """Returns the joint network's logits of projected frames and predictions."""

    def first_token(self) -> int:
        return self.blank_id


class Stateless(LoopingTransducer):
    """icefall's AsrModel, or anything with its ``decoder`` and ``joiner``."""

    most_symbols = 1

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.blank_id = model.decoder.blank_id
        self.skipped = getattr(model, "unk_id", self.blank_id)
        self.context_size = model.decoder.context_size

    def parts(self) -> tuple[Any, Any]:
        return self.model.decoder, self.model.joiner

    def projected(self, encoder_out: Tensor) -> Tensor:
        return self.model.joiner.encoder_proj(encoder_out)

    def weights(self) -> Weights:
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

    def predictions(self, tokens: list[int]) -> Tensor:
        decoder, joiner = self.parts()
        seen = [-1] * (self.context_size - 1) + tokens
        windows = [seen[i : i + self.context_size] for i in range(len(tokens))]
        y = torch.tensor(windows, device=decoder.embedding.weight.device, dtype=torch.int64)
        return joiner.decoder_proj(decoder(y, need_pad=False)[:, 0])

    def logits(self, f: Tensor, g: Tensor) -> Tensor:
        return self.model.joiner(f, g, project_input=False)


class EmformerRNNT(LoopingTransducer):
    """torchaudio's RNN-T, ours or theirs. Its blank is the last symbol."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.blank_id = model.joiner.linear.out_features - 1

    def parts(self) -> tuple[Any, Any]:
        return self.model.predictor, self.model.joiner

    def weights(self) -> Weights:
        predictor, joiner = self.parts()
        table = _plain(predictor.embedding, torch.nn.Embedding).weight
        layers, first = tuple(predictor.lstm_layers), _norm(predictor.input_layer_norm)
        normalised = type(layers[0].g_norm) is torch.nn.LayerNorm
        kind = torch.nn.LayerNorm if normalised else torch.nn.Identity
        norms = [(_plain(layer.g_norm, kind), _plain(layer.c_norm, kind)) for layer in layers]
        eps = {norm.eps for pair in norms for norm in pair} if normalised else {0.0}
        if len(eps) > 1:
            raise Unserved("the norms of its LSTM layers differ in eps")
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

    def predictions(self, tokens: list[int]) -> Tensor:
        y = torch.tensor([tokens], device=self.model.joiner.linear.weight.device, dtype=torch.int64)
        return self.model.predictor(y, torch.full_like(y[:, 0], len(tokens)), None)[0][0]

    def logits(self, f: Tensor, g: Tensor) -> Tensor:
        one = torch.ones(len(f), dtype=torch.int64, device=f.device)
        return self.model.joiner(f[:, None], one, g[:, None], one)[0][:, 0, 0]


class Parakeet(LoopingTransducer):
    """transformers' ParakeetForRNNT and ParakeetForTDT, and our FastConformerRNNT and FastConformerTDT."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = getattr(model, "config", model)  # ours is its own
        self.blank_id = config.blank_token_id
        self.durations = tuple(getattr(config, "durations", ()))
        self.most_symbols = model.max_symbols_per_step

    def parts(self) -> tuple[Any, Any]:
        return self.model.decoder, self.model.joint

    def projected(self, encoder_out: Tensor) -> Tensor:
        return self.model.encoder_projector(encoder_out)

    def weights(self) -> Weights:
        decoder, joint = self.parts()
        lstm = _plain(decoder.lstm, torch.nn.LSTM)
        if lstm.bidirectional or lstm.proj_size or not lstm.bias:
            raise Unserved("its LSTM has two directions, a projection or no biases")
        return Weights(
            embedding=_plain(decoder.embedding, torch.nn.Embedding).weight,
            layers=tuple(map(tuple, lstm.all_weights)),
            linear=_linear(decoder.decoder_projector),
            head=_linear(joint.head),
            activation=_activation(joint.activation),
        )

    def predictions(self, tokens: list[int]) -> Tensor:
        return self.model.decoder(
            torch.tensor([tokens], device=self.model.joint.head.weight.device, dtype=torch.int64)
        )[0]

    def logits(self, f: Tensor, g: Tensor) -> Tensor:
        return self.model.joint(encoder_hidden_states=f, decoder_hidden_states=g)


def looping_transducer(
    model: Any,
) -> LoopingTransducer | None:
    """Returns the LoopingTransducer of a model, or None if it is of no known kind."""
    for attributes, kind in (
        (("decoder", "joint", "encoder_projector"), Parakeet),
        (("predictor", "joiner", "transcriber"), EmformerRNNT),
        (("decoder", "joiner"), Stateless),
    ):
        parts = [getattr(model, name, None) for name in attributes]
        if all(isinstance(part, torch.nn.Module) for part in parts):
            try:
                return kind(model)
            except AttributeError:
                return None
    return None


# --------------------------------------------------------------------------- weights that are kept
class _Kept:
    """The search with a model's weights, or why there is none, until the modules change."""

    def __init__(
        self,
        transducer: LoopingTransducer,
        parts: tuple[Any, Any],
        format: str,
    ) -> None:
        self._parts = [weakref.ref(part) for part in parts]
        self._states = [ModuleState(part) for part in parts]
        self._watched = [state.watched() for state in self._states]
        self._looping: LabelLooping | None = None
        self._reason: str | None = None
        try:
            if any(part.training for part in parts):
                raise Unserved(_TRAINING)
            if not all(state.traceable() for state in self._states):
                raise Unserved("parameters were made in inference mode, where changes leave no trace")
            with torch.no_grad():
                self._looping = LabelLooping(transducer.checked_weights(), format)
        except Unserved as reason:
            self._reason = str(reason)

    def fresh(self, parts: tuple[Any, Any]) -> bool:
        return (
            self._reason is None
            and all(ref() is part for ref, part in zip(self._parts, parts, strict=True))
            and not any(part.training for part in parts)
            and not any_watched(parts)
            and all(map(has_known_forward, parts))
            and self._watched == [state.watched() for state in self._states]
            and all(state.unchanged() for state in self._states)
        )

    def result(self) -> LabelLooping:
        if self._looping is None:
            raise Unserved(self._reason)
        return self._looping


# the first part of a transducer -> format -> _Kept
_KEPT: weakref.WeakKeyDictionary[Any, dict[str, "_Kept"]] = weakref.WeakKeyDictionary()


def release(transducer: LoopingTransducer) -> None:
    """Frees the copies of a transducer's weights."""
    _KEPT.pop(transducer.parts()[0], None)


def _plain(module: torch.nn.Module, *kinds: type) -> Any:
    if not is_plain(module, *kinds):
        raise Unserved(f"a submodule is a {type(module).__name__}, expected a plain {kinds[0].__name__}")
    return module


def _linear(module: Any) -> tuple[Tensor, Tensor]:
    """Returns weight and bias."""
    weight, bias = _plain(module, torch.nn.Linear, Linear).weight, module.bias
    return weight, torch.zeros_like(weight[:, 0]) if bias is None else bias


def _norm(module: Any) -> tuple[Tensor, Tensor, float]:
    """Returns weight, bias and eps of a LayerNorm."""
    if _plain(module, torch.nn.LayerNorm).weight is None or module.bias is None:
        raise Unserved("a LayerNorm lacks weight or bias")
    return module.weight, module.bias, module.eps


def _convolution(module: Any) -> Tensor:
    if _plain(module, torch.nn.Conv1d).bias is not None:
        raise Unserved("the predictor's convolution has a bias")
    return module.weight


def _activation(module: torch.nn.Module) -> str:
    if not is_plain(module, *_ACTIVATIONS):
        raise Unserved(f"the joint network's activation is {type(module).__name__}, expected ReLU or Tanh")
    return _ACTIVATIONS[type(module)]


def _floats(w: Weights) -> int:
    return 2 * len(w.layers) * w.hidden + len(w.linear[0])
