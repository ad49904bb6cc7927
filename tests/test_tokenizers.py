"""Tokenizers, built in and from libraries: round trips, special tokens, refusals, and a state that rebuilds them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref.errors import DataError
from oxidizr_ref.tokenizer_libraries import SPLINTR_NAMES, JsonTokenizer, SplintrTokenizer
from oxidizr_ref.tokenizers import (
    SPECIAL_TOKENS,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
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


@pytest.mark.parametrize("vocabulary", [None, 5, "ab", [1, 2], [["a"]], {"a": 0}])
def test_a_state_whose_vocabulary_is_no_list_of_texts_is_refused(vocabulary: object) -> None:
    with pytest.raises(DataError, match="a char vocabulary is sorted characters"):
        tokenizer_from_state({**CharTokenizer.from_text("ab").state(), "vocabulary": vocabulary})


def test_get_tokenizer_knows_the_built_in_names_and_lists_them_for_others() -> None:
    assert isinstance(get_tokenizer("byte", None), ByteTokenizer)
    assert isinstance(get_tokenizer("char", "abc"), CharTokenizer)
    with pytest.raises(
        DataError, match=r"^no tokenizer 'gpt5' \(data.tokenizer\); there are byte, char, cl100k_base, .*json$"
    ):
        get_tokenizer("gpt5", "abc")
    with pytest.raises(DataError, match="non-empty text"):
        get_tokenizer("char", None)


# ------------------------------------------------------------------------------------------------- those of libraries


def tokenizer_json(pieces: list[str] | None = None) -> str:
    """A tokenizer.json: byte-level, of 300 ids, trained on a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=pieces or [*SPECIAL_TOKENS], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["the cat and the hat and the bat sat on the mat"] * 3, trainer)
    return str(core.to_str())


@cache
def library_tokenizer(name: str) -> SplintrTokenizer | JsonTokenizer:
    if name == "tokenizer.json":
        return JsonTokenizer(tokenizer_json())
    pytest.importorskip("splintr")
    return SplintrTokenizer(name)


of_libraries = pytest.mark.parametrize("name", [*SPLINTR_NAMES, "tokenizer.json"])
#: Id of the end of a text, ids there are, an id that stands for nothing: as published, or as splintr has it.
KNOWN = {
    "cl100k_base": (100257, 100_331, 100256),
    "o200k_base": (199999, 200_073, 199998),
    "llama3": (128001, 128_354, 128011),
    "deepseek_v3": (1, 128_954, 128000),
}


@of_libraries
@given(st.data())
def test_decode_undoes_encode_and_a_batch_is_its_texts_one_by_one(name: str, data: st.DataObject) -> None:
    tokenizer = library_tokenizer(name)
    of_this_one = st.sampled_from(list(tokenizer.special_tokens))
    texts = data.draw(st.lists(st.lists(TEXTS | of_this_one).map("".join), max_size=4))
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids.dtype == np.uint32
        assert tokenizer.decode(ids) == text
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@of_libraries
def test_every_special_token_is_one_id_wherever_it_stands(name: str) -> None:
    tokenizer = library_tokenizer(name)
    assert set(SPECIAL_TOKENS[1:]) <= set(tokenizer.special_tokens)
    for token, token_id in tokenizer.special_tokens.items():
        assert tokenizer.encode(f"é{token}é").tolist().count(token_id) == 1
        assert tokenizer.encode(token).tolist() == [token_id]
        assert tokenizer.decode([token_id]) == token


@pytest.mark.parametrize("name", SPLINTR_NAMES)
def test_the_four_known_vocabularies_have_their_size_and_their_end_of_text(name: str) -> None:
    tokenizer = library_tokenizer(name)
    end, size, gap = KNOWN[name]
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (end, size)
    assert max(tokenizer.special_tokens.values()) == size - 1
    assert tokenizer.decode([gap]) == "\ufffd"


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", None])
def test_a_tokenizer_json_has_the_end_of_text_of_its_own(end: str | None) -> None:
    tokenizer = JsonTokenizer(tokenizer_json(["<pad>", *([end] if end else [])]))
    assert tokenizer.end_of_text == (None if end is None else tokenizer.special_tokens[end])
    text = f"the{end}hat"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@of_libraries
def test_one_that_a_library_made_is_rebuilt_from_its_state_through_json(name: str) -> None:
    tokenizer = library_tokenizer(name)
    state = json.loads(json.dumps(tokenizer.state()))
    rebuilt = tokenizer_from_state(state)
    assert type(rebuilt) is type(tokenizer) and rebuilt.state() == state
    np.testing.assert_array_equal(rebuilt.encode("the hat<|user|>"), tokenizer.encode("the hat<|user|>"))
    with pytest.raises(DataError, match=f"the stored {name} tokenizer does not match its digest"):
        tokenizer_from_state({**state, "digest": "0"})


@of_libraries
def test_what_they_cannot_do_is_refused_as_the_built_in_ones_refuse_it(name: str) -> None:
    tokenizer = library_tokenizer(name)
    with pytest.raises(DataError, match=r"^half a surrogate pair at position 1 of the text"):
        tokenizer.encode("a\ud800")
    with pytest.raises(DataError, match=rf"^token id {tokenizer.vocab_size} at position 1 is not an id of the {name} "):
        tokenizer.decode([0, tokenizer.vocab_size])
    assert tokenizer.encode("").shape == (0,) and tokenizer.encode_batch([]) == [] and tokenizer.decode([]) == ""


def test_a_tokenizer_json_is_read_from_its_path_and_neither_cuts_nor_adds(tmp_path: Path) -> None:
    described = json.loads(tokenizer_json())
    described["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(described))
    assert get_tokenizer(str(path), None).encode("the cat and the hat").size > 2
    path.write_text("{}")
    for where, message in [
        (path, "is no tokenizer.json"),
        (tmp_path / "no.json", "no such"),
        (tmp_path / "..json", "no such"),
    ]:
        with pytest.raises(DataError, match=f"{where.name}: {message}"):
            get_tokenizer(str(where), None)


@pytest.mark.parametrize(
    ("library", "make"),
    [("splintr", lambda: get_tokenizer("llama3", None)), ("tokenizers", lambda: JsonTokenizer("{}"))],
)
def test_a_library_that_is_missing_is_named_with_the_way_to_install_it(
    library: str, make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=r'pip install "oxidizr-ref\[tokenizers\]"$'):
        make()


@of_libraries
@given(
    st.lists(
        st.sampled_from(["x", " ", "\n", "\n\n", "don't", " 12345", "é", "字", ".", "!?", "//", "<|user|>", "\t", "\r\n"])
    )
)
def test_a_text_may_be_cut_behind_a_line_end_that_stands_between_two_signs(name: str, parts: list[str]) -> None:
    """What `prepare` relies on: vocabularies cut there as well, so the pieces have the tokens of the whole."""
    tokenizer, text = library_tokenizer(name), "".join(parts) + "a\nb" + "".join(reversed(parts))
    ends = [i for i in range(2, len(text)) if text[i - 1] == "\n" and text[i] != "/"]
    places = [i for i in ends if not text[i - 2].isspace() and not text[i].isspace()]
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    np.testing.assert_array_equal(np.concatenate(tokenizer.encode_batch(pieces)), tokenizer.encode(text))
