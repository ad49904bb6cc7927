"""The stand-in for the hub does what the real client relies on; that pushing does is in test_push.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import hub_stand_in
import pytest
from hub_stand_in import GROUP, READER, USER, WRITER, Hub, hub

client = pytest.importorskip("huggingface_hub")

LARGE = bytes(range(256)) * 8000
FILES = {"train.bin": LARGE, "empty.txt": b"", "below/deep/a.txt": b"a", "below/b.bin": LARGE[1:]}


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub() as server, server.in_this_process():
        yield server


def downloaded(path: str) -> dict[str, bytes]:
    root = Path(path)
    return {found.relative_to(root).as_posix(): found.read_bytes() for found in root.rglob("*") if found.is_file()}


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("token", [None, READER])
def test_a_repository_comes_down_as_it_is_and_no_token_goes_to_the_store(
    server: Hub, tmp_path: Path, kind: str, token: str | None
) -> None:
    server.add("stranger/data", FILES, kind=kind)
    path = client.snapshot_download("stranger/data", repo_type=kind, cache_dir=tmp_path, token=token or False)
    assert downloaded(path) == FILES and server.leaks == []
    server.requests.clear()
    again = client.snapshot_download("stranger/data", repo_type=kind, cache_dir=tmp_path, token=token or False)
    assert again == path and not any("/cdn/" in request.path for request in server.requests)


def test_a_download_that_is_cut_off_goes_on_where_it_was(server: Hub, tmp_path: Path) -> None:
    server.add("stranger/data", {"train.bin": LARGE})
    server.drop("GET", "/cdn/", after=1_000_000)
    with mock.patch.object(client.constants, "DOWNLOAD_CHUNK_SIZE", 100_000):
        path = client.hf_hub_download("stranger/data", "train.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == LARGE
    assert [request.status for request in server.requests if "/cdn/" in request.path] == [200, 206]


def test_branches_trees_and_paths(server: Hub) -> None:
    server.add(f"{USER}/data", FILES, kind="dataset")
    api = client.HfApi(token=WRITER)
    api.create_branch(f"{USER}/data", branch="a/b", repo_type="dataset")
    api.upload_file(
        path_or_fileobj=b"new", path_in_repo="new.txt", repo_id=f"{USER}/data", repo_type="dataset", revision="a/b"
    )
    assert {ref.name for ref in api.list_repo_refs(f"{USER}/data", repo_type="dataset").branches} == {"main", "a/b"}
    assert sorted(api.list_repo_files(f"{USER}/data", repo_type="dataset", revision="a/b")) == sorted([*FILES, "new.txt"])
    top = api.list_repo_tree(f"{USER}/data", repo_type="dataset")
    assert [entry.path for entry in top] == ["below", "empty.txt", "train.bin"]
    below = api.list_repo_tree(f"{USER}/data", "below", recursive=True, repo_type="dataset")
    assert [entry.path for entry in below] == ["below/deep", "below/b.bin", "below/deep/a.txt"]
    (info,) = api.get_paths_info(f"{USER}/data", ["train.bin", "nothing"], repo_type="dataset")
    assert info.lfs.sha256 == hub_stand_in.File(LARGE, True).sha256 and info.size == len(LARGE)
    assert api.dataset_info(f"{USER}/data").sha == server.repos[f"datasets/{USER}/data"].branches["main"]


def test_who_may_see_and_change_what(server: Hub) -> None:
    server.add(f"{GROUP}/mine", FILES, private=True)
    server.add("stranger/theirs", FILES, private=True)
    assert client.HfApi(token=READER).whoami()["name"] == USER
    assert client.HfApi(token=READER).model_info(f"{GROUP}/mine").private
    for name, token in ((f"{GROUP}/mine", False), ("stranger/theirs", WRITER), ("stranger/none", WRITER)):
        with pytest.raises(client.errors.RepositoryNotFoundError):
            client.HfApi(token=token).model_info(name)
    with pytest.raises(client.errors.RevisionNotFoundError):
        client.HfApi(token=READER).model_info(f"{GROUP}/mine", revision="none")
    for token, status in (("hf_unknown", 401), (READER, 403)):
        with pytest.raises(client.errors.HfHubHTTPError) as caught:
            client.HfApi(token=token).create_repo(f"{USER}/new")
        assert caught.value.response.status_code == status
    with pytest.raises(client.errors.HfHubHTTPError, match="409"):
        client.HfApi(token=WRITER).create_repo(f"{GROUP}/mine")
