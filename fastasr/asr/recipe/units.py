# SPDX-License-Identifier: Apache-2.0
"""Splits texts into tokens: characters, or pieces of words that sentencepiece learns. Id 0 is blank."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

from fastasr.asr.recogniser.symbol_table import SymbolTable, token_ids_to_text

BLANK = "<blk>"
SPACE = "▁"


class Units:
    """A token table with its tokeniser. ``model``: sentencepiece's model in bytes, or None for characters."""

    def __init__(self, table: SymbolTable, model: bytes | None = None) -> None:
        self.table = table
        self.model = model
        self._pieces = None if model is None else _processor(model)

    @staticmethod
    def learn(kind: str, texts: Sequence[str]) -> "Units":
        """Learns units from texts. ``kind`` is "char", or "bpe:N" for N tokens."""
        if kind == "char":
            symbols = [BLANK, SPACE, *sorted(set("".join(texts)) - {" "})]
            return Units(SymbolTable.from_str("".join(f"{s} {i}\n" for i, s in enumerate(symbols))))
        name, _, size = kind.partition(":")
        if name != "bpe" or not size.isdigit():
            raise ValueError(f'units must be "char" or "bpe:N", got {kind!r}')
        import sentencepiece

        file = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=file,
                model_type="bpe",
                vocab_size=int(size),
                unk_id=0,
                unk_piece=BLANK,
                bos_id=-1,
                eos_id=-1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(f"sentencepiece cannot make {size} tokens of these texts: {error}") from None
        pieces = _processor(file.getvalue())
        lines = (f"{pieces.id_to_piece(i)} {i}\n" for i in range(pieces.get_piece_size()))
        return Units(SymbolTable.from_str("".join(lines)), file.getvalue())

    def __len__(self) -> int:
        return len(self.table)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text. Raises ValueError for an empty text and a character outside the table."""
        if not text.strip():
            raise ValueError("the transcript is empty")
        if self._pieces is not None:
            tokens = self._pieces.encode(text)
            if 0 in tokens:
                raise ValueError(f"a character of {text!r} is outside the token table")
            return tokens
        tokens = []
        for character in text.replace(" ", SPACE):
            if character not in self.table:
                raise ValueError(f"the character {character!r} of {text!r} is outside the token table")
            tokens.append(self.table[character])
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return token_ids_to_text(tokens, self.table)

    def state_dict(self) -> dict[str, Any]:
        return {"table": self.table.to_str(), "model": self.model}

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> "Units":
        return Units(SymbolTable.from_str(state["table"]), state["model"])


def _processor(model: bytes | None) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)
