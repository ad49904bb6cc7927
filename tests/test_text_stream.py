"""Text in pieces: together what decoding all tokens gives, each character whole, and nothing beyond a stop text."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref.text_stream import TextStream
from oxidizr_ref.tokenizers import ByteTokenizer, CharTokenizer, get_tokenizer

BYTE = ByteTokenizer()
#: Broken bytes, beginnings of characters, whole ones.
octets = st.lists(
    st.sampled_from([b"\x80", b"\xff", b"\xe6\x97", b"\xf0\x9f\xa6", "é".encode(), "🦀".encode(), b"a"]), max_size=9
)
known = cache(lambda name: get_tokenizer(name, None))


@cache
def llama3_bytes() -> list[int]:
    """The token of each byte: the first 256 are these, in the order of the printable ones first."""
    tokens = {known("llama3")._octets(token): token for token in range(256)}
    return [tokens[bytes([octet])] for octet in range(256)]


@given(st.text(max_size=20), st.text(max_size=10))
def test_the_pieces_of_a_text_are_the_text_and_no_piece_has_half_a_character(text: str, prompt: str) -> None:
    tokens, before = BYTE.encode(text).tolist(), BYTE.encode(prompt).tolist()
    stream = TextStream(BYTE, prompt=before)
    pieces = [stream.push(token) for token in tokens]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) or "\N{REPLACEMENT CHARACTER}" in text
    assert "".join(pieces) + stream.close() == text == stream.text


@pytest.mark.parametrize("name", ["byte", "llama3"])
@given(parts=octets)
def test_bytes_that_are_no_text_come_out_as_decoding_all_of_them_says(name: str, parts: list[bytes]) -> None:
    """Characters behind broken bytes, too: a run of those must not swallow the beginning of one."""
    tokenizer = known(name)
    of_byte = [*range(256)] if name == "byte" else llama3_bytes()
    tokens = [of_byte[octet] for part in parts for octet in part]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in tokens) + stream.close() == tokenizer.decode(tokens)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=2))
def test_a_stop_text_and_what_follows_are_left_out_whatever_the_tokens_cut(text: str, stops: list[str]) -> None:
    tokenizer = CharTokenizer.from_text("ab")
    stream = TextStream(tokenizer, stops)
    given_out = ""
    for token in tokenizer.encode(text).tolist():
        given_out += stream.push(token)
    given_out += stream.close()
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    assert stream.stopped == bool(places)
    # Which stop is met first is decided when its last character comes.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first = min(ends)[0] if ends else len(text)
    met = [begin for end, begin in ends if end == first]
    assert given_out == text[: min(met)] if met else given_out == text


@pytest.mark.parametrize("name", ["cl100k_base", "llama3"])
def test_tokens_that_cut_characters_wait_for_the_rest(name: str) -> None:
    tokenizer = get_tokenizer(name, None)
    text = "naïve 🦀🦀 日本語 text"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text).tolist()]
    assert "".join(pieces) + stream.close() == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
