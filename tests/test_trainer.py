"""The stock `Trainer`, unmodified: training, checkpoints, exact resumption, best model, precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import tokens
from safetensors import safe_open
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_prefix import PrefixConfig, PrefixFileError, PrefixModel, get_prefix_model


class Rows(Dataset):
    """Random texts of different content and equal length."""

    def __init__(self, count: int, seed: int) -> None:
        self.ids = tokens(count, 12, seed)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def make(seed: int = 0, **config: Any) -> PrefixModel:
    """A model whose base has dropout, so that resumption must restore the random state."""
    family = FAMILIES["gpt2"]
    base = type(family)(family.config, family.model, {**family.kwargs, "resid_pdrop": 0.1, "attn_pdrop": 0.1}).build()
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, dropout=0.1, mlp_hidden_size=16, **config))


def make_trainer(model: PrefixModel, folder: Path, **arguments: Any) -> Trainer:
    """A trainer of eight steps with two epochs."""
    settings = dict(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        logging_steps=1,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=Rows(16, 1),
        eval_dataset=Rows(8, 2),
    )


def losses(trainer: Trainer) -> dict[int, float]:
    """Training loss by step."""
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


FORMS = pytest.mark.parametrize("reparameterization", ["none", "mlp"])


@FORMS
def test_training_lowers_the_loss_and_leaves_the_base_alone(reparameterization: str, tmp_path: Path) -> None:
    model = make(reparameterization=reparameterization)
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    trainer = make_trainer(model, tmp_path, max_steps=30, save_strategy="no")
    trainer.train()
    values = list(losses(trainer).values())
    assert sum(values[-4:]) < 0.99 * sum(values[:4])
    for name, value in model.base.state_dict().items():
        assert torch.equal(value, before[name]), name


@FORMS
def test_a_checkpoint_holds_the_prefix_and_its_training_state_and_no_base_weights(
    reparameterization: str, tmp_path: Path
) -> None:
    model = make(reparameterization=reparameterization)
    make_trainer(model, tmp_path, max_steps=4).train()
    folder = tmp_path / "checkpoint-4"
    files = {file.name for file in folder.iterdir()}
    assert files == {
        "prefix.safetensors",
        "prefix_config.json",
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
    }
    with safe_open(folder / "model.safetensors", framework="pt") as state:
        names = set(state.keys())
    assert names == set(model.state_dict())
    assert all(name.startswith(("prefixes.default.", "prefixes._extra_state")) for name in names)
    loaded = PrefixModel.from_pretrained(model.base, folder)
    for name, tensor in model.prefix_state_dict().items():
        assert torch.equal(loaded.prefix_state_dict()[name], tensor)


@FORMS
def test_a_resumed_run_equals_an_uninterrupted_one(reparameterization: str, tmp_path: Path) -> None:
    whole_model = make(reparameterization=reparameterization)
    whole = make_trainer(whole_model, tmp_path / "whole")
    whole.train()
    resumed_model = make(reparameterization=reparameterization)
    resumed = make_trainer(resumed_model, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert len(losses(whole)) == 8
    assert losses(resumed) == losses(whole)
    for name, tensor in whole_model.state_dict().items():
        assert torch.equal(resumed_model.state_dict()[name], tensor), name
    assert not torch.equal(
        whole_model.prefix_state_dict()["decoder.layers.0.key"],
        make(reparameterization=reparameterization).prefix_state_dict()["decoder.layers.0.key"],
    )


def test_resuming_with_another_configuration_is_an_error(tmp_path: Path) -> None:
    make_trainer(make(), tmp_path, max_steps=4).train()
    other = make_trainer(make(reparameterization="mlp"), tmp_path)
    with pytest.raises(PrefixFileError, match="Resume with the PrefixConfig"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@FORMS
def test_best_model_is_loaded_at_the_end(reparameterization: str, tmp_path: Path) -> None:
    model = make(reparameterization=reparameterization)
    trainer = make_trainer(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        learning_rate=0.3,
    )
    trainer.train()
    evaluations = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert len(evaluations) == 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], abs=1e-6)
    kept = {int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*")}
    assert best in kept
    assert len(kept) <= 2  # the best one and the last one


def test_saving_the_final_model_writes_the_prefix_only(tmp_path: Path) -> None:
    model = make()
    trainer = make_trainer(model, tmp_path / "run", max_steps=1, save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    files = {file.name for file in (tmp_path / "final").iterdir()}
    assert files == {"prefix.safetensors", "prefix_config.json", "README.md", "training_args.bin"}
    assert json.loads((tmp_path / "final" / "prefix_config.json").read_text())["num_virtual_tokens"] == 4


def test_bfloat16_training_works_and_keeps_the_prefix_in_float32(tmp_path: Path) -> None:
    model = make()
    trainer = make_trainer(model, tmp_path, bf16=True, max_steps=30, save_strategy="no")
    trainer.train()
    values = list(losses(trainer).values())
    assert sum(values[-4:]) < 0.99 * sum(values[:4])
    assert {tensor.dtype for tensor in model.prefix_state_dict().values()} == {torch.float32}


def test_the_loss_is_normalized_over_the_accumulated_batch(tmp_path: Path) -> None:
    family = FAMILIES["llama"]

    def run(batch: int, accumulation: int) -> PrefixModel:
        model = get_prefix_model(family.build(), PrefixConfig(num_virtual_tokens=4))
        trainer = make_trainer(
            model,
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            save_strategy="no",
        )
        trainer.train()
        return model

    together, apart = run(4, 1), run(2, 2)
    for name, tensor in together.prefix_state_dict().items():
        torch.testing.assert_close(apart.prefix_state_dict()[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    plain = make_trainer(make(), tmp_path / "plain")
    plain.train()
    checkpointed = make_trainer(
        make(),
        tmp_path / "checkpointed",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    checkpointed.train()
    expected = losses(plain)
    assert losses(checkpointed) == pytest.approx(expected, rel=1e-5)
    for name, tensor in plain.model.prefix_state_dict().items():
        torch.testing.assert_close(checkpointed.model.prefix_state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
