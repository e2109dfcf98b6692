# SPDX-License-Identifier: Apache-2.0
"""Character and word error rates."""

from collections.abc import Sequence


def error_rate(references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]]) -> float:
    """Returns (insertions + deletions + substitutions) / (length of the references).

    Both arguments are sequences of sequences of symbols.
    """
    import kaldialign

    pairs = zip(references, hypotheses, strict=True)
    errors = sum(kaldialign.edit_distance(list(r), list(h))["total"] for r, h in pairs)
    return errors / max(1, sum(map(len, references)))


def rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Returns {"cer": ..., "wer": ...} of texts. Spaces count as characters."""
    words = [text.split() for text in references], [text.split() for text in hypotheses]
    return {"cer": error_rate(references, hypotheses), "wer": error_rate(*words)}
