# SPDX-License-Identifier: Apache-2.0
"""Text of the tokens of byte-level BPE: tables of Hugging Face's tokenizers and of icefall's recipes are recognised by
what they hold, and others are not taken for such."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastasr.asr.recogniser import SymbolTable, byte_tokens, token_ids_to_text

TEXTS = [
    "the cat sat on the mat and the dog ran",
    "les élèves étaient très contents de l'été",
    "žena i čovjek su došli kući, šuma je zelena",
    "你好世界 我们 今天 学习 你好 世界",
    "こんにちは 世界 カタカナ ひらがな",
    "Привет мир, как дела сегодня",
    "مرحبا بالعالم كيف حالك اليوم",
    "naïve café 😀 😀 emoji",
]
# the characters of icefall's 256 bytes, from its icefall/byte_utils.py
PRINTABLE = [(256, 287), (32, 126), (288, 305), (308, 318), (321, 328), (330, 382), (384, 422)]


def table_of(symbols):
    return SymbolTable.from_str("".join(f"{s} {i}\n" for i, s in enumerate(["<blk>", *symbols])))


def hugging_face(texts):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<blk>", "<|endoftext|>"]
    made.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=400, show_progress=False, special_tokens=special, initial_alphabet=alphabet
        ),
    )
    table = SymbolTable.from_str("".join(f"{s} {i}\n" for s, i in made.get_vocab().items()))
    return made, table


def sentencepieces(texts, size, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        model_type="bpe",
        vocab_size=size,
        user_defined_symbols=["<blk>", "<sos/eos>"],
        unk_id=2,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
        **options,
    )
    made = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    symbols = (made.id_to_piece(i) for i in range(made.get_piece_size()))
    return made, SymbolTable.from_str("".join(f"{s} {i}\n" for i, s in enumerate(symbols)))


def as_icefall(text):
    characters = [chr(c) for first, last in PRINTABLE for c in range(first, last + 1)]
    return "".join(characters[b] for b in text.encode())


def test_the_alphabets():
    tokenizers = pytest.importorskip("tokenizers")
    assert set(byte_tokens.GPT2) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_tokens.GPT2.values()) == list(range(256))
    assert as_icefall("好") == "".join(
        c for b in "好".encode() for c, v in byte_tokens.ICEFALL.items() if v == b
    )
    assert len(byte_tokens.ICEFALL) == 257
    assert all(as_icefall(chr(b)) == c for c, b in byte_tokens.ICEFALL.items() if b < 128 and c != "▁")


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[3:4]], ids=["all", "English", "Chinese"])
def test_hugging_faces(texts):
    made, table = hugging_face(texts)
    for text in texts:
        ids = made.encode(text).ids
        assert token_ids_to_text(ids, table) == made.decode(ids).strip() == text
    assert token_ids_to_text([table["å"]], table) == "\ufffd"  # the first byte of 好
    assert token_ids_to_text([table["<|endoftext|>"]], table) == "<|endoftext|>"


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[3:4], TEXTS[5:6]], ids=["all", "Chinese", "Russian"])
def test_icefalls(texts):
    made, table = sentencepieces([as_icefall(text) for text in texts], 300)
    for text in texts:
        ids = made.encode(as_icefall(text))
        assert token_ids_to_text(ids, table) == text


@pytest.mark.parametrize("fallback", [False, True], ids=["pieces", "byte fallback"])
@pytest.mark.parametrize("texts", [TEXTS, *([text] for text in TEXTS)], ids=lambda texts: texts[-1][:5])
def test_sentencepieces_of_text(texts, fallback):
    made, table = sentencepieces(texts, 400 if fallback else 120, byte_fallback=fallback)
    for text in [*texts, *(["好 ok"] if fallback else [])]:
        ids = made.encode(text)
        assert token_ids_to_text(ids, table) == made.decode(ids)


@pytest.mark.parametrize(
    "symbols",
    [
        sorted(set("".join(TEXTS)) - {" "}),
        ["▁", *sorted(set(TEXTS[2]) - {" "})],
        [word for text in TEXTS for word in text.split()],
        ["Ġimgħa", "Ġurnata", "żgħir", "ħobż", "ċavetta", "ġenna"],
        ["▁" + word for word in TEXTS[2].split()],
        ["š", "ž", "▁š", "že", "▁na"],
        [],
    ],
    ids=["characters", "Croatian characters", "words", "Maltese", "Croatian words", "few", "none"],
)
def test_tables_of_text(symbols):
    symbols = list(dict.fromkeys(symbols))
    table = table_of(symbols)
    for symbol in symbols:
        assert token_ids_to_text([table[symbol]], table) == symbol.replace("▁", " ").strip()


def test_a_table_that_grows():
    table = table_of(["Ġthe", "a"])
    assert token_ids_to_text([1, 2], table) == "thea"
    table.add("好")
    assert token_ids_to_text([1, 2], table) == "Ġthea"


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Z"]), min_size=1, max_size=20))
def test_any_text_in_bytes(text):
    back = {b: c for c, b in byte_tokens.GPT2.items()}
    written = "".join(back[b] for b in text.encode())
    table = table_of([*dict.fromkeys(written), *("Ġ" + c for c in "abcdefghijkl")])
    assert token_ids_to_text([table[c] for c in written], table) == text.strip()
