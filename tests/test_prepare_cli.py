"""``oxidizr-ref prepare``: what it takes, what it says, and how it refuses: in one line, nothing written."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hub_stand_in
import numpy as np
import pytest
import tiny

from oxidizr_ref.errors import DataError
from oxidizr_ref.prepare import hub, pipeline
from oxidizr_ref.token_files import read_meta
from oxidizr_ref.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # which --threads sets


class Refusal:
    """Runs a command that must be refused: exit 2, one line on stderr, nothing on stdout, no file written or changed."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys

    def __call__(self, *argv: object, code: int = 2) -> str:
        before = tiny.snapshot(self.root)
        self.capsys.readouterr()
        got = tiny.cli("prepare", *argv)
        out, err = self.capsys.readouterr()
        assert (got, out) == (code, ""), err
        *notices, last = err.splitlines()
        assert last.startswith("error: ") and "(unexpected;" not in last and "Traceback" not in err and not notices, err
        assert tiny.snapshot(self.root) == before
        return last


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(tmp_path, capsys)


def write(path: str, content: str | bytes = "Some text.\n") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def text_of(path: str = "out.bin") -> str:
    return BYTES.decode(np.fromfile(path, dtype="<u4"))


# ---------------------------------------------------------------------------------------------------------------- inputs


def test_directories_and_globs_are_read_in_the_order_of_their_paths_and_the_rest_is_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("d/b.txt", "d/a.md", "d/a/z.txt", "d/c.csv", "d/.bin", "e/2.txt", "e/1.txt", "e/3.json", "e/sub/4.txt"):
        write(name, f"{name};")
    write("d/x.jsonl", '{"text": "x;"}')
    write("d/y.txt.gz", gzip.compress(b"y;"))
    assert tiny.cli("prepare", "e/*", "d", "-o", "out.bin") == 0
    assert text_of().split("<|endoftext|>") == [
        *("e/1.txt;", "e/2.txt;", "e/sub/4.txt;", "d/a/z.txt;", "d/a.md;", "d/b.txt;", "x;", "y;", ""),
    ]
    assert "files skipped for the ending of their names: 3\n" in capsys.readouterr().err
    meta = read_meta(Path("out.bin"))
    assert meta is not None and meta.sources[:4] == ("1.txt", "2.txt", "4.txt", "z.txt")


