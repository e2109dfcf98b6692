# SPDX-License-Identifier: Apache-2.0
"""Finds the predictor of a model for a search: PyTorch models and ONNX sessions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastasr.models.transducer.predictors import Predictor, find_predictor


class OnnxPredictor(Predictor):
    """The predictor of an OnnxTransducerModel or OnnxStreamingTransducerModel, ours or upstream's. The model's encoder
    has projected the frames."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.blank_id = getattr(model, "blank_id", 0)
        self.skipped = getattr(model, "unk_id", self.blank_id)
        self.context_size = model.context_size

    def project(self, encoder_out: Tensor) -> Tensor:
        return encoder_out

    def step(self, contexts: Sequence[Sequence[int]], states: Sequence[Tensor | None]) -> Tensor:
        return self.model.run_decoder(torch.tensor(contexts, dtype=torch.int64, device="cpu"))

    def join(self, frames: Tensor, states: Tensor) -> Tensor:
        return self.model.run_joiner(frames.contiguous(), states.contiguous())


def require_predictor(name: str, model: Any) -> Predictor:
    """Returns the predictor of a model. Raises TypeError, for the search ``name``, if the model is no transducer."""
    predictor = OnnxPredictor(model) if hasattr(model, "run_joiner") else find_predictor(model)
    if predictor is None:
        raise TypeError(f"{name}: expected a model with a transducer, got {type(model).__name__}")
    return predictor
