"""From text to files of tokens: what is in them, and that nothing but documents, tokenizer and seed decides it."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from faults import fast_place
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref.chat import Message, chat_parts
from oxidizr_ref.data import Source, TokenStream
from oxidizr_ref.errors import DataError
from oxidizr_ref.prepare import documents, pipeline, writer
from oxidizr_ref.prepare.pipeline import Prepared, PrepareOptions, PrepareReporter, prepare
from oxidizr_ref.token_files import open_documents, open_responses, read_meta
from oxidizr_ref.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, get_tokenizer, tokenizer_from_state

END = "<|endoftext|>"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory where bringing files to the disk takes no time."""
    with tempfile.TemporaryDirectory(dir=fast_place()) as place:
        yield Path(place)


@cache
def known(name: str) -> Tokenizer:
    return get_tokenizer(name, None)


class Notes(PrepareReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.steps: list[tuple[int, int | None, int, int]] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def progress(self, done: int, total: int | None, documents: int, tokens: int) -> None:
        self.steps.append((done, total, documents, tokens))


def make(directory: Path, *inputs: Path | str, reporter: PrepareReporter | None = None, **options: Any) -> Prepared:
    """``out.bin`` in this directory."""
    asked = PrepareOptions([str(path) for path in inputs], directory / "out.bin", **{"overwrite": True, **options})
    return prepare(asked, reporter)


def tokens_of(directory: Path, name: str = "out.bin") -> list[int]:
    return list(np.fromfile(directory / name, dtype="<u4"))


def documents_of(directory: Path, name: str = "out.bin") -> list[int]:
    positions = open_documents(directory / name)
    assert positions is not None
    return positions.tolist()


def text_of(directory: Path, tokenizer: Tokenizer, name: str = "out.bin") -> str:
    return tokenizer.decode(tokens_of(directory, name))


def bytes_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------ documents


def test_a_file_of_text_is_a_document_and_ends_of_text_split_it_without_a_second_one_behind(tmp_path: Path) -> None:
    for name, text in {"a.txt": "one", "b.txt": f"two{END}three{END}", "c.txt": f"{END}{END}four\n{END}\n "}.items():
        (tmp_path / name).write_text(text)
    prepared = make(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt")
    assert text_of(tmp_path, ByteTokenizer()) == f"one{END}two{END}three{END}four\n{END}"
    assert documents_of(tmp_path) == [0, 3, 7, 13]  # but for the first, at the end of text before
    assert open_responses(tmp_path / "out.bin") is None
    (meta,) = prepared.metas.values()
    assert (meta.tokens, meta.documents, meta.largest, meta.end_of_text) == (20, 4, 256, 256)
    assert meta == read_meta(tmp_path / "out.bin")


def test_json_lines_are_texts_questions_with_answers_and_chats_in_oxidizr_s_layout(tmp_path: Path) -> None:
    system, user, reply = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
    data = lines(
        tmp_path / "a.jsonl",
        {"text": "plain"},
        {"prompt": "p", "response": f"r{END}"},
        {"messages": [system, user, reply, user, reply]},
        {"messages": [reply, user]},
    )
    make(tmp_path, data)
    tokenizer = ByteTokenizer()
    pairs = f"<|user|>p<|assistant|>r{END}", f"<|system|>s<|user|>u<|assistant|>a<|user|>u<|assistant|>a{END}"
    assert text_of(tmp_path, tokenizer) == f"plain{END}{pairs[0]}{pairs[1]}<|assistant|>a<|user|>u{END}"
    spans = open_responses(tmp_path / "out.bin")
    assert spans is not None
    ids = tokens_of(tmp_path)
    learnt = [tokenizer.decode(ids[begin:end]) for begin, end in spans.tolist()]
    assert learnt == [f"plain{END}", f"r{END}", "a<|user|>", f"a{END}", "a<|user|>"]
    assert spans.tolist()[1] == [6 + 3, 6 + 5]


def test_what_is_said_by_nobody_else_is_learnt_whole_and_has_no_file_of_responses(tmp_path: Path) -> None:
    make(tmp_path, lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": ""}, {"text": f"b{END}c"}))
    assert text_of(tmp_path, ByteTokenizer()) == f"a{END}b{END}c{END}"
    assert not (tmp_path / "out.responses.u64").exists()


@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_lines_are_whole_however_their_bytes_come(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxidizr_ref.prepare.inputs._BLOCK", block)
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}\r\n\n{"text": "long enough"}\n\n\n{"text": "last"}'.encode())
    make(tmp_path, tmp_path / "a.jsonl")
    assert text_of(tmp_path, ByteTokenizer()) == f"é{END}long enough{END}last{END}"


def test_an_empty_response_is_an_end_to_be_learnt(tmp_path: Path) -> None:
    make(tmp_path, lines(tmp_path / "a.jsonl", {"prompt": "p", "response": ""}))
    spans = open_responses(tmp_path / "out.bin")
    assert spans is not None and spans.tolist() == [[3, 4]] and tokens_of(tmp_path)[3:4] == [256]


CHATS = st.lists(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text("aé\n", max_size=4)), min_size=1, max_size=4
    )
    | st.text("bö ", min_size=1, max_size=6).filter(str.strip),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", ["byte", "cl100k_base", "no end"])
@given(chats=CHATS)
def test_documents_and_responses_are_those_of_a_plain_reckoning(name: str, chats: Any, tmp_path: Path) -> None:
    """Every token is spelled out with whether it is to be learnt; the files must say the same."""
    signs = sorted({*"\n abéö<|>", *"systemuserassistantendofx"})
    tokenizer = CharTokenizer([*signs, "<|user|>", "<|assistant|>", "<|system|>"]) if name == "no end" else known(name)
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    ids: list[int] = []
    learnt: list[bool] = []
    begins: list[int] = []
    for chat in chats:
        begins.append(max(len(ids) - len(end), 0) if begins else 0)
        parts = [(chat, True)] if isinstance(chat, str) else chat_parts([Message(*message) for message in chat])
        after_response = False
        for text, response in parts:
            part = tokenizer.encode(text).tolist()
            flags = [response] * len(part)
            if part and not response:
                flags[0] = after_response
            ids += part
            learnt += flags
            after_response = response if part or response else after_response
        ids += end
        learnt += [after_response] * len(end)
    entries = [{"text": c} if isinstance(c, str) else {"messages": [{"role": r, "content": t} for r, t in c]} for c in chats]
    with mock.patch.object(pipeline, "get_tokenizer", lambda *_: tokenizer):
        make(tmp_path, lines(tmp_path / "a.jsonl", *entries))
    assert tokens_of(tmp_path) == ids
    assert documents_of(tmp_path) == begins
    spans = open_responses(tmp_path / "out.bin")
    if spans is None:
        assert all(isinstance(chat, str) for chat in chats)
    else:
        told = np.zeros(len(ids), dtype=bool)
        for begin, stop in spans.tolist():
            told[begin:stop] = True
        assert told.tolist() == learnt


# ------------------------------------------------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("name", ["byte", "char", "cl100k_base", "llama3"])
def test_every_tokenizer_s_files_hold_the_text_and_the_tokenizer(name: str, tmp_path: Path) -> None:
    text = f"The cat.\nÉ 日本\n{END}second\n\nthird"
    (tmp_path / "a.txt").write_text(text)
    (meta,) = make(tmp_path, tmp_path / "a.txt", tokenizer=name).metas.values()
    tokenizer = tokenizer_from_state(json.loads((tmp_path / "out.meta.json").read_text())["tokenizer"])
    assert tokenizer.name == name and meta.vocab_size == tokenizer.vocab_size
    own = tokenizer.decode([meta.end_of_text])
    assert text_of(tmp_path, tokenizer) == text.replace(END, own) + own
    assert dict(meta.special_tokens) == dict(tokenizer.special_tokens)
    if name == "char":
        assert tokenizer.state() == CharTokenizer.from_text(text).state()


def test_the_digests_are_those_of_a_stream_and_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 3000)
    lines(tmp_path / "b.jsonl", {"prompt": "p", "response": "r"})
    with mock.patch.object(writer, "CHUNK", 1 << 10):
        (meta,) = make(tmp_path, tmp_path / "a.txt", tmp_path / "b.jsonl").metas.values()
    ids = np.fromfile(tmp_path / "out.bin", dtype="<u4")
    chunks = [hashlib.sha256(ids[i : i + 1024].tobytes()).digest() for i in range(0, ids.size, 1024)]
    assert meta.digest == hashlib.sha256(b"".join(chunks)).hexdigest() and len(chunks) == 3
    for name, digest in {"documents": meta.documents_digest, "responses": meta.responses_digest}.items():
        assert digest == hashlib.sha256((tmp_path / f"out.{name}.u64").read_bytes()).hexdigest()
    (meta,) = make(tmp_path, tmp_path / "a.txt").metas.values()
    stream = TokenStream([Source("out", np.fromfile(tmp_path / "out.bin", dtype=np.uint32))])
    assert (meta.digest, meta.largest) == dataclasses.astuple(stream.facts())


def test_without_an_end_of_text_documents_run_together_and_a_notice_says_so(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 3)
    notes = Notes()
    make(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", tokenizer="char", reporter=notes)
    assert tokens_of(tmp_path) == [0, 0, 0, 1, 1, 1] and documents_of(tmp_path) == [0, 3]
    assert len(notes.notices) == 1 and notes.notices[0].startswith("the tokenizer char has no end-of-text token")
    make(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", tokenizer="char", end_of_text=END)
    meta = read_meta(tmp_path / "out.bin")
    assert meta is not None
    assert text_of(tmp_path, tokenizer_from_state(meta.tokenizer)) == f"aaa{END}bbb{END}" and documents_of(tmp_path) == [
        0,
        3,
    ]


def test_an_end_of_text_behind_an_answer_is_one_of_the_vocabulary(tmp_path: Path) -> None:
    (meta,) = make(
        tmp_path, lines(tmp_path / "a.jsonl", {"prompt": "a", "response": f"b{END}"}), tokenizer="char"
    ).metas.values()
    tokenizer = tokenizer_from_state(meta.tokenizer)
    assert text_of(tmp_path, tokenizer) == f"<|user|>a<|assistant|>b{END}" and meta.end_of_text == tokenizer.end_of_text


def test_another_end_of_text_can_be_named_and_splits_as_well(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"a<|user|>b{END}c")
    make(tmp_path, tmp_path / "a.txt", end_of_text="<|user|>")
    assert text_of(tmp_path, ByteTokenizer()) == "a<|user|>b<|user|>c<|user|>"
    assert documents_of(tmp_path) == [0, 1, 3]


def test_byte_pairs_are_trained_the_same_each_time_without_merging_special_tokens(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    text = ("the cat and the hat " * 50 + END + "\n") * 3
    (tmp_path / "a.txt").write_text(text)
    made = []
    for _ in range(2):
        make(tmp_path, tmp_path / "a.txt", train_bpe=300)
        made.append(bytes_in(tmp_path))
    assert made[0] == made[1]
    tokenizer = get_tokenizer(str(tmp_path / "out.tokenizer.json"), None)
    assert list(tokenizer.special_tokens) == ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert text_of(tmp_path, tokenizer) == text.removesuffix("\n")
    assert len(tokens_of(tmp_path)) < len(text) / 3 and tokenizer.vocab_size <= 300
    meta = read_meta(tmp_path / "out.bin")
    assert meta is not None and tokenizer_from_state(meta.tokenizer).state() == tokenizer.state()


# ------------------------------------------------------------------------------- what decides the bytes, and what does not

LETTERS = st.sampled_from(
    ["a", "b c", "\n", "\n\n", " ", "é", "日", "\U0001f600", "<|user|>", "<|end", END, "x\ny", "\r\n", "."]
)


@pytest.mark.parametrize("name", ["byte", "char"])
@given(parts=st.lists(LETTERS, max_size=60), piece=st.integers(20, 40), block=st.integers(1, 9), batch=st.integers(1, 200))
def test_cutting_anywhere_changes_no_token_of_bytes_or_characters(
    name: str, parts: list[str], piece: int, block: int, batch: int, tmp_path: Path
) -> None:
    text = "a" + "".join(parts)
    (tmp_path / "a.txt").write_text(text, newline="")
    with (
        mock.patch("oxidizr_ref.prepare.inputs._BLOCK", block),
        mock.patch.object(pipeline, "_BATCH", batch),
        mock.patch.multiple(documents, PIECE=piece, _NEAR=10),
    ):
        make(tmp_path, tmp_path / "a.txt", tokenizer=name, threads=1)
    kept = [part for part in text.split(END) if part and not part.isspace()]
    tokenizer = CharTokenizer.from_text(text) if name == "char" else ByteTokenizer()
    has_end = tokenizer.end_of_text is not None
    whole = tokenizer.encode(END.join(kept) + (END if has_end else ""))
    assert tokens_of(tmp_path) == whole.tolist()


def tokens_of_pieces(tmp_path: Path, text: str, name: str, piece: int, near: int) -> list[int]:
    """The tokens of a document that is cut into such pieces, without its end."""
    (tmp_path / "a.txt").write_text(text, newline="")
    tokenizer = known(name)
    with (
        mock.patch.multiple(documents, PIECE=piece, _NEAR=near),
        mock.patch.object(pipeline, "get_tokenizer", lambda *_: tokenizer),
    ):
        make(tmp_path, tmp_path / "a.txt", threads=1)
    return tokens_of(tmp_path)[:-1]


@given(
    words=st.lists(st.sampled_from(["the", "cat's", "É", "42", "};", "// x", "x", "日本"]), min_size=30, max_size=80),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_cutting_behind_line_ends_or_between_words_changes_no_token(
    name: str, words: list[str], seed: int, tmp_path: Path
) -> None:
    gaps = np.random.default_rng(seed).choice([" ", " ", "\n", " ", "  ", "\n\n", " a b ", "\nab\n"], len(words))
    gaps[::3] = " a b "  # so that there is a place in every piece
    text = "".join(word + gap for word, gap in zip(words, gaps, strict=True)) + "end"
    assert tokens_of_pieces(tmp_path, text, name, piece=50, near=50) == known(name).encode(text).tolist()


def test_no_cut_is_before_a_slash_which_o200k_takes_together_with_the_line_end(tmp_path: Path) -> None:
    text = "};\n// note\n" * 20
    assert tokens_of_pieces(tmp_path, text, "o200k_base", piece=50, near=50) == known("o200k_base").encode(text).tolist()


def test_a_place_between_words_may_be_far_from_the_end_of_a_piece(tmp_path: Path) -> None:
    text = "a word of 12345678.12345678.12345678.12345678.12345678\r\n" * 9
    assert tokens_of_pieces(tmp_path, text, "cl100k_base", piece=100, near=10) == known("cl100k_base").encode(text).tolist()


def test_threads_blocks_compression_and_standard_input_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = ("A line of text, and é another.\n" * 40 + END) * 9 + "日本" * 600
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    frames = zstandard.ZstdCompressor().compress(text[:5000].encode()) + zstandard.ZstdCompressor().compress(
        text[5000:].encode()
    )
    (tmp_path / "c.txt.zst").write_bytes(frames)
    monkeypatch.setattr(documents, "PIECE", 1000)
    monkeypatch.setattr(pipeline, "_BATCH", 3000)
    made = []
    for source, threads, block in [
        ("a.txt", 1, 1 << 20),
        ("a.txt", 3, 777),
        ("b.txt.gz", 2, 100),
        ("c.txt.zst", 2, 50),
        ("-", 1, 999),
    ]:
        monkeypatch.setattr("oxidizr_ref.prepare.inputs._BLOCK", block)
        monkeypatch.setattr("oxidizr_ref.prepare.inputs._ZSTD_BLOCK", block)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        place = tmp_path / f"{len(made)}"
        place.mkdir()
        make(place, "-" if source == "-" else tmp_path / source, tokenizer="cl100k_base", threads=threads, validation=0.3)
        made.append({name: data for name, data in bytes_in(place).items() if not name.endswith("json")})
    assert all(other == made[0] for other in made) and len(made[0]) == 4


# ------------------------------------------------------------------------------------------------------- the validation part


def test_whole_documents_go_to_the_validation_part_by_seed_and_index_alone(tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", *({"text": f"document {i}."} for i in range(200)))
    tokenizer = ByteTokenizer()

    def sides(**options: Any) -> tuple[list[str], list[str]]:
        make(tmp_path, data, validation=0.2, **options)
        return tuple(text_of(tmp_path, tokenizer, name).split(END)[:-1] for name in ("out.bin", "out.validation.bin"))  # type: ignore[return-value]

    train, validation = sides()
    assert sorted([*train, *validation]) == sorted(f"document {i}." for i in range(200)) and 25 <= len(validation) <= 55
    for name, side in (("out.bin", train), ("out.validation.bin", validation)):
        meta = read_meta(tmp_path / name)
        assert meta is not None and meta.documents == len(side) == len(documents_of(tmp_path, name))
    assert sides(threads=1) == (train, validation)
    assert sides(seed=1) != (train, validation)
    lines(data, *({"text": f"document {i}."} for i in range(100)))
    assert sides()[1] == [text for text in validation if int(text[9:-1]) < 100]


@given(
    contents=st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=3),
    part=st.floats(0.01, 0.99),
    chat=st.booleans(),
)
def test_too_few_documents_are_split_by_tokens(contents: list[str], part: float, chat: bool, tmp_path: Path) -> None:
    entries = [{"prompt": text, "response": text} if chat else {"text": text} for text in contents]
    data = lines(tmp_path / "a.jsonl", *entries)
    make(tmp_path, data)
    whole, begins, spans = tokens_of(tmp_path), documents_of(tmp_path), open_responses(tmp_path / "out.bin")
    learnt = np.ones(len(whole), dtype=bool)
    if spans is not None:
        learnt = np.array([any(b <= i < e for b, e in spans.tolist()) for i in range(len(whole))])
    with mock.patch.object(pipeline, "_sides", lambda *_: iter([0] * 9)):
        make(tmp_path, data, validation=part)
    cut = len(tokens_of(tmp_path))
    assert tokens_of(tmp_path) + tokens_of(tmp_path, "out.validation.bin") == whole
    assert abs(cut - len(whole) * (1 - part)) <= 1 and 0 < cut < len(whole)
    for name, low, high in (("out.bin", 0, cut), ("out.validation.bin", cut, len(whole))):
        assert documents_of(tmp_path, name) == [0, *(b - low for b in begins if low < b < high - 1)]
        spans = open_responses(tmp_path / name)
        told = np.full(high - low, not chat)
        for begin, end in [] if spans is None else spans.tolist():
            told[begin:end] = True
        assert (spans is not None) == chat and told.tolist() == learnt[low:high].tolist()
    assert not [name for name in bytes_in(tmp_path) if "whole" in name or name.endswith(".tmp")]


def test_a_run_without_a_validation_part_takes_away_that_of_the_run_it_replaces(tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"}, {"text": "b"})
    make(tmp_path, data, validation=0.5)
    assert len(bytes_in(tmp_path)) == 9
    make(tmp_path, lines(data, {"text": "b"}))
    assert sorted(bytes_in(tmp_path)) == ["a.jsonl", "out.bin", "out.documents.u64", "out.meta.json"]


# ------------------------------------------------------------------------------------------------ statistics and progress


def test_statistics_count_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"aaaab{END}é{END}aa")
    found = make(tmp_path, tmp_path / "a.txt", statistics=True, validation=0.5).statistics
    assert found == {
        "tokens": 12,
        "bytes": 9,
        "bytes_per_token": 9 / 12,
        "documents": 3,
        "longest_document": 5,
        "ids_used": 5,
        "vocab_size": 260,
        "most_frequent": [
            {"id": 97, "text": "a", "count": 6},
            {"id": 256, "text": END, "count": 3},
            {"id": 98, "text": "b", "count": 1},
            {"id": 0xA9, "text": "\ufffd", "count": 1},
            {"id": 0xC3, "text": "\ufffd", "count": 1},
        ],
        "histogram": [[2, 3, 2], [4, 7, 1]],
    }


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress])
def test_progress_is_told_in_bytes_of_the_files_and_comes_to_their_end(
    pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    name = "a.txt" if pack(b"x") == b"x" else "a.txt.gz"
    (tmp_path / name).write_bytes(pack(bytes(range(32, 127)) * 9000))
    notes = Notes()
    make(tmp_path, tmp_path / name, tmp_path / name, reporter=notes)
    size = (tmp_path / name).stat().st_size
    assert notes.steps[-1][:2] == (2 * size, 2 * size)
    assert [done for done, *_ in notes.steps] == sorted(done for done, *_ in notes.steps)


def test_what_is_read_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """A thing that stands for a text of 400 MB is read: what Python and NumPy hold at a time stays far below."""
    import tracemalloc

    block = b"A line of text that is neither long nor short.\n" * 22_000

    def blocks(*_: object) -> Any:
        yield from (block for _ in range(12))

    (tmp_path / "a.txt").write_text("stands for more")
    tracemalloc.start()
    try:
        with mock.patch.object(pipeline, "read_blocks", blocks):
            make(tmp_path, tmp_path / "a.txt", threads=2)
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out.bin").stat().st_size == 4 * (12 * len(block) + 1)


def test_an_error_is_told_before_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok\n" * 1000 + b"\xff" + b"more\n" * 1_000_000)
    notes = Notes()
    with pytest.raises(DataError, match=r"a\.txt: the byte 0xff at offset 3000 \(line 1001\) is not UTF-8"):
        make(tmp_path, tmp_path / "a.txt", reporter=notes)
    assert notes.steps[-1][0] < 2 << 20
