"""What the stock `Trainer` records, writes into cards and uploads of prefixes, and nothing of it for other models."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from families import ENCODER_DECODERS, FAMILIES, MULTIMODAL
from families_hybrid import HYBRIDS
from helpers import random_model, tokens
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tiny_tokenizer import tiny_tokenizer
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers import trainer as trainer_module

from peft_prefix import PrefixConfig, PrefixFileError, PrefixModel, PrefixWarning, card_facts, trainer_integration
from peft_prefix.card_facts import card_on_hub, entry_facts, local_card, pipeline_tag, taking_over, write_card
from peft_prefix.trainer_integration import RecordingCallback, prefixes_in
from peft_prefix.training_record import DataSet, TrainingRecord

REPOSITORY = "me/cards"


class Rows(Dataset):
    """Random texts."""

    def __init__(self, count: int, seed: int) -> None:
        self.ids = tokens(count, 8, seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def make(*names: str) -> PrefixModel:
    """A model with prefixes that can all be trained, the first one active."""
    model = random_model(FAMILIES["llama"].build(), p=2)
    for seed, name in enumerate(names):
        model.add_prefix(name, PrefixConfig(num_virtual_tokens=3, init="normal", init_seed=seed))
    if names:
        model.set_prefix(names[0])
        model.remove_prefix("default")
    return model


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return TrainingArguments(**{**settings, **changes})


def make_trainer(model: Any, folder: Path, kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    data: dict[str, Any] = dict(train_dataset=Rows(16, 1), eval_dataset=Rows(8, 2))
    return kind(model, arguments(folder, **changes), **data)


def record_in(model: PrefixModel, name: str | None = None) -> TrainingRecord:
    record = model.prefixes.entry(name).training
    assert record is not None
    return record


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[str, TrainingRecord | None]:
    """The record at the time when a prefix is saved, by folder."""
    found: dict[str, TrainingRecord | None] = {}
    save = PrefixModel.save_pretrained

    def save_pretrained(self: PrefixModel, folder: Any, **options: Any) -> None:
        found[Path(folder).name] = self.prefixes.entry().training
        save(self, folder, **options)

    monkeypatch.setattr(PrefixModel, "save_pretrained", save_pretrained)
    return found


def test_a_training_is_recorded(tmp_path: Path) -> None:
    model = make()
    trainer = make_trainer(model, tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    record = record_in(model)
    logged = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    assert dict(record.training_losses) == logged
    assert len(logged) == 4
    assert [step for step, _ in record.evaluation_losses] == [2, 4]
    assert record.evaluation is not None
    assert record.evaluation.metrics["loss"] == record.evaluation_losses[-1][1]
    assert (record.steps, record.kept_step, record.epochs) == (4, 4, 1.0)
    assert record.training_data == DataSet(examples=16)
    assert record.evaluation_data == DataSet(examples=8)
    assert record.hyperparameters["learning_rate"] == 3e-2
    assert record.hyperparameters["optimizer"] == "AdamW"
    assert TrainingRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert copy.deepcopy(model).prefixes.entry().training == record


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"save_strategy": "steps", "save_steps": 2}, [2, 4]),
        ({"save_strategy": "steps", "save_steps": 2, "logging_strategy": "no"}, [2, 4]),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "logging_steps": 3}, [4, 8]),
        ({"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 2}, [2]),
    ],
    ids=["steps", "without a log", "epochs", "best"],
)
def test_a_checkpoint_knows_of_all_that_came_before(
    changes: dict[str, Any], steps: list[int], tmp_path: Path, saved: dict[str, TrainingRecord | None]
) -> None:
    trainer = make_trainer(make(), tmp_path, **changes)
    trainer.train()
    assert saved.keys() >= {f"checkpoint-{step}" for step in steps}
    for name, record in saved.items():
        step = int(name.split("-")[1])
        assert record is not None
        assert record.steps == record.kept_step == step
        known = {log["step"] for log in trainer.state.log_history if "loss" in log and log["step"] <= step}
        assert {one for one, _ in record.training_losses} == known
        if trainer.args.eval_strategy != "no":
            assert record.evaluation is not None


def test_a_checkpoint_that_a_later_callback_asks_for_is_recorded_too(
    tmp_path: Path, saved: dict[str, TrainingRecord | None]
) -> None:
    class Asking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = state.global_step == 3

    trainer = make_trainer(make(), tmp_path)
    trainer.add_callback(Asking())
    trainer.train()
    record = saved["checkpoint-3"]
    assert record is not None
    assert [step for step, _ in record.training_losses] == [1, 2, 3]


def test_the_record_is_not_made_anew_at_every_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    record_of = trainer_integration.record_of

    def counting(args: Any, state: Any, **more: Any) -> TrainingRecord:
        made.append(state.global_step)
        return record_of(args, state, **more)

    monkeypatch.setattr(trainer_integration, "record_of", counting)
    callback, model = RecordingCallback(), make()
    state, control = SimpleNamespace(log_history=[], global_step=0), SimpleNamespace(should_save=False)
    state.epoch, state.best_global_step = None, None
    args = arguments(tmp_path)
    callback.on_train_begin(args, state, control, model=model)  # type: ignore[arg-type]
    for step in range(1, 2001):
        state.global_step = step
        state.log_history.append({"loss": 1.0, "step": step})
        callback.on_step_end(args, state, control, model=model)  # type: ignore[arg-type]
        callback.on_log(args, state, control, model=model)  # type: ignore[arg-type]
    assert 100 < len(made) < 300
    assert made[:50] == list(range(1, 51))


def test_a_resumed_run_has_the_whole_curve(tmp_path: Path) -> None:
    whole, resumed = make(), make()
    settings: dict[str, Any] = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    make_trainer(whole, tmp_path / "whole", **settings).train()
    trainer = make_trainer(resumed, tmp_path / "resumed", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert record_in(resumed) == record_in(whole)
    assert len(record_in(resumed).training_losses) == 4


def test_the_best_model_has_the_evaluation_of_its_step(tmp_path: Path) -> None:
    model = make()
    trainer = make_trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="rank",
        greater_is_better=True,
    )
    ranks = iter([1.0, 3.0, 2.0, 0.0, 7.0])
    trainer.compute_metrics = lambda _: {"rank": next(ranks)}
    trainer.train()
    record = record_in(model)
    assert (record.steps, record.kept_step) == (4, 2)
    assert record.evaluation is record.best_evaluation
    assert record.evaluation is not None
    assert record.evaluation.metrics["rank"] == 3.0
    assert record.last_evaluation is not None
    assert record.last_evaluation.metrics["rank"] == 0.0
    trainer.evaluate()
    record = record_in(model)
    assert record.evaluation is not None
    assert (record.evaluation.step, record.evaluation.metrics["rank"]) == (2, 7.0)
    assert record.last_evaluation is not None
    assert record.last_evaluation.metrics["rank"] == 0.0


def test_only_prefixes_that_have_changed_are_recorded(tmp_path: Path) -> None:
    model = make("a", "b", "c")
    model.prefixes["c"].requires_grad_(False)
    make_trainer(model, tmp_path / "a").train()
    first = record_in(model, "a")
    assert model.prefixes.entry("b").training is None
    model.set_prefix("b")
    trainer = make_trainer(model, tmp_path / "b", max_steps=2)
    trainer.train()
    assert record_in(model, "a") is first
    assert record_in(model, "b").steps == 2
    assert model.prefixes.entry("c").training is None
    # An evaluation afterwards is about the prefix that is active.
    trainer.evaluate()
    assert record_in(model, "b").evaluation is not None
    own = record_in(model, "b")
    model.set_prefix("a")
    trainer.evaluate()
    assert record_in(model, "a") is first
    assert record_in(model, "b") is own


def test_an_evaluation_alone_is_no_training(tmp_path: Path) -> None:
    model = make()
    make_trainer(model, tmp_path).train()
    before = record_in(model)
    make_trainer(model, tmp_path).evaluate()
    assert record_in(model) is before
    trainer = make_trainer(make(), tmp_path, eval_on_start=True, eval_strategy="steps", eval_steps=4)
    trainer.train()
    assert [step for step, _ in record_in(trainer.model).evaluation_losses] == [0, 4]  # type: ignore[arg-type]


def test_the_callback_is_there_once_and_leaves_other_models_alone(tmp_path: Path) -> None:
    trainer_integration._register()
    callbacks: list[Any] = trainer_module.DEFAULT_CALLBACKS
    assert callbacks.count(RecordingCallback) == 1
    assert not hasattr(Trainer.create_model_card.__wrapped__, "__wrapped__")  # type: ignore[attr-defined]
    trainer = make_trainer(FAMILIES["llama"].build(), tmp_path, save_strategy="steps", save_steps=2)
    kinds = [type(one) for one in trainer.callback_handler.callbacks]
    assert kinds.count(RecordingCallback) == 1
    trainer.train()
    trainer.create_model_card(language="en", tags="mine")
    ours = (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").unlink()
    Trainer.create_model_card.__wrapped__(trainer, language="en", tags="mine")  # type: ignore[attr-defined]
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == ours
    assert "library_name: transformers" in ours
    assert "peft_prefix" not in ours


def test_prefixes_are_found_in_what_is_put_around_them() -> None:
    model = make()
    assert prefixes_in(model) is model
    assert prefixes_in(torch.nn.DataParallel(model)) is model
    assert prefixes_in(torch.compile(model)) is model
    assert prefixes_in(model.base) is None
    assert prefixes_in(None) is None


# Cards


def card_in(folder: Path) -> ModelCard:
    """The card, which huggingface_hub can read."""
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def test_the_card_of_a_trainer_is_that_of_its_prefix(tmp_path: Path) -> None:
    model = make()
    trainer = make_trainer(model, tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.save_model()
    (tmp_path / "README.md").write_text("# Mine\n\nWhat I want to say.", encoding="utf-8")
    asked: dict[str, Any] = dict(language="en", license="mit", tags=["mine"], dataset_tags=["me/data"], dataset="Data")
    trainer.create_model_card(**asked, tasks="text-generation", model_name="name", finetuned_from="me/base")
    card = card_in(tmp_path)
    data = card.data.to_dict()
    assert data["library_name"] == "peft_prefix"
    assert data["language"] == ["en"]
    assert data["license"] == "mit"
    assert data["tags"] == ["mine", "generated_from_trainer", "prefix-tuning", "peft_prefix"]
    assert data["datasets"] == ["me/data"]
    assert data["base_model"] == ["me/base"] or data["base_model"] == "me/base"
    assert data["pipeline_tag"] == "text-generation"
    assert card.text.startswith("# Mine\n\nWhat I want to say.\n\n<!-- peft_prefix: . -->\n")
    assert "fine-tuned version of" not in card.text
    size = (tmp_path / "prefix.safetensors").stat().st_size
    assert f"| size | {size / 1000:,.0f} KB |" in card.text
    assert f"| numbers | {sum(one.numel() for one in model.prefix_state_dict().values()):,} |" in card.text
    assert json.loads((tmp_path / "prefix_config.json").read_text())["sha256"] in card.text
    assert "| 4 | " in card.text
    trainer.create_model_card(**asked, tasks="text-generation", model_name="name", finetuned_from="me/base")
    assert card_in(tmp_path).content == card.content


def test_results_that_the_trainer_knows_the_task_and_data_of_are_taken_over(tmp_path: Path) -> None:
    trainer = make_trainer(make(), tmp_path, max_steps=1)
    trainer.compute_metrics = lambda _: {"accuracy": 0.5}
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(tasks="text-generation", dataset_tags="me/data", dataset="Data", model_name="name")
    (entry,) = card_in(tmp_path).data.to_dict()["model-index"]
    assert entry["name"] == "name"
    assert entry["results"][0]["metrics"] == [{"name": "Accuracy", "type": "accuracy", "value": 0.5}]
    assert card_in(tmp_path).data.metrics == ["accuracy"]


def test_the_card_of_several_prefixes_and_of_none(tmp_path: Path) -> None:
    model = make("a", "b")
    model.set_prefix(None)
    trainer = make_trainer(model, tmp_path)
    trainer.save_model()
    trainer.create_model_card()
    text = card_in(tmp_path).text
    assert text.startswith("# ")
    assert text.index("<!-- peft_prefix: a -->") < text.index("<!-- peft_prefix: b -->")
    assert 'subfolder="b"' in text
    before = (tmp_path / "README.md").read_bytes()
    model.prefixes.requires_grad_(False)
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_bytes() == before  # there is nothing to say


def test_a_card_before_anything_is_saved(tmp_path: Path) -> None:
    make_trainer(make(), tmp_path).create_model_card()
    assert "| virtual tokens | 2 |" in card_in(tmp_path).text
    assert "sha256" not in card_in(tmp_path).text


def test_what_cannot_be_read_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, readme = make_trainer(make(), tmp_path), tmp_path / "README.md"
    readme.write_bytes(b"# Caf\xe9\r\n")
    with pytest.raises(PrefixFileError, match="is not UTF-8"):
        trainer.create_model_card()
    assert readme.read_bytes() == b"# Caf\xe9\r\n"
    readme.write_bytes(b"---\nlicense: mit\n\nText.\r\n")
    with pytest.raises(PrefixFileError, match="the line '---' that ends it is missing"):
        trainer.create_model_card()
    assert readme.read_bytes() == b"---\nlicense: mit\n\nText.\r\n"
    readme.write_bytes(b"# Fine\r\n")

    def fail(*_: Any, **__: Any) -> None:
        readme.write_text("half a c")
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_integration, "_replace_card", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.create_model_card()
    assert readme.read_bytes() == b"# Fine\r\n"


def test_the_card_on_the_hub_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hub: dict[str, Any] = {"text": "---\nlicense: mit\n---\nWritten on the Hub.\n"}

    def on_the_hub(repo_id: str, token: Any, revision: Any) -> str | None:
        assert (repo_id, token, revision) == (REPOSITORY, "token", "branch")
        if isinstance(on_hub["text"], Exception):
            raise on_hub["text"]
        return on_hub["text"]

    monkeypatch.setattr(trainer_integration, "card_on_hub", on_the_hub)
    trainer = make_trainer(make(), tmp_path, hub_token="token", hub_revision="branch")
    trainer.hub_model_id = REPOSITORY
    (tmp_path / "README.md").write_text("Written here.\n", encoding="utf-8")
    with pytest.warns(PrefixWarning, match=r"The Hub's text stays; this one is kept in .*_README\.md"):
        trainer.create_model_card(license="apache-2.0")
    assert (tmp_path / "_README.md").read_text(encoding="utf-8") == "Written here.\n"
    assert "Written on the Hub." in card_in(tmp_path).text
    assert "Written here." not in card_in(tmp_path).text
    assert card_in(tmp_path).data.license == "apache-2.0"
    assert 'PrefixModel.from_pretrained(base, "me/cards")' in card_in(tmp_path).text
    on_hub["text"] = None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nWritten here.\n", encoding="utf-8")
    trainer.create_model_card()
    assert "Written here." in card_in(tmp_path).text
    assert card_in(tmp_path).data.license == "mit"
    before = (tmp_path / "README.md").read_bytes()
    on_hub["text"] = PrefixFileError("no connection")
    with pytest.raises(PrefixFileError, match="no connection"):
        trainer.create_model_card()
    assert (tmp_path / "README.md").read_bytes() == before
    trainer.is_in_train = True  # as when TRL saves a checkpoint
    with pytest.warns(PrefixWarning, match="README.md was not renewed. no connection"):
        trainer.create_model_card()
    assert (tmp_path / "README.md").read_bytes() == before
    (tmp_path / "README.md").unlink()
    with pytest.warns(PrefixWarning, match="not renewed"):
        trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()


def test_trainers_with_a_card_of_their_own(tmp_path: Path) -> None:
    class Own(Trainer):
        def create_model_card(self, *args: Any, dataset_name: str | None = None, **kwargs: Any) -> None:
            """My card."""
            super().create_model_card(*args, **kwargs)
            file = Path(str(self.args.output_dir)) / "README.md"
            text = file.read_text(encoding="utf-8")
            assert text.startswith("---\nlibrary_name: transformers")
            file.write_text(text.replace("tags:", f"datasets: {dataset_name}\nlicense: mit\ntags:"), encoding="utf-8")

    own = Own.create_model_card
    other = make_trainer(FAMILIES["llama"].build(), tmp_path / "other", Own)
    assert Own.create_model_card is own
    other.create_model_card(dataset_name="me/data")
    assert "license: mit" in (tmp_path / "other" / "README.md").read_text()
    make_trainer(make(), tmp_path, Own).create_model_card(dataset_name="me/data")
    assert Own.create_model_card.__doc__ == "My card."
    data = card_in(tmp_path).data
    assert data.library_name == "peft_prefix"
    assert data.license == "mit"
    assert data.datasets == ["me/data"]
    assert "fine-tuned" not in card_in(tmp_path).text


def test_the_card_of_trl(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own futures
        trl = pytest.importorskip("trl")
    warnings.simplefilter("ignore", FutureWarning)
    settings: dict[str, Any] = dict(max_steps=2, save_steps=2, learning_rate=3e-2, logging_steps=1, use_cpu=True)
    trainer = trl.SFTTrainer(
        make(),
        trl.SFTConfig(str(tmp_path), report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **settings),
        train_dataset=datasets.Dataset.from_list([{"prompt": "name : ", "completion": "the Blue Spice ."}] * 8),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    card = card_in(tmp_path)  # TRL writes it with each checkpoint
    assert card.data.library_name == "peft_prefix"
    assert set(card.data.tags) >= {"trl", "sft", "prefix-tuning"}
    assert "Cite TRL" not in card.text
    assert "| `learning_rate` | 0.03 |" in card.text
    (tmp_path / "README.md").write_text(f"{card.content}\nMine.\n", encoding="utf-8")
    trainer.create_model_card(dataset_name="me/data")
    assert card_in(tmp_path).text.endswith("\nMine.\n")
    assert card_in(tmp_path).data.datasets == ["me/data"]


def test_facts_of_a_base_that_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    model = make()
    entry = model.prefixes.entry()
    for name, known in (("base", None), ("gpt2", "gpt2")):
        entry.config = entry.config.replace(base_model_name_or_path=name)
        assert entry_facts(entry, model.base, tmp_path).base == known


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *(("llama", "text-generation"), ("gpt2", "text-generation"), ("hybrid", "text-generation")),
        *(("bart", None), ("t5", None), ("image", None)),
    ],
)
def test_tasks_that_are_certain(family: str, task: str | None) -> None:
    first = {"hybrid": next(iter(HYBRIDS)), "image": next(iter(MULTIMODAL))}.get(family, family)
    assert pipeline_tag({**FAMILIES, **ENCODER_DECODERS, **HYBRIDS, **MULTIMODAL}[first].build()) == task


def test_pictures_lie_beside_their_prefixes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = make("a", "b")
    model.set_prefix("a")
    make_trainer(model, tmp_path / "run").train()
    entries = model.prefixes.entries
    facts = [entry_facts(entries["a"], model.base, tmp_path, "a"), entry_facts(entries["b"], model.base, tmp_path, "b")]
    write_card(tmp_path, facts, None)
    assert (tmp_path / "a" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "b").exists()
    text = local_card(tmp_path)
    assert text is not None
    assert "](a/loss_curve.png)" in text
    write_card(tmp_path, facts, None, draw=False)
    assert "loss_curve" not in (local_card(tmp_path) or "")


def test_nothing_is_written_if_the_card_is_broken(tmp_path: Path) -> None:
    model = make()
    facts = [entry_facts(model.prefixes.entry(), model.base, tmp_path)]
    with pytest.raises(PrefixFileError, match="not valid YAML"):
        write_card(tmp_path, facts, "---\n[\n---\n")
    assert list(tmp_path.iterdir()) == []


def test_only_asked_for_values_replace_the_users(tmp_path: Path) -> None:
    own = "---\nlicense: mit\nlanguage: de\ndatasets: a/b\n---\nText"
    made = (
        "---\nlicense: apache-2.0\nlanguage: [en]\ndatasets: [generator]\ntags: [x]\nlicence: license\n---\nNot this."
    )
    assert taking_over(own, made, {}) == own.replace("a/b\n", "a/b\ntags:\n- x\n")
    changed = yaml.safe_load(
        taking_over(own, made, {"license": "apache-2.0", "dataset_tags": "generator"}).split("---")[1]
    )
    assert changed == {"license": "apache-2.0", "language": "de", "datasets": ["a/b", "generator"], "tags": ["x"]}
    assert yaml.safe_load(taking_over(None, made, {}).split("---")[1])["language"] == ["en"]


@pytest.mark.parametrize("kind", [RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError])
def test_there_is_no_card_on_the_hub(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(card_facts, "hf_hub_download", download)
    assert card_on_hub(REPOSITORY) is None


@pytest.mark.parametrize("kind", [GatedRepoError, LocalEntryNotFoundError, ValueError, ConnectionError])
def test_nobody_knows_whether_there_is_a_card_on_the_hub(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(card_facts, "hf_hub_download", download)
    with pytest.raises(PrefixFileError, match=r"did not say whether me/cards has a README\.md .*upload again"):
        card_on_hub(REPOSITORY)


def test_a_card_in_the_cache_is_not_taken_for_the_one_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[Path] = []

    def download(repo_id: str, file: str, *, cache_dir: str, **_: Any) -> str:
        caches.append(Path(cache_dir))
        assert list(caches[-1].iterdir()) == []
        (caches[-1] / file).write_bytes(b"Line\r\n")
        return str(caches[-1] / file)

    monkeypatch.setattr(card_facts, "hf_hub_download", download)
    assert card_on_hub(REPOSITORY) == "Line\r\n"
    assert not caches[0].exists()
