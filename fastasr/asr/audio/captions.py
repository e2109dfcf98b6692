# SPDX-License-Identifier: Apache-2.0
"""Timed pieces of text as words, as lines of a subtitle and as an .srt file. All times are in seconds."""

from collections.abc import Iterable
from typing import NamedTuple

LINE = 80  # characters of a subtitle
LONGEST = 6.0
PAUSE = 0.8  # a longer pause ends a subtitle


class Timed(NamedTuple):
    """A text with the time of its first and of its last sound."""

    text: str
    start: float
    end: float


def words(pieces: Iterable[Timed]) -> list[Timed]:
    """Joins the pieces of a tokenizer to words: a piece that begins with a space begins a word."""
    found: list[Timed] = []
    for piece in pieces:
        text = piece.text.strip()
        if not found or piece.text[:1].isspace():
            found.append(Timed(text, piece.start, piece.end))
        else:
            found[-1] = Timed(found[-1].text + text, found[-1].start, piece.end)
    return [word for word in found if word.text]


def lines(found: Iterable[Timed]) -> list[Timed]:
    """Joins words to subtitles of at most ``LINE`` characters and ``LONGEST`` seconds, each ended by a pause."""
    made: list[Timed] = []
    for word in found:
        last = made[-1] if made else None
        if (
            last is not None
            and word.start - last.end <= PAUSE
            and word.end - last.start <= LONGEST
            and len(last.text) + 1 + len(word.text) <= LINE
        ):
            made[-1] = Timed(f"{last.text} {word.text}", last.start, word.end)
        else:
            made.append(word)
    return made


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"


def srt(subtitles: Iterable[Timed]) -> str:
    """Returns the text of an .srt file."""
    blocks = (
        f"{number}\n{_clock(line.start)} --> {_clock(line.end)}\n{line.text}\n"
        for number, line in enumerate(subtitles, 1)
    )
    return "\n".join(blocks)
