# SPDX-License-Identifier: Apache-2.0
"""One interface to the transducers that can be searched: PyTorch models and ONNX sessions."""

import torch

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
        return self.model.run_decoder(torch.tensor(contexts, dtype=torch.int64))

    def join(self, frames, predictions):
        return self.model.run_joiner(frames.contiguous(), predictions.contiguous())


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
