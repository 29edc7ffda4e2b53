"""The joined pieces equal the decode of all ids at once, for every kind of decoder and every cut."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.text.detokenizer import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    MetaspaceDetokenizer,
    WindowDetokenizer,
    detokenizer_factory,
)
from tests.server.text import tokenizers as kinds

EXACT: dict[str, tuple[Tokenizer, type]] = {
    "byte_level": (kinds.byte_level(), ByteLevelDetokenizer),
    "byte_fallback": (kinds.byte_fallback(), ByteFallbackDetokenizer),
    "byte_fallback_no_strip": (kinds.byte_fallback(strip=False), ByteFallbackDetokenizer),
    "metaspace": (kinds.metaspace(), MetaspaceDetokenizer),
    "metaspace_first": (kinds.metaspace("first"), MetaspaceDetokenizer),
    "metaspace_never": (kinds.metaspace("never"), MetaspaceDetokenizer),
}
FACTORIES = {
    name: detokenizer_factory(tokenizer, kinds.decoder_of(tokenizer)) for name, (tokenizer, _) in EXACT.items()
}


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def pieces_of(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """ids cut into runs of the lengths in `cuts`, repeated."""
    pieces: list[list[int]] = []
    position = turn = 0
    while position < len(ids):
        length = cuts[turn % len(cuts)]
        pieces.append(ids[position : position + length])
        position += length
        turn += 1
    return pieces


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data(), skip=st.booleans(), cuts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_pieces_join_to_the_whole(name: str, data: st.DataObject, skip: bool, cuts: list[int]) -> None:
    tokenizer, kind = EXACT[name]
    size = tokenizer.get_vocab_size()
    # Two ids beyond the vocabulary: a model's padded rows. They add nothing.
    ids = data.draw(st.lists(st.integers(0, size + 1), max_size=30))
    detokenizer = FACTORIES[name](skip, False)
    assert isinstance(detokenizer, kind)
    text = "".join(map(detokenizer.push, pieces_of(ids, cuts))) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=40), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_real_text_comes_back(text: str, cuts: list[int]) -> None:
    tokenizer = EXACT["byte_level"][0]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = FACTORIES["byte_level"](False, False)
    joined = "".join(map(detokenizer.push, pieces_of(ids, cuts))) + detokenizer.flush()
    assert joined == tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_cut_character_waits_for_its_rest_only() -> None:
    tokenizer = EXACT["byte_level"][0]
    ids = tokenizer.encode("a🙈b", add_special_tokens=False).ids
    detokenizer = FACTORIES["byte_level"](True, False)
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(pieces) == "a🙈b"
    assert pieces[0] == "a"
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_bad_byte_spoils_its_run_of_byte_tokens_as_in_the_library() -> None:
    tokenizer = EXACT["byte_fallback"][0]
    ids = [id_of(tokenizer, token) for token in ("<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "a")]
    detokenizer = FACTORIES["byte_fallback"](True, False)
    assert [detokenizer.push([token_id]) for token_id in ids] == ["", "", "", "", "\ufffd\ufffd\ufffd\ufffda"]
    assert tokenizer.decode(ids) == "\ufffd\ufffd\ufffd\ufffda"


@pytest.mark.parametrize("name", ["byte_fallback", "metaspace"])
def test_a_leading_space_stays_when_text_precedes(name: str) -> None:
    tokenizer = EXACT[name][0]
    ids = [id_of(tokenizer, "▁hello"), id_of(tokenizer, "▁a")]
    alone, after = FACTORIES[name](True, False), FACTORIES[name](True, True)
    assert alone.push(ids) + alone.flush() == "hello a"
    assert after.push(ids) + after.flush() == " hello a"


@given(st.lists(st.integers(0, 8), max_size=20), st.booleans())
def test_decoders_of_unknown_kind_go_through_a_window(ids: list[int], skip: bool) -> None:
    tokenizer = kinds.word_piece()
    detokenizer = detokenizer_factory(tokenizer, kinds.decoder_of(tokenizer))(skip, False)
    assert isinstance(detokenizer, WindowDetokenizer)
    text = "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_tokenizer_without_decoder_works() -> None:
    tokenizer = kinds.word_piece()
    tokenizer.decoder = None
    detokenizer = detokenizer_factory(tokenizer, None)(True, False)
    assert detokenizer.push([2]) + detokenizer.push([3]) + detokenizer.flush() == "the cat"


def test_what_is_kept_does_not_grow() -> None:
    rng = random.Random(3)
    tokenizer = EXACT["byte_level"][0]
    detokenizer = FACTORIES["byte_level"](False, False)
    assert isinstance(detokenizer, ByteLevelDetokenizer)
    for _ in range(2000):
        detokenizer.push([rng.randrange(tokenizer.get_vocab_size())])
        assert len(detokenizer._pending) <= 3
    window = detokenizer_factory(kinds.word_piece(), {"type": "WordPiece"})(True, False)
    assert isinstance(window, WindowDetokenizer)
    for _ in range(2000):
        window.push([rng.randrange(2, 9)])
        assert len(window._ids) <= 16
