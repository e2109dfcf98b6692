# SPDX-License-Identifier: Apache-2.0
"""Searches that turn an encoder's output into tokens: greedy and beam search, for transducers and CTC.

A search has three methods, the same for whole utterances and for streams:

    search = GreedySearch(model)
    state = search.start(batch_size)
    state = search.advance(state, encoder_out)      # (batch, frames, channels), as often as there is more
    search.result(state)                            # Decoded(tokens, timestamps, scores), partial or final

``model`` is an AsrModel, ours or upstream's, or one of the ONNX models. The function ``greedy_search`` takes whole
utterances in one call, and so do those of the other searches. See docs/decoding.md.
"""

from fastasr.asr.decoding.batching import join_states, split_state
from fastasr.asr.decoding.chunks import FeatureChunks
from fastasr.asr.decoding.ctc_greedy_search import CtcGreedySearch, ctc_greedy_search
from fastasr.asr.decoding.ctc_prefix_beam_search import CtcPrefixBeamSearch, ctc_prefix_beam_search
from fastasr.asr.decoding.encoders import ChunkEncoder, encode
from fastasr.asr.decoding.greedy_search import GreedySearch, greedy_search
from fastasr.asr.decoding.methods import METHODS
from fastasr.asr.decoding.modified_beam_search import ModifiedBeamSearch, modified_beam_search
from fastasr.asr.decoding.parakeet_generate import parakeet_generate
from fastasr.asr.decoding.results import Decoded
from fastasr.asr.decoding.rnnt_beam_search import RNNTBeamSearch

__all__ = [
    "METHODS",
    "ChunkEncoder",
    "CtcGreedySearch",
    "CtcPrefixBeamSearch",
    "Decoded",
    "FeatureChunks",
    "GreedySearch",
    "ModifiedBeamSearch",
    "RNNTBeamSearch",
    "ctc_greedy_search",
    "ctc_prefix_beam_search",
    "encode",
    "greedy_search",
    "join_states",
    "modified_beam_search",
    "parakeet_generate",
    "split_state",
]
