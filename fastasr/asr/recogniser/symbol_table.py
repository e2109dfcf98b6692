# SPDX-License-Identifier: Apache-2.0
"""Tokens and their ids. ``tokens.txt`` of recipes and runtimes has a token and its id on every line."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastasr import files
from fastasr.asr.recogniser import byte_tokens

DISAMBIGUATION = re.compile(r"^#\d+$")
_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{1,2})>$")


class SymbolTable:
    """A one-to-one map between symbols of any hashable type and ids, ints of 0 or more. Id 0 is ``eps``.

    Only strings can be read from a file or written to one.
    """

    _byte_alphabet: tuple[int, dict[str, int] | None]  # see ``_byte_alphabet``

    def __init__(
        self,
        _id2sym: dict | None = None,
        _sym2id: dict | None = None,
        _next_available_id: int = 1,
        eps: str = "<eps>",
    ) -> None:
        self._id2sym = {} if _id2sym is None else _id2sym
        self._sym2id = {} if _sym2id is None else _sym2id
        self.eps = eps
        if {(i, s) for i, s in self._id2sym.items()} != {(i, s) for s, i in self._sym2id.items()}:
            raise ValueError("SymbolTable: _id2sym and _sym2id do not say the same")
        if any(i < 0 for i in self._id2sym):
            raise ValueError(f"SymbolTable: ids must be 0 or more, got {min(self._id2sym)}")
        if self._id2sym.setdefault(0, eps) != eps or self._sym2id.setdefault(eps, 0) != 0:
            raise ValueError(f"SymbolTable: id 0 must be eps = {eps!r}, got {self._id2sym[0]!r}")
        self._next_available_id = max(max(self._id2sym) + 1, _next_available_id)

    @staticmethod
    def from_str(s: str) -> "SymbolTable":
        """Returns a table from lines of a symbol, white space and an id. Raises ValueError with the malformed line."""
        id2sym, sym2id = {}, {}
        for number, line in enumerate(s.split("\n"), start=1):
            fields = line.split()
            if not fields:
                continue
            try:
                symbol, index = fields[0], int(fields[1])
            except (IndexError, ValueError):
                symbol = None
            if symbol is None or len(fields) != 2:
                raise ValueError(f"SymbolTable: line {number} must be a symbol and an id, got {line!r}")
            if symbol in sym2id or index in id2sym:
                raise ValueError(f"SymbolTable: line {number} repeats a symbol or an id: {line!r}")
            id2sym[index], sym2id[symbol] = symbol, index
        return SymbolTable(id2sym, sym2id, eps=id2sym.get(0, "<eps>"))

    @staticmethod
    def from_file(filename: Path | str) -> "SymbolTable":
        """Reads a table from a file as ``to_file`` writes it. Raises ValueError if the file is not such a table."""
        try:
            return SymbolTable.from_str(Path(filename).read_text(encoding="utf-8").strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"SymbolTable: {filename} is not UTF-8: {error}") from None

    def to_str(self) -> str:
        return "".join(f"{symbol} {index}\n" for index, symbol in sorted(self._id2sym.items()))

    def to_file(self, filename: Path | str) -> None:
        files.write(filename, self.to_str())

    def add(self, symbol: Any, index: int | None = None) -> int:
        """Adds ``symbol`` if it is new and returns its id: the one it has, else ``index``, else the next free id.
        Raises ValueError if another symbol has ``index``.
        """
        if symbol in self._sym2id:
            return self._sym2id[symbol]
        index = self._next_available_id if index is None else index
        if index in self._id2sym:
            raise ValueError(f"SymbolTable: id {index} of {symbol!r} is taken by {self._id2sym[index]!r}")
        self._sym2id[symbol], self._id2sym[index] = index, symbol
        self._next_available_id = max(self._next_available_id, index + 1)
        return index

    def get(self, k: Any) -> Any:
        """Returns the symbol of an id or the id of a symbol. Raises KeyError if the table does not have it."""
        return self._id2sym[k] if isinstance(k, int) else self._sym2id[k]

    __getitem__ = get

    def merge(self, other: "SymbolTable") -> "SymbolTable":
        """Returns the union of two tables. Raises ValueError if they contradict each other."""
        if self.eps != other.eps:
            raise ValueError(f"SymbolTable: tables differ in eps: {self.eps!r} and {other.eps!r}")
        for index in self._id2sym.keys() & other._id2sym.keys():
            if self[index] != other[index]:
                raise ValueError(
                    f"SymbolTable: tables differ in id {index}: {self[index]!r} and {other[index]!r}"
                )
        for symbol in self._sym2id.keys() & other._sym2id.keys():
            if self[symbol] != other[symbol]:
                raise ValueError(
                    f"SymbolTable: tables differ in {symbol!r}: {self[symbol]} and {other[symbol]}"
                )
        return SymbolTable({**self._id2sym, **other._id2sym}, {**self._sym2id, **other._sym2id}, eps=self.eps)

    def __contains__(self, item: Any) -> bool:
        return item in (self._id2sym if isinstance(item, int) else self._sym2id)

    def __len__(self) -> int:
        return len(self._id2sym)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, SymbolTable) and self._sym2id == other._sym2id

    __hash__ = None  # type: ignore[assignment]  # as of all mutable classes

    @property
    def ids(self) -> list[int]:
        return sorted(self._id2sym)

    @property
    def symbols(self) -> list:
        return sorted(self._sym2id)


def num_tokens(token_table: SymbolTable, disambig_pattern: re.Pattern[str] = DISAMBIGUATION) -> int:
    """Counts the symbols of the table without id 0 and without disambiguation symbols (#0, #1, ...)."""
    return sum(
        1 for symbol in token_table.symbols if not disambig_pattern.match(symbol) and token_table[symbol] != 0
    )


def token_ids_to_text(token_ids: Iterable[int], token_table: SymbolTable) -> str:
    """Returns the text of tokens. "▁" is a space, "<0xE2>" one byte of UTF-8, and the characters of a byte-level table
    are bytes (``byte_tokens.py``); invalid bytes become U+FFFD.

    Raises ValueError for an id that is not in the table.
    """
    text, alphabet = b"", _byte_alphabet(token_table)
    for index in token_ids:
        if index not in token_table:
            raise ValueError(
                f"token_ids_to_text: id {index} is not in the table of {len(token_table)} symbols"
            )
        token = token_table[index]
        byte = _BYTE.match(token)
        if byte:
            text += bytes([int(byte[1], 16)])
        elif alphabet and not byte_tokens.is_special(token):
            text += bytes(alphabet[c] for c in token)
        else:
            text += token.encode()
    found = text.decode(errors="replace")
    return (found if alphabet else found.replace("▁", " ")).strip()


def _byte_alphabet(table: SymbolTable) -> dict[str, int] | None:
    """Returns the alphabet of a byte-level table, or None, and keeps it with the table until it grows."""
    kept = getattr(table, "_byte_alphabet", None)
    if kept is None or kept[0] != len(table):
        symbols = [symbol for symbol in table.symbols if isinstance(symbol, str)]
        text = len(symbols) < len(table) or any(map(_BYTE.match, symbols))
        kept = table._byte_alphabet = len(table), None if text else byte_tokens.alphabet_of(symbols)
    return kept[1]
