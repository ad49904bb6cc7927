"""What the stand-in for the hub answers: the requests of huggingface_hub's client, one method each. See `hub_stand_in`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml
from hub_stand_in import GROUP, USER, Fault, File, Hub, Repo, Request, Tree, is_lfs

_REPO = r"(?P<prefix>datasets/)?(?P<name>[^/]+/[^/]+?)"
_API = r"/api/(?P<kinds>models|datasets)/(?P<name>[^/]+/[^/]+)"
_AT = r"/(?P<revision>[^/]+)"
#: Method and path of what is asked for, and the method of `Handler` that answers.
_ROUTES = {
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate",
    rf"POST {_API}/preupload{_AT}": "preupload",
    rf"POST {_API}/commit{_AT}": "commit",
    rf"POST {_API}/branch{_AT}": "branch",
    rf"POST {_API}/paths-info{_AT}": "paths",
    rf"GET {_API}/refs": "refs",
    rf"GET {_API}/tree{_AT}(?:/(?P<path>.*))?": "tree",
    rf"GET {_API}(?:/revision{_AT})?": "info",
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": "batch",
    rf"POST /{_REPO}\.git/info/lfs/objects/verify": "verify",
    r"PUT /store/(?P<oid>[0-9a-f]{64})": "put",
    r"GET /cdn/(?P<oid>[0-9a-f]{64})": "cdn",
    rf"GET /{_REPO}/resolve{_AT}/(?P<path>.+)": "resolve",
}


class _Error(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _HangUp(Exception):  # noqa: N818 - no error, but what the test wants
    """The connection ends here, without an answer."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # the answer goes out in two parts, and the second would wait for 40 ms
    hub: Hub
    connections: set[socket.socket]

    def setup(self) -> None:
        super().setup()
        self.connections.add(self.connection)

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._body = b""
        split = urlsplit(self.path)
        self._query = parse_qs(split.query)
        try:
            fault = self._fault(split.path)
            self._body = self._read(fault if fault and fault.status is None and self.command != "GET" else None)
            self._cut = fault.after if fault and fault.status is None else None
            if fault and fault.status is not None:
                raise _Error(fault.status, fault.message or f"as the test wants it: {fault.status}")
            self._route(split.path)
        except _Error as error:
            headers = {"X-Error-Message": error.message.encode("ascii", "replace").decode().replace("\n", " ")}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._json({"error": error.message}, error.status, headers)
        except (_HangUp, ConnectionError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _fault(self, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.method == self.command and re.search(fault.pattern, path) and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def _read(self, cut: Fault | None) -> bytes:
        """The body, whole; if it is to be cut, so much of it as the fault says, and then the line goes dead."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            raise _Error(411, "the stand-in needs a Content-Length")
        length = int(self.headers.get("Content-Length", 0))
        self._body = self.rfile.read(length if cut is None else min(length, cut.after))
        if cut is not None:
            self._note(0)
            if cut.released is not None:
                cut.released.wait(60)
            raise _HangUp
        return self._body

    def _route(self, path: str) -> None:
        asked = f"{'GET' if self.command == 'HEAD' else self.command} {path}"
        for pattern, name in _ROUTES.items():
            if match := re.fullmatch(pattern, asked):
                parts = {key: unquote(value or "") for key, value in match.groupdict().items()}
                with self.hub.lock:
                    answer: Callable[[], None] = getattr(self, f"_{name}")(**parts)
                return answer()
        raise _Error(404, f"the stand-in knows no {asked}")

    # --- answering

    def _note(self, status: int) -> None:
        """Before the answer: whoever has it shall find the request among those that were made."""
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, urlsplit(self.path).path, len(self._body), status))

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._note(status)
        self.send_response(status)
        for key, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            cut = getattr(self, "_cut", None)
            self.wfile.write(body if cut is None else body[:cut])
            if cut is not None and cut < len(body):
                raise _HangUp

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _later(self, value: Any) -> Callable[[], None]:
        return lambda: self._json(value)

    # --- who asks, and for what

    def _role(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        role = self.hub.tokens.get(header.removeprefix("Bearer "))
        if role is None:
            raise _Error(401, "Invalid credentials in Authorization header")
        return role

    def _may_write(self, name: str) -> None:
        role = self._role()
        if role is None:
            raise _Error(401, "Invalid username or password.")
        if role != "write" or name.partition("/")[0] not in (USER, GROUP):
            raise _Error(403, "You don't have the rights to write to this repository")

    def _repo(self, name: str, dataset: bool, writing: bool = False) -> Repo:
        role = self._role()
        repo = self.hub.repos.get(f"datasets/{name}" if dataset else name)
        if repo is None or (repo.private and (role is None or name.partition("/")[0] not in (USER, GROUP))):
            raise _Error(404 if role else 401, "Repository not found", "RepoNotFound")
        if writing:
            self._may_write(name)
        return repo

    def _at(self, repo: Repo, revision: str) -> Tree:
        try:
            return repo.tree(revision or "main")
        except KeyError:
            raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    # --- the requests, each under the lock; what comes back is done without it

    def _whoami(self) -> Callable[[], None]:
        role = self._role()
        if role is None:
            raise _Error(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return self._later({"type": "user", "name": USER, "orgs": [{"type": "org", "name": GROUP}], "auth": auth})

    def _create(self) -> Callable[[], None]:
        asked = json.loads(self._body)
        name, kind = f"{asked.get('organization') or USER}/{asked['name']}", asked.get("type") or "model"
        self._may_write(name)
        key = name if kind == "model" else f"{kind}s/{name}"
        if key in self.hub.repos:
            raise _Error(409, "You already created this model repo")
        self.hub.add(name, {}, kind, asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._later({"url": f"{self.hub.url}/{key}", "name": name})

    def _validate(self) -> Callable[[], None]:
        front = re.match(r"---\n(.*?\n)---\n", json.loads(self._body)["content"], re.DOTALL)
        try:
            sound = front is None or isinstance(yaml.safe_load(front[1]), dict)
        except yaml.YAMLError:
            sound = False
        errors = [] if sound else [{"message": "metadata is not YAML"}]
        return lambda: self._json({"errors": errors, "warnings": []}, 200 if sound else 400)

    def _preupload(self, kinds: str, name: str, revision: str) -> Callable[[], None]:
        tree = self._at(self._repo(name, kinds == "datasets", writing=True), revision)
        files = []
        for asked in json.loads(self._body)["files"]:
            path, there = asked["path"], tree.get(asked["path"])
            oid = None if there is None else there.sha256 if there.lfs else there.oid
            mode = "lfs" if is_lfs(path, asked["size"]) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._later({"files": files, "commitOid": ""})

    def _batch(self, prefix: str, name: str) -> Callable[[], None]:
        self._repo(name, bool(prefix), writing=True)
        objects = []
        for asked in json.loads(self._body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.store}/store/{asked['oid']}?size={asked['size']}&signature=1"},
                "verify": {"href": f"{self.hub.url}/{prefix}{name}.git/info/lfs/objects/verify"},
            }
            there = asked["oid"] in self.hub.objects
            objects.append({**asked, "authenticated": True, **({} if there else {"actions": actions})})
        return self._later({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> Callable[[], None]:
        self._no_token_here()
        if str(len(self._body)) not in self._query.get("size", []) or hashlib.sha256(self._body).hexdigest() != oid:
            raise _Error(400, "the bytes are not those that were announced")
        self.hub.objects[oid] = self._body
        return lambda: self._send(200, b"", {})

    def _verify(self, prefix: str, name: str) -> Callable[[], None]:
        self._repo(name, bool(prefix), writing=True)
        asked = json.loads(self._body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise _Error(404, "no such object")
        return self._later({})

    def _commit(self, kinds: str, name: str, revision: str) -> Callable[[], None]:
        repo = self._repo(name, kinds == "datasets", writing=True)
        tree = dict(self._at(repo, revision))
        if revision not in repo.branches:
            raise _Error(400, "a commit needs a branch")
        message = ""
        for line in self._body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", repo.branches[revision]) != repo.branches[revision]:
                    raise _Error(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Error(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                tree[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
            elif item["key"] == "deletedFile":
                del tree[value["path"]]
            else:
                tree = {path: file for path, file in tree.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        oid = repo.commit(revision, tree, message)
        url = f"{self.hub.url}/{'datasets/' if kinds == 'datasets' else ''}{name}/commit/{oid}"
        return self._later({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _branch(self, kinds: str, name: str, revision: str) -> Callable[[], None]:
        repo = self._repo(name, kinds == "datasets", writing=True)
        if revision in repo.branches:
            raise _Error(409, "Reference already exists")
        tree_of = json.loads(self._body or b"{}").get("startingPoint", "main")
        self._at(repo, tree_of)
        repo.branches[revision] = repo.branches.get(tree_of, tree_of)
        return self._later({})

    def _info(self, kinds: str, name: str, revision: str) -> Callable[[], None]:
        repo = self._repo(name, kinds == "datasets")
        tree = self._at(repo, revision)
        sizes = "blobs" in self._query
        siblings = [{"rfilename": path, **({"size": len(tree[path].data)} if sizes else {})} for path in sorted(tree)]
        sha = repo.branches.get(revision or "main", revision)
        return self._later({"id": name, "_id": "0", "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def _refs(self, kinds: str, name: str) -> Callable[[], None]:
        branches = self._repo(name, kinds == "datasets").branches.items()
        listed = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": oid} for key, oid in branches]
        return self._later({"branches": listed, "converts": [], "tags": []})

    def _tree(self, kinds: str, name: str, revision: str, path: str) -> Callable[[], None]:
        tree = self._at(self._repo(name, kinds == "datasets"), revision)
        below = f"{path}/" if path else ""
        inside = {key: file for key, file in sorted(tree.items()) if key.startswith(below)}
        folders = {key[: at.start() + len(below)] for key in inside for at in re.finditer("/", key[len(below) :])}
        if self._query.get("recursive", ["false"])[0].lower() != "true":
            folders = {key for key in folders if "/" not in key[len(below) :]}
            inside = {key: file for key, file in inside.items() if "/" not in key[len(below) :]}
        listed: list[dict[str, Any]] = [
            {"type": "directory", "path": key, "oid": "0" * 40, "size": 0} for key in sorted(folders)
        ]
        return self._later(listed + [file.described(key) for key, file in inside.items()])

    def _paths(self, kinds: str, name: str, revision: str) -> Callable[[], None]:
        tree = self._at(self._repo(name, kinds == "datasets"), revision)
        asked = parse_qs(self._body.decode()).get("paths", [])
        return self._later([tree[path].described(path) for path in asked if path in tree])

    def _resolve(self, prefix: str, name: str, revision: str, path: str) -> Callable[[], None]:
        repo = self._repo(name, bool(prefix))
        tree = self._at(repo, revision)
        commit = {"X-Repo-Commit": repo.branches.get(revision, revision)}
        if path not in tree:
            raise _Error(404, f"Entry not found: {path}", "EntryNotFound")
        file = tree[path]
        if not file.lfs:
            return lambda: self._send(200, file.data, {"ETag": f'"{file.oid}"', **commit})
        linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data)), **commit}
        return lambda: self._send(302, b"", {"Location": f"{self.hub.store}/cdn/{file.sha256}?name={quote(path)}", **linked})

    def _cdn(self, oid: str) -> Callable[[], None]:
        self._no_token_here()
        data = self.hub.objects.get(oid)
        if data is None:
            raise _Error(404, "no such object")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return lambda: self._send(200, data, {"ETag": f'"{oid}"'})
        begin, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1) + 1
        headers = {"ETag": f'"{oid}"', "Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
        return lambda: self._send(206, data[begin:end], headers)

    def _no_token_here(self) -> None:
        if "Authorization" in self.headers:
            self.hub.leaks.append(f"{self.command} {self.path}")
            raise _Error(400, "Only one auth mechanism allowed")
