"""Runs: what is done is not done again, and an interrupted run ends as an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_paper import tiny_model, tiny_place
from transformers import TrainerCallback

pytest.importorskip("peft")
pytest.importorskip("rouge_score")

from paper import execute as executing
from paper.data import digest
from paper.execute import Options, execute, is_done
from paper.files import read_json, write_json
from paper.generation import kept
from paper.methods import Setting, method_from
from paper.metrics import MissingTool
from paper.run import DataChoice, Run
from paper.settings import DatasetSettings, MethodSettings, Training
from paper.splits import rows, shortened, splits_of
from paper.training import BatchError, steps_of
from paper.yaml_files import SettingError

from peft_prefix import PromptTargetCollator

PREFIX = {"kind": "prefix", "length": 4}
FULL = {"kind": "fine_tuning"}
TRAINING = Training(learning_rate=1e-2, batch_size=4, steps=8, evaluations=4)
TASK = DatasetSettings(
    separator=" Headline :", instruction="Write each headline .", max_new_tokens=6, methods={}, target_start=" "
)
DATA = DataChoice("bbc", train_size=12, protocol="news-to-sport")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny data and models."""
    folder = tiny_place(tmp_path_factory.mktemp("paper"))
    tiny_model(folder / "causal-plain", dropout=0.0)
    tiny_model(folder / "encoder-decoder-plain", encoder_decoder=True, dropout=0.0)
    return folder


def run_of(place: Path, base: str = "causal", method: dict[str, Any] = PREFIX, **training: Any) -> Run:
    chosen = MethodSettings(method_from(method), replace(TRAINING, **training))
    return Run(str(place / base), "method", chosen, DATA, TASK)


def options(place: Path, runs: Path, *callbacks: TrainerCallback) -> Options:
    return Options(str(place / "data"), runs, generation_batch=4, callbacks=callbacks)


class Stop(TrainerCallback):
    """Ends the process, as it were, at some step, or behind the checkpoint of that step."""

    def __init__(self, step: int, saved: bool) -> None:
        self.step, self.saved = step, saved

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.saved:
            raise KeyboardInterrupt

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("base", ["causal", "encoder-decoder"])
def test_a_run_leaves_what_reports_need(base: str, place: Path, tmp_path: Path) -> None:
    run = run_of(place, base)
    result = execute(run, options(place, tmp_path), "some")
    folder = tmp_path / run.folder
    splits = splits_of(DATA, str(place / "data"))
    assert {item.group for item in splits.train} <= {"business", "entertainment", "politics", "tech"}
    assert {item.group for item in splits.test} == {"sport"}
    assert result["inputs_scored"] == len(splits.test) > 4
    assert set(result["metrics"]["all"]) == {"rouge_1", "rouge_2", "rouge_L"}
    assert [point["step"] for point in result["curve"]] == [2, 4, 6, 8]
    assert result["dev_loss"] == result["curve"][-1]["dev_loss"] < result["curve"][0]["dev_loss"]
    layers = 3 if base == "causal" else 2 + 2 * 3
    assert result["trained_parameters"] == layers * 2 * 4 * 32
    assert result["stored_bytes"] > 4 * result["trained_parameters"]
    assert not (folder / "training").exists()
    assert read_json(folder / "config.json")["setting"]["length"] == 4
    assert read_json(folder / "digests.json")["train"] == digest(splits.train)
    texts = (folder / f"texts-{run.texts_key}" / "predictions.txt").read_text().splitlines()
    assert len(texts) == len(splits.test)


