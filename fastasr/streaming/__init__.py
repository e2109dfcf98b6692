# SPDX-License-Identifier: Apache-2.0
"""Live recognition: many streams through one Zipformer, a chunk at a time.

    from fastasr.streaming import StreamingEncoder, StreamingRecogniser

``StreamingEncoder`` runs the encoder of a model, ours or upstream's, for streams that come and go;
``StreamingRecogniser`` makes words of it. See docs/streaming.md.
"""

from fastasr._renamed import old_names as _old_names
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

__getattr__ = _old_names(globals(), {"StreamingRecognizer": "StreamingRecogniser", "recognise": "identify"})