def test_a_glob_takes_each_file_once_and_what_is_in_directories_too(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("d/a.txt", "d/sub/b.txt", "d/pictures/c.png"):
        write(name, f"{name};")
    for glob in ("d/**", "d/*"):
        assert tiny.cli("prepare", glob, "-o", "out.bin", "--overwrite") == 0
        assert sorted(text_of().split("<|endoftext|>")) == ["", "d/a.txt;", "d/sub/b.txt;"]
        assert "files skipped for the ending of their names: 1\n" in capsys.readouterr().err


def test_a_standard_input_that_is_closed_is_told(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert "-: standard input is closed; give a file" in refused("-", "-o", "out.bin")


def test_a_file_that_is_named_is_text_whatever_its_name_unless_told_otherwise() -> None:
    write("README", '{"text": "a"}')
    assert tiny.cli("prepare", "README", "-o", "out.bin") == 0
    assert text_of() == '{"text": "a"}<|endoftext|>'
    assert tiny.cli("prepare", "README", "-o", "out.bin", "--format", "jsonl", "--overwrite") == 0
    assert text_of() == "a<|endoftext|>"


def test_standard_input_is_read_in_another_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "oxidizr_ref", "prepare", "-", "-o", "out.bin", "--json", "--threads", "1"],
        input="é from a pipe".encode(),
        capture_output=True,
        cwd=tmp_path,
        env=tiny.environment(),
    )
    assert done.returncode == 0, done.stderr
    assert text_of() == "é from a pipe<|endoftext|>"
    assert json.loads(done.stdout)["files"]["out.bin"]["tokens"] == 15


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_a_byte_order_mark_is_no_text(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxidizr_ref.prepare.inputs._BLOCK", block)
    write("a.txt", b"\xef\xbb\xbfa\xef\xbb\xbf")
    assert tiny.cli("prepare", "a.txt", "-o", "out.bin") == 0
    assert text_of() == "a\ufeff<|endoftext|>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            b"ab\ncd\xe9f and more text",
            r"a\.txt: the byte 0xe9 at offset 5 \(line 2\) is not UTF-8; .*--errors replace",
        ),
        ("a.txt", b"ab\xe2\x82", r"a\.txt: the byte 0xe2 at offset 2 \(line 1\)"),
        ("a.txt", b"text\0", r"a\.txt: has a NUL byte at offset 4; it looks binary, or is UTF-16"),
        ("a.txt", "Слова".encode("cp1251"), r"a\.txt: looks binary, or is text in another encoding"),
        ("a.txt", b"", r"a\.txt: no text to be found there; nothing was written"),
        ("a.txt", b" \n<|endoftext|> ", r"a\.txt: no text to be found there; nothing was written"),
        (
            "a.txt.gz",
            gzip.compress(b"x" * 10_000, mtime=0)[:-9],
            r"a\.txt\.gz: cannot be decompressed .*cut short or damaged",
        ),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: cannot be decompressed"),
        ("a.txt.zst", b"no zstd", r"a\.txt\.zst: cannot be decompressed"),
        ("a.bin", b"1234", r"a\.bin: ends in \.bin, so it holds tokens already; train on it with -d a\.bin"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: is no JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: is no JSON"),
        ("a.jsonl", b'"a"', r'a\.jsonl, line 1: is no object; a document is {"text"}, {"prompt", "response"} or'),
        ("a.jsonl", b'{"texts": "a", "b": 1}', r"a\.jsonl, line 1: has the keys 'texts', 'b'; a document is"),
        ("a.jsonl", b'{"text": "a", "prompt": "b", "response": "c"}', r"has the keys 'text', 'prompt', 'response'"),
        ("a.jsonl", b'{"text": 1}', r"a\.jsonl, line 1: text is no string"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: text has half a surrogate pair"),
        ("a.jsonl", b'{"messages": []}', r"a\.jsonl, line 1: messages is no list, or is empty"),
        ("a.jsonl", b'{"messages": ["a"]}', r"a message has the role none; there are system, user, assistant"),
        ("a.jsonl", b'{"messages": [{"role": "tool", "content": "a"}]}', r"a message has the role 'tool'"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', r"a\.jsonl, line 1: content is missing"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl: the byte 0xff at offset 24 \(line 2\)"),
    ],
)
def test_bad_input_is_refused_with_its_place(refused: Refusal, name: str, content: bytes, message: str) -> None:
    write(name, content)
    assert re.search(message, refused(name, "-o", "out.bin"))


def test_a_zstd_file_that_is_cut_short_is_refused(refused: Refusal) -> None:
    zstandard = pytest.importorskip("zstandard")
    write("a.txt.zst", zstandard.ZstdCompressor().compress(os.urandom(4000).hex().encode())[:-5])
    assert "a.txt.zst: cannot be decompressed (it ends within a frame)" in refused("a.txt.zst", "-o", "out.bin")


def test_what_is_no_unicode_is_replaced_and_counted_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.txt", b"one \xe9 two \xef\xbf\xbd three \xff\xfe four " + "é".encode()[:1])
    write("b.jsonl", b'{"text": "a \\ud800 b \\ud83d\\ude00"}')
    assert tiny.cli("prepare", "a.txt", "b.jsonl", "-o", "out.bin", "--errors", "replace") == 0
    assert text_of().split("<|endoftext|>")[:2] == ["one � two � three �� four �", "a � b 😀"]
    assert "places without valid Unicode that became U+FFFD: 5\n" in capsys.readouterr().err
    meta = read_meta(Path("out.bin"))
    assert meta is not None and meta.replaced == 5


def test_keys_that_are_not_used_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", '{"text": "a", "url": 1}\n{"messages": [{"role": "user", "content": "b", "id": 1}], "score": 2}\n')
    assert tiny.cli("prepare", "a.jsonl", "-o", "out.bin") == 0
    assert "keys of JSON lines that were not used: messages.id, score, url\n" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ options, refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("absent.txt", "-o", "out.bin"), "absent.txt: no such file, directory or glob"),
        (("*.no", "-o", "out.bin"), "*.no: no such file, directory or glob"),
        (("*.bin", "-o", "out.bin"), "*.bin: has no file ending in .txt"),
        (("empty", "-o", "out.bin"), "empty: has no file ending in .txt .md .jsonl .json-lines"),
        (("a.txt", "-o", "out"), "-o out: the name must end in .bin; give -o out.bin"),
        (("a.txt", "-o", "no/out.bin"), "-o no/out.bin: there is no directory no; make it first"),
        (("a.txt", "-o", "there.bin"), "there.bin: is there already; give --overwrite to replace it, or another -o"),
        (("-o", "out.bin"), "nothing to prepare; name files"),
        (("a.txt",), "Missing option '-o' / '--output'"),
        (("a.txt", "-o", "out.bin", "--validation", 1), "--validation 1.0: expected a part of the documents"),
        (("a.txt", "-o", "out.bin", "--tokenizer", "gpt5"), "no tokenizer 'gpt5'"),
        (("a.txt", "-o", "out.bin", "--tokenizer", "no.json"), "no.json: no such tokenizer file"),
        (("a.txt", "-o", "out.bin", "--train-bpe", 259), "--train-bpe 259: bytes and special tokens take 260 ids"),
        (("a.txt", "-o", "out.bin", "--train-bpe", 300, "--tokenizer", "char"), "--train-bpe makes a tokenizer"),
        (("-", "-o", "out.bin", "--tokenizer", "char"), "standard input can be read only once"),
        (("a.txt", "-o", "out.bin", "--end-of-text", "</s>"), "--end-of-text </s>: is no single id of byte"),
        (("a.txt", "-o", "out.bin", "--check", "absent.yaml"), "absent.yaml"),
    ],
)
def test_what_cannot_be_done_as_asked_is_refused(refused: Refusal, argv: tuple[object, ...], message: str) -> None:
    write("a.txt")
    write("there.bin")
    Path("empty").mkdir()
    assert message in refused(*argv)


