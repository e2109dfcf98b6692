# SPDX-License-Identifier: Apache-2.0
"""Runs recognisers in onnxruntime from the files that ``fastasr.asr.export`` or upstream's exporter writes.

Constructors and methods are upstream's. Inputs and outputs are PyTorch tensors on the CPU. Streaming models keep the
states of their batch of streams; ``reset_states(batch_size)`` starts new streams.
"""

from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from fastasr.models.common.sequences import check_frames


def _session(filename: Path | str, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ImportError("ONNX models need onnxruntime: pip install onnxruntime") from None
    if not Path(filename).is_file():
        raise FileNotFoundError(f"there is no ONNX model {filename}")
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads
    # Without this, a session's threads spin after a call for longer than a chunk takes, so on two cores the next work,
    # for example of another session, gets only one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(
            str(filename), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime does not export its error classes under stable names
        raise ValueError(f"{filename} cannot be loaded as an ONNX model: {error}") from None


def _metadata(session: Any, filename: Path | str, *names: str) -> list[int]:
    """Returns the ints under these names in a model's metadata."""
    found = session.get_modelmeta().custom_metadata_map
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{filename} lacks the metadata {', '.join(missing)}: was it exported for this use?")
    return [int(found[name]) for name in names]


def _run(session: Any, *tensors: Tensor) -> list[Tensor]:
    inputs = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, inputs)]


class _Transducer:
    """The three networks of a transducer, and the metadata of its decoder."""

    def __init__(
        self,
        encoder_filename: Path | str,
        decoder_filename: Path | str,
        joiner_filename: Path | str,
        threads: int = 1,
    ) -> None:
        self.encoder = self._open(encoder_filename, threads)
        self.decoder = _session(decoder_filename, threads)
        self.joiner = _session(joiner_filename, threads)
        self.context_size, self.vocab_size = _metadata(
            self.decoder, decoder_filename, "context_size", "vocab_size"
        )
        found = self.decoder.get_modelmeta().custom_metadata_map
        self.blank_id = int(found.get("blank_id", 0))
        self.unk_id = int(found.get("unk_id", self.blank_id))

    def _open(self, filename: Path | str, threads: int) -> Any:
        return _session(filename, threads)

    def run_decoder(self, decoder_input: Tensor) -> Tensor:
        """(batch, context_size) of int64 -> (batch, joiner_dim)"""
        return _run(self.decoder, decoder_input)[0]

    def run_joiner(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """(batch, joiner_dim) twice -> logits (batch, vocabulary)"""
        return _run(self.joiner, encoder_out, decoder_out)[0]


class OnnxTransducerModel(_Transducer):
    """A transducer for whole utterances: encoder, decoder and joiner."""

    def run_encoder(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, ...]:
        """Features (batch, time, channels), lengths -> encoder_out (batch, frames, joiner_dim), lengths

        Raises ValueError when a sequence is too short for a frame of output.
        """
        check_frames(type(self).__name__, x, x_lens)
        return tuple(_run(self.encoder, x, x_lens))


class OnnxCtcModel:
    """A CTC model for whole utterances."""

    def __init__(self, nn_model: Path | str, threads: int = 1) -> None:
        self.model = _session(nn_model, threads)

    def __call__(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, ...]:
        """Features (batch, time, channels), lengths -> log-probabilities (batch, frames, vocabulary), lengths

        Raises ValueError when a sequence is too short for a frame of output.
        """
        check_frames(type(self).__name__, x, x_lens)
        return tuple(_run(self.model, x, x_lens))


class _Streams:
    """A session with states. ``segment``: frames of features per chunk; ``offset``: frames from chunk to chunk."""

    def _open(self, filename: Path | str, threads: int) -> Any:
        self._session = _session(filename, threads)
        self.segment, self.offset = _metadata(self._session, filename, "T", "decode_chunk_len")
        self._names = [i.name for i in self._session.get_inputs()]
        self._outputs = [self._session.get_outputs()[0].name] + [f"new_{name}" for name in self._names[1:]]
        self.reset_states()
        return self._session

    def reset_states(self, batch_size: int = 1) -> None:
        """Starts ``batch_size`` new streams."""
        self.states = []
        for i in self._session.get_inputs()[1:]:
            shape = [n if isinstance(n, int) else batch_size for n in i.shape]
            kind = numpy.int64 if "int64" in i.type else numpy.float32
            self.states.append(numpy.zeros(shape, dtype=kind))

    def _step(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.segment:
            raise ValueError(
                f"{type(self).__name__}: a chunk must be (batch, {self.segment}, channels), got {tuple(x.shape)}"
            )
        inputs = dict(zip(self._names, [x.numpy(), *self.states], strict=True))
        y, *self.states = self._session.run(self._outputs, inputs)
        return torch.from_numpy(y)


class OnnxStreamingTransducerModel(_Streams, _Transducer):
    """A transducer for streams."""

    def run_encoder(self, x: Tensor) -> Tensor:
        """A chunk of features (batch, segment, channels) -> encoder_out (batch, frames, joiner_dim)"""
        return self._step(x)


class OnnxStreamingCtcModel(_Streams):
    """A CTC model for streams."""

    def __init__(self, model_filename: Path | str, threads: int = 1) -> None:
        self.model = self._open(model_filename, threads)

    def __call__(self, x: Tensor) -> Tensor:
        """A chunk of features (batch, segment, channels) -> log-probabilities (batch, frames, vocabulary)"""
        return self._step(x)
