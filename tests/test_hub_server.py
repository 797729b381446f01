"""The small Hub of the tests, used by the real client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import TRANSPORT
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 40
"""Content of a large file."""
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "ada/prefix.safetensors": b"1" * 9, "ada/a.txt": b"\n"}
ATTRIBUTES = ".gitattributes"


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """The files in a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read(*args: str, **kwargs: str | None) -> bytes:
    """A file, downloaded or from the cache."""
    return Path(hf_hub_download(*args, **kwargs)).read_bytes()


def test_a_folder_is_uploaded(hub: HubServer, ada: str, tmp_path: Path) -> None:
    api = HfApi()
    assert api.whoami()["name"] == "ada"
    assert api.create_repo("base").repo_id == "ada/base"
    folder = write(tmp_path / "folder", FILES)
    info = api.upload_folder(repo_id="ada/base", folder_path=folder, commit_message="All of it")
    assert {path: hub.read("ada/base", path) for path in hub.paths("ada/base")} == FILES
    assert info.oid == hub.repositories["ada/base"].at("main").oid
    assert [commit.title for commit in api.list_repo_commits("ada/base")] == ["All of it", "initial commit"]
    large = {path for path, file in hub.repositories["ada/base"].at("main").files.items() if file.large}
    assert large == {"model.safetensors", "ada/prefix.safetensors"}
    # Nothing that is there is uploaded again, and no commit is empty.
    assert api.upload_folder(repo_id="ada/base", folder_path=folder).oid == info.oid
    uploads = [seen.user for seen in hub.requests if seen.method == "PUT"]
    assert uploads == [None, None]
    api.upload_folder(repo_id="ada/base", folder_path=folder, allow_patterns="*.json", delete_patterns="ada/*")
    assert hub.paths("ada/base") == {"config.json", "model.safetensors"}


def test_a_commit_adds_copies_and_deletes(hub: HubServer, ada: str) -> None:
    parent = hub.put("ada/base", FILES)
    api = HfApi()
    operations = [
        CommitOperationAdd("new.json", b"[]"),
        CommitOperationAdd("new.png", b"png"),
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationDelete("config.json"),
        CommitOperationDelete("ada/"),
    ]
    info = api.create_commit("ada/base", operations, commit_message="Much", parent_commit=parent)
    assert hub.paths("ada/base") == {"new.json", "new.png", "model.safetensors", "copy.safetensors"}
    assert hub.read("ada/base", "copy.safetensors") == WEIGHTS
    assert set(api.list_repo_files("ada/base", revision=parent)) == {*FILES, ATTRIBUTES}
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        api.create_commit("ada/base", [CommitOperationAdd("x", b"x")], commit_message="Late", parent_commit=parent)
    assert refused.value.response.status_code == 412
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("config.json", "ada/base")
    assert hub.repositories["ada/base"].at("main").oid == info.oid


