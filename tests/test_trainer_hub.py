"""What the stock `Trainer` uploads of prefixes, to a small Hub on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from hub_server import HubServer
from huggingface_hub import ModelCard, snapshot_download
from test_trainer_integration import Rows, arguments, make, make_trainer, record_in
from transformers import Trainer, TrainerCallback, default_data_collator

from peft_prefix import PrefixFileError, PrefixModel, PrefixNamesCollator, PrefixWarning, card_facts

REPOSITORY = "ada/cards"
PUSHING: dict[str, Any] = dict(
    push_to_hub=True, hub_model_id=REPOSITORY, hub_always_push=True, save_strategy="steps", save_steps=2
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_facts, "loss_curve_png", lambda _: None)  # takes most of the time


def readme(hub: HubServer) -> str:
    return hub.read(REPOSITORY, "README.md").decode()


def assert_no_base_weights(hub: HubServer, model: PrefixModel) -> None:
    """Nothing in the whole history is as large as the base, and what is in no checkpoint is no model."""
    weights = sum(parameter.numel() for parameter in model.base.parameters())
    for commit in hub.repositories[REPOSITORY].history("main"):
        assert "model.safetensors" not in commit.files
        assert all(len(file.content) < weights for file in commit.files.values())


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_each_checkpoint_uploads_the_prefix_and_no_training_state_at_the_top(
    strategy: str, hub: HubServer, ada: str, tmp_path: Path
) -> None:
    model = make()
    trainer = make_trainer(model, tmp_path / "run", **PUSHING, hub_strategy=strategy)
    trainer.train()
    assert {"prefix.safetensors", "prefix_config.json", "README.md", ".gitignore"} <= set(hub.paths(REPOSITORY))
    loaded = PrefixModel.from_pretrained(model.base, REPOSITORY)
    for name, tensor in model.prefix_state_dict().items():
        assert torch.equal(loaded.prefix_state_dict()[name], tensor)
    assert "| steps | 4 |" in readme(hub)
    assert f'PrefixModel.from_pretrained(base, "{REPOSITORY}")' in readme(hub)
    folder = {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-2"}.get(strategy)
    if folder is not None:
        pulled = Path(snapshot_download(REPOSITORY, local_dir=tmp_path / "pulled"))
        resumed = make_trainer(make(), tmp_path / "resumed", max_steps=6)
        resumed.train(resume_from_checkpoint=str(pulled / folder))
        assert record_in(resumed.model).steps == 6  # type: ignore[arg-type]
    trainer.push_to_hub()
    assert_no_base_weights(hub, model)
    ModelCard(readme(hub)).validate()


def test_all_prefixes_of_a_bank_are_uploaded(hub: HubServer, ada: str, tmp_path: Path) -> None:
    model = make("a", "b")
    model.set_prefix(None)
    rows: Any = [
        {**{key: one.tolist() for key, one in row.items()}, "prefix_names": "ab"[number % 2]}
        for number, row in enumerate(Rows(8, 1))  # type: ignore[arg-type,var-annotated]
    ]
    collator: Any = PrefixNamesCollator(default_data_collator)
    Trainer(model, arguments(tmp_path / "run", **PUSHING), train_dataset=rows, data_collator=collator).train()
    for name in "ab":
        assert {f"{name}/prefix.safetensors", f"{name}/prefix_config.json"} <= set(hub.paths(REPOSITORY))
        assert f"<!-- peft_prefix: {name} -->" in readme(hub)
        assert record_in(model, name).steps == 4
    assert_no_base_weights(hub, model)


def test_what_somebody_writes_on_the_hub_during_a_training_stays(hub: HubServer, ada: str, tmp_path: Path) -> None:
    class Writing(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                trainer.push_in_progress.wait_until_done()  # it runs beside the training
                hub.put(REPOSITORY, {"README.md": f"{readme(hub)}\nAfter three steps.\n".encode()})

    hub.put(REPOSITORY, {".gitignore": b"*.log", "README.md": b"# Mine\n"})
    trainer = make_trainer(make(), tmp_path / "run", **PUSHING)
    trainer.add_callback(Writing())
    trainer.train()
    trainer.push_to_hub()
    assert "\n# Mine\n" in readme(hub)
    assert "\nAfter three steps.\n" in readme(hub)
    assert readme(hub).count("<!-- peft_prefix: . -->") == 1
    assert hub.read(REPOSITORY, ".gitignore") == b"*.log\n/model.safetensors\n"


def test_a_training_goes_on_where_the_hub_cannot_be_asked(hub: HubServer, ada: str, tmp_path: Path) -> None:
    hub.put(REPOSITORY, {"README.md": b"# Mine\n"})
    hub.fail("*README.md", times=1000, status=403)
    trainer = make_trainer(make(), tmp_path / "run", **PUSHING)
    with pytest.warns(PrefixWarning, match=r"README\.md was not renewed"):
        trainer.train()
    assert readme(hub) == "# Mine\n"
    with pytest.raises(PrefixFileError, match=r"did not say whether"):
        trainer.push_to_hub()
    hub.mend()
    trainer.push_to_hub()
    assert "| steps | 4 |" in readme(hub)
    assert "\n# Mine\n" in readme(hub)


def test_the_end_alone_is_uploaded(hub: HubServer, ada: str, tmp_path: Path) -> None:
    model = make()
    trainer = make_trainer(model, tmp_path / "run", **PUSHING, hub_strategy="end")
    trainer.train()
    assert not hub.paths(REPOSITORY)
    trainer.push_to_hub(language="en")
    assert {"prefix.safetensors", "prefix_config.json", "README.md"} <= set(hub.paths(REPOSITORY))
    assert ModelCard(readme(hub)).data.language == ["en"]
    assert_no_base_weights(hub, model)


def test_a_repository_without_its_owners_name(hub: HubServer, ada: str, tmp_path: Path) -> None:
    trainer = make_trainer(make(), tmp_path / "cards", push_to_hub=True, save_strategy="no")
    trainer.train()
    trainer.push_to_hub()
    assert f'"{REPOSITORY}"' in readme(hub)


def test_other_models_are_uploaded_as_ever(hub: HubServer, ada: str, tmp_path: Path) -> None:
    make_trainer(FAMILIES["llama"].build(), tmp_path / "run", **PUSHING).train()
    assert "model.safetensors" in hub.paths(REPOSITORY)
    assert ".gitignore" not in hub.paths(REPOSITORY)


def test_what_somebody_writes_here_between_two_uploads_stays(hub: HubServer, ada: str, tmp_path: Path) -> None:
    hub.put(REPOSITORY, {"README.md": b"# Mine\n\nWritten on the Hub.\n"})
    trainer = make_trainer(make(), tmp_path / "run", **PUSHING, hub_strategy="end")
    trainer.train()
    trainer.push_to_hub()
    card = tmp_path / "run" / "README.md"
    card.write_text(f"{card.read_text(encoding='utf-8')}\nWritten here.\n", encoding="utf-8")
    trainer.push_to_hub()
    for text in (readme(hub), card.read_text(encoding="utf-8")):
        assert "\nWritten on the Hub.\n" in text
        assert text.endswith("\nWritten here.\n")
    hub.put(REPOSITORY, {"README.md": f"{readme(hub)}\nAnd there.\n".encode()})
    trainer.push_to_hub()
    assert readme(hub).endswith("\nWritten here.\n\nAnd there.\n")
    hub.put(REPOSITORY, {"README.md": f"{readme(hub)}\nMore there.\n".encode()})
    card.write_text(f"{card.read_text(encoding='utf-8')}\nMore here.\n", encoding="utf-8")
    with pytest.warns(PrefixWarning, match="is kept in"):
        trainer.push_to_hub()
    assert readme(hub).endswith("\nAnd there.\n\nMore there.\n")
    assert (tmp_path / "run" / "_README.md").read_text(encoding="utf-8").endswith("\nMore here.\n")
    assert "_README.md" not in hub.paths(REPOSITORY)


@pytest.mark.parametrize("metadata", ["x: !!bool maybe", "x: &a [*a]", "base_model:\n- name: x", "[" * 20_000])
def test_no_card_ends_a_training(metadata: str, hub: HubServer, ada: str, tmp_path: Path) -> None:
    content = f"---\n{metadata}\n---\n# Mine\n".encode()
    hub.put(REPOSITORY, {"README.md": content})
    trainer = make_trainer(make(), tmp_path / "run", **PUSHING)
    with pytest.warns(PrefixWarning, match=r"README\.md was not renewed"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert hub.read(REPOSITORY, "README.md") == content
    assert "prefix.safetensors" in hub.paths(REPOSITORY)
