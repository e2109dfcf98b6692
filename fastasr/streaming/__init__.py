# SPDX-License-Identifier: Apache-2.0
"""Live recognition: many streams through one Zipformer, a chunk at a time.

    from fastasr.streaming import StreamingEncoder, StreamingRecogniser

``StreamingEncoder`` runs the encoder of a model, ours or upstream's, for streams that come and go;
``StreamingRecogniser`` makes words of it. See docs/streaming.md.
"""

import warnings

from fastasr.audio.features import FbankStream
from fastasr.streaming.backend import Backend, EagerBackend
from fastasr.streaming.cuda_graph import CudaGraphBackend
from fastasr.streaming.encoder import EngineReport, StreamingEncoder
from fastasr.streaming.features import StreamFeatures, utterance_chunks
from fastasr.streaming.identify import identify
from fastasr.streaming.recogniser import EndpointRules, Result, StreamingRecogniser

__all__ = [
    "Backend",
    "CudaGraphBackend",
    "EagerBackend",
    "EndpointRules",
    "EngineReport",
    "FbankStream",
    "Result",
    "StreamFeatures",
    "StreamingEncoder",
    "StreamingRecogniser",
    "identify",
    "utterance_chunks",
]

_RENAMED = {"StreamingRecognizer": "StreamingRecogniser", "recognise": "identify"}


def __getattr__(name):
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {__name__}.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
