"""A package, to the Hugging Face hub: by the hub's own client, in one commit, so that nobody ever sees half of it there.

What is large is uploaded first, under its digest; what is there already is not sent again. So an upload that was interrupted
goes on when it is started again.

The token opens an account: it stays inside `Token` and the client. No message has it, no exception of the client (whose
request has it) is kept as cause or context of ours, and nothing is written down.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oxidizr_ref.errors import OxidizrError, UsageError
from oxidizr_ref.interop.dotenv import read_dotenv
from oxidizr_ref.interop.package_check import CONFIG
from oxidizr_ref.version import __version__

ROOT, DOTENV = Path("hf"), Path(".env")

_NAME = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(f"{_NAME}/{_NAME}(?<!\\.git)")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
_AGAIN = "run the same command again: what was sent before is not sent twice"


# --- what, where to, as whom ------------------------------------------------------------------------------------------


def packages(root: Path = ROOT) -> list[Path]:
    """The packages that `pack` left: directories ``root/USER/NAME`` with a ``config.json``, sorted."""
    return sorted(path.parent for path in root.glob(f"*/*/{CONFIG}"))


def repo_name(directory: Path, given: str | None = None) -> str:
    """The repository a package goes to: the one given, else the last two parts of its path (``hf/USER/NAME``).

    Raises UsageError for what cannot be a repository's name.
    """
    name = given if given is not None else "/".join(Path(os.path.abspath(directory)).parts[-2:])
    if not _REPO.fullmatch(name):
        raise UsageError(f"{name!r} cannot be a repository's name; give one with --repo USER/NAME")
    return name


@dataclass(frozen=True)
class Token:
    """A token of the hub, and where it came from (in words, for messages)."""

    value: str = field(repr=False)
    source: str


def find_token(given: str | None = None, dotenv: Path = DOTENV) -> Token:
    """The token given, else HF_TOKEN of the environment, else of ``.env``, else that of the hub's own login.

    Raises UsageError when there is none, when it cannot be one, and for a ``.env`` that cannot be read.
    """
    for value, source in _tokens(given, dotenv):
        if value is None or (not value.strip() and source != "--token"):
            continue
        if not _TOKEN.fullmatch(value.strip()):
            raise UsageError(f"what {source} gives is no token (it is empty, or has spaces or letters no token has)")
        return Token(value.strip(), source)
    ways = "--token, HF_TOKEN in the environment or in .env, or `hf auth login`"
    raise UsageError(f"pushing needs a token with the right to write ({ways}); make one at {_endpoint()}/settings/tokens")


def _tokens(given: str | None, dotenv: Path) -> Iterator[tuple[str | None, str]]:
    yield given, "--token"
    yield os.environ.get("HF_TOKEN"), "HF_TOKEN"
    yield (read_dotenv(dotenv).get("HF_TOKEN") if dotenv.is_file() else None), f"HF_TOKEN in {dotenv}"
    yield _ask(_library().get_token, "the hub's login", None), "the hub's login"


# --- the hub ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A repository as it was found: ``commit`` is its branch's newest, None where there is no branch or no repository."""

    repo: str
    branch: str
    exists: bool
    private: bool
    commit: str | None

    def __str__(self) -> str:
        new = "" if self.commit else ", new branch" if self.exists else ", new"
        return f"{self.repo} ({'private' if self.private else 'public'}{new}), branch {self.branch}"


