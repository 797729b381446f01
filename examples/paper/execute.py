"""Does one run in a folder of its own: trains, generates, scores; what is there already is not done again.

<runs>/<data set>/<method>-<size>-seed<seed>-<key>/
    config.json, versions.json               what was asked for, with what
    data.json, digests.json                  on which data
    training/                                checkpoints, while it trains
    trained/                                 what the task has to store
    training.json                            dev loss over steps, sizes
    texts-<key>/                             config.json, digests.json, texts-*.jsonl, predictions.txt, metrics.json
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import smollm2
import torch
from accelerate.utils import broadcast_object_list
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from paper.data import digest
from paper.files import read_json, write_json
from paper.generation import generate
from paper.methods import Setting, stored_bytes
from paper.metrics import MissingTool
from paper.processes import alone, processes
from paper.run import Run
from paper.scoring import score_texts
from paper.splits import Splits, rows, shortened, splits_of
from paper.training import train
from paper.yaml_files import SettingError
from peft_prefix import PromptTargetCollator
from peft_prefix.example_inputs import loss_counts_items

PACKAGES = ("peft-prefix", "torch", "transformers", "accelerate", "peft")


@dataclass(frozen=True)
class Options:
    """Where runs read and write, and how much they do at once.

    Args:
        data: Folder or Hub id of the data; a folder may hold all data sets.
        runs: Folder of all runs.
        accumulation: Parts that each process divides its share of a batch into.
        generation_batch: Prompts at the same time.
        callbacks: Further callbacks of the Trainer.
    """

    data: str
    runs: Path
    accumulation: int = 1
    generation_batch: int = 16
    callbacks: Sequence[TrainerCallback] = ()


def execute(run: Run, options: Options, experiment: str) -> dict[str, Any]:
    """Do a run, as far as it is not done, and return what it gave.

    Raises:
        SettingError: The folder holds a run on other data.
        MethodError: The method does not fit the base or the data.
        MissingTool: A metric lacks what it needs. The texts are kept; `reproduce.py score` scores them later.
        BusyError: Another call is doing it.
    """
    with alone(options.runs / run.folder):
        return _execute(run, options, experiment)


def _execute(run: Run, options: Options, experiment: str) -> dict[str, Any]:
    folder = options.runs / run.folder
    texts = folder / f"texts-{run.texts_key}"
    state = processes()
    splits = splits_of(run.data, options.data)
    if state.is_main_process:
        _describe(run, folder, texts, splits)
    state.wait_for_everyone()
    if is_done(run, options.runs):
        return result_of(run, options.runs, experiment)
    set_seed(run.seed)
    base, tokenizer = load_base(run.model)
    if run.settings.training is not None and not run.settings.training.base_dropout:
        without_dropout(base)
    size = base.num_parameters()
    train_rows = rows(splits.train, run.task, tokenizer)
    adapted = run.settings.method.build(
        Setting(base, tokenizer, train_rows, run.task.separator, run.task.instruction, run.seed)
    )
    collate = PromptTargetCollator(tokenizer, base)
    if not (folder / "training.json").is_file():
        facts: dict[str, Any] = {"curve": [], "dev_loss": None, "steps": 0, "seconds": 0.0}
        trained = sum(one.numel() for one in adapted.model.parameters() if one.requires_grad)
        if run.settings.training is not None:
            facts = train(
                adapted,
                run.settings.training,
                train_rows,
                rows(splits.dev, run.task, tokenizer),
                collate,
                folder / "training",
                run.seed,
                options.accumulation,
                options.callbacks,
            )
            state.wait_for_everyone()  # before the checkpoints go, every process has read the best one
        if state.is_main_process:
            adapted.save(folder / "trained")
            facts |= {"trained_parameters": trained, "base_parameters": size}
            write_json(folder / "training.json", {**facts, "stored_bytes": stored_bytes(folder / "trained")})
            shutil.rmtree(folder / "training", ignore_errors=True)
    elif run.settings.training is not None:
        adapted.load(folder / "trained")
    state.wait_for_everyone()
    adapted.model.to(state.device)
    arguments = {"max_new_tokens": run.task.max_new_tokens, "do_sample": False, **run.task.decoding}
    inputs = shortened(splits.test, run.task.max_source_tokens, tokenizer)
    prompts = [item.source + run.task.separator for item in inputs]
    predictions = generate(adapted, tokenizer, prompts, collate, texts, arguments, options.generation_batch)
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            score_texts(run.data.dataset, splits.test, predictions, texts)
        except MissingTool as error:
            outcome = [error]
    broadcast_object_list(outcome)  # all stop, or none
    if outcome[0] is not None:
        raise outcome[0]
    return result_of(run, options.runs, experiment)


def is_done(run: Run, runs: Path) -> bool:
    """Whether a run's metrics are there."""
    return (runs / run.folder / f"texts-{run.texts_key}" / "metrics.json").is_file()


def result_of(run: Run, runs: Path, experiment: str) -> dict[str, Any]:
    """What a finished run gave, in one flat mapping.

    Args:
        run: The run.
        runs: Folder of all runs.
        experiment: What it is run for.
    """
    folder = runs / run.folder
    data = read_json(folder / "data.json")
    texts = folder / f"texts-{run.texts_key}"
    return {
        "experiment": experiment,
        "dataset": run.data.dataset,
        "model": run.model,
        **run.asked,
        "train_groups": data["train_groups"],
        "test_groups": data["test_groups"],
        "notes": data["notes"],
        **read_json(texts / "metrics.json"),
        **read_json(folder / "training.json"),
        "versions": read_json(folder / "versions.json"),
    }


def load_base(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base in float32 with its tokenizer; SmolLM2 from its package where the Hub cannot be reached."""
    source = smollm2.find()[0] if model == smollm2.HUB_ID else model
    if not AutoConfig.from_pretrained(source).is_encoder_decoder:
        base, tokenizer, _ = smollm2.load(source)
    else:
        base = AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Some losses ignore over how many labels of all parts of a batch the Trainer wants the mean.
        base.accepts_loss_kwargs = loss_counts_items(base)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    base.generation_config.pad_token_id = tokenizer.pad_token_id
    return base, tokenizer


def without_dropout(model: torch.nn.Module) -> None:
    """Set all dropout of a model to 0, in modules of its own and where a module only has the number."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def claim(file: Path, digests: dict[str, str]) -> None:
    """Write down which data a folder is for.

    Raises:
        SettingError: It is for other data.
    """
    if file.is_file() and read_json(file) != digests:
        raise SettingError(
            f"{file.parent} holds what was made of other data of the same name. Choose another folder with --runs, or "
            "move that away."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, digests)


def _describe(run: Run, folder: Path, texts: Path, splits: Splits) -> None:
    """Write down what a folder and one of its texts are, once: later calls may have other versions."""
    claim(folder / "digests.json", {"train": digest(splits.train), "dev": digest(splits.dev)})
    claim(texts / "digests.json", {"test": digest(splits.test)})
    versions = {**{name: version(name) for name in PACKAGES}, "machine": platform.machine()}
    groups = {"train_groups": splits.train_groups, "test_groups": splits.test_groups}
    for file, content in (
        (folder / "config.json", {"method": run.method, **run.trained}),
        (folder / "data.json", {**groups, "notes": splits.notes}),
        (folder / "versions.json", versions),
        (texts / "config.json", {**run.texts, "versions": versions}),
    ):
        if not file.is_file():
            write_json(file, content)
