# SPDX-License-Identifier: Apache-2.0
"""One interface to the transducers that can be searched: PyTorch models and ONNX sessions."""

import torch

from fastasr.models.transducer import label_looping
from fastasr.models.transducer.looping_transducers import Unserved

BEFORE_THE_SENTENCE = -1  # embeds as zeros


class TorchTransducer:
    """An AsrModel, or anything with its ``decoder`` and ``joiner``."""

    def __init__(self, model):
        self.decoder, self.joiner = model.decoder, model.joiner
        self.blank_id = model.decoder.blank_id
        self.unk_id = getattr(model, "unk_id", self.blank_id)
        self.context_size = model.decoder.context_size
        self.device = next(model.joiner.parameters()).device

    def project(self, encoder_out):
        """Frames (..., channels) -> (..., joiner_dim)."""
        return self.joiner.encoder_proj(encoder_out.to(self.device))

    def predict(self, contexts):
        """Contexts, one list of ``context_size`` tokens per row -> (rows, joiner_dim)."""
        y = torch.tensor(contexts, dtype=torch.int64, device=self.device)
        return self.joiner.decoder_proj(self.decoder(y, need_pad=False).squeeze(1))

    def join(self, frames, predictions):
        """Two of (rows, joiner_dim) -> logits (rows, vocabulary)."""
        return self.joiner(frames, predictions, project_input=False)


class OnnxTransducer:
    """An OnnxTransducerModel or OnnxStreamingTransducerModel, ours or upstream's. Its encoder has projected already."""

    def __init__(self, model):
        self.model = model
        self.blank_id = getattr(model, "blank_id", 0)
        self.unk_id = getattr(model, "unk_id", self.blank_id)
        self.context_size = model.context_size
        self.device = torch.device("cpu")

    def project(self, encoder_out):
        return encoder_out

    def predict(self, contexts):
        return self.model.run_decoder(torch.tensor(contexts, dtype=torch.int64, device="cpu"))

    def join(self, frames, predictions):
        return self.model.run_joiner(frames.contiguous(), predictions.contiguous())


class RecurrentTransducer:
    """A transducer whose predictor has a state: torchaudio's RNN-T, transformers' ParakeetForRNNT and ParakeetForTDT. A
    state (floats,) holds the predictor's output too."""

    context_size = 1

    def __init__(self, name, looping):
        self.name, self.looping = name, looping
        self.blank_id, self.unk_id = looping.blank_id, looping.skipped
        self.weights = self._current()
        self.device = self.weights.embedding.device

    def _current(self):
        try:
            return self.looping.looping().weights
        except Unserved as reason:
            model = type(self.looping.model).__name__
            raise TypeError(f"{self.name}: this {model} cannot be searched: {reason}") from None

    def project(self, encoder_out):
        self.weights = self._current()  # they may have changed since the last call
        return self.looping.projected(encoder_out.to(self.device))

    def step(self, tokens, states):
        """Returns states (rows, floats) after these tokens; None is the state before the first token."""
        w = self.weights
        before = w.embedding.new_zeros(2 * len(w.layers) * w.hidden + len(w.linear[0]))
        rows = torch.stack([before if state is None else state for state in states])
        return label_looping.predict(
            w, torch.tensor(tokens, device=self.device, dtype=torch.int64)[:, None], rows
        )

    def predictions(self, states):
        return states[:, -len(self.weights.linear[0]) :]

    def join(self, frames, predictions):
        return label_looping.join(self.weights, frames, predictions)


def as_transducer(name, model):
    """Returns ``model`` with this interface. Raises TypeError if it is not a transducer."""
    if hasattr(model, "run_joiner"):
        return OnnxTransducer(model)
    if getattr(model, "decoder", None) is not None and getattr(model, "joiner", None) is not None:
        return TorchTransducer(model)
    raise TypeError(f"{name}: expected a model with a transducer, got {type(model).__name__}")


def first_context(transducer):
    """Returns the context of an utterance's first token."""
    return [BEFORE_THE_SENTENCE] * (transducer.context_size - 1) + [transducer.blank_id]
