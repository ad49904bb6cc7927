"""``oxidizr-ref push``, with the hub's real client over real HTTP: what arrives, what is refused, and no token anywhere."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import hub_stand_in
import pytest
import tiny
import typer
from hub_stand_in import READER, WRITER, Hub, hub
from packages import make_package

from oxidizr_ref.cli import main as cli_main
from oxidizr_ref.cli import push as cli_push
from oxidizr_ref.errors import OxidizrError, UsageError
from oxidizr_ref.interop import push as pushing
from oxidizr_ref.interop.push import Token, find_token, packages, repo_name

pytest.importorskip("huggingface_hub")

REPO = "someone/model"
PACKAGE = f"hf/{REPO}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("made") / "package")


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with one package in it."""
    shutil.copytree(made, tmp_path / PACKAGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server() -> Iterator[Hub]:
    """The stand-in for the hub, which the client of this process talks to."""
    with hub() as server, server.in_this_process():
        yield server


class Result:
    """What a command ended with and wrote."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The error, which is one line."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and self.err.endswith(f"{lines[0]}\n") and self.out == "", self.err
        assert "(unexpected" not in lines[0]
        return lines[0]


#: The command line with no other command: making them all anew for every call takes most of the time.
ONLY_PUSH = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ONLY_PUSH.command()(cli_push.push)
ONLY_PUSH.callback()(lambda: None)


class Push:
    """Runs ``oxidizr-ref push`` with arguments; the package and a token that may write are added, and nothing is asked."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *argv: object, token: str | None = WRITER, asks: bool = False) -> Result:
        self.capsys.readouterr()
        given = [] if token is None else ["--token", token]
        with mock.patch.object(cli_main, "app", ONLY_PUSH):
            code = tiny.cli("push", *([] if asks else ["-m", PACKAGE, "--yes"]), *given, *argv)
        result = Result(code, *self.capsys.readouterr())
        assert token is None or token not in result.out + result.err
        return result


@pytest.fixture
def push(place: Path, server: Hub, capsys: pytest.CaptureFixture[str]) -> Push:
    del place, server  # where the command runs, and whom it talks to
    return Push(capsys)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def changes(server: Hub) -> list[str]:
    """The requests that change something there, if they succeed."""
    changing = r"/store/|/commit/|/branch/|/repos/create"
    return [f"{r.method} {r.path}" for r in server.requests if re.search(changing, r.path)]


# --------------------------------------------------------------------------------------------------------------- it works


def test_a_package_arrives_whole_in_one_commit_and_its_address_is_printed(push: Push, server: Hub, place: Path) -> None:
    result = push("--create-repo")
    assert (result.code, result.out) == (0, f"{server.url}/{REPO}\n")
    repo = server.repos[REPO]
    assert repo.files() == files_of(place / PACKAGE)
    assert repo.messages[1:] == [f"Upload with oxidizr-ref {pushing.__version__}"] and not repo.private
    assert repo.tree()["model.safetensors"].lfs and not repo.tree()["config.json"].lfs
    assert server.leaks == []
    assert "7 files" in result.err and f"from {PACKAGE} to {REPO} (public, new), branch main" in result.err


def test_what_is_downloaded_again_is_the_package(push: Push, server: Hub, place: Path) -> None:
    from huggingface_hub import snapshot_download

    assert push("--create-repo", "--private").code == 0
    assert server.repos[REPO].private
    assert files_of(Path(snapshot_download(REPO, cache_dir=place / "cache", token=READER))) == files_of(place / PACKAGE)


def test_a_second_push_sends_what_changed_and_a_third_nothing(push: Push, server: Hub, place: Path) -> None:
    assert push("--create-repo").code == 0
    (place / PACKAGE / "README.md").write_text("---\nlicense: mit\n---\nchanged\n")
    server.requests.clear()
    assert push().code == 0
    assert server.received("PUT") == 0 and server.repos[REPO].files() == files_of(place / PACKAGE)
    server.requests.clear()
    result = push()
    assert (result.code, result.out) == (0, f"{server.url}/{REPO}\n") and "everything was there already" in result.err
    assert changes(server) == [] and len(server.repos[REPO].messages) == 3


def test_another_repository_and_a_branch(push: Push, server: Hub, place: Path) -> None:
    server.add("group/other", {"old.txt": b"old"})
    assert "branch draft: not there" in push("--repo", "group/other", "--revision", "draft").error
    assert changes(server) == []
    result = push("--repo", "group/other", "--revision", "draft", "--create-repo")
    assert (result.code, result.out) == (0, f"{server.url}/group/other/tree/draft\n") and "new branch" in result.err
    repo = server.repos["group/other"]
    assert repo.files() == {"old.txt": b"old"}
    assert repo.files("draft") == {"old.txt": b"old", **files_of(place / PACKAGE)}
    assert push("--repo", "group/other", "--revision", "draft").code == 0


def test_shards_and_files_in_folders(push: Push, server: Hub, place: Path) -> None:
    shutil.rmtree(place / PACKAGE)
    make_package(place / PACKAGE, shards=3)
    (place / PACKAGE / "more").mkdir()
    (place / PACKAGE / "more" / "notes.txt").write_text("notes")
    assert push("--create-repo").code == 0
    assert server.repos[REPO].files() == files_of(place / PACKAGE)


# ------------------------------------------------------------------------------------------------- before anything is sent


def test_a_package_with_problems_is_not_uploaded_and_each_is_told(push: Push, server: Hub, place: Path) -> None:
    (place / PACKAGE / "README.md").unlink()
    (place / PACKAGE / ".env").write_text(f"HF_TOKEN={WRITER}\n")
    result = push("--create-repo")
    assert result.code == 1 and result.error == f"error: {PACKAGE}: 2 problems; nothing was uploaded"
    assert f"{PACKAGE}/README.md: missing\n" in result.err and f"{PACKAGE}/.env: may hold secrets" in result.err
    assert server.requests == []
    assert "no such directory" in push("-m", "nowhere/to/go").error


def test_a_public_repository_is_refused_where_a_private_one_is_demanded(push: Push, server: Hub) -> None:
    server.add(REPO)
    assert "is there already, and public" in push("--private", "--create-repo").error
    assert changes(server) == []


NOT_NAMES = ["model", "a/b/c", "../model", "a//b", "-a/b", "a/b.", "a/x--y", "a/x..y", "a/b.git", "a b/c", ""]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_a_name_that_no_repository_has(push: Push, server: Hub, name: str) -> None:
    result = push("--repo", name)
    assert result.code == 2 and "give one with --repo USER/NAME" in result.error
    assert server.requests == []


def test_the_repository_is_the_last_two_folders_of_the_package(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repo_name(Path(PACKAGE)) == REPO
    assert repo_name(place / PACKAGE) == REPO
    monkeypatch.chdir(PACKAGE)
    assert repo_name(Path()) == REPO
    assert repo_name(Path(), "a/b") == "a/b"


# -------------------------------------------------------------------------------------------------------------- it asks


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_asks_before_it_uploads(push: Push, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    result = push("-m", PACKAGE, "--create-repo", asks=True)
    assert result.code == 1 and "nothing was uploaded" in result.err and changes(server) == []
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert push("-m", PACKAGE, "--create-repo", asks=True).code == 0
    assert server.repos[REPO].files()


def test_it_lists_packages_to_choose_from(push: Push, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(PACKAGE, "hf/group/another")
    Path("hf/group/no package").mkdir()
    assert packages() == [Path("hf/group/another"), Path(PACKAGE)]
    monkeypatch.setattr(sys, "stdin", Terminal("2\ny\n"))
    result = push("--create-repo", asks=True)
    assert result.code == 0 and "  1  hf/group/another\n  2  hf/someone/model\n" in result.err
    assert list(server.repos) == [REPO]
    monkeypatch.setattr(sys, "stdin", Terminal("3\n"))
    assert "expected a number from 1 to 2" in push(asks=True).err


def test_without_a_terminal_it_asks_nothing_and_says_what_to_give(
    push: Push, server: Hub, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert "-m DIR" in push(asks=True).error
    assert "--yes" in push("-m", PACKAGE, "--create-repo", asks=True).error
    assert changes(server) == []
    shutil.rmtree(place / "hf")
    assert "oxidizr-ref pack" in push(asks=True).error


# ------------------------------------------------------------------------------------------------------------- the token


@pytest.mark.usefixtures("server")
def test_where_a_token_comes_from(place: Path) -> None:
    from huggingface_hub import constants

    login = place / "login"
    login.write_text("hf_login\n")
    with pytest.raises(UsageError, match=r"--token, HF_TOKEN .* or `hf auth login`.*/settings/tokens"):
        find_token()
    with mock.patch.object(constants, "HF_TOKEN_PATH", str(login)):
        assert find_token() == Token("hf_login", "the hub's login")
    Path(".env").write_text("HF_TOKEN='hf_dotenv'\n")
    assert find_token() == Token("hf_dotenv", "HF_TOKEN in .env")
    with mock.patch.dict(os.environ, HF_TOKEN="hf_environment "):
        assert find_token() == Token("hf_environment", "HF_TOKEN")
        assert find_token("hf_given") == Token("hf_given", "--token")
    assert repr(find_token("hf_given")) == "Token(source='--token')"


@pytest.mark.parametrize("token", ["", " ", "hf_a b", "hf_a\nb", "hf_ä", "hf_\x1b[0m", "hf_a\0"])
def test_what_cannot_be_a_token_is_refused_before_it_goes_anywhere(push: Push, server: Hub, token: str) -> None:
    result = push("--token", token, token=None)
    assert result.code == 2 and "--token gives is no token" in result.error
    assert server.requests == [] and (not token.strip() or token not in result.err)


def test_a_malformed_dotenv_is_named_and_not_shown(push: Push, server: Hub) -> None:
    Path(".env").write_text(f"HF_TOKEN: {WRITER}\n")
    result = push("--debug", token=None)
    assert ".env:1: expected KEY=VALUE" in result.error and "Traceback" in result.err
    assert WRITER not in result.err and server.requests == []


#: What fails, with which status, and what is said of it.
FAILURES: dict[str, tuple[tuple[str, str, int], int, str]] = {
    "unknown token": (("GET", "/api/models/", 401), 2, r"does not know the token of --token \(401\).*/settings/tokens"),
    "unknown token, later": (("POST", "/commit/", 401), 2, r"does not know the token of --token \(401\)"),
    "no right to look": (("GET", "/api/models/", 403), 2, "may not do this"),
    "no right to write": (("POST", "/preupload/", 403), 2, "right to write"),
    "no right to store": (("PUT", "/store/", 403), 2, "may not do this"),
    "gone": (("POST", "/commit/", 404), 2, "--create-repo makes what is missing"),
    "changed meanwhile": (("POST", "/commit/", 409), 1, "somebody else meanwhile"),
    "changed meanwhile, too": (("POST", "/commit/", 412), 1, "somebody else meanwhile"),
    "refused": (("POST", "/commit/", 400), 1, "refused this"),
    "too much": (("POST", "/lfs/objects/batch", 413), 1, "refused this"),
    "too many": (("POST", "/commit/", 429), 1, "wait some minutes"),
    "failed at once": (("GET", "/api/models/", 500), 1, r"failed \(500\); run the same command again"),
    "failed in the store": (("PUT", "/store/", 503), 1, r"failed \(503\); run the same command again"),
    "failed at last": (("POST", "/commit/", 502), 1, r"failed \(502\)"),
    "no sense in the header": (("POST", "/validate-yaml", 400), 1, "refused this"),
    "cut off at once": (("GET", "/api/models/", 0), 1, "no connection to http"),
    "cut off in the store": (("PUT", "/store/", 0), 1, "no connection to http.*is not sent twice"),
    "cut off at last": (("POST", "/commit/", 0), 1, "no connection to http"),
}


def arrange(server: Hub, failure: str) -> None:
    """The failure, whose message has the token, as that of a careless server would."""
    method, pattern, status = FAILURES[failure][0]
    if status:
        server.fail(method, pattern, status, times=None, message=f"no\nway for Bearer {WRITER}")
    else:
        server.drop(method, pattern, times=None)


@pytest.mark.parametrize("failure", FAILURES)
def test_every_failure_is_a_line_that_says_what_to_do_and_never_shows_the_token(
    push: Push, server: Hub, place: Path, failure: str
) -> None:
    _, code, said = FAILURES[failure]
    server.add(REPO, {"old.txt": b"old"})
    arrange(server, failure)
    result = push("--debug")  # which itself makes sure that the token is not shown
    assert result.code == code and re.search(said, result.error), result.error
    assert "Traceback" in result.err
    assert server.repos[REPO].files() == {"old.txt": b"old"}  # nothing half is ever to be seen
    with pytest.raises(OxidizrError) as caught:
        to = pushing.Hub(Token(WRITER, "--token"))
        to.push(place / PACKAGE, sorted(files_of(place / PACKAGE)), to.look_up(REPO))
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert WRITER not in f"{caught.value!r} {vars(caught.value)}"
    server.faults.clear()
    assert push().code == 0


def test_a_token_that_may_only_read(push: Push, server: Hub) -> None:
    server.add(REPO)
    assert "may not do this (403" in push(token=READER).error
    assert "may not do this (403" in push("--repo", "someone/new", "--create-repo", token=READER).error
    assert server.repos[REPO].files() == {} and list(server.repos) == [REPO]


def test_a_repository_that_is_not_there_or_somebody_else_s(push: Push, server: Hub) -> None:
    server.add("stranger/model", private=True)
    assert "--create-repo makes what is missing" in push().error
    assert "--create-repo makes what is missing" in push("--repo", "stranger/model").error
    assert "may not do this (403" in push("--repo", "stranger/model", "--create-repo").error
    assert server.repos["stranger/model"].files() == {}


def test_a_file_that_went_away_meanwhile(push: Push, server: Hub) -> None:
    server.add(REPO)
    listed = mock.patch.object(cli_push, "package_files", return_value=["README.md", "gone.json"])
    with listed, mock.patch.object(cli_push, "_show"):
        result = push()
    assert result.code == 1 and "gone.json" in result.error and changes(server) == []


def test_no_network(push: Push) -> None:
    from huggingface_hub import constants

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with mock.patch.object(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}"):
            result = push()
    assert result.code == 1 and "no connection to http://127.0.0.1" in result.error
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
        assert "HF_HUB_OFFLINE is set" in push().error


def test_a_missing_extra_is_named(push: Push) -> None:
    with mock.patch.dict(sys.modules, {"huggingface_hub": None}):
        result = push()
    assert result.code == 2 and 'pip install "oxidizr-ref[hub]"' in result.error


# ---------------------------------------------------------------------------------------------------------- interruptions


def large_package(directory: Path) -> tuple[Path, int]:
    """Three shards of about the same size, and how large the whole is."""
    package = make_package(directory, shards=3, hidden_size=64, num_heads=4, intermediate_size=4096, num_layers=3)
    return package, sum(path.stat().st_size for path in package.iterdir())


def test_an_upload_that_was_cut_off_goes_on_with_what_is_missing(push: Push, server: Hub, place: Path) -> None:
    shutil.rmtree(place / PACKAGE)
    large_package(place / PACKAGE)
    last = hub_stand_in.File((place / PACKAGE / "model-00003-of-00003.safetensors").read_bytes(), True)
    server.drop("PUT", last.sha256, after=len(last.data) // 2, times=None)
    assert "no connection" in push("--create-repo").error
    assert server.repos[REPO].files() == {}
    server.faults.clear()
    server.requests.clear()
    assert push().code == 0
    assert server.received("PUT") == len(last.data)
    assert server.repos[REPO].files() == files_of(place / PACKAGE)


def pushing_elsewhere(server: Hub, place: Path, **environment: str) -> subprocess.Popen[str]:
    argv = ["push", "-m", PACKAGE, "--yes", "--debug"]
    return tiny.start(argv, place, {**server.environment(place / "home", WRITER), **environment})


@pytest.mark.thorough
def test_an_upload_that_was_killed_goes_on_and_leaves_the_token_nowhere(place: Path) -> None:
    shutil.rmtree(place / PACKAGE)
    _, whole = large_package(place / PACKAGE)
    shards = sorted((place / PACKAGE).glob("*.safetensors"))
    last = hub_stand_in.File(shards[-1].read_bytes(), True)
    with hub() as server:
        server.add(REPO)
        released = server.hold("PUT", last.sha256)
        process = pushing_elsewhere(server, place)
        while len(server.objects) < len(shards) - 1:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        out, err = tiny.finish(process, -signal.SIGKILL)
        released.set()
        assert WRITER not in out + err and server.repos[REPO].files() == {}
        first = server.received()
        server.faults.clear()
        server.requests.clear()
        out, err = tiny.finish(pushing_elsewhere(server, place))
        assert out == f"{server.url}/{REPO}\n" and WRITER not in err
        assert server.repos[REPO].files() == files_of(place / PACKAGE)
        assert server.received("PUT") == len(last.data) and server.received() < 0.4 * whole < first
    kept = [path for path in place.rglob("*") if path.is_file() and WRITER.encode() in path.read_bytes()]
    assert kept == []


def test_another_process_says_nothing_of_its_token_even_when_told_to_log_everything(place: Path) -> None:
    with hub() as server:
        server.add(REPO)
        arrange(server, "no right to store")
        out, err = tiny.finish(pushing_elsewhere(server, place, HF_DEBUG="1", HF_HUB_VERBOSITY="debug"), 2)
    assert "Traceback" in err and "error: " in err and WRITER not in out + err
