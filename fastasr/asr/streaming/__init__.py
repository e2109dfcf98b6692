# SPDX-License-Identifier: Apache-2.0
"""Live recognition: many streams through one Zipformer, a chunk at a time.

    from fastasr.asr.streaming import StreamingEncoder, StreamingRecogniser

``StreamingEncoder`` runs the encoder of a model, ours or upstream's, for streams that come and go;
``StreamingRecogniser`` turns its output into words. See docs/streaming.md.
"""

from fastasr.asr.audio.features import FbankStream
from fastasr.asr.streaming.backend import Backend, EagerBackend
from fastasr.asr.streaming.cuda_graph import CudaGraphBackend
from fastasr.asr.streaming.encoder import EngineReport, StreamingEncoder
from fastasr.asr.streaming.features import StreamFeatures, utterance_chunks
from fastasr.asr.streaming.identify import identify
from fastasr.asr.streaming.recogniser import EndpointRules, Result, StreamingRecogniser

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