class Hub:
    """The hub, as whoever has this token sees it."""

    def __init__(self, token: Token) -> None:
        library = _library()
        library.utils.logging.set_verbosity_error()  # what the client tries again is its affair; what fails is told below
        if not sys.stderr.isatty():
            library.utils.disable_progress_bars()
        self._token = token
        self._api = library.HfApi(token=token.value, library_name="oxidizr-ref", library_version=__version__)

    def look_up(self, repo: str, branch: str | None = None, create: bool = False, private: bool = False) -> Target:
        """The repository to push to. ``create``: what is missing will be made, ``private`` or not.

        Raises UsageError when it is not there and is not to be made, when it is public but ``private`` is demanded, and when
        the token does not do; OxidizrError when the hub cannot be asked.
        """
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        branch = branch or "main"
        missing = (RepositoryNotFoundError, RevisionNotFoundError) if create else ()
        there = self._ask(lambda: self._api.model_info(repo), repo, missing)
        if there is None:
            return Target(repo, branch, False, private, None)
        if private and not there.private:
            raise UsageError(f"{repo} is there already, and public: make it private in its settings, or give another --repo")
        newest = self._ask(lambda: self._api.model_info(repo, revision=branch), f"{repo}, branch {branch}", missing)
        return Target(repo, branch, True, bool(there.private), newest and newest.sha)

    def push(self, directory: Path, names: list[str], target: Target) -> tuple[str, bool]:
        """Upload files of a package in one commit, making repository and branch if they are not there.

        Returns the address of what is there now, and whether anything changed. Raises as `look_up` does.
        """
        library, repo, branch = _library(), target.repo, target.branch
        if not target.exists:
            self._ask(lambda: self._api.create_repo(repo, private=target.private), repo)
        if target.commit is None and branch != "main":
            self._ask(lambda: self._api.create_branch(repo, branch=branch), repo)

        def commit() -> Any:
            files = [library.CommitOperationAdd(path_in_repo=name, path_or_fileobj=directory / name) for name in names]
            message = f"Upload with oxidizr-ref {__version__}"
            return self._api.create_commit(repo, files, commit_message=message, revision=branch)

        made = self._ask(commit, f"{repo}, branch {branch}")
        where = "" if branch == "main" else f"/tree/{branch}"
        return f"{_endpoint()}/{repo}{where}", made.oid != target.commit

    def _ask(self, call: Callable[[], Any], what: str, missing: tuple[type[Exception], ...] = ()) -> Any:
        return _ask(call, what, self._token, missing)


def _library() -> Any:
    """The client of the hub, an extra. Imported by whoever needs it: it takes a second."""
    try:
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError:
        raise UsageError('this needs the client of the hub: pip install "oxidizr-ref[hub]"') from None
    return huggingface_hub


def _endpoint() -> str:
    return str(_library().constants.ENDPOINT)


# --- what went wrong --------------------------------------------------------------------------------------------------


def _ask(call: Callable[[], Any], what: str, token: Token | None, missing: tuple[type[Exception], ...] = ()) -> Any:
    """What the client answers, or None for an error among ``missing``. Raises nothing but errors of this package."""
    try:
        return call()
    except missing:
        return None
    except Exception as error:
        failure = _explained(error, what, token)
    raise failure  # here, where the client's exception is no longer its context


def _explained(error: BaseException, what: str, token: Token | None) -> OxidizrError:
    """In our words, without the token, what the client raised."""
    chain = list(_chain(error))
    answer = next((answer for e in chain if (answer := getattr(e, "response", None)) is not None), None)
    if answer is not None:
        said = next((said for e in chain if (said := getattr(e, "server_message", None))), "")
        return _refused(answer.status_code, what, token, _without(token, said))
    if any(type(e).__name__ == "OfflineModeIsEnabled" for e in chain):
        return UsageError(f"{what}: HF_HUB_OFFLINE is set, so that the hub is not asked; unset it")
    if any(type(e).__module__.partition(".")[0] in _HTTP_LIBRARIES for e in chain):
        return OxidizrError(f"{what}: no connection to {_endpoint()} ({_without(token, chain[-1])}); {_AGAIN}")
    return OxidizrError(f"{what}: the upload failed ({type(error).__name__}: {_without(token, error)}); {_AGAIN}")


def _refused(status: int, what: str, token: Token | None, said: str) -> OxidizrError:
    whose = f"the token of {token.source}" if token else "the token"
    if status == 401:
        return UsageError(f"{what}: the hub does not know {whose} (401); make a new one at {_endpoint()}/settings/tokens")
    if status == 403:
        return UsageError(f"{what}: {whose} may not do this (403: {said}); it needs the right to write there")
    if status == 404:
        return UsageError(f"{what}: not there, or {whose} may not see it (404); --create-repo makes what is missing")
    if status in (409, 412):
        return OxidizrError(f"{what}: was changed by somebody else meanwhile ({status}: {said}); run the same command again")
    if status == 429:
        return OxidizrError(f"{what}: the hub has had too many requests (429); wait some minutes, then {_AGAIN}")
    if status >= 500:
        return OxidizrError(f"{what}: the hub itself failed ({status}); {_AGAIN}")
    return OxidizrError(f"{what}: the hub refused this ({status}: {said})")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _without(token: Token | None, said: object) -> str:
    """What others said, in one line of bearable length, with the token blotted out wherever it is echoed."""
    text = " ".join(str(said).split())
    if token is not None:
        text = text.replace(token.value, "(the token)")
    return text[:300] or "no reason given"
