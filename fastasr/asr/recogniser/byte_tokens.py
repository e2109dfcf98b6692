# SPDX-License-Identifier: Apache-2.0
"""Tokens of byte-level BPE, which write every byte of UTF-8 as one printable character.

GPT-2's alphabet, also that of Hugging Face's tokenizers, keeps the printable characters of Latin-1; the other bytes, in
rising order, are the characters from U+0100 on, among them the space as "Ġ". icefall's keeps printable ASCII; the other
bytes are the characters from U+0100 on that NFKC normalisation leaves alone. There sentencepiece writes a space as "▁".
"""

import codecs
import itertools
import unicodedata
from collections.abc import Collection, Iterable, Iterator

SPACE = "▁"
_CONTINUATION = bytes(range(0x80, 0xC0))
_CONTROL = {*range(32), 127} - set(b"\t\n\r")


def _alphabet(kept: Collection[int], others: Iterator[str]) -> dict[str, int]:
    return {chr(b) if b in kept else next(others): b for b in range(256)}


GPT2 = _alphabet({*range(33, 127), *range(161, 173), *range(174, 256)}, map(chr, itertools.count(256)))
ICEFALL = _alphabet(
    range(32, 127), (c for c in map(chr, itertools.count(256)) if unicodedata.normalize("NFKC", c) == c)
)
ICEFALL[SPACE] = ord(" ")


def is_special(token: str) -> bool:
    return token.startswith("<") and token.endswith(">")


def alphabet_of(tokens: Iterable[str]) -> dict[str, int] | None:
    """Returns character -> byte, the alphabet in which a token table writes bytes, or None if it writes text.

    A table writes bytes if all of its tokens consist of the alphabet and, among tokens of several characters, more than
    ten show bytes for each that is not a part of UTF-8. A token shows bytes if it has a whole character beyond ASCII
    or, in GPT-2's alphabet, begins with a space. Words with letters of the alphabets, such as "či" or "été", are not
    parts of UTF-8.
    """
    tokens = [token for token in tokens if not is_special(token)]
    alphabet = ICEFALL if any(SPACE in token for token in tokens) else GPT2
    if not all(alphabet.keys() >= set(token) for token in tokens):
        return None
    found = wrong = 0
    for token in tokens:
        if len(token) > 1:
            text = _part_of_utf8(bytes(alphabet[c] for c in token))
            wrong += text is None
            found += bool(text and (not text.isascii() or (alphabet is GPT2 and token.startswith("Ġ"))))
    return alphabet if found > 10 * wrong else None


def _part_of_utf8(part: bytes) -> str | None:
    """Returns the whole characters in a part of UTF-8 text, or None if these bytes are not such a part."""
    rest = part.lstrip(_CONTINUATION)
    if len(part) - len(rest) > 3 or not _CONTROL.isdisjoint(part):
        return None
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(rest)
    except UnicodeDecodeError:
        return None
