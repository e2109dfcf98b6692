# SPDX-License-Identifier: Apache-2.0
"""One streaming Zipformer in several implementations, each for many streams that share calls.

- ``upstream``: the PyPI package's streaming wrapper as it is;
- ``scripted``: the same by ``torch.jit.script`` and ``torch.jit.freeze``, as upstream's exporter writes it;
- ``onnxruntime``, ``onnxruntime int8``: the files that ``fastasr.asr.export`` writes of the same weights (with the
  joiner's projection, one product more);
- ``sherpa-onnx``, ``sherpa-onnx int8``: its online recogniser on the same files, with its own features and greedy
  search, which no other implementation runs; only if they are named;
- ``engine fp32``, ``engine bf16``, ``engine int8``: ``fastasr.asr.streaming.StreamingEncoder``.

The implementations before sherpa-onnx keep a list of states per stream, which they stack for a call and split after it,
as upstream's servers do.
"""

import copy
import tempfile
import time
from pathlib import Path

import torch

from fastasr.asr.decoding.chunks import RIGHT_CONTEXT
from fastasr.benchmarks import upstream
from fastasr.benchmarks.environment import int8_saturates
from fastasr.benchmarks.models.transcribe import LEFT_CONTEXT, VOCABULARY, config
from fastasr.models.zipformer.stream_states import stack_states, unstack_states

UPSTREAM, SCRIPTED, ONNX, ONNX_INT8 = "upstream", "scripted", "onnxruntime", "onnxruntime int8"
SHERPA = ("sherpa-onnx", "sherpa-onnx int8")
RATE = 16000
FRAME = 0.01  # seconds of a frame of features
ENGINES = {"engine fp32": "fp32", "engine bf16": "bf16", "engine int8": "int8"}
NAMES = (UPSTREAM, SCRIPTED, ONNX, ONNX_INT8, *ENGINES)


class StackedStreams:
    """Streams of ``run``, which maps features (n, frames, bins) and the states of n streams to output and
    new states.
    """

    def __init__(self, run, first):
        self._run, self._first, self._states = run, first, {}

    def open(self, count):
        self._states = {stream: [state.clone() for state in self._first] for stream in range(count)}

    @torch.inference_mode()
    def middle(self, features, chunks):
        """Returns a call that takes the chunk after the first ``chunks``, of as many streams as there are features. The
        states are one batch already and none is kept: every call does the same.
        """
        states = stack_states([self._first] * len(features))
        for _ in range(chunks):
            states = self._run(features, states)[1]
        return torch.inference_mode()(lambda: self._run(features, states)[0])

    @torch.inference_mode()
    def step(self, features, streams):
        """Encodes the next chunk of each of ``streams``, (n, 2 chunk_size + 13, bins), and returns the output."""
        if len(streams) == 1:
            y, self._states[streams[0]] = self._run(features, self._states[streams[0]])
            return y
        y, states = self._run(features, stack_states([self._states[stream] for stream in streams]))
        for stream, own in zip(streams, unstack_states(states), strict=True):
            self._states[stream] = own
        return y


class SherpaStreams:
    """The streams of sherpa-onnx's online recogniser. They hear noise: a chunk of it replaces each chunk of
    features."""

    def __init__(self, files, tokens, chunk, threads):
        sherpa_onnx = upstream.module("sherpa_onnx")
        self._recogniser = sherpa_onnx.OnlineRecognizer.from_transducer(
            str(tokens), *(str(file) for file in files), num_threads=threads, sample_rate=RATE
        )
        # Two frames more than a chunk, because sherpa-onnx waits for the end of a frame's window.
        noise = 0.1 * torch.randn(round(RATE * FRAME * (2 * chunk + RIGHT_CONTEXT + 2)))
        self._head = noise[round(RATE * FRAME * 2 * chunk) :].numpy()  # The first chunk is longer by these.
        self._chunk = noise[: round(RATE * FRAME * 2 * chunk)].numpy()
        self._streams = []

    def open(self, count):
        self._streams = [self._recogniser.create_stream() for _ in range(count)]
        for stream in self._streams:
            stream.accept_waveform(RATE, self._head)

    def step(self, features, streams):
        """Reads a chunk of each of ``streams`` and returns the number of chunks that it decoded."""
        chosen, decoded = [self._streams[stream] for stream in streams], 0
        for stream in chosen:
            stream.accept_waveform(RATE, self._chunk)
        while ready := [stream for stream in chosen if self._recogniser.is_ready(stream)]:
            self._recogniser.decode_streams(ready)
            decoded += len(ready)
        return decoded