def test_a_finished_run_is_not_repeated(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(place)
    first = execute(run, options(place, tmp_path), "some")
    monkeypatch.setattr(executing, "load_base", lambda model: pytest.fail("the base was loaded again"))
    assert execute(run, options(place, tmp_path), "some") == first


def test_other_texts_need_no_other_training(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(place)
    first = execute(run, options(place, tmp_path), "some")
    monkeypatch.setattr(executing, "train", lambda *_: pytest.fail("it was trained again"))
    longer = replace(run, task=replace(TASK, max_new_tokens=9, decoding={"num_beams": 2}))
    assert longer.folder == run.folder
    assert execute(longer, options(place, tmp_path), "some")["dev_loss"] == first["dev_loss"]
    assert len(list((tmp_path / run.folder).glob("texts-*/metrics.json"))) == 2


@pytest.mark.parametrize(("step", "saved"), [(5, False), (4, True), (8, True)], ids=["between", "saved", "at the end"])
@pytest.mark.parametrize("select", ["last", "best"])
@pytest.mark.parametrize("method", [PREFIX, FULL], ids=["prefix", "full"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    method: dict[str, Any], select: str, step: int, saved: bool, place: Path, tmp_path: Path
) -> None:
    run = run_of(place, method=method, select=select, bf16=True)
    whole = execute(run, options(place, tmp_path / "whole"), "some")
    with pytest.raises(KeyboardInterrupt):
        execute(run, options(place, tmp_path / "parts", Stop(step, saved)), "some")
    assert not is_done(run, tmp_path / "parts")
    parts = execute(run, options(place, tmp_path / "parts"), "some")
    assert parts["seconds"] is None
    # A prefix that only had to be stored has no record of its training in its file.
    unlike = ("seconds", "stored_bytes") if step == 8 else ("seconds",)
    assert {**parts, **dict.fromkeys(unlike)} == {**whole, **dict.fromkeys(unlike)}
    (file,) = (file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*.safetensors"))
    weights, resumed = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
    assert all(weights[name].equal(resumed[name]) for name in weights)


@pytest.mark.parametrize("method", [PREFIX, FULL, {"kind": "adapter", "width": 4}], ids=lambda method: method["kind"])
def test_texts_do_not_depend_on_whether_this_process_has_trained(
    method: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def spying(adapted: Any, *arguments: Any) -> list[str]:
        block = next(module for module in adapted.model.modules() if type(module).__name__ == "GPT2MLP")
        with block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype)):
            return generate(adapted, *arguments)

    generate = executing.generate
    monkeypatch.setattr(executing, "generate", spying)
    run = run_of(place, method=method, bf16=True)
    execute(run, options(place, tmp_path), "some")
    shutil.rmtree(tmp_path / run.folder / f"texts-{run.texts_key}")
    execute(run, options(place, tmp_path), "some")
    assert set(seen) == {torch.float32}


def test_the_weights_with_the_lowest_dev_loss_are_kept(place: Path, tmp_path: Path) -> None:
    run = run_of(place, method=FULL, select="best", learning_rate=3.0, steps=12, warmup_steps=12, evaluations=6)
    result = execute(run, options(place, tmp_path), "some")
    losses = [point["dev_loss"] for point in result["curve"]]
    assert result["dev_loss"] == min(losses) < losses[-1], "the rate rises until it must do harm"
    assert measured(run, place, tmp_path) == pytest.approx(min(losses), rel=1e-4)


def test_interrupted_texts_go_on_where_they_were(place: Path, tmp_path: Path) -> None:
    run = run_of(place)
    whole = execute(run, options(place, tmp_path), "some")
    texts = tmp_path / run.folder / f"texts-{run.texts_key}"
    (file,) = texts.glob("texts-*.jsonl")
    complete = kept(texts)
    lines = file.read_text().splitlines(keepends=True)
    changed = {**json.loads(lines[0]), "text": "a text that was there before"}
    file.write_text(json.dumps(changed) + "\n" + lines[1][:9])  # a line that was cut off in the middle
    (texts / "metrics.json").unlink()
    execute(run, options(place, tmp_path), "some")
    assert kept(texts) == {**complete, changed["index"]: changed["text"]}
    assert whole["inputs_scored"] == len(complete)


@pytest.mark.parametrize("part", ["method", "texts"])
def test_other_data_of_the_same_name_are_refused(part: str, place: Path, tmp_path: Path) -> None:
    run = run_of(place)
    execute(run, options(place, tmp_path), "some")
    (other,) = (file for file in (tmp_path / run.folder).rglob("digests.json") if file.parent.name.startswith(part))
    write_json(other, {"train": "other", "dev": "other"})
    with pytest.raises(SettingError, match="other data of the same name"):
        execute(run, options(place, tmp_path), "some")


def test_texts_outlive_a_metric_that_cannot_be_computed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(place)

    def fails(*_: Any) -> None:
        raise MissingTool("there is no Java")

    with monkeypatch.context() as patched:
        patched.setattr(executing, "score_texts", fails)
        with pytest.raises(MissingTool, match="no Java"):
            execute(run, options(place, tmp_path), "some")
    monkeypatch.setattr(executing, "train", lambda *_: pytest.fail("it was trained again"))
    assert execute(run, options(place, tmp_path), "some")["inputs_scored"] > 0


def test_a_batch_that_cannot_be_divided_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="batch of 4 rows cannot be divided into 3"):
        execute(run_of(place), replace(options(place, tmp_path), accumulation=3), "some")


def test_another_precision_than_that_of_the_settings_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(SettingError, match=r"settings train with mixed precision 'no'.*asks for 'bf16'"):
        execute(run_of(place), options(place, tmp_path), "some")


def test_the_published_numbers_that_the_data_lack_are_told(place: Path, tmp_path: Path) -> None:
    train, *_ = execute(run_of(place), options(place, tmp_path), "some")["notes"]
    assert train.startswith("bbc train: expected 1754 texts; found")


@pytest.mark.parametrize("base", ["causal", "encoder-decoder"])
def test_the_dropout_of_the_base_can_be_off(base: str, place: Path, tmp_path: Path) -> None:
    with_it, without = (
        execute(run_of(place, base, base_dropout=is_on), options(place, tmp_path), "some") for is_on in (True, False)
    )
    none_in_it = execute(run_of(place, f"{base}-plain"), options(place, tmp_path), "some")
    assert [point["dev_loss"] for point in without["curve"]] == [point["dev_loss"] for point in none_in_it["curve"]]
    assert without["curve"] != with_it["curve"]


def test_epochs_are_turned_into_steps() -> None:
    assert steps_of(Training(1e-3, 4, epochs=3), rows=10) == 9
    assert steps_of(Training(1e-3, 4, epochs=0.5), rows=16) == 2
    assert steps_of(Training(1e-3, 4, steps=7), rows=10) == 7


@pytest.mark.parametrize("base", ["causal-plain", "encoder-decoder-plain"])
def test_accumulation_changes_nothing(base: str, place: Path, tmp_path: Path) -> None:
    run = run_of(place, base, FULL)
    whole = execute(run, options(place, tmp_path / "whole"), "some")
    parts = execute(run, replace(options(place, tmp_path / "parts"), accumulation=2), "some")
    assert [one["dev_loss"] for one in parts["curve"]] == pytest.approx(
        [one["dev_loss"] for one in whole["curve"]], rel=1e-4
    )


def test_the_dev_loss_is_a_mean_over_tokens(place: Path, tmp_path: Path) -> None:
    run = run_of(place)
    result = execute(run, options(place, tmp_path), "some")
    assert result["dev_loss"] == pytest.approx(measured(run, place, tmp_path), rel=1e-4)


def test_long_inputs_keep_what_stands_behind_them(place: Path) -> None:
    _, tokenizer = executing.load_base(str(place / "causal"))
    items = splits_of(DATA, str(place / "data")).train
    cut = shortened(items, 4, tokenizer)
    for item, short in zip(items, cut, strict=True):
        assert item.source.startswith(short.source)
        assert len(tokenizer(short.source)["input_ids"]) == 4
        assert short.references == item.references
    for row in rows(items, replace(TASK, max_source_tokens=4), tokenizer):
        assert row["prompt"].endswith(TASK.separator)
        assert len(row["prompt"]) < 60
    assert shortened(items, None, tokenizer) == items == shortened(items, 1000, tokenizer)


def measured(run: Run, place: Path, runs: Path) -> float:
    """The dev loss of what a run stored, row by row."""
    base, tokenizer = executing.load_base(run.model)
    splits = splits_of(DATA, str(place / "data"))
    setting = Setting(base, tokenizer, rows(splits.train, TASK, tokenizer), TASK.separator, TASK.instruction, 0)
    adapted = run.settings.method.build(setting)
    adapted.load(runs / run.folder / "trained")
    adapted.model.eval()
    collate = PromptTargetCollator(tokenizer, base)
    total, tokens = 0.0, 0
    for row in rows(splits.dev, TASK, tokenizer):
        batch = collate([row])
        count = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            total += float(adapted.model(**batch).loss) * count
        tokens += count
    return total / tokens
