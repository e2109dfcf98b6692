# SPDX-License-Identifier: Apache-2.0
"""The searches by the names that recognisers and commands give them."""

from collections.abc import Callable
from typing import Any

from fastasr.asr.decoding.ctc_greedy_search import CtcGreedySearch
from fastasr.asr.decoding.ctc_prefix_beam_search import CtcPrefixBeamSearch
from fastasr.asr.decoding.greedy_search import GreedySearch
from fastasr.asr.decoding.modified_beam_search import ModifiedBeamSearch


def _blank(model: Any) -> int:
    return getattr(model, "blank_id", 0)


# Name -> a function of the model, the number of hypotheses, and what is subtracted from a transducer's blank. A name
# that begins with "ctc-" is of a search over CTC's log-probabilities.
METHODS: dict[str, Callable[[Any, int, float], Any]] = {
    "greedy": lambda model, beam, penalty: GreedySearch(model, blank_penalty=penalty),
    "beam": lambda model, beam, penalty: ModifiedBeamSearch(model, beam, blank_penalty=penalty),
    "ctc-greedy": lambda model, beam, penalty: CtcGreedySearch(_blank(model)),
    "ctc-beam": lambda model, beam, penalty: CtcPrefixBeamSearch(beam, _blank(model)),
}