def test_pull_requests(hub: HubServer) -> None:
    hub.put("ada/base", FILES)
    api = HfApi(token=hub.add_user("bob"))
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        api.upload_file(path_or_fileobj=b"{1}", path_in_repo="config.json", repo_id="ada/base")
    info = api.upload_file(path_or_fileobj=b"{1}", path_in_repo="config.json", repo_id="ada/base", create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1")
    api.upload_file(path_or_fileobj=WEIGHTS * 2, path_in_repo="b.bin", repo_id="ada/base", revision="refs/pr/1")
    assert read("ada/base", "config.json", revision="refs/pr/1") == b"{1}"
    assert hub.paths("ada/base", revision="refs/pr/1") - hub.paths("ada/base") == {"b.bin"}
    assert hub.read("ada/base", "config.json") == b"{}"
    references = api.list_repo_refs("ada/base", include_pull_requests=True)
    assert [reference.ref for reference in references.pull_requests] == ["refs/pr/1"]


def test_files_of_any_revision(hub: HubServer, ada: str) -> None:
    first = hub.put("ada/base", FILES)
    api = HfApi()
    api.create_tag("ada/base", tag="v1")
    api.create_branch("ada/base", branch="next/one", revision="v1")
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch("ada/base", branch="next/one")
    api.create_branch("ada/base", branch="next/one", exist_ok=True)
    api.upload_file(path_or_fileobj=b"next", path_in_repo="ada/a.txt", repo_id="ada/base", revision="next/one")
    hub.put("ada/base", {"ada/a.txt": b"last"})
    contents = {"v1": b"\n", "main": b"last", "next/one": b"next", first: b"\n"}
    assert {name: read("ada/base", "a.txt", subfolder="ada", revision=name) for name in contents} == contents
    references = api.list_repo_refs("ada/base")
    assert {branch.name for branch in references.branches} == {"main", "next/one"}
    assert {tag.name: tag.target_commit for tag in references.tags} == {"v1": first}


def test_what_a_repository_holds(hub: HubServer) -> None:
    card = b"---\nlicense: mit\nbase_model: ada/llama\nbase_model_relation: adapter\ntags: [prefix]\n---\n# Title\n"
    sha = hub.put("ada/base", {**FILES, "README.md": card})
    api = HfApi()
    info = api.model_info("ada/base", files_metadata=True)
    assert (info.sha, info.private, info.author) == (sha, False, "ada")
    assert info.card_data.license == "mit"
    assert {"prefix", "license:mit", "base_model:adapter:ada/llama", "safetensors"} <= set(info.tags)
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in info.siblings}
    assert sizes["model.safetensors"] == (len(WEIGHTS), True)
    assert sizes["config.json"] == (2, False)
    assert api.model_info("ada/base", revision=sha).sha == sha
    assert set(api.list_repo_files("ada/base")) == {*FILES, "README.md", ATTRIBUTES}
    assert {entry.path for entry in api.list_repo_tree("ada/base", "ada")} == {"ada/prefix.safetensors", "ada/a.txt"}
    assert {entry.path for entry in api.list_repo_tree("ada/base")} == {
        *("ada", "config.json", "model.safetensors", "README.md", ATTRIBUTES)
    }
    weights, folder = sorted(api.get_paths_info("ada/base", ["model.safetensors", "ada", "nothing"]), key=repr)
    assert (weights.lfs.size, folder.path) == (len(WEIGHTS), "ada")


def test_what_is_not_there(hub: HubServer, ada: str) -> None:
    hub.put("ada/base", FILES)
    api = HfApi()
    for token in (False, None):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("ada/other", "config.json", token=token)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("ada/base", "config.json", revision="v2")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("ada/base", "nothing")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("nobody")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")
    assert not api.file_exists("ada/base", "nothing")
    assert api.file_exists("ada/base", "model.safetensors")
    assert not api.repo_exists("ada/other")
    assert not api.revision_exists("ada/base", "v2")


def test_a_private_repository_is_its_owners(hub: HubServer) -> None:
    token = hub.add_user("ada")
    api = HfApi(token=token)
    api.create_repo("ada/secret", private=True)
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id="ada/secret")
    assert api.model_info("ada/secret").private
    for other in (False, hub.add_user("bob")):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("ada/secret", "model.safetensors", token=other)
    assert read("ada/secret", "model.safetensors", token=token) == WEIGHTS
    assert hub.requests[-1].user is None, "the storage must not get the token"


def test_repositories_are_made_once_and_deleted(hub: HubServer, ada: str) -> None:
    api = HfApi()
    api.create_repo("ada/base", private=False)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("ada/base")
    assert api.create_repo("ada/base", exist_ok=True).repo_id == "ada/base"
    with pytest.raises(HfHubHTTPError, match="don't have the rights"):
        api.create_repo("bob/base")
    api.delete_repo("ada/base")
    assert hub.repositories == {}
    api.delete_repo("ada/base", missing_ok=True)


def test_a_snapshot_is_downloaded_once(hub: HubServer) -> None:
    hub.put("ada/base", FILES)
    folder = Path(snapshot_download("ada/base", allow_patterns=["*.json", "ada/*"]))
    expected = {"config.json", "ada/a.txt", "ada/prefix.safetensors"}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == expected
    assert set(hub.downloads) == {f"ada/base/{path}" for path in expected}
    snapshot_download("ada/base", allow_patterns=["*.json", "ada/*"])
    assert len(hub.downloads) == len(expected)


