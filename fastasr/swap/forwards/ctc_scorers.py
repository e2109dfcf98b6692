# SPDX-License-Identifier: Apache-2.0
"""The scorers by which ESPnet's and SpeechBrain's searches ask CTC. They are no modules, so that no swap finds them: a
swapped search has them compute by ``ctc_prefix`` while it runs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastasr.ops import _dispatch
from fastasr.swap.forwards.ctc_prefix import Hypotheses, PrefixScores, Scores
from fastasr.swap.source_hash import SourceUnavailable, fingerprint


@contextlib.contextmanager
def served(scorers: Iterable[Any]) -> Iterator[None]:
    """Inside the block those of ``scorers`` that are known compute by ``ctc_prefix``."""
    bound = []
    try:
        for scorer in scorers:
            for name, method in _methods(scorer).items():
                setattr(scorer, name, partial(method, scorer))
                bound.append((scorer, name))
        yield
    finally:
        for scorer, name in bound:
            delattr(scorer, name)
            if isinstance(getattr(scorer, "ctc_score", None), _SpeechBrains):
                scorer.ctc_score = scorer.ctc_score.upstream
            if hasattr(getattr(scorer, "impl", None), "prefixes"):
                del scorer.impl.prefixes


def _methods(scorer: Any) -> dict[str, Callable]:
    """Returns what a scorer is to run in place of its class's methods."""
    methods = _SERVED.get(type(scorer).__name__, {})
    if not methods or _dispatch.why_not_native() or any(name in vars(scorer) for name in methods):
        return {}
    return methods if _is_known(scorer) and not getattr(scorer, "ctc_window_size", 0) else {}


def _is_known(made: Any) -> bool:
    """Says whether an object of upstream's runs code that this file stands for."""
    cls = type(made)
    methods, code = _KNOWN.get(cls.__name__, ((), ""))
    try:
        return fingerprint([getattr(cls, name) for name in methods], cls) == code
    except (AttributeError, SourceUnavailable):
        return False


def _fits(prefix_score: Any) -> bool:
    x = prefix_score.x
    return _is_known(prefix_score) and x.is_cpu and x.dtype is torch.float32 and x.numel() > 0


class _SpeechBrains:
    """Stands for the ``CTCPrefixScore`` of one search."""

    def __init__(self, upstream: Any) -> None:
        self.upstream, self.minus_inf, self._length = upstream, upstream.minus_inf, -1
        numbers = upstream.blank_index, upstream.eos_index, upstream.minus_inf
        x, ends = upstream.x[0].transpose(0, 1), upstream.last_frame_index.long()
        # A recording without frames has -1, which upstream takes for the batch's last one.
        ends = ends % x.shape[1]
        self._prefixes = PrefixScores(x, ends, *numbers, column=0)

    def forward_step(
        self, inp_tokens: Tensor, states: Any, candidates: Tensor | None = None, attn: Tensor | None = None
    ) -> tuple[Tensor, Scores]:
        self._length += 1
        of = self._prefixes.start(inp_tokens) if states is None else states[0]
        found = self._prefixes.scores(of, self._length, candidates)
        return (found.table - of.score[:, None]).float(), found

    def permute_mem(self, memory: Scores, index: Tensor) -> tuple[Hypotheses, Tensor]:
        """index: (recordings, beams), beam times tokens plus token."""
        tokens = memory.table.shape[1]
        first = torch.arange(len(index), dtype=torch.int64, device="cpu") * index.shape[1]
        rows = torch.div(index, tokens, rounding_mode="floor") + first[:, None]
        found = self._prefixes.chosen(memory, rows.flatten(), (index % tokens).flatten())
        return found, found.score


def _reset_mem(self: Any, x: Tensor, enc_lens: Tensor) -> Any:
    result = type(self).reset_mem(self, x, enc_lens)
    if _fits(self.ctc_score):
        self.ctc_score = _SpeechBrains(self.ctc_score)
    return result


class _Chosen(NamedTuple):
    """A hypothesis of ESPnet's search, continued by a token."""

    scores: Scores
    row: int
    token: int


def _batch_init_state(self: Any, x: Tensor) -> None:
    type(self).batch_init_state(self, x)
    made = self.impl
    if _fits(made) and made.margin == 0:
        x, ends = made.x[0].transpose(0, 1), made.end_frames.long()
        made.prefixes = PrefixScores(x, ends, made.blank, made.eos, made.logzero, column=-1)


def _batch_score_partial(
    self: Any, y: Tensor, ids: Tensor | None, state: list[Any], x: Tensor
) -> tuple[Tensor, Any]:
    prefixes: PrefixScores | None = getattr(self.impl, "prefixes", None)
    if prefixes is None:
        found: tuple[Tensor, Any] = type(self).batch_score_partial(self, y, ids, state, x)
        return found
    of = prefixes.start(y[:, -1]) if state[0] is None else _continued(prefixes, state)
    scores = prefixes.scores(of, y.shape[1] - 1, ids)
    return (scores.table - of.score[:, None]).to(x.dtype), scores


def _continued(prefixes: PrefixScores, chosen: list[_Chosen]) -> Hypotheses:
    """Returns the hypotheses, which are all of one step."""
    rows, tokens = (
        torch.tensor(part, dtype=torch.int64, device="cpu")
        for part in ([one.row for one in chosen], [one.token for one in chosen])
    )
    return prefixes.chosen(chosen[0].scores, rows, tokens)


def _select_state(self: Any, state: Any, i: Any, new_id: Any = None) -> Any:
    if isinstance(state, Scores):
        return _Chosen(state, int(i), int(new_id))
    return type(self).select_state(self, state, i, new_id)


# Class of a scorer -> methods in place of its own
_SERVED: dict[str, dict[str, Callable]] = {
    "CTCScorer": {"reset_mem": _reset_mem},
    "CTCPrefixScorer": {
        "batch_init_state": _batch_init_state,
        "batch_score_partial": _batch_score_partial,
        "select_state": _select_state,
    },
}
# Class -> the methods for which this file stands, and the fingerprint of their code
_KNOWN = {
    "CTCScorer": (("reset_mem", "score", "permute_mem"), "b2f1e4e00b82a69f952298ce"),
    "CTCPrefixScore": (("__init__", "forward_step", "permute_mem"), "285a45b93f07316a116c5e8c"),
    "CTCPrefixScorer": (
        ("batch_init_state", "batch_score_partial", "select_state"),
        "bcb97c85a6c43bb58a4481b1",
    ),
    "CTCPrefixScoreTH": (("__init__", "__call__"), "d82eb427028dbaea3767c025"),
}
