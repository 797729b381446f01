from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from helpers import random_model
from hub_server import HubServer
from huggingface_hub import ModelCard
from test_hub import assert_same

from peft_prefix import PrefixConfig, PrefixConfigError, PrefixFileError, PrefixModel, PrefixWarning, list_prefixes
from peft_prefix.training_record import TrainingRecord

FILES = {"README.md", "prefix.safetensors", "prefix_config.json"}


@pytest.fixture
def model() -> PrefixModel:
    base = FAMILIES["llama"].build()
    base.config.name_or_path = "someone/base"
    return random_model(base)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the library wanted to wait."""
    waits: list[float] = []
    monkeypatch.setattr("peft_prefix.patience.time.sleep", waits.append)
    return waits


def test_what_is_pushed_can_be_pulled(hub: HubServer, ada: str, model: PrefixModel, tmp_path: Path) -> None:
    commit = model.push_to_hub("ada/prefix", commit_message="First", tags=["e2e"])
    assert set(hub.paths("ada/prefix")) == FILES
    assert commit == commit.commit_url
    assert commit.commit_message == "First"
    assert hub.repositories["ada/prefix"].at("main").files["prefix.safetensors"].large
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix"), model)
    card = ModelCard(hub.read("ada/prefix", "README.md").decode())
    card.validate()
    assert card.data.base_model == "someone/base"
    assert card.data.base_model_relation == "adapter"
    assert card.data.library_name == "peft_prefix"
    assert {"prefix-tuning", "e2e"} <= set(card.data.tags)
    assert 'PrefixModel.from_pretrained("ada/prefix"' in card.text


def test_the_card_keeps_what_others_wrote(hub: HubServer, ada: str, model: PrefixModel) -> None:
    model.push_to_hub("ada/prefix")
    card = hub.read("ada/prefix", "README.md").decode()
    changed = card.replace("---\n", "---\nlicense: mit\n", 1) + "\n## My thoughts\n\nIt is *good*.\n"
    hub.put("ada/prefix", {"README.md": changed.encode()})
    other = random_model(model.base, p=7)
    other.push_to_hub("ada/prefix")
    after = hub.read("ada/prefix", "README.md").decode()
    assert after.endswith("\n## My thoughts\n\nIt is *good*.\n")
    assert "license: mit\n" in after
    assert "7 virtual tokens" in after
    assert "4 virtual tokens" not in after
    ModelCard(after).validate()


def test_tasks_in_subfolders(hub: HubServer, ada: str, model: PrefixModel) -> None:
    model.add_prefix("long", PrefixConfig(num_virtual_tokens=9, init="normal"))
    model.push_to_hub("ada/tasks", prefix_name="default", subfolder="webnlg")
    model.push_to_hub("ada/tasks", prefix_name="long", subfolder="table/e2e")
    assert list_prefixes("ada/tasks") == ["table/e2e", "webnlg"]
    card = hub.read("ada/tasks", "README.md").decode()
    assert card.count("virtual tokens for") == 2
    assert 'subfolder="webnlg"' in card
    assert "webnlg/README.md" not in hub.paths("ada/tasks")
    for name, subfolder in (("default", "webnlg"), ("long", "table/e2e")):
        loaded = PrefixModel(model.base)
        loaded.load_prefix("ada/tasks", subfolder=subfolder)
        expected = model.prefix_state_dict(name)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.prefix_state_dict().items())
    with pytest.raises(PrefixConfigError, match="does not stay inside"):
        model.push_to_hub("ada/tasks", subfolder="../other")


def test_no_state_of_a_training_is_pushed(hub: HubServer, ada: str, model: PrefixModel) -> None:
    model.push_to_hub("ada/tasks", subfolder="checkpoint-10")
    assert {path for path in hub.paths("ada/tasks") if "/" in path} == {
        "checkpoint-10/prefix.safetensors",
        "checkpoint-10/prefix_config.json",
    }


def test_only_the_prefix_that_is_named_is_uploaded(
    hub: HubServer, ada: str, model: PrefixModel, tmp_path: Path
) -> None:
    model.add_prefix("short", PrefixConfig(num_virtual_tokens=2, init="normal"))
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=3, init="normal"))
    for parameter in model.prefixes.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    with pytest.warns(PrefixWarning, match="not saved here"):
        model.save_pretrained(
            tmp_path / "short", prefix_name="short", push_to_hub=True, repo_id="ada/mine", dtype=torch.bfloat16
        )
    model.set_prefix(None)
    with pytest.warns(PrefixWarning, match="not saved here"):
        model.push_to_hub("ada/other", prefix_name="other")
    loaded = PrefixModel.from_pretrained(model.base, "ada/mine")
    assert loaded.prefixes.entry().config.num_virtual_tokens == 2
    assert next(iter(loaded.prefix_state_dict().values())).dtype == torch.bfloat16
    assert set(hub.paths("ada/other")) == FILES
    for call in (
        lambda: model.push_to_hub("ada/none"),
        lambda: model.save_pretrained(tmp_path / "none", push_to_hub=True, repo_id="ada/none"),
    ):
        with pytest.raises(PrefixConfigError, match="No prefix is active"):
            call()
    assert not (tmp_path / "none").exists()
    assert "ada/none" not in hub.repositories


def test_branches_and_pull_requests(hub: HubServer, ada: str, model: PrefixModel) -> None:
    model.push_to_hub("ada/prefix", private=True)
    assert hub.repositories["ada/prefix"].private
    other = random_model(model.base, p=6)
    other.push_to_hub("ada/prefix", revision="longer")
    request = random_model(model.base, p=8).push_to_hub("ada/prefix", create_pr=True)
    lengths = {
        revision: PrefixModel.from_pretrained(model.base, "ada/prefix", revision=revision)
        .prefixes.entry()
        .config.num_virtual_tokens
        for revision in ("main", "longer", f"refs/pr/{request.pr_num}")
    }
    assert list(lengths.values()) == [4, 6, 8]


def test_somebody_else_commits_at_the_same_moment(
    hub: HubServer, ada: str, model: PrefixModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_prefix import saving

    made, original = [], saving.card_text

    def slow(existing: str | None, facts: object) -> str:
        text = original(existing, facts)  # type: ignore[arg-type]
        made.append(text)
        if len(made) == 1:
            hub.put("ada/prefix", {"README.md": b"# Mine\n\nWritten meanwhile.\n"})
        return text

    monkeypatch.setattr(saving, "card_text", slow)
    model.push_to_hub("ada/prefix")
    assert len(made) == 2
    assert b"Written meanwhile." in hub.read("ada/prefix", "README.md")
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix"), model)


def test_many_tasks_at_the_same_time(hub: HubServer, ada: str) -> None:
    models = [random_model(FAMILIES["llama"].build(), p=number) for number in (2, 3, 4)]
    threads = [
        threading.Thread(target=one.push_to_hub, args=("ada/tasks",), kwargs={"subfolder": f"task-{number}"})
        for number, one in enumerate(models)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    card = hub.read("ada/tasks", "README.md").decode()
    assert list_prefixes("ada/tasks") == ["task-0", "task-1", "task-2"]
    assert all(f"## task-{number}\n" in card for number in range(3))


@pytest.mark.parametrize("path", ["/api/repos/create", "/api/models/ada/prefix", "*/commit/*", "*/preupload/*"])
@pytest.mark.parametrize("status", [429, 500])
def test_a_busy_hub_is_asked_again(
    path: str, status: int, hub: HubServer, ada: str, model: PrefixModel, waits: list[float], pauses: list[float]
) -> None:
    hub.fail(path, times=2, status=status, headers={"Retry-After": "7"})
    model.push_to_hub("ada/prefix")
    assert_same(PrefixModel.from_pretrained(model.base, "ada/prefix"), model)
    assert 7.0 in waits or pauses


def test_what_cannot_be_uploaded_is_not_lost(hub: HubServer, ada: str, model: PrefixModel, waits: list[float]) -> None:
    before = {name: tensor.clone() for name, tensor in model.prefix_state_dict().items()}
    hub.put("bob/prefix", {"x": b""})
    with pytest.raises(PrefixFileError, match=r"(?s)not uploaded to bob/prefix .*still in the model"):
        model.push_to_hub("bob/prefix")
    assert not waits  # that would not help
    hub.fail("*/commit/*", times=100, status=503)
    with pytest.raises(PrefixFileError, match="still in the model"):
        model.push_to_hub("ada/prefix")
    assert waits == [1, 2, 4, 8]
    hub.mend()
    hub.stop()
    with pytest.raises(PrefixFileError, match="still in the model"):
        model.push_to_hub("ada/prefix")
    hub.start()
    assert not hub.paths("ada/prefix")
    model.push_to_hub("ada/prefix")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.prefix_state_dict().items())


def test_a_card_that_cannot_be_read_is_not_overwritten(hub: HubServer, ada: str, model: PrefixModel) -> None:
    for content in (b"---\n: [broken\n---\n# Mine", b"\xff\xfe"):
        hub.put("ada/prefix", {"README.md": content})
        with pytest.raises(PrefixFileError, match=r"README\.md"):
            model.push_to_hub("ada/prefix")
        assert hub.read("ada/prefix", "README.md") == content
    hub.put("ada/other", {"README.md": b"# Mine"})
    hub.fail("*resolve*README.md", times=100, status=500)
    with pytest.raises(PrefixFileError):
        model.push_to_hub("ada/other")
    hub.mend()
    assert hub.read("ada/other", "README.md") == b"# Mine"


def test_a_picture_of_the_losses(hub: HubServer, ada: str, model: PrefixModel) -> None:
    pytest.importorskip("matplotlib")
    record = TrainingRecord(steps=3, kept_step=3, training_losses=((1, 2.0), (2, 1.5), (3, 1.25)))
    model.prefixes.entry().training = record
    model.push_to_hub("ada/tasks", subfolder="e2e")
    assert hub.read("ada/tasks", "e2e/loss_curve.png").startswith(b"\x89PNG")
    assert "(e2e/loss_curve.png)" in hub.read("ada/tasks", "README.md").decode()
    loaded = PrefixModel.from_pretrained(model.base, "ada/tasks/e2e")
    assert loaded.prefixes.entry().training == record


def test_what_has_not_arrived_is_not_taken_for_saved(
    hub: HubServer, ada: str, model: PrefixModel, tmp_path: Path
) -> None:
    with torch.no_grad():
        next(model.prefixes.parameters()).add_(1)
    hub.put("bob/prefix", {"x": b""})
    with pytest.raises(PrefixFileError):
        model.push_to_hub("bob/prefix")
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=2))
    with pytest.warns(PrefixWarning, match="'default' have been trained and are not saved here"):
        model.save_pretrained(tmp_path)
    model.push_to_hub("ada/prefix", prefix_name="default", tags="one")
    model.save_pretrained(tmp_path)
    assert "one" in ModelCard(hub.read("ada/prefix", "README.md").decode()).data.tags


def test_names_with_a_folder_tags_and_processes(hub: HubServer, ada: str, model: PrefixModel) -> None:
    model.push_to_hub("ada/tasks/webnlg", tags=None)
    assert list_prefixes("ada/tasks") == ["webnlg"]
    with pytest.raises(PrefixConfigError, match="tags must be texts"):
        model.push_to_hub("ada/tasks", tags=[{"a": 1}])  # type: ignore[list-item]
    assert model.push_to_hub("ada/none", is_main_process=False) is None
    assert "ada/none" not in hub.repositories
    state = {name: torch.full_like(tensor, 3.0) for name, tensor in model.state_dict().items()}
    model.push_to_hub("ada/given", state_dict=state)
    loaded = PrefixModel.from_pretrained(model.base, "ada/given")
    assert all((tensor == 3).all() for tensor in loaded.prefix_state_dict().values())


def test_a_folder_is_pushed_under_its_own_name(
    hub: HubServer, ada: str, model: PrefixModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    model.save_pretrained(".", push_to_hub=True)
    assert set(hub.paths("ada/mine")) == FILES