def test_offline_after_the_first_use(hub: HubServer, pauses: list[float]) -> None:
    hub.put("ada/base", FILES)
    folder = snapshot_download("ada/base")
    hub.stop()
    assert read("ada/base", "model.safetensors") == WEIGHTS
    assert snapshot_download("ada/base") == folder
    # huggingface_hub 1.5 closes its connections at the first failure and then uses them again.
    with pytest.raises((LocalEntryNotFoundError, RuntimeError)):
        hf_hub_download("ada/base", "new.json")
    assert pauses, "the client tries again where it has no file"
    hub.start()
    hub.put("ada/base", {"new.json": b"new"})
    assert read("ada/base", "new.json") == b"new"


def test_a_stalled_download_goes_on_where_it_stopped(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("ada/base", FILES)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.cut("*/model.safetensors", after_bytes=4500, stall=30)
    assert read("ada/base", "model.safetensors") == WEIGHTS
    assert [seen.range for seen in hub.requests if seen.file] == [None, "bytes=4000-"]


def test_a_cut_download_goes_on_where_it_stopped(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("ada/base", FILES)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut("*/model.safetensors", after_bytes=4500)
    try:
        content = read("ada/base", "model.safetensors")
    except TRANSPORT.RemoteProtocolError:
        # huggingface_hub 1 leaves it to the caller to try again, and then goes on.
        content = read("ada/base", "model.safetensors")
    assert content == WEIGHTS
    assert [seen.range for seen in hub.requests if seen.file] == [None, "bytes=4000-"]


def test_errors_of_the_hub_are_tried_again(hub: HubServer, ada: str, pauses: list[float]) -> None:
    hub.put("ada/base", FILES)
    limit = {"RateLimit": '"api";r=0;t=55', "Retry-After": "55"}
    hub.fail("*/resolve/*", method="GET", status=429, headers=limit)
    assert read("ada/base", "config.json") == b"{}"
    assert pauses == [56]
    hub.fail("*/model.safetensors", method="HEAD", times=3, status=503)
    assert read("ada/base", "model.safetensors") == WEIGHTS
    assert pauses == [56, 1, 2]
    hub.fail("/storage/*", method="PUT", times=2, status=500)
    HfApi().upload_file(path_or_fileobj=b"new", path_in_repo="new.bin", repo_id="ada/base")
    assert hub.read("ada/base", "new.bin") == b"new"
    hub.fail("*/commit/*", status=500)
    with pytest.raises(HfHubHTTPError, match="The test wants 500"):
        HfApi().upload_file(path_or_fileobj=b"new", path_in_repo="b.bin", repo_id="ada/base")
    assert "b.bin" not in hub.paths("ada/base")


def test_model_cards(hub: HubServer, ada: str) -> None:
    HfApi().create_repo("ada/base")
    card = ModelCard.from_template(ModelCardData(license="mit", base_model="ada/llama", library_name="peft_prefix"))
    card.validate()
    card.push_to_hub("ada/base")
    assert ModelCard.load("ada/base").data.base_model == "ada/llama"
    assert "base_model:ada/llama" in HfApi().model_info("ada/base").tags
    wrong = {
        "is not valid. Use a model id": ModelCardData(base_model="/home/ada/llama"),
        "must be one of": ModelCardData(license="no such license"),
        "must be an array": ModelCardData(tags=[1]),
    }
    for message, data in wrong.items():
        with pytest.raises(ValueError, match=message):
            ModelCard.from_template(data).push_to_hub("ada/base")
        with pytest.raises(ValueError, match=message):
            ModelCard.from_template(data).validate()
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        HfApi().upload_file(path_or_fileobj=b"# Title", path_in_repo="README.md", repo_id="ada/base")


def test_a_process_that_the_test_starts_uses_the_hub(hub: HubServer, ada: str) -> None:
    hub.put("ada/secret", FILES, private=True)
    code = "from huggingface_hub import hf_hub_download; hf_hub_download('ada/secret', 'model.safetensors')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert hub.downloads == ["ada/secret/model.safetensors"]
    hub.stop()
    assert read("ada/secret", "model.safetensors") == WEIGHTS, "it has the same cache"
