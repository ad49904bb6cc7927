"""A stand-in for the Hugging Face hub: a real HTTP server on this machine, for the real client of huggingface_hub.

The usual ways to use it::

    with hub() as server:
        server.add("someone/data", {"train.bin": b"..."}, kind="dataset")      # a repository that is there already
        with server.in_this_process():                                         # the client here talks to it ...
            snapshot_download("someone/data", repo_type="dataset", cache_dir=tmp_path, token=WRITER)
        subprocess.run(command, env=tiny.environment(**server.environment(home=tmp_path)))  # ... or one elsewhere does
        assert server.repos["someone/model"].files()["config.json"] == b"{}"   # what a push left there
        assert "abc" in server.repos["datasets/someone/data"].files("branch")  # data sets, branches
        server.fail("PUT", "/store/", 403)                                     # the next such request; times=None: all
        server.fail("POST", "/commit/", 500, times=2)
        server.drop("PUT", "/store/", after=100_000)                           # hangs up in the middle of an upload
        server.drop("GET", "/cdn/", after=1_000)                               # ... or of a download
        assert server.received("PUT", "/store/") < 1_000                       # bytes of bodies, as counted by the server

It speaks what the client does without Xet: who am I, making repositories and branches, checking YAML, preupload, the LFS
batch with upload and verification (objects by their SHA-256, which is checked), commits in NDJSON, information, trees,
paths, refs, and files by HEAD and GET with ranges. Files of LFS are stored and served under another origin (``localhost``
beside ``127.0.0.1``), as on the hub: a request there that carries a token is an error, and is kept in `Hub.leaks`.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

#: Tokens the server knows: both are someone's, who belongs to the organization "group".
WRITER = "hf_testWriterWriterWriterWriterWriter00"
READER = "hf_testReaderReaderReaderReaderReader00"
USER, GROUP = "someone", "group"

LFS_SUFFIXES = (".safetensors", ".bin", ".zst", ".gz", ".model")
LFS_BYTES = 10 << 20


@dataclass(frozen=True)
class File:
    """What a commit has under a name."""

    data: bytes = field(repr=False)
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """The name git gives it: of an LFS file, that of its pointer."""
        data = self.data
        if self.lfs:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def described(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.oid, **lfs}


Tree = dict[str, File]


@dataclass
class Repo:
    """A repository: every commit's files, and which commit each branch is at."""

    name: str
    kind: str
    private: bool
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def tree(self, revision: str = "main") -> Tree:
        return self.commits[self.branches.get(revision, revision)]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in sorted(self.tree(revision).items())}

    def commit(self, branch: str, tree: Tree, message: str) -> str:
        parts = [self.branches.get(branch, ""), message, *(f"{path} {tree[path].oid}" for path in sorted(tree))]
        oid = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[oid], self.branches[branch] = dict(tree), oid
        self.messages.append(message)
        return oid


@dataclass
class Fault:
    """What happens to the next ``times`` requests (None: to all) of this method whose path matches."""

    method: str
    pattern: str
    status: int | None  # None: the server hangs up
    times: int | None
    after: int = 0  # bytes of the body, before it hangs up
    message: str | None = None
    released: threading.Event | None = None  # what it waits for, before it hangs up


@dataclass(frozen=True)
class Request:
    """A request as the server saw it: ``size`` bytes of body were received, and ``status`` sent back (0: nothing)."""

    method: str
    path: str
    size: int
    status: int


class Hub:
    """The server's state, and what tests do with it. See the module's text."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.leaks: list[str] = []
        self.tokens = {WRITER: "write", READER: "read"}
        self.lock = threading.RLock()
        self.port = 0

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def store(self) -> str:
        """Where LFS files are kept: another origin."""
        return f"http://localhost:{self.port}"

    def add(self, name: str, files: Mapping[str, bytes] | None = None, kind: str = "model", private: bool = False) -> Repo:
        """Make a repository; ``files`` are its first commit."""
        repo = Repo(name, kind, private)
        repo.commit("main", {path: File(data, is_lfs(path, len(data))) for path, data in (files or {}).items()}, "first")
        self.objects |= {file.sha256: file.data for file in repo.tree().values() if file.lfs}
        self.repos[name if kind == "model" else f"{kind}s/{name}"] = repo
        return repo

    def fail(self, method: str, pattern: str, status: int, times: int | None = 1, message: str | None = None) -> None:
        """Answer the next requests of this method whose path matches ``pattern`` with an error."""
        self.faults.append(Fault(method, pattern, status, times, message=message))

    def drop(self, method: str, pattern: str, after: int = 0, times: int | None = 1) -> None:
        """Hang up on them, after that many bytes of the body: of a GET the one sent, otherwise the one received."""
        self.faults.append(Fault(method, pattern, None, times, after))

    def hold(self, method: str, pattern: str) -> threading.Event:
        """Read no body of such a request, and hang up when the event is set that is returned (after a minute at last)."""
        released = threading.Event()
        self.faults.append(Fault(method, pattern, None, None, released=released))
        return released

    def received(self, method: str = "", pattern: str = "") -> int:
        """Bytes of all bodies received with such requests, those broken off included."""
        return sum(r.size for r in self.requests if method in ("", r.method) and re.search(pattern, r.path))

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables with which another process takes this for the hub; its client keeps files below ``home``."""
        names = {"HF_ENDPOINT": self.url, "HF_HOME": str(home / "huggingface"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        return {**names, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token or "", "HUGGING_FACE_HUB_TOKEN": ""}

    @contextmanager
    def in_this_process(self) -> Iterator[Hub]:
        """Inside this context the client of this process takes this for the hub, is not logged in, and does not wait
        before it tries again."""
        from huggingface_hub import constants, file_download
        from huggingface_hub.utils import _http

        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, self.url)
        hurried = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        _http.close_session()
        try:
            with (
                mock.patch.multiple(constants, ENDPOINT=self.url, HUGGINGFACE_CO_URL_TEMPLATE=template),
                mock.patch.multiple(constants, HF_HUB_DISABLE_XET=True, HF_TOKEN_PATH=os.devnull),
                mock.patch.object(_http, "time", hurried),
                mock.patch.object(file_download, "time", hurried),
                mock.patch.dict(os.environ, {"NO_PROXY": "*", "HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": ""}),
                warnings.catch_warnings(),
            ):
                warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # the client's own affair
                yield self
        finally:
            _http.close_session()


def is_lfs(path: str, size: int) -> bool:
    """Whether the hub keeps such a file outside git."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES


@contextmanager
def hub() -> Iterator[Hub]:
    """The server, at work in this context. See the module's text."""
    from hub_protocol import Handler  # which needs what is above

    state = Hub()
    connections: set[socket.socket] = set()
    handler = type("HandlerOfThis", (Handler,), {"hub": state, "connections": connections})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False  # closing the server waits for them
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="hub stand-in")
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        for connection in list(connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)  # ends the wait for another request
            except OSError:
                continue  # closed already
        server.server_close()
        thread.join()
