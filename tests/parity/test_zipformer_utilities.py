# SPDX-License-Identifier: Apache-2.0
"""Tokens, padding and streaming states against ``zipformer.utils``."""

import pytest
import torch

pytest.importorskip("zipformer", reason="upstream's package is not installed")

import tiny_asr
from hypothesis import given, settings
from hypothesis import strategies as st
from zipformer import utils as theirs

from fastasr.asr import recogniser
from fastasr.models import zipformer as ours
from fastasr.models.common.sequences import pad_sequences

TABLE = "<blk> 0\na 3\n▁b 1\n<0xE2> 5\n<0x82> 6\n<0xAC> 7\n#0 8\n#1 9\n"


def test_symbol_table(tmp_path):
    our_table, their_table = (utils.SymbolTable.from_str(TABLE) for utils in (recogniser, theirs))
    for table in (our_table, their_table):
        assert table.add("new") == 10
        assert table.add("new") == 10
        assert table.add("at", 4) == 4
        with pytest.raises(ValueError, match=r"'?4'?"):
            table.add("other", 4)
        table.to_file(tmp_path / type(table).__module__)
    ours_file, theirs_file = (tmp_path / type(t).__module__ for t in (our_table, their_table))
    assert ours_file.read_text() == theirs_file.read_text() == our_table.to_str() == their_table.to_str()
    assert recogniser.SymbolTable.from_file(ours_file) == our_table
    assert our_table.ids == their_table.ids
    assert our_table.symbols == their_table.symbols
    assert len(our_table) == len(their_table)
    assert our_table[3] == their_table[3] == "a"
    assert our_table["a"] == their_table.get("a") == 3
    assert "a" in our_table
    assert 99 not in our_table
    assert recogniser.num_tokens(our_table) == theirs.num_tokens(their_table)
    other = (recogniser.SymbolTable.from_str("<blk> 0\nz 20"), theirs.SymbolTable.from_str("<blk> 0\nz 20"))
    assert our_table.merge(other[0]).to_str() == their_table.merge(other[1]).to_str()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 2", "line 1"),
        ("a 0\nb", "line 2"),
        ("a 0\na 1", "repeats"),
        ("a 0\nb 0", "repeats"),
        ("a x", "line 1"),
    ],
)
def test_a_damaged_table(text, message):
    with pytest.raises(ValueError, match=message):
        recogniser.SymbolTable.from_str(text)


def test_tables_that_disagree():
    table = recogniser.SymbolTable.from_str("<blk> 0\na 1")
    for text, message in (("<eps> 0", "eps"), ("<blk> 0\nb 1", "id 1"), ("<blk> 0\na 2", "'a'")):
        with pytest.raises(ValueError, match=message):
            table.merge(recogniser.SymbolTable.from_str(text))


def test_text_of_tokens():
    our_table, their_table = (utils.SymbolTable.from_str(TABLE) for utils in (recogniser, theirs))
    tokens = [3, 1, 3, 5, 6, 7]
    assert (
        recogniser.token_ids_to_text(tokens, our_table)
        == theirs.token_ids_to_text(tokens, their_table)
        == "a ba€"
    )
    assert recogniser.token_ids_to_text([3, 5], our_table) == "a\ufffd"  # upstream raises UnicodeDecodeError
    with pytest.raises(ValueError, match="id 77 is not in the table"):
        recogniser.token_ids_to_text([77], our_table)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=4),
    st.none() | st.just(7),
    st.none() | st.just(8),
)
def test_pad_sequences(sequences, sos, eos):
    for value, expected in zip(
        pad_sequences(sequences, -1, sos, eos), theirs.pad_sequences(sequences, -1, sos, eos), strict=True
    ):
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def test_states_are_stacked_and_unstacked():
    from zipformer.modules.model import StreamingEncoderWrapper

    model = recogniser.AsrModel(**tiny_asr.STREAMING)
    states = []
    for _ in range(3):
        made = StreamingEncoderWrapper(model.encoder, model.encoder_embed).get_init_states()
        states.append([torch.randn(s.shape).to(s.dtype) for s in made])
    stacked, expected = ours.stack_states(states), theirs.stack_states(states)
    assert all(torch.equal(a, b) for a, b in zip(stacked, expected, strict=True))
    for one, two, first in zip(
        ours.unstack_states(stacked), theirs.unstack_states(stacked), states, strict=True
    ):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, first, strict=True))
    with pytest.raises(ValueError, match="6 states per layer"):
        ours.stack_states([states[0][1:]])
    with pytest.raises(ValueError, match="of one model"):
        ours.stack_states([states[0], states[1][6:]])


def test_is_module_available():
    for names in (("torch", "math"), ("torch", "no_such_module_at_all")):
        assert ours.is_module_available(*names) == theirs.is_module_available(*names)
