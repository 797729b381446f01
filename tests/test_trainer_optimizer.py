"""The stock `Trainer` and prefixes: no weight decay, and the norms of gradient and prefix in the log."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from family import Family
from test_trainer import Rows, make, make_trainer
from transformers import Trainer, TrainingArguments

from peft_prefix import PrefixConfig, get_prefix_model


def arguments(folder: Path, **more: object) -> TrainingArguments:
    settings = dict(
        max_steps=2, learning_rate=1e-3, report_to="none", use_cpu=True, disable_tqdm=True, weight_decay=0.5
    )
    return TrainingArguments(str(folder), **{**settings, **more})


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_weight_decay_of_the_arguments_does_not_reach_a_prefix(reparameterization: str, tmp_path: Path) -> None:
    model = make(reparameterization=reparameterization)
    optimizer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(4, 0)).create_optimizer()
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.0}
    assert optimizer.param_groups[0]["params"], "FSDP resumes only if an empty group is the last one"


def test_it_reaches_a_head_and_other_models(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    head = Family(family.config, "LlamaForSequenceClassification", {**family.kwargs, "num_labels": 3})
    model = get_prefix_model(head.build(), PrefixConfig(num_virtual_tokens=3))
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(4, 0))
    decayed = [group["params"] for group in trainer.create_optimizer().param_groups if group["weight_decay"]]
    assert decayed == [list(model.prefixes["default"].modules_to_save.parameters())]
    plain = torch.nn.Sequential(torch.nn.Linear(2, 3))
    names = Trainer(model=plain, args=arguments(tmp_path), train_dataset=Rows(4, 0)).get_decay_parameter_names(plain)
    assert names == ["0.weight"]


def test_the_log_has_the_norms_of_gradient_and_prefix(tmp_path: Path) -> None:
    model = make()
    start = model.prefix_state_dict()
    trainer = make_trainer(model, tmp_path, save_strategy="no")
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 8
    assert all(entry["grad_norm"] > 0 for entry in steps)
    assert 0 < steps[0]["prefix_change"] < steps[-1]["prefix_change"]
    now = model.prefix_state_dict()
    change = torch.cat([(now[name] - start[name]).flatten() for name in now]).norm()
    numbers = torch.cat([one.flatten() for one in now.values()])
    before = torch.cat([one.flatten() for one in start.values()]).norm()
    assert steps[-1]["prefix_change"] == pytest.approx(float(change / before), rel=1e-4)
    assert steps[-1]["prefix_norm"] == pytest.approx(float(numbers.square().mean().sqrt()), rel=1e-4)


def test_other_models_have_no_such_numbers_in_their_log(tmp_path: Path) -> None:
    trainer = Trainer(
        model=FAMILIES["llama"].build(), args=arguments(tmp_path, logging_steps=1), train_dataset=Rows(4, 0)
    )
    trainer.train()
    assert not any("prefix_norm" in entry for entry in trainer.state.log_history)