def test_one_token_is_not_split(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.txt", "a")
    assert tiny.cli("prepare", "a.txt", "-o", "out.bin", "--tokenizer", "char", "--validation", 0.5) == 2
    assert "error: one token cannot be split" in capsys.readouterr().err
    assert os.listdir() == ["a.txt"]


def test_a_config_with_too_small_a_vocabulary_is_told_what_to_set(refused: Refusal) -> None:
    write("a.txt")
    run = tiny.make_run(Path("run"), model={"vocab_size": 259})
    said = refused("a.txt", "-o", "out.bin", "--check", run.config)
    assert "model.vocab_size is 259, the tokenizer byte has 260 ids" in said
    assert "write model.vocab_size: 260, or train with --set model.vocab_size=260" in said
    assert tiny.cli("prepare", "a.txt", "-o", "out.bin", "--check", "nano-start") == 0


def test_ids_beyond_u32_are_refused(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.txt")
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 2**32 + 1)
    assert "the tokenizer byte has 4,294,967,297 ids; a .bin holds ids below 2^32" in refused("a.txt", "-o", "out.bin")


@pytest.mark.parametrize(
    ("library", "extra", "argv"),
    [
        ("zstandard", "zstd", ("a.txt.zst",)),
        ("splintr", "tokenizers", ("a.txt", "--tokenizer", "llama3")),
        ("tokenizers", "tokenizers", ("a.txt", "--train-bpe", 300)),
        ("huggingface_hub", "hub", ("--hub", "someone/data")),
    ],
)
def test_a_library_that_is_missing_is_named_with_the_way_to_install_it(
    refused: Refusal, library: str, extra: str, argv: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.txt")
    write("a.txt.zst")
    monkeypatch.setitem(sys.modules, library, None)
    assert refused(*argv, "-o", "out.bin").endswith(f'pip install "oxidizr-ref[{extra}]"')


# ---------------------------------------------------------------------------------------------------------------- output


@pytest.mark.usefixtures("plain_terminal_of_80_columns")
def test_what_was_made_is_told_in_tables_for_people_and_in_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.txt", "aaa bbb\n\x1b<|endoftext|>b")
    assert tiny.cli("prepare", "a.txt", "-o", "out.bin", "--stats", "--json", "--threads", 1) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == ("out.bin: 12 tokens in 2 documents, 48 B; tokenizer byte, 260 ids, the largest used 256")
    for text in ("10 bytes, 0.833 a token", "2, the longest 9 tokens", "6 of 260 ids used (2.3%)", "'\\x1b'", "8 .. 15"):
        assert text in err
    assert "\x1b" not in err
    told = json.loads(out)
    assert told["files"]["out.bin"]["documents"] == 2 and told["files"]["out.bin"]["tokenizer"] == "byte"
    assert told["statistics"]["most_frequent"][0] == {"count": 4, "id": 98, "text": "b"}


def test_a_run_trains_on_what_was_prepared(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path / "run", trainer={"max_steps": 2})
    assert tiny.cli("prepare", run.text, "-o", "out.bin") == 0
    assert run.train("-d", "out.bin") == 0


# ------------------------------------------------------------------------------------------------------------------- hub


def repository(files: dict[str, bytes]) -> Any:
    """Stands for the download of these files."""

    def download(name: str, patterns: list[str]) -> Path:
        assert name == "someone/data"
        for path, content in files.items():
            if not patterns or any(Path(path).match(pattern) for pattern in patterns):
                write(f"downloaded/{path}", content)
        return Path("downloaded")

    return download


@pytest.mark.usefixtures("plain_terminal_of_80_columns")
def test_tokens_from_the_hub_are_copied_and_described(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {f"{name}.bin": BYTES.encode(f"{name}<|endoftext|>{name}<|endoftext|>").astype("<u4").tobytes() for name in "ba"}
    monkeypatch.setattr(hub, "download", repository({**parts, "README.md": b"no data"}))
    monkeypatch.setattr(hub, "_CHUNK", 3)
    assert tiny.cli("prepare", "--hub", "someone/data", "-o", "out.bin") == 0
    assert Path("out.bin").read_bytes() == parts["a.bin"] + parts["b.bin"]
    meta = read_meta(Path("out.bin"))
    assert meta is not None and (meta.documents, meta.sources) == (4, ("a.bin", "b.bin"))
    capsys.readouterr()
    assert (
        tiny.cli("prepare", "--hub", "someone/data", "b.bin", "-o", "two.bin", "--validation", 0.5, "--stats", "--json") == 0
    )
    out, err = capsys.readouterr()
    told = json.loads(out)["statistics"]
    assert (told["tokens"], told["documents"], told["bytes"], told["bytes_per_token"]) == (4, 2, None, None)
    assert "text        -" in err


def test_text_from_the_hub_is_prepared_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a/1.jsonl": b'{"text": "x"}', "a/2.txt": b"y", "a/3.csv": b"z", "README.md": b"what these are"}
    monkeypatch.setattr(hub, "download", repository(files))
    assert tiny.cli("prepare", "--hub", "someone/data", "-o", "out.bin", "--tokenizer", "char") == 0
    meta = read_meta(Path("out.bin"))
    assert meta is not None and meta.sources == ("1.jsonl", "2.txt") and meta.vocab_size == 2


def test_a_data_set_without_text_is_refused(refused: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    repository({"a.csv": b"x", "README.md": b"what this is"})("someone/data", [])
    monkeypatch.setattr(hub, "download", lambda *_: Path("downloaded"))
    assert "--hub someone/data: has no file ending in .txt" in refused("--hub", "someone/data", "-o", "out.bin")


@pytest.mark.parametrize(
    ("content", "argv", "message"),
    [
        (b"12345", (), "a.bin: 5 bytes are no u32 tokens"),
        (b"", (), "a.bin: 0 bytes are no u32 tokens"),
        (b"1234", (), "is none of the 260 ids of byte; name the tokenizer it was made with (--tokenizer)"),
        (b"\0\0\0\0", ("--tokenizer", "char"), "--hub someone/data: holds tokens; name the --tokenizer they were made with"),
    ],
)
def test_what_the_hub_has_is_checked(
    refused: Refusal, content: bytes, argv: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository({"a.bin": content})("someone/data", [])
    monkeypatch.setattr(hub, "download", lambda *_: Path("downloaded"))
    assert message in refused("--hub", "someone/data", "-o", "out.bin", *argv)


def test_a_repository_is_downloaded_by_the_real_client_and_one_that_is_not_there_is_told(
    refused: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path.parent / "hub-cache"))
    tokens = BYTES.encode("a<|endoftext|>").astype("<u4").tobytes()
    with hub_stand_in.hub() as server, server.in_this_process():
        server.add("someone/data", {"a.bin": tokens, "notes.txt": b"text", "large.csv": b"never asked for"}, kind="dataset")
        assert tiny.cli("prepare", "--hub", "someone/data", "-o", "out.bin") == 0
        # The client's directory still has the tokens.
        assert tiny.cli("prepare", "--hub", "someone/data", "*.txt", "-o", "text.bin") == 0
        assert tiny.cli("prepare", "--hub", "someone/data", "a*", "-o", "again.bin") == 0
        assert "--hub someone/absent: " in refused("--hub", "someone/absent", "-o", "no.bin", code=1)
    assert Path("out.bin").read_bytes() == Path("again.bin").read_bytes() == tokens
    assert text_of("text.bin") == "text<|endoftext|>"


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        ([], ["a.txt", "d/README.md", "d/b.txt"]),
        (["*.txt"], ["a.txt", "d/b.txt"]),
        (["d/"], ["d/README.md", "d/b.txt"]),
        (["README.md", "a.txt"], ["README.md", "a.txt"]),
        (["b.txt"], []),
    ],
)
def test_patterns_of_the_hub_s_files_are_of_the_whole_path_and_the_card_is_no_data(
    patterns: list[str], found: list[str]
) -> None:
    for name in ("README.md", "a.txt", "d/README.md", "d/b.txt"):
        write(f"down/{name}")
    assert [path.relative_to("down").as_posix() for path in hub.files_in(Path("down"), patterns)] == found


def test_the_library_says_the_same_as_the_command_line() -> None:
    with pytest.raises(DataError, match="no such file"):
        pipeline.prepare(pipeline.PrepareOptions(["absent"], Path("out.bin")))
