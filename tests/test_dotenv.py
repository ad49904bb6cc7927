"""Files of settings: what a line may be, and that nothing of a malformed one is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref.errors import UsageError
from oxidizr_ref.interop.dotenv import read_dotenv, setting

LINES = {
    "A=b": {"A": "b"},
    "A = b c  ": {"A": "b c"},
    "  export A=b": {"A": "b"},
    "export\tA_1=b": {"A_1": "b"},
    "exported=b": {"exported": "b"},
    "A=b=c": {"A": "b=c"},
    "A=b#c": {"A": "b#c"},
    "A=b # it's a comment": {"A": "b"},
    "A=\t# a comment": {"A": ""},
    "A=": {"A": ""},
    "A=''": {"A": ""},
    "A='b # c' # d": {"A": "b # c"},
    "A='b\\n'": {"A": "b\\n"},
    'A="b # c"': {"A": "b # c"},
    r'A="1\n2\t3\r4\"5\\6\$7"': {"A": '1\n2\t3\r4"5\\6$7'},
    'A="it\'s"': {"A": "it's"},
    "A=ü": {"A": "ü"},
    "# A=b": {},
    "": {},
    " \t": {},
}
MALFORMED = [
    "A",
    "A b",
    "1A=b",
    "A-B=c",
    "=b",
    "export A",
    "A=#b",
    "A='b",
    'A="b',
    "A=b'c",
    "A='b'c",
    "A='b' c",
    "A='b'#c",
    'A="b\\"',
    "A=b; B=c 'd'",
    "A: b'",
]


@pytest.fixture
def dotenv(tmp_path: Path) -> Path:
    return tmp_path / ".env"


@pytest.mark.parametrize("line", LINES)
def test_a_line(dotenv: Path, line: str) -> None:
    dotenv.write_text(line, encoding="utf-8")
    assert read_dotenv(dotenv) == LINES[line]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_of_any_system_with_a_byte_order_mark_or_without(dotenv: Path, end: str, mark: str) -> None:
    dotenv.write_bytes((mark + end.join(["HF_USERNAME=me", "# c", "HF_TOKEN='t'", "HF_USERNAME=you", ""])).encode())
    assert read_dotenv(dotenv) == {"HF_USERNAME": "you", "HF_TOKEN": "t"}


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_line_is_named_and_not_shown(dotenv: Path, line: str) -> None:
    dotenv.write_text(f"A=1\n\nB=2\n{line.replace('b', 'SECRET')}\nC=3\n")
    with pytest.raises(UsageError) as caught:
        read_dotenv(dotenv)
    said = str(caught.value)
    assert said.startswith(f"{dotenv}:4: expected KEY=VALUE") and "SECRET" not in said
    assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize("data", [b"A=\xff", b"A=\0b", b"#" * (2 << 20)])
def test_what_is_no_text_of_settings(dotenv: Path, data: bytes) -> None:
    dotenv.write_bytes(data)
    with pytest.raises(UsageError):
        read_dotenv(dotenv)


def test_a_long_line_takes_no_time(dotenv: Path) -> None:
    for line in ("A=" + " " * 900_000 + "'", "A='" + "\\" * 900_000, 'A="' + "\\" * 900_001, "A" * 900_000):
        dotenv.write_text(line)
        with pytest.raises(UsageError):
            read_dotenv(dotenv)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_dotenv(path)


def test_the_environment_wins_and_an_empty_value_is_none(dotenv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_USERNAME", raising=False)
    assert setting("HF_USERNAME", dotenv) is None
    dotenv.write_text("HF_USERNAME=of the file\nEMPTY=\n")
    assert setting("HF_USERNAME", dotenv) == "of the file"
    assert setting("EMPTY", dotenv) is None
    monkeypatch.setenv("HF_USERNAME", "")
    assert setting("HF_USERNAME", dotenv) == "of the file"
    monkeypatch.setenv("HF_USERNAME", "of the environment")
    assert setting("HF_USERNAME", dotenv) == "of the environment"
    dotenv.write_text("malformed")
    assert setting("HF_USERNAME", dotenv) == "of the environment"  # the file is not even read


@given(st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), st.text(st.characters(codec="utf-8"))))
def test_whatever_is_written_in_double_quotes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, settings: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.env"
    escapes = {"\n": "\\n", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
    settings = {key: value.replace("\0", "") for key, value in settings.items()}
    lines = [f'{key}="{"".join(escapes.get(c, c) for c in value)}"' for key, value in settings.items()]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    assert read_dotenv(path) == settings


@given(st.binary(max_size=60))
def test_any_bytes_are_settings_or_refused_in_a_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.env"
    path.write_bytes(data)
    try:
        read = read_dotenv(path)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert json.dumps(read)
