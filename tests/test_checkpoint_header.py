"""The header: written in one way, read in that way only, refused at the very byte where it departs from it.

Each crafted header below is wrong in one thing only, and sealed with a right digest: nothing but its sense gives it away.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import handmade
import numpy as np
import pytest
import safetensors.numpy
from golden import write_format_v1

from oxidizr_ref.checkpoint import format
from oxidizr_ref.checkpoint import header as headers
from oxidizr_ref.errors import CheckpointError, DamagedError

SHA = handmade.digest(bytes(4))
DIGESTS = handmade.digests_of(x=bytes(4))
SEAL = f'"header_digest":"{handmade.ZEROS}"'
ENTRY = '{"data_offsets":[0,4],"dtype":"F32","shape":[1]}'
RIGHT = f'{{"__metadata__":{{"digests":"{DIGESTS}",{SEAL}}},"x":{ENTRY}}}'


def one(old: str, new: str) -> str:
    """The right header with one thing in it replaced."""
    assert RIGHT.count(old) == 1
    return RIGHT.replace(old, new)


def words(more: str) -> str:
    """The right header with more in its metadata, before its own keys."""
    return one('"digests":', f'{more},"digests":')


def several(*entries: tuple[str, int, int, str]) -> str:
    """A header of tensors (name, begin, end, dtype) of zeros, each with one axis, with right digests."""
    item_size = {"U8": 1, "F32": 4}
    digests = handmade.digests_of(**{name: bytes(end - begin) for name, begin, end, _ in entries})
    body = (
        f'"{name}":{{"data_offsets":[{begin},{end}],"dtype":"{dtype}","shape":[{(end - begin) // item_size[dtype]}]}}'
        for name, begin, end, dtype in entries
    )
    return f'{{"__metadata__":{{"digests":"{digests}",{SEAL}}},{",".join(body)}}}'


def write(path: Path, text: str, payload: bytes = bytes(4), pad: bool = True) -> Path:
    path.write_bytes(handmade.sealed(text.encode("utf-8", "surrogatepass"), payload, pad))
    return path


def test_the_header_that_the_crafted_ones_are_made_from_is_right(tmp_path: Path) -> None:
    path = write(tmp_path / "right.safetensors", RIGHT)
    assert format.load(path).tensors["x"].tolist() == [0.0]
    assert path.read_bytes() == write_format_v1.file_bytes({"x": np.zeros(1, np.float32)}, {})
    assert format.load(write(path, words('"a":"b"'))).metadata == {"a": "b"}
    assert format.load(write(path, several(("a", 0, 4, "F32"), ("b", 4, 5, "U8")), bytes(5))).tensors.keys() == {"a", "b"}


# --- headers that make no sense ---------------------------------------------------------------------------------------

_ENTRY = "data_offsets, dtype and shape of tensor x, and nothing else, expected"
_SHAPE = "tensor x: shape and offsets disagree"
_NO_ARRAY = "tensor x: no array has this shape"
_NAME = "a tensor's name (letters, digits, _ and -, in parts joined by dots) expected"
_ASCEND = "names must ascend, and none may appear twice"
_STRING = "a string that is not written the one way (ASCII, lower-case \\u escapes)"
_NO_DIGESTS = "the digests of the tensors are missing or malformed"
_OTHERS = "digests and tensors name different things"
_LAYOUT = "a hole, an overlap, or another order than by item size, then name"
_END = "the header must end here, padded with spaces to "

#: What is wrong, the header, the reason, and the text at whose last appearance reading stops (None: at the beginning).
CRAFTED: list[tuple[str, str, str, str | None]] = [
    # one entry
    ("a shape of more bytes", one("[1]", "[2]"), _SHAPE, '{"data_'),
    ("a shape of fewer bytes", one("[1]", "[0]"), _SHAPE, '{"data_'),
    ("offsets that go back", one("[0,4]", "[4,0]"), _SHAPE, '{"data_'),
    ("a negative length", one("[1]", "[-1]"), _ENTRY, '{"data_'),
    ("a boolean length", one("[1]", "[true]"), _ENTRY, '{"data_'),
    ("a length with a point", one("[1]", "[1.0]"), _ENTRY, '{"data_'),
    ("a length with an exponent", one("[1]", "[1e0]"), _ENTRY, '{"data_'),
    ("a length that begins with 0", one("[1]", "[01]"), _ENTRY, '{"data_'),
    ("a length that begins with +", one("[1]", "[+1]"), _ENTRY, '{"data_'),
    ("a length that is text", one("[1]", '["1"]'), _ENTRY, '{"data_'),
    ("a length in Arabic digits", one("[1]", "[١]"), _ENTRY, '{"data_'),
    ("a length of 20 digits", one("[1]", "[10000000000000000000]"), _ENTRY, '{"data_'),
    ("a shape that is text", one("[1]", '"1"'), _ENTRY, '{"data_'),
    ("a shape that is null", one("[1]", "null"), _ENTRY, '{"data_'),
    ("a shape in a shape", one("[1]", "[[1]]"), _ENTRY, '{"data_'),
    ("a comma after a shape", one("[1]", "[1,]"), _ENTRY, '{"data_'),
    ("a comma before a shape", one("[1]", "[,1]"), _ENTRY, '{"data_'),
    ("no shape", one(',"shape":[1]', ""), _ENTRY, '{"data_'),
    ("101 axes", one("[1]", f"[{','.join('1' * 101)}]"), _ENTRY, '{"data_'),
    ("65 axes", one("[1]", f"[{','.join('1' * 65)}]"), _NO_ARRAY, '{"data_'),
    ("an absurd empty shape", one("[0,4]", "[0,0]").replace("[1]", f"[{2**61},0]"), _NO_ARRAY, '{"data_'),
    ("a product beyond 2**63", one("[1]", f"[{2**40},{2**40}]"), _NO_ARRAY, '{"data_'),
    ("a dtype not every reader has", one("F32", "F8_E4M3"), _ENTRY, '{"data_'),
    ("a dtype that is never written", one("F32", "I32"), "tensor x has a dtype that is never written", '{"data_'),
    ("a dtype in small letters", one("F32", "f32"), _ENTRY, '{"data_'),
    ("a dtype that is a list", one('"F32"', '["F32"]'), _ENTRY, '{"data_'),
    ("one offset", one("[0,4]", "[4]"), _ENTRY, '{"data_'),
    ("three offsets", one("[0,4]", "[0,4,4]"), _ENTRY, '{"data_'),
    ("a negative offset", one("[0,4]", "[-4,0]"), _ENTRY, '{"data_'),
    ("an unknown field", one('"shape":[1]', '"shape":[1],"z":1'), _ENTRY, '{"data_'),
    ("a field given twice", one('"dtype":"F32"', '"dtype":"F32","dtype":"F32"'), _ENTRY, '{"data_'),
    ("fields in another order", one(ENTRY, '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'), _ENTRY, '{"dtype'),
    ("an escape in a field", one("dtype", "dt\\u0079pe"), _ENTRY, '{"data_'),
    ("a space in an entry", one("[0,4]", "[0, 4]"), _ENTRY, '{"data_'),
    ("a space after a name", one('"x":{', '"x": {'), _ENTRY, ' {"data_'),
    ("an entry that is a list", one(ENTRY, "[1]"), _ENTRY, "[1]"),
    ("an entry that is null", one(ENTRY, "null"), _ENTRY, "null"),
    ("an entry without anything", one(ENTRY, "{}"), _ENTRY, "{}}"),
    # entries together
    ("a hole before", several(("x", 4, 8, "F32")), f"x begins at byte 4 of the payload, not at 0: {_LAYOUT}", None),
    ("a hole between", several(("x", 0, 4, "F32"), ("y", 5, 9, "F32")), f"5 of the payload, not at 4: {_LAYOUT}", None),
    ("an overlap", several(("x", 0, 4, "F32"), ("y", 0, 4, "F32")), f"0 of the payload, not at 4: {_LAYOUT}", None),
    (
        "not by name",
        several(("x", 1, 2, "U8"), ("y", 0, 1, "U8")),
        f"x begins at byte 1 of the payload, not at 0: {_LAYOUT}",
        None,
    ),
    (
        "not by item size",
        several(("x", 0, 1, "U8"), ("y", 1, 5, "F32")),
        f"y begins at byte 1 of the payload, not at 0: {_LAYOUT}",
        None,
    ),
    ("digests, but no tensor", one(f',"x":{ENTRY}', ""), _OTHERS, None),
    ("a tensor without digest", one('"x":{', f'"w":{ENTRY},"x":{{'), _OTHERS, None),
    ("digests of another tensor", one('"x":{', '"y":{'), _OTHERS, None),
    ("a tensor named twice", one('"x":{', f'"x":{ENTRY},"x":{{'), f"x after x: {_ASCEND}", '"x":'),
    ("names that descend", several(("y", 0, 4, "F32"), ("x", 4, 8, "F32")), f"x after y: {_ASCEND}", '"x":'),
    ("a name after the metadata that belongs before", one('"x":{', '"Z":{'), f"Z after __metadata__: {_ASCEND}", '"Z":'),
    # names
    ("an empty name", one('"x":', '"":'), _NAME, '"":'),
    ("a dot first", one('"x":', '".x":'), _NAME, '".x"'),
    ("a dot last", one('"x":', '"x.":'), _NAME, '"x."'),
    ("a dot last after a part", one('"x":', '"x.y.":'), _NAME, '"x.y."'),
    ("two dots", one('"x":', '"x..y":'), _NAME, '"x..y"'),
    ("a space in a name", one('"x":', '"x y":'), _NAME, '"x y"'),
    ("a slash in a name", one('"x":', '"../x":'), _NAME, '"../x"'),
    ("a letter beyond ASCII", one('"x":', '"größe":'), _NAME, '"grö'),
    ("an escape in a name", one('"x":', '"\\u0078":'), _NAME, '"\\u0078'),
    ("a name of 257 characters", one('"x":', f'"{"x" * 257}":'), "a name of more than 256 characters", '"xx'),
    ("a name without quotes", one('"x":', "x:"), _NAME, "x:{"),
    ("a comma after the last entry", RIGHT[:-1] + ",}", _NAME, "}"),
    ("no metadata", f'{{"digests":{ENTRY}}}', "there is no __metadata__", None),
    # metadata
    ("a number for a string", words('"a":1'), "a string expected", '1,"digests'),
    ("an object for a string", words('"a":{}'), "a string expected", '{},"digests'),
    ("null for a string", words('"a":null'), "a string expected", 'null,"digests'),
    ("metadata that is a list", one('"__metadata__":{', '"__metadata__":[{'), "{ expected", '[{"digests'),
    ("metadata without a colon", words('"a" "b"'), ": expected", ' "b"'),
    ("metadata without a comma", one('","header', '""header'), "} expected", '"header'),
    ("a comma after the last string", one('0"},"x"', '0",},"x"'), "a string expected", '},"x"'),
    ("a comma before the first", one('{"digests', '{,"digests'), "a string expected", ',"digests'),
    ("a key twice", words('"a":"","a":""'), "metadata 'a' after 'a': keys must ascend", '"a":'),
    ("the empty key twice", words('"":"","":""'), "metadata '' after '': keys must ascend", '"":""'),
    ("keys that descend", words('"b":"","a":""'), "metadata 'a' after 'b': keys must ascend", '"a":'),
    ("keys in the order of UTF-16", words('"\\ud83e\\udd80":"","\\uffee":""'), "keys must ascend", '"\\uffee'),
    ("an escaped slash", words('"a":"\\/"'), _STRING, '"\\/"'),
    ("an escape that is not needed", words('"a":"\\u0041"'), _STRING, '"\\u0041'),
    ("a long escape for a short one", words('"a":"\\u000a"'), _STRING, '"\\u000a'),
    ("an escape in capitals", words('"a":"\\u00E9"'), _STRING, '"\\u00E9'),
    ("an escape that is none", words('"a":"\\x41"'), _STRING, '"\\x41'),
    ("half an escape", words('"a":"\\u00e"'), _STRING, '"\\u00e'),
    ("a letter that is not escaped", words('"a":"é"'), _STRING, '"é'),
    ("bytes that are no UTF-8", words('"a":"\ud800"'), _STRING, '"\ud800'),
    ("a raw line break", words('"a":"\n"'), _STRING, '"\n'),
    ("a raw NUL", words('"a":"\0"'), _STRING, '"\0'),
    ("a raw control character beyond ASCII", words('"a":"\x80"'), _STRING, '"\x80'),
    ("half a surrogate pair, the first", words('"a":"\\ud83e"'), _STRING, '"\\ud83e'),
    ("half a surrogate pair, the second", words('"a":"\\udd80"'), _STRING, '"\\udd80'),
    ("a surrogate pair the wrong way round", words('"a":"\\udd80\\ud83e"'), _STRING, '"\\udd80'),
    ("half a surrogate pair in a key", words('"\\ud83e":""'), _STRING, '"\\ud83e'),
    ("a string that never ends", one(f'{SEAL}}},"x":{ENTRY}}}', '"a\\"'), "a string expected", '"a\\"'),
    # digests
    ("no digests", one(f'"digests":"{DIGESTS}",', ""), _NO_DIGESTS, None),
    ("no digest of the header", one(f",{SEAL}", ""), "there is no header_digest", None),
    ("digests that are not JSON", one(DIGESTS, "{"), _NO_DIGESTS, None),
    ("digests that are a list", one(DIGESTS, "[]"), _NO_DIGESTS, None),
    ("digests that are empty text", one(DIGESTS, ""), _NO_DIGESTS, None),
    ("digests with a space", one(DIGESTS, DIGESTS.replace(":", ": ")), _NO_DIGESTS, None),
    ("digests with a comma after", one(DIGESTS, DIGESTS.replace("}", ",}")), _NO_DIGESTS, None),
    ("a digest of 63 digits", one(SHA, SHA[1:]), _NO_DIGESTS, None),
    ("a digest of 65 digits", one(SHA, SHA + "0"), _NO_DIGESTS, None),
    ("a digest in capitals", one(SHA, SHA.upper()), _NO_DIGESTS, None),
    ("a digest without quotes", one(f'\\"{SHA}\\"', SHA), _NO_DIGESTS, None),
    ("a digest in apostrophes", one(f'\\"{SHA}\\"', f"'{SHA}'"), _NO_DIGESTS, None),
    ("a digest given twice", one(DIGESTS, DIGESTS[:-1] + "," + DIGESTS[1:]), _NO_DIGESTS, None),
    ("digests of more than there is", one(DIGESTS, DIGESTS[:-1] + f',\\"y\\":\\"{SHA}\\"}}'), _OTHERS, None),
    ("a header digest of 63 digits", one(SEAL, SEAL.replace('0"', '"')), "the header's digest is malformed", None),
    ("a header digest in capitals", one(SEAL, SEAL.replace("0", "A")), "the header's digest is malformed", None),
    # beginning and end
    ("no header", "", "{ expected", None),
    ("a list", "[]", "{ expected", None),
    ("deep nesting", "[" * 100_000, "{ expected", None),
    ("a space first", " " + RIGHT, "{ expected", None),
    ("a byte order mark first", "\ufeff" + RIGHT, "{ expected", None),
    ("an open header", RIGHT[:-1], "} expected", ""),
    ("a header that is closed twice", RIGHT + "}", _END, "}"),
    ("two headers", RIGHT + RIGHT, _END, RIGHT),
    ("a line break after it", RIGHT + "\n", _END, "\n"),
    ("a space after the metadata", one('},"x"', '} ,"x"'), "} expected", ' ,"x"'),
    ("a space before the metadata", one('{"__metadata__"', '{ "__metadata__"'), _NAME, ' "__metadata__'),
]


@pytest.mark.parametrize(("text", "reason", "at"), [case[1:] for case in CRAFTED], ids=[case[0] for case in CRAFTED])
def test_a_header_that_makes_no_sense_is_refused_at_the_byte_where_it_departs_from_the_format(
    tmp_path: Path, text: str, reason: str, at: str | None
) -> None:
    path = write(tmp_path / "crafted.safetensors", text)
    offset = 0 if at is None else len(text[: text.rindex(at)].encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedError) as caught:
        format.load(path)
    where, _, why = str(caught.value).partition(": ")[2].partition(": ")
    assert (where, reason in why) == (f"damaged at or after byte {8 + offset}", True), caught.value


def test_no_two_crafted_headers_are_the_same() -> None:
    assert len({text for _, text, _, _ in CRAFTED}) == len({name for name, _, _, _ in CRAFTED}) == len(CRAFTED) > 100


@pytest.mark.parametrize("padding", ["", " " * 64, "\t", "\n", "\0"])
def test_a_header_is_padded_with_as_few_spaces_as_bring_the_payload_to_a_multiple_of_64(
    tmp_path: Path, padding: str
) -> None:
    missing = -(8 + len(RIGHT)) % 64
    assert missing > 1
    tail = {"": " " * (missing - 1), " " * 64: " " * (missing + 64)}.get(padding, padding * missing)
    path = write(tmp_path / "x", RIGHT + tail, pad=False)
    wanted = f"byte {8 + len(RIGHT)}: the header must end here, padded with spaces to {len(RIGHT) + missing} bytes"
    with pytest.raises(DamagedError, match=re.escape(wanted)):
        format.load(path)
    assert format.load(write(path, RIGHT + " " * missing, pad=False)).tensors["x"] == 0


def test_a_header_that_was_changed_without_its_digest_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x", words('"a":"b"'))
    path.write_bytes(path.read_bytes().replace(b'"a":"b"', b'"a":"c"'))
    with pytest.raises(DamagedError, match=r"byte 8: the header was changed \(its SHA-256 is not the stored one\)"):
        format.load(path)


def test_a_payload_of_another_size_than_the_header_says_is_refused_at_the_byte_where_one_of_them_ends(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "x", RIGHT, bytes(3))
    start = path.stat().st_size - 3
    with pytest.raises(DamagedError, match=f"byte {start + 3}: the payload has 3 bytes, not 4"):
        format.load(path)
    with pytest.raises(DamagedError, match=f"byte {start + 4}: the payload has 5 bytes, not 4"):
        format.load(write(path, RIGHT, bytes(5)))
    exabytes = one("[1]", f"[{2**60}]").replace("[0,4]", f"[0,{2**62}]")
    with pytest.raises(DamagedError, match=f": the payload has 4 bytes, not {2**62}"):
        format.load(write(path, exabytes))


# --- limits -----------------------------------------------------------------------------------------------------------


def test_as_many_tensors_as_may_be_are_read_and_one_more_is_refused_at_its_name(tmp_path: Path) -> None:
    names = [f"t{number:05}" for number in range(headers.MAX_TENSORS + 1)]
    path = write(tmp_path / "x", several(*((name, 0, 0, "U8") for name in names[:-1])), b"")
    assert len(format.load(path).tensors) == headers.MAX_TENSORS == 20_000
    text = several(*((name, 0, 0, "U8") for name in names))
    with pytest.raises(DamagedError, match=f"byte {8 + text.index(names[-1] + chr(34) + ':') - 1}: more than 20000 tensors"):
        format.load(write(path, text, b""))


def test_a_name_may_have_256_characters(tmp_path: Path) -> None:
    name = "n" * headers.MAX_NAME
    assert len(name) == 256
    assert format.load(write(tmp_path / "x", several((name, 0, 4, "F32")))).tensors.keys() == {name}


@pytest.mark.parametrize("character", ["a", '"', "é", "🦀"])
def test_as_much_metadata_as_may_be_written_can_be_read_and_a_character_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, character: str
) -> None:
    monkeypatch.setattr(headers, "MAX_METADATA_BYTES", 1000)
    path = tmp_path / "x"
    format.save(path, {"x": np.zeros(1)}, {"key": character * 997})
    assert format.load(path).metadata == {"key": character * 997}
    with pytest.raises(CheckpointError, match=r"1001 characters of metadata are too many \(at most 1000\)"):
        format.save(path, {"x": np.zeros(1)}, {"key": character * 998})
    with pytest.raises(DamagedError, match=r"more than 1000 characters of metadata"):
        format.load(write(path, words(f'"key":{handmade.compact(character * 998)}')))


def test_the_limit_of_metadata_is_2_mib(tmp_path: Path) -> None:
    format.save(tmp_path / "x", {}, {"key": "a" * (2**21 - 3)})
    assert format.load(tmp_path / "x").metadata["key"] == "a" * (2**21 - 3)
    with pytest.raises(CheckpointError, match="too many"):
        format.save(tmp_path / "x", {}, {"key": "a" * (2**21 - 2)})


def test_as_large_a_header_as_may_be_written_can_be_read_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    path, limit = tmp_path / "x", 8 << 20
    assert headers.MAX_HEADER_BYTES == limit
    format.save(path, {}, {"key": ""})
    room = (limit - path.stat().st_size) // 6
    format.save(path, {}, {"key": "é" * room})
    assert path.stat().st_size == limit and format.load(path).metadata == {"key": "é" * room}
    with pytest.raises(CheckpointError, match=f"a header of {limit + 64} bytes is too large"):
        format.save(path, {}, {"key": "é" * (room + 64 // 6 + 1)})
    path.write_bytes((limit + 56).to_bytes(8, "little") + bytes(limit + 56))
    with pytest.raises(DamagedError, match=f"byte 0: .*{limit + 56} bytes"):
        format.load(path)


# --- sound files that are not ours to read ----------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"step": "7", "größe": "🦀"}])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_plain_safetensors_file_is_told_from_a_damaged_checkpoint(
    tmp_path: Path, metadata: dict[str, str] | None, count: int
) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({f"x{n}": np.ones(n, np.float32) for n in range(count)}, path, metadata=metadata)
    for read in (format.load, format.verify, format.read_header, format.mapped):
        with pytest.raises(CheckpointError, match="not a checkpoint of oxidizr_ref") as caught:
            read(path)
        assert type(caught.value) is CheckpointError


@pytest.mark.parametrize("version", ["2", "10", "999999999"])
def test_a_file_of_a_newer_format_version_is_told_from_a_damaged_one(tmp_path: Path, version: str) -> None:
    path = tmp_path / "newer.safetensors"
    format.save(path, handmade.tensors(1), {**handmade.metadata(1), "format_version": version})
    with pytest.raises(
        CheckpointError, match=rf"format version {version} is newer.*\(1\); use a newer oxidizr_ref"
    ) as caught:
        format.load(path)
    assert type(caught.value) is CheckpointError
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"pu"'))
    with pytest.raises(DamagedError, match="the header was changed"):
        format.load(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 8, b"\0" * 4096, b"{}", b"\x02\0\0\0\0\0\0\0\xff\xfe", b"a"])
def test_what_is_no_safetensors_file_is_damage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"other: damaged at or after byte [08]: "):
        format.load(path)


def test_a_later_version_with_another_way_of_writing_is_called_newer_not_damaged(tmp_path: Path) -> None:
    """Its header proves whole by a digest that is made as ever; what stands between is not ours to judge."""
    text = b'{ "layout": {"of": 2}, "__metadata__":{"format_version":"2","header_digest":"' + b"0" * 64 + b'"}}'
    text += b" " * (-(len(text) + 8) % 64)
    raw = len(text).to_bytes(8, "little") + text
    path = tmp_path / "later.safetensors"
    path.write_bytes(raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode()))
    with pytest.raises(CheckpointError, match="format version 2 is newer") as caught:
        format.load(path)
    assert not isinstance(caught.value, DamagedError)
    path.write_bytes(raw)  # its digest is not right
    with pytest.raises(DamagedError):
        format.load(path)
