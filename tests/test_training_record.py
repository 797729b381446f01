"""The record of a training: what may be in it, and what it is made from."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import random_model, tokens
from transformers import Trainer, TrainerState, TrainingArguments

from peft_prefix import PrefixConfigError
from peft_prefix.training_facts import record_of
from peft_prefix.training_record import LARGEST_RECORD, DataSet, Evaluation, TrainingRecord, thinned


def full_record(**changes: Any) -> TrainingRecord:
    """A record in which every field says something."""
    fields: dict[str, Any] = dict(
        hyperparameters={"learning_rate": 0.03, "seed": 1, "optimizer": "AdamW", "bf16": True, "clip": None},
        training_data=DataSet(name="GEM/e2e_nlg", config="default", split="train", examples=2000),
        evaluation_data=DataSet(examples=64),
        steps=300,
        kept_step=200,
        epochs=2.5,
        hardware="Some Processor @ 2.00GHz",
        num_processes=2,
        versions={"torch": "2.13.0", "python": "3.11.7"},
        training_losses=((1, 3.0), (150, 0.1 + 0.2), (300, 1e-17)),
        evaluation_losses=((100, 2.5), (200, 1.5), (300, 1.75)),
        last_evaluation=Evaluation(step=300, metrics={"loss": 1.75, "rouge1": 40}),
        best_evaluation=Evaluation(step=200, metrics={"loss": 1.5}),
    )
    return TrainingRecord(**{**fields, **changes})


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = dict(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True)
    return TrainingArguments(**{**settings, **changes})


def state_with(log: list[dict[str, Any]], **fields: Any) -> TrainerState:
    return TrainerState(log_history=log, global_step=max((one["step"] for one in log), default=1), **fields)


@pytest.mark.parametrize("record", [full_record(), TrainingRecord()], ids=["full", "empty"])
def test_the_round_trip_is_exact(record: TrainingRecord) -> None:
    text = json.dumps(record.to_dict(), allow_nan=False)
    again = TrainingRecord.from_dict(json.loads(text))
    assert again == record
    assert json.dumps(again.to_dict()) == text
    assert copy.deepcopy(record) == record


def test_the_evaluation_of_a_prefix_is_that_of_its_own_numbers() -> None:
    assert full_record().evaluation == Evaluation(step=200, metrics={"loss": 1.5})
    assert full_record(kept_step=300).evaluation == Evaluation(step=300, metrics={"loss": 1.75, "rouge1": 40})
    assert full_record(kept_step=299).evaluation is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "steps must be an integer from 0"),
        ({"steps": True}, "steps must be an integer"),
        ({"steps": 10**400}, "not a larger one"),
        ({"steps": "3"}, "not '3'"),
        ({"epochs": math.nan}, "epochs must be a finite number"),
        ({"epochs": 10**400}, "finite"),
        ({"hardware": "x" * 201}, "at most 200 characters"),
        ({"hardware": "two\nlines"}, "printable"),
        ({"hardware": "\ud800"}, "printable"),
        ({"hardware": 3}, "hardware must be a printable string"),
        ({"versions": {"torch": None}}, "versions must have a string for 'torch'"),
        ({"versions": {"torch": 2}}, "torch must be a printable string"),
        ({"versions": ["torch"]}, "versions must be a dictionary"),
        ({"hyperparameters": {"a": [1]}}, "a must be a printable string"),
        ({"hyperparameters": {"a": math.inf}}, "a must be a finite number"),
        ({"hyperparameters": {"a": 2**60}}, "a must be an integer of at most 2"),
        ({"hyperparameters": {"": 1}}, "printable names of at most 64"),
        ({"hyperparameters": {"x" * 65: 1}}, "printable names of at most 64"),
        ({"hyperparameters": {1: 1}}, "printable names"),
        ({"hyperparameters": {f"a{i}": 1 for i in range(49)}}, "at most 48 entries, not one of 49"),
        ({"training_losses": [[1, 2.0]] * 201}, "at most 200 points, not one of 201"),
        ({"training_losses": [[1, math.nan]]}, "A loss of training_losses must be a finite number"),
        ({"training_losses": [[1.5, 1.0]]}, "A step of training_losses"),
        ({"training_losses": [[2, 1.0], [1, 1.0]]}, "ascending order"),
        ({"training_losses": [[1, 1.0, 1.0]]}, "pairs of a step and a loss"),
        ({"training_losses": {"1": 1.0}}, "must be a list"),
        ({"training_data": []}, "This DataSet must be a dictionary"),
        ({"training_data": {"examples": -1}}, "examples must be"),
        ({"training_data": {"name": 1}}, "name must be"),
        ({"training_data": {"url": "x"}}, "config, examples, name, split, not"),
        ({"last_evaluation": {"step": 1}}, "This Evaluation is incomplete.*metrics"),
        ({"last_evaluation": {"step": 1, "metrics": {"loss": "low"}}}, "loss must be a finite number"),
        ({"date": "2026-01-01"}, "another version of peft_prefix"),
    ],
)
def test_what_a_file_may_not_say(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrefixConfigError, match=message):
        TrainingRecord.from_dict({**full_record().to_dict(), **changes})


@pytest.mark.parametrize("fields", [None, [], "text", 3])
def test_what_is_no_record(fields: Any) -> None:
    with pytest.raises(PrefixConfigError, match="This TrainingRecord must be a dictionary"):
        TrainingRecord.from_dict(fields)


def test_a_record_is_small() -> None:
    wide = {f"{'ü' * 60}{i:02}": "ü" * 200 for i in range(48)}
    with pytest.raises(PrefixConfigError, match=f"at most {LARGEST_RECORD} bytes"):
        TrainingRecord(hyperparameters=wide)


def test_parts_must_be_parts() -> None:
    with pytest.raises(PrefixConfigError, match="training_data must be a DataSet or None"):
        TrainingRecord(training_data={"name": "e2e"})  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 2, 199, 200, 201, 12345])
def test_a_thinned_curve_has_its_ends(count: int) -> None:
    points = thinned(range(count))
    assert len(points) == min(count, 200)
    assert list(points) == sorted(set(points))
    if count:
        assert (points[0], points[-1]) == (0, count - 1)


def test_a_record_says_what_the_log_says(tmp_path: Path) -> None:
    log: list[dict[str, Any]] = []
    for step in range(1, 1001):
        log.append({"loss": 2.0 / step, "step": step, "epoch": step / 100})
        if step % 100 == 0:
            log.append({"eval_loss": 1.0 / step, "eval_rouge1": 30, "eval_runtime": 1.0, "step": step})
    log.append({"loss": math.nan, "step": 1001})
    log.append({"train_runtime": 3.0, "train_loss": 1.0, "step": 1001})
    record = record_of(
        arguments(tmp_path, learning_rate=3e-2, max_steps=1001, seed=7, label_smoothing_factor=0.1),
        state_with(log, epoch=10.0, best_global_step=900),
        training_data=tokens(8, 4),
        kept_step=900,
    )
    assert len(record.training_losses) == 200
    assert record.training_losses[0] == (1, 2.0)
    assert record.training_losses[-1] == (1000, 0.002)
    assert record.evaluation_losses == tuple((step, 1.0 / step) for step in range(100, 1001, 100))
    assert record.last_evaluation == Evaluation(step=1000, metrics={"loss": 0.001, "rouge1": 30.0})
    assert record.evaluation == record.best_evaluation == Evaluation(step=900, metrics={"loss": 1 / 900, "rouge1": 30})
    assert (record.steps, record.epochs, record.num_processes) == (1001, 10.0, 1)
    assert record.training_data == DataSet(examples=8)
    assert record.hardware
    assert set(record.versions) == {"peft_prefix", "transformers", "torch", "accelerate", "python"}
    known = record.hyperparameters
    assert known["learning_rate"] == 3e-2
    assert known["max_steps"] == 1001
    assert "num_train_epochs" not in known
    assert known["label_smoothing_factor"] == 0.1
    assert known["seed"] == 7
    assert known["mixed_precision"] == "no"
    assert known["lr_scheduler_type"] == "linear"
    assert "neftune_noise_alpha" not in known
    assert TrainingRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_the_optimizer_in_use_is_recorded_not_the_one_in_the_arguments(tmp_path: Path) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))]
    own = torch.optim.SGD([{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:]}], lr=0.1, momentum=0.9)
    known = record_of(arguments(tmp_path), state_with([]), optimizer=own).hyperparameters
    assert known["optimizer"] == "SGD"
    assert known["learning_rate"] == "0.5, 0.1"
    assert known["momentum"] == "0.9"
    assert known["weight_decay"] == 0


def test_strange_arguments_and_logs_still_make_a_record(tmp_path: Path) -> None:
    log: list[dict[str, Any]] = [
        {"step": 1, "loss": math.inf, "eval_loss": math.nan, "eval_": 1.0},
        {"step": 1, **{f"eval_{i}{'é' * (i % 2)}{'x' * i}": float(i) for i in range(100)}, "eval_text": "no number"},
        {"loss": 1.0},
    ]
    args = arguments(tmp_path, lr_scheduler_kwargs={"text": "\n\u202e" * 500, "power": 2})
    record = record_of(args, state_with(log[:2]), training_data=iter([]))
    assert record.training_losses == ()
    assert record.training_data == DataSet()
    assert record.last_evaluation is not None
    assert len(record.last_evaluation.metrics) <= 24
    assert len(str(record.hyperparameters["lr_scheduler_kwargs"])) == 200


def test_data_sets_say_where_they_are_from(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    plain = datasets.Dataset.from_dict({"a": [1, 2, 3]})
    info = datasets.DatasetInfo(
        builder_name="parquet",
        config_name="sst2",
        download_checksums={"hf://datasets/nyu-mll/glue@bcdcba79/sst2/train.parquet": {}},
    )
    hub = datasets.Dataset(plain.data, info=info, split=datasets.Split.TRAIN).map(lambda row: {"b": row["a"]})
    script = datasets.Dataset(plain.data, info=datasets.DatasetInfo(builder_name="e2e_nlg", config_name="default"))
    local = datasets.Dataset(plain.data, info=datasets.DatasetInfo(builder_name="json", config_name="default-1a2b"))
    stream = hub.to_iterable_dataset()
    expected = {
        "plain": (plain, DataSet(examples=3)),
        "hub": (hub, DataSet(name="nyu-mll/glue", config="sst2", split="train", examples=3)),
        "script": (script, DataSet(name="e2e_nlg", config="default", examples=3)),
        "local": (local, DataSet(examples=3)),
        "stream": (stream, DataSet()),
    }
    for name, (data, facts) in expected.items():
        assert record_of(arguments(tmp_path), state_with([]), training_data=data).training_data == facts, name


def test_the_clipping_of_each_prefix_is_recorded(tmp_path: Path) -> None:
    from peft_prefix import PrefixBankTrainer

    trainer = PrefixBankTrainer(random_model(FAMILIES["llama"].build()), arguments(tmp_path, max_grad_norm=0.25))
    assert record_of(trainer.args, state_with([])).hyperparameters["max_grad_norm"] == 0.25
    stock = Trainer(random_model(FAMILIES["llama"].build()), arguments(tmp_path, max_grad_norm=0.5))
    assert record_of(stock.args, state_with([])).hyperparameters["max_grad_norm"] == 0.5
