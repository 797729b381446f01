from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from helpers import random_model, tokens
from hub_server import HubServer

from peft_prefix import PrefixConfigError, PrefixError, PrefixFileError, PrefixModel, list_prefixes
from peft_prefix.hub import locate_prefix

FILES = {"prefix.safetensors", "prefix_config.json"}


@pytest.fixture
def model() -> PrefixModel:
    return random_model(FAMILIES["llama"].build())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the library wanted to wait."""
    waits: list[float] = []
    monkeypatch.setattr("peft_prefix.patience.time.sleep", waits.append)
    return waits


def put(
    hub: HubServer, model: PrefixModel, folder: Path, where: str = "", repo: str = "ada/prefix", **options: object
) -> None:
    """Put a prefix into a repository without the client."""
    shutil.rmtree(folder / "put", ignore_errors=True)
    model.save_pretrained(folder / "put")
    hub.put(repo, {f"{where}{file.name}": file.read_bytes() for file in (folder / "put").iterdir()}, **options)  # type: ignore[arg-type]


def assert_same(loaded: PrefixModel, model: PrefixModel, name: str | None = None) -> None:
    found = loaded.prefix_state_dict(name)
    assert found.keys() == model.prefix_state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.prefix_state_dict().items())
    if name is None:
        ids = tokens(2, 5)
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_only_what_is_needed_is_downloaded(hub: HubServer, model: PrefixModel, tmp_path: Path) -> None:
    put(hub, model, tmp_path)
    put(hub, model, tmp_path, where="other/")
    hub.put("ada/prefix", {"model.safetensors": bytes(10**6), "README.md": b"# Hello"})
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix"), model)
    assert hub.downloads == ["ada/prefix/prefix.safetensors"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ada/tasks/webnlg", {}),
        ("ada/tasks", {"subfolder": "webnlg"}),
        ("ada/tasks", {"subfolder": "webnlg/"}),
        ("ada/tasks/table/e2e", {}),
        ("ada/tasks/table", {"subfolder": "e2e"}),
    ],
)
def test_a_repository_holds_many(
    name: str, options: dict[str, str], hub: HubServer, model: PrefixModel, tmp_path: Path
) -> None:
    for where in ("webnlg/", "table/e2e/"):
        put(hub, model, tmp_path, where, "ada/tasks")
    loaded = PrefixModel(model.base)
    loaded.load_prefix(name, "one", **options)  # type: ignore[arg-type]
    assert_same(loaded, model, "one")


def test_the_prefixes_of_a_repository_are_listed(hub: HubServer, model: PrefixModel, tmp_path: Path) -> None:
    for where in ("webnlg/", "table/e2e/", ""):
        put(hub, model, tmp_path, where, "ada/tasks")
    hub.put("ada/tasks", {"peft/adapter_config.json": b"{}", "data/README.md": b"x", "a\nb/prefix.safetensors": b""})
    assert list_prefixes("ada/tasks") == ["", "peft", "table/e2e", "webnlg"]
    assert list_prefixes("ada/tasks/table") == ["table/e2e"]
    assert list_prefixes(tmp_path) == ["put"]
    assert list_prefixes(tmp_path / "put") == [""]
    with pytest.raises(PrefixFileError, match="the Hub did not give its files"):
        list_prefixes("ada/nothing")
    hub.fail("/api/models/ada/tasks*", times=2, status=429, headers={"Retry-After": "3"})
    assert "webnlg" in list_prefixes("ada/tasks")


def test_where_the_prefixes_are_is_said(hub: HubServer, model: PrefixModel, tmp_path: Path) -> None:
    for where in ("webnlg/", "e2e/"):
        put(hub, model, tmp_path, where, "ada/tasks")
    with pytest.raises(PrefixFileError, match="It has prefixes in the subfolders 'e2e', 'webnlg'"):
        PrefixModel.from_pretrained(model.base, "ada/tasks")
    with pytest.raises(PrefixFileError, match=r"There are some in its subfolders put: give subfolder"):
        PrefixModel.from_pretrained(model.base, tmp_path)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, model: PrefixModel, tmp_path: Path) -> None:
    put(hub, model, tmp_path)
    commit = hub.put("ada/prefix", {"note.txt": b"after the first"})
    other = random_model(FAMILIES["llama"].build(), p=3)
    put(hub, other, tmp_path)
    put(hub, other, tmp_path, revision="branch")
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix", revision=commit), model)
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix"), other)
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix", revision="branch"), other)
    with pytest.raises(PrefixFileError, match="the Hub did not give"):
        PrefixModel.from_pretrained(model.base, "ada/prefix", revision="nowhere")
    with pytest.raises(PrefixConfigError, match="is a folder here, which has no revisions"):
        PrefixModel.from_pretrained(model.base, tmp_path / "put", revision="v1")


def test_a_private_repository_needs_a_token(hub: HubServer, model: PrefixModel, tmp_path: Path) -> None:
    put(hub, model, tmp_path, private=True)
    bob, ada = hub.add_user("bob"), hub.add_user("ada")
    for token in (None, bob, "hf_wrong"):
        with pytest.raises(PrefixFileError, match="for a private repository, the token"):
            PrefixModel.from_pretrained(model.base, "ada/prefix", token=token)
        with pytest.raises(PrefixFileError):
            list_prefixes("ada/prefix", token=token)
    assert list_prefixes("ada/prefix", token=ada) == [""]
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix", token=ada), model)


def test_one_that_was_used_before_needs_no_connection(hub: HubServer, model: PrefixModel, tmp_path: Path) -> None:
    put(hub, model, tmp_path)
    put(hub, model, tmp_path, "other/")
    PrefixModel.from_pretrained(model.base, "ada/prefix")
    seen = len(hub.requests)
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix", local_files_only=True), model)
    assert len(hub.requests) == seen
    hub.stop()
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix"), model)
    with pytest.raises(PrefixFileError, match="your connection"):
        PrefixModel.from_pretrained(model.base, "ada/prefix", subfolder="other")
    hub.start()
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix", subfolder="other"), model)


def test_a_connection_that_breaks_leaves_nothing_half(hub: HubServer, model: PrefixModel, tmp_path: Path) -> None:
    put(hub, model, tmp_path)
    hub.cut("*prefix.safetensors*", times=100, after_bytes=1000)
    with pytest.raises(PrefixFileError, match="your connection"):
        PrefixModel.from_pretrained(model.base, "ada/prefix")
    hub.mend()
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix"), model)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(status: int, hub: HubServer, model: PrefixModel, tmp_path: Path) -> None:
    put(hub, model, tmp_path)
    hub.fail("*prefix.safetensors*", times=2, status=status, headers={"Retry-After": "1"})
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix"), model)


def test_adapters_of_peft_load_from_the_hub(hub: HubServer, model: PrefixModel, tmp_path: Path) -> None:
    model.save_as_peft(tmp_path / "peft")
    files = {file.name: file.read_bytes() for file in (tmp_path / "peft").iterdir()}
    hub.put("ada/adapter", {f"deep/{name}": content for name, content in files.items()})
    assert_same(PrefixModel.from_pretrained(model.base, "ada/adapter/deep"), model)
    hub.stop()
    assert_same(PrefixModel.from_pretrained(model.base, "ada/adapter/deep"), model)
    hub.start()
    hub.put("ada/pickle", {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"\x80\4."})
    with pytest.raises(PrefixFileError, match=r"adapter_model\.bin, which is a pickle and is not opened here"):
        PrefixModel.from_pretrained(model.base, "ada/pickle")
    assert "ada/pickle/adapter_model.bin" not in hub.downloads


@pytest.mark.parametrize(
    "subfolder", ["..", "../x", "a/../../x", "/etc", "a//b", "./a", "a\\b", "C:x", "a\0b", "a\nb", "x" * 300]
)
def test_a_subfolder_stays_inside(subfolder: str, tmp_path: Path) -> None:
    for name in (tmp_path, "ada/prefix"):
        with pytest.raises(PrefixConfigError, match="does not stay inside its folder"):
            locate_prefix(name, subfolder=subfolder)


@pytest.mark.parametrize(
    "name", ["../prefix", "/no/such/folder", "~/prefix", "./prefix", "a/../b", "a\\b", "", "http://x/y", "a\0b"]
)
def test_what_cannot_be_a_repository_is_not_asked_for(name: str, hub: HubServer, model: PrefixModel) -> None:
    with pytest.raises(PrefixFileError, match=r"no name of a repository on the Hub|There is no prefix"):
        PrefixModel.from_pretrained(model.base, name)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["nobody/nothing", "not/a/repository", "no such folder"])
def test_what_is_neither_here_nor_on_the_hub_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(PrefixFileError, match=r"is no folder here, and the Hub did not give"):
        PrefixModel.from_pretrained(FAMILIES["llama"].build(), name, cache_dir=tmp_path, local_files_only=True)


def test_a_link_out_of_a_folder_is_only_read_if_it_is_a_prefix(model: PrefixModel, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(json.dumps({"password": "123"}))
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "prefix.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(PrefixError) as found:
        PrefixModel.from_pretrained(model.base, tmp_path / "trap")
    assert "123" not in str(found.value)
    (tmp_path / "trap" / "zero").symlink_to("/dev/zero")
    (tmp_path / "trap" / "prefix.safetensors").unlink()
    (tmp_path / "trap" / "prefix.safetensors").symlink_to("/dev/zero")
    with pytest.raises(PrefixFileError, match="is not a file"):
        PrefixModel.from_pretrained(model.base, tmp_path / "trap")
    (tmp_path / "home").mkdir()
    (tmp_path / "trap" / "up").symlink_to(tmp_path)
    assert list_prefixes(tmp_path / "trap") == [""]


def test_a_hub_that_fails_has_not_said_that_there_is_no_prefix(
    hub: HubServer, model: PrefixModel, tmp_path: Path
) -> None:
    put(hub, model, tmp_path)
    other = random_model(model.base, p=9)
    other.save_as_peft(tmp_path / "peft")
    hub.put("ada/prefix", {file.name: file.read_bytes() for file in (tmp_path / "peft").iterdir()})
    hub.fail("*/prefix.safetensors", times=1000, status=500)
    with pytest.raises(PrefixFileError, match="the Hub did not give"):
        PrefixModel.from_pretrained(model.base, "ada/prefix")
    hub.mend()
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix"), model)


def test_the_name_of_a_file_is_not_that_of_a_folder(model: PrefixModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(PrefixFileError, match="names a file; give the folder"):
        PrefixModel.from_pretrained(model.base, str(tmp_path / "prefix.safetensors"))
