# SPDX-License-Identifier: Apache-2.0
"""One interface to encoders: PyTorch models and ONNX sessions, transducers and CTC, whole utterances and streams."""

from typing import Any

import torch
from torch import Tensor

from fastasr.asr.decoding.chunks import RIGHT_CONTEXT
from fastasr.asr.export.wrappers import StreamingEncoderWrapper


@torch.inference_mode()
def encode(model: Any, x: Tensor, x_lens: Tensor, ctc: bool = False) -> tuple[Tensor, Tensor]:
    """Encodes features (batch, time, channels) of the given lengths for a search. Returns the encoder's output or, with
    ``ctc``, CTC's log-probabilities, and their lengths. ``model`` is an AsrModel, an OnnxTransducerModel or an
    OnnxCtcModel.
    """
    if hasattr(model, "run_encoder"):
        return model.run_encoder(x, x_lens)
    if not isinstance(model, torch.nn.Module):
        return model(x, x_lens)
    _check_eval(model)
    of_torch: Any = model
    encoder_out, lengths = of_torch.forward_encoder(x, x_lens)
    return (_ctc_output(model)(encoder_out) if ctc else encoder_out), lengths


def _check_eval(model: Any) -> None:
    if model.training:
        raise ValueError("decoding takes a model in eval mode: call model.eval()")


def _ctc_output(model: Any) -> Any:
    if getattr(model, "ctc_output", None) is None:
        raise ValueError(f"this {type(model).__name__} has no CTC output")
    return model.ctc_output


class ChunkEncoder:
    """Runs a batch of streams chunk by chunk. Every stream of the batch advances with every chunk.

    ``model`` is a causal AsrModel with one chunk size, an OnnxStreamingTransducerModel or an OnnxStreamingCtcModel.
    With ``ctc`` an AsrModel gives CTC's log-probabilities.
    """

    right_context = RIGHT_CONTEXT

    def __init__(self, model: Any, batch_size: int = 1, ctc: bool = False) -> None:
        self.model = model
        self.onnx = not isinstance(model, torch.nn.Module)
        if self.onnx:
            self.chunk_size = model.offset // 2
            model.reset_states(batch_size)
            return
        _check_eval(model)
        self.head = _ctc_output(model) if ctc else None
        self.wrapper = StreamingEncoderWrapper(model.encoder, model.encoder_embed)
        self.chunk_size = self.wrapper.chunk_size
        self.states = self.wrapper.get_init_states(batch_size, next(model.parameters()).device)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """Chunks (batch, 2 chunk_size + 13, channels) -> (batch, chunk_size / 2, channels)."""
        if self.onnx:
            return self.model.run_encoder(x) if hasattr(self.model, "run_encoder") else self.model(x)
        lengths = torch.full((x.shape[0],), x.shape[1], device=x.device, dtype=torch.int64)
        encoder_out, _, self.states = self.wrapper(x, lengths, self.states)
        return encoder_out if self.head is None else self.head(encoder_out)