class EngineStreams:
    """The streams of the engine, and how long it took to pack."""

    def __init__(self, model, chunk, weights, threads, most):
        from fastasr.asr.streaming import StreamingEncoder

        began = time.perf_counter()
        self._encoder = StreamingEncoder.from_model(
            model, chunk, LEFT_CONTEXT, weights=weights, max_streams=most, threads=threads
        )
        self.packing_seconds = time.perf_counter() - began
        self._streams = []

    def open(self, count):
        for stream in self._streams:
            self._encoder.close(stream)
        self._streams = [self._encoder.open() for _ in range(count)]

    def middle(self, features, chunks):
        """Returns a call in the middle of the streams. The states move on with every call; its work does not change."""
        self.open(len(features))
        for _ in range(chunks):
            self._encoder.step(features, self._streams)
        return lambda: self._encoder.step(features, self._streams)[0]

    def step(self, features, streams):
        return self._encoder.step(features, [self._streams[stream] for stream in streams])[0]


def make(names=NAMES, size="medium", chunk=16, threads=1, most=64):
    """Returns {name: streams} of a model with the same random weights; ``open(count)`` begins streams 0 to ``count`` -
    1, at most ``most`` of an engine. Raises ``upstream.MissingUpstream`` for a package that is not installed, and
    ValueError for an unknown name.
    """
    unknown = [name for name in names if name not in (*NAMES, *SHERPA)]
    if unknown:
        raise ValueError(f"implementations are {', '.join((*NAMES, *SHERPA))}, got {', '.join(unknown)}")
    with upstream.activations(compiled=False):
        theirs = upstream.distinct(upstream.recogniser(config(size, chunk)))
    made = {}
    if UPSTREAM in names or SCRIPTED in names:
        from zipformer.modules.model import StreamingEncoderWrapper

        wrapper = StreamingEncoderWrapper(copy.deepcopy(theirs.encoder), copy.deepcopy(theirs.encoder_embed))
        wrapper.eval()
        first = wrapper.get_init_states(1)
        if UPSTREAM in names:
            made[UPSTREAM] = StackedStreams(_chunk_of(wrapper), first)
        if SCRIPTED in names:
            scripted = torch.jit.freeze(torch.jit.script(wrapper))
            made[SCRIPTED] = StackedStreams(_chunk_of(scripted), first)
    exported = [name for name in (ONNX, ONNX_INT8, *SHERPA) if name in names]
    if exported:
        made |= _exported(exported, theirs, size, chunk, threads)
    for name, weights in ENGINES.items():
        if name in names:
            made[name] = EngineStreams(theirs, chunk, weights, threads, most)
    return {name: made[name] for name in names}


def _chunk_of(wrapper):
    def run(features, states):
        lengths = torch.full((len(features),), features.shape[1])
        y, _, states = wrapper(features, lengths, states)
        return y, states

    return run


def _exported(names, theirs, size, chunk, threads):
    """Returns {name: streams} of implementations that read ONNX files."""
    for name in ("onnx", "onnxruntime"):
        upstream.module(name)
    from fastasr.asr import export, recogniser
    from fastasr.asr.export import export_onnx

    ours = recogniser.AsrModel(**config(size, chunk)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        int8 = any(name.endswith("int8") for name in names)
        files = export_onnx(ours, folder, int8=int8, reduce_range=int8 and int8_saturates())
        tokens = Path(folder) / "tokens.txt"
        tokens.write_text("".join(f"t{i} {i}\n" for i in range(VOCABULARY)), encoding="utf-8")
        for name in names:
            kind = ".int8" if name.endswith("int8") else ""
            parts = [files[part + kind] for part in ("encoder", "decoder", "joiner")]
            if name in SHERPA:
                made[name] = SherpaStreams(parts, tokens, chunk, threads)
            else:
                made[name] = _onnx(export.OnnxStreamingTransducerModel(*parts, threads=threads))
    return made


def _onnx(session):
    def run(features, states):
        session.states = [state.numpy() for state in states]
        y = session.run_encoder(features)
        return y, [torch.from_numpy(state) for state in session.states]

    return StackedStreams(run, [torch.from_numpy(state) for state in session.states])
