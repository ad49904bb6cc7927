"""The byte and char tokenizers: round trips, special tokens, refusals, and a state that rebuilds them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref.errors import DataError
from oxidizr_ref.tokenizers import (
    SPECIAL_TOKENS,
    ByteTokenizer,
    CharTokenizer,
    get_tokenizer,
    tokenizer_from_state,
)

# All of Unicode but lone surrogates, which are no text, mixed with whole and broken special tokens.
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TEXTS = st.lists(UNICODE | st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "<|user|", "<<|user|>>"])).map("".join)


@given(TEXTS)
def test_byte_decode_undoes_encode_for_any_text(text: str) -> None:
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.uint32
    assert ids.flags.c_contiguous
    assert ByteTokenizer().decode(ids) == text


@given(TEXTS.filter(bool))
def test_char_decode_undoes_encode_for_any_text(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert ids.flags.c_contiguous
    assert int(ids.max()) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text


def test_byte_ids_are_utf8_bytes_and_special_tokens_follow_in_their_order() -> None:
    assert ByteTokenizer.vocab_size == 260
    assert ByteTokenizer().encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert ByteTokenizer().encode("".join(SPECIAL_TOKENS)).tolist() == [256, 257, 258, 259]
    assert ByteTokenizer().encode("é<|user|>é").tolist() == [0xC3, 0xA9, 257, 0xC3, 0xA9]
    assert ByteTokenizer().encode("<|user|").tolist() == list(b"<|user|")
    assert ByteTokenizer().encode("").shape == (0,)


def test_char_ids_follow_code_points_then_the_special_tokens_that_occur() -> None:
    tokenizer = CharTokenizer.from_text("ba\U0001f600é<|assistant|>a")
    specials = set("<|assistant|>")
    assert tokenizer.vocabulary == (*sorted({"a", "b", "é", "\U0001f600"} | specials), "<|assistant|>")
    assert tokenizer.encode("<|assistant|>").tolist() == [tokenizer.vocab_size - 1]
    assert CharTokenizer.from_text("hello").vocabulary == ("e", "h", "l", "o")


def test_char_vocabulary_does_not_depend_on_the_order_of_the_text() -> None:
    assert CharTokenizer.from_text("abcé").state() == CharTokenizer.from_text("éccba").state()


def test_decode_replaces_bytes_that_are_no_utf8() -> None:
    assert ByteTokenizer().decode([0xC3, 256, 97, 0xFF]) == "\ufffd<|endoftext|>a\ufffd"
    assert ByteTokenizer().decode([]) == ""


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer.from_text("abc")], ids=["byte", "char"])
@pytest.mark.parametrize("outside", [-1, 260, 2**40])
def test_decode_refuses_an_id_outside_and_names_it(tokenizer: ByteTokenizer | CharTokenizer, outside: int) -> None:
    with pytest.raises(DataError, match=rf"^token id {outside} at position 2 is not an id of the {tokenizer.name} "):
        tokenizer.decode([0, 1, outside])


def test_char_encode_names_the_first_unknown_character_and_its_position() -> None:
    tokenizer = CharTokenizer.from_text("abc")
    message = r"^'é' \(U\+00E9\) at position 2 of the text is not in the char vocabulary; leave it out"
    with pytest.raises(DataError, match=message):
        tokenizer.encode("abé?")
    for text in ("`", "d", "\U0010ffff"):  # below, above and far above the known code points
        with pytest.raises(DataError, match="position 0"):
            tokenizer.encode(text)


def test_byte_encode_refuses_half_a_surrogate_pair() -> None:
    with pytest.raises(DataError, match=r"^half a surrogate pair at position 1 of the text"):
        ByteTokenizer().encode("a\ud800")


@given(TEXTS.filter(bool))
def test_a_tokenizer_is_rebuilt_from_its_state_through_json(text: str) -> None:
    for tokenizer in (ByteTokenizer(), CharTokenizer.from_text(text)):
        state = tokenizer.state()
        rebuilt = tokenizer_from_state(json.loads(json.dumps(state)))
        assert type(rebuilt) is type(tokenizer)
        assert rebuilt.state() == state
        assert rebuilt.vocab_size == tokenizer.vocab_size
        np.testing.assert_array_equal(rebuilt.encode(text), tokenizer.encode(text))


def test_the_digest_tells_vocabularies_apart() -> None:
    texts = ["a", "b", "ab", "<|user|>", "<|user>|"]
    digests = {CharTokenizer.from_text(text).state()["digest"] for text in texts}
    assert len(digests | {ByteTokenizer().state()["digest"]}) == len(texts) + 1


def test_a_state_that_does_not_match_its_digest_is_refused() -> None:
    state = CharTokenizer.from_text("abc").state()
    with pytest.raises(DataError, match="stored char tokenizer does not match its digest"):
        tokenizer_from_state({**state, "vocabulary": ["a", "b", "d"]})
    with pytest.raises(DataError, match="stored byte tokenizer does not match its digest"):
        tokenizer_from_state({"name": "byte", "digest": "0"})


@pytest.mark.parametrize("vocabulary", [[], ["b", "a"], ["a", "a"], ["<|user|>"], ["<|user|>", "a"], ["a", "no"]])
def test_a_char_vocabulary_out_of_order_or_without_characters_is_refused(vocabulary: list[str]) -> None:
    with pytest.raises(DataError, match="a char vocabulary is sorted characters, then special tokens"):
        CharTokenizer(vocabulary)


def test_get_tokenizer_knows_the_built_in_names_and_lists_them_for_others() -> None:
    assert isinstance(get_tokenizer("byte", None), ByteTokenizer)
    assert isinstance(get_tokenizer("char", "abc"), CharTokenizer)
    with pytest.raises(DataError, match=r"^no tokenizer 'cl100k_base' \(data.tokenizer\); built in are byte and char"):
        get_tokenizer("cl100k_base", "abc")
    with pytest.raises(DataError, match="non-empty text"):
        get_tokenizer("char", None)
