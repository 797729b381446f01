"""Finished runs, kept as lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paper.files import write_text
from paper.yaml_files import into

NAMED = ("experiment", "dataset", "model", "method", "setting", "train_size", "train_groups", "test_groups")
"""Fields that tell what was measured."""

Scores = Mapping[str, float | None]


class ReportError(ValueError):
    """Results that cannot be read, or that must not be put together."""


@dataclass(frozen=True)
class FinishedRun:
    """One method, trained once and scored.

    Args:
        experiment: Name of the experiment that it belongs to.
        dataset: Name of the data set.
        model: The base model.
        method: Name of the method in the settings.
        setting: The method's fields and how it was trained.
        train_size: Number of training pairs; `None` is all.
        subset: Which random subset of that size.
        seed: Of the method and of the order of the data.
        train_groups: Groups of the data that were trained on; `None` is all.
        test_groups: Groups of the data that were scored; `None` is all.
        metrics: Scores by part of the test data (`all`, `seen`, `unseen`) and metric; `None` where one is missing.
        dev_loss: Of the weights that were kept, in nats per target token.
        curve: `step` and `dev_loss` as training went on.
        trained_parameters: Numbers that were trained.
        base_parameters: Numbers of the base model.
        stored_bytes: What the task has to keep.
        seconds: Training time, with measuring the dev loss and saving checkpoints.
        inputs_scored: Distinct inputs that texts were generated for.
        versions: Of the packages.
        steps: Optimizer steps that were taken.
        task: How prompts, targets and texts are written, and what the dev loss is measured on.
        notes: How the data differ from the published ones, or nothing.
        source: Where it was read, for errors.

    Raises:
        ReportError: A score is no finite number.
    """

    experiment: str
    dataset: str
    model: str
    method: str
    setting: Mapping[str, Any]
    train_size: int | None
    subset: int
    seed: int
    train_groups: Sequence[str] | None
    test_groups: Sequence[str] | None
    metrics: Mapping[str, Scores]
    dev_loss: float | None
    curve: Sequence[Mapping[str, float]]
    trained_parameters: int
    base_parameters: int
    stored_bytes: int
    seconds: float | None
    inputs_scored: int
    versions: Mapping[str, str]
    steps: int | None = None
    task: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        scores = {f"{part} {name}": score for part, named in self.metrics.items() for name, score in named.items()}
        losses = {f"dev_loss at step {point['step']}": point["dev_loss"] for point in self.curve}
        for name, value in {**scores, **losses, "dev_loss": self.dev_loss}.items():
            if value is not None and not (_is_number(value) and math.isfinite(value)):
                raise ReportError(
                    f"{name} is {value!r}, which is no finite number; write null for one that is missing."
                )


def read_kept(file: Path) -> list[FinishedRun]:
    """The runs of a `.jsonl` file; none where there is no such file.

    Raises:
        ReportError: A line is no finished run.
    """
    return [finished_run(record, source) for source, record in _lines(file)]


def asked_for(runs: Iterable[FinishedRun], wanted: Iterable[Mapping[str, Any]]) -> list[FinishedRun]:
    """Those of some runs, of whichever model, that were asked for.

    Args:
        runs: Finished runs.
        wanted: Values of some fields, for each run that is asked for.
    """
    known = [dict(one) for one in wanted]
    return [run for run in runs if any(all(getattr(run, name) == one[name] for name in one) for one in known)]


def keep(records: Iterable[Mapping[str, Any]], file: Path) -> None:
    """Write runs into a `.jsonl` file, each in the place of what it held of the same run before.

    Args:
        records: Fields of finished runs.
        file: What it holds of other runs stays.

    Raises:
        ReportError: One of them, or a line of the file, is no finished run.
    """
    new = [(str(record.get("experiment")), dict(record)) for record in records]
    kept: dict[str, dict[str, Any]] = {}
    for source, record in [*_lines(file), *new]:
        finished_run(record, source)
        kept[_identity(record)] = record
    lines = [json.dumps(kept[identity], ensure_ascii=False) + "\n" for identity in sorted(kept)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(lines))


def by_experiment(runs: Iterable[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs by the name of their experiment, in alphabetical order."""
    grouped: dict[str, list[FinishedRun]] = {}
    for run in sorted(runs, key=lambda run: run.experiment):
        grouped.setdefault(run.experiment, []).append(run)
    return grouped


def model_name(model: str) -> str:
    """The name of a base model without the folder or the user that it belongs to."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def finished_run(record: Mapping[str, Any], source: str) -> FinishedRun:
    """A run from its fields.

    Args:
        record: The fields.
        source: What is read, for errors.

    Raises:
        ReportError: A field is missing, not known, or no number where it must be one.
    """
    try:
        return into(FinishedRun, {**record, "source": source}, source)
    except ValueError as error:
        raise ReportError(str(error)) from error


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line of a file stands and what it says."""
    content = file.read_text(encoding="utf-8") if file.is_file() else ""
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            source = f"{file}, line {number}"
            yield source, _parsed(source, line)


def _parsed(source: str, content: str) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise ReportError(f"{source} is no JSON: {error}. Was it cut off? Remove it and run it again.") from error
    if not isinstance(record, dict):
        raise ReportError(f"{source} must hold the fields of one run, not {type(record).__name__}.")
    return record


def _identity(record: Mapping[str, Any]) -> str:
    return json.dumps([record[name] for name in (*NAMED, "inputs_scored", "subset", "seed")], sort_keys=True)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
