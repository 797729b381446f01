"""What the paper reports, read from `paper.yaml`: scores of its tables, numbers in its text, and its claims."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args

from paper.report.metric_names import DATASETS, METRICS, shown
from paper.report.runs import FinishedRun, ReportError, model_name
from paper.yaml_files import SettingError, into, read

FILE = Path(__file__).with_name("paper.yaml")
Topic = Literal[
    "data", "comparison", "low_data", "extrapolation", "length", "embedding", "infix", "initialization", "cost"
]


@dataclass(frozen=True)
class Scores:
    """One row of one of the paper's tables.

    Args:
        table: As the paper numbers it.
        split: Of the data: `test` or `dev`.
        dataset: Name of the data set.
        model: Name of the base model.
        method: Name of the method in the settings.
        name: What the paper calls the row.
        metrics: Scores by part of the data and metric, shares as fractions.
        setting: Settings that tell the row from others of the method.
        train_groups: Groups of the data that were trained on; `None` is all.
        test_groups: Groups of the data that were scored; `None` is all.
    """

    table: str
    split: Literal["test", "dev"]
    dataset: str
    model: str
    method: str
    name: str
    metrics: Mapping[str, Mapping[str, float]]
    setting: Mapping[str, Any] = field(default_factory=dict)
    train_groups: Sequence[str] | None = None
    test_groups: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.split not in ("test", "dev"):
            raise ReportError(f'split is "test" or "dev", not {self.split!r}.')
        if self.dataset not in DATASETS:
            raise ReportError(f"There is no data set {self.dataset!r}. There are {list(DATASETS)}.")
        for part, scores in self.metrics.items():
            if part not in ("all", "seen", "unseen"):
                raise ReportError(f'A part of the data is "all", "seen" or "unseen", not {part!r}.')
            for metric, score in scores.items():
                if metric not in METRICS:
                    raise ReportError(f"There is no metric {metric!r}. There are {list(METRICS)}.")
                if not isinstance(score, float) or (shown(metric).percent and not 0 <= score <= 1.1):
                    raise ReportError(f"{metric} of {self.name} is {score!r}; write a fraction, as 0.688 for 68.8 %.")

    def is_of(self, run: FinishedRun) -> bool:
        """Whether it is of the data, method and settings of a run, with whichever model."""
        is_whole = run.train_size is None and run.task.get("test_inputs") is None and not run.notes
        return (
            self.split == "test"
            and is_whole
            and (self.dataset, self.method) == (run.dataset, run.method)
            and (_listed(self.train_groups), _listed(self.test_groups))
            == (_listed(run.train_groups), _listed(run.test_groups))
            and all(run.setting.get(name) == value for name, value in self.setting.items())
        )


@dataclass(frozen=True)
class Number:
    """A number that the paper's text states.

    Args:
        where: Section, table or figure.
        topic: What it is about.
        what: What is measured.
        value: The number, shares as fractions.
        datasets: What it is about, where that is not all data sets.
    """

    where: str
    topic: Topic
    what: str
    value: float | int
    datasets: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check(self.topic, self.datasets)


@dataclass(frozen=True)
class Claim:
    """A sentence that measurements can confirm or not.

    Args:
        where: Section, table or figure.
        topic: What it is about.
        sentence: What the paper says, in our words.
        datasets: What it is about, where that is not all data sets.
    """

    where: str
    topic: Topic
    sentence: str
    datasets: Sequence[str] = ()

    def __post_init__(self) -> None:
        _check(self.topic, self.datasets)


@dataclass(frozen=True)
class Paper:
    """All that the paper reports.

    Args:
        scores: Rows of its tables.
        numbers: Numbers in its text.
        claims: What it says about them.
    """

    scores: tuple[Scores, ...]
    numbers: tuple[Number, ...]
    claims: tuple[Claim, ...]

    def beside(self, run: FinishedRun) -> list[Scores]:
        """What the paper has for a run: of the same base model, or of all where it did not use that."""
        fitting = [scores for scores in self.scores if scores.is_of(run)]
        return [scores for scores in fitting if scores.model == model_name(run.model)] or fitting

    def said(self, topics: Collection[str], datasets: Collection[str]) -> list[Claim | Number]:
        """Its claims and numbers on some topics and data sets."""
        both: tuple[Claim | Number, ...] = (*self.claims, *self.numbers)
        return [
            one
            for one in both
            if one.topic in topics and (not one.datasets or not set(datasets).isdisjoint(one.datasets))
        ]

    def digits(self, scores: Scores, metric: str) -> int:
        """With how many decimals the paper prints a metric in the column of a row, once it is in the unit we show."""
        column = [
            part[metric]
            for other in self.scores
            if (other.table, other.dataset) == (scores.table, scores.dataset)
            for part in other.metrics.values()
            if metric in part
        ]
        return max([0, *(_decimals(score) - (2 if shown(metric).percent else 0) for score in column)])


def read_paper(file: Path = FILE) -> Paper:
    """What the paper reports.

    Raises:
        SettingError: The file says something that is not known, leaves something out, or says it twice.
    """
    content = read(file)
    into(_Lists, content, str(file))
    rows = [
        into(Scores, {"table": table, **row}, f"{file.name}: {table}, row {index}")
        for table, rows in content["tables"].items()
        for index, row in enumerate(rows, start=1)
    ]
    named = [
        (row.table, row.split, row.dataset, row.model, row.method, repr(row.setting), repr(row.test_groups))
        for row in rows
    ]
    if twice := {name for name in named if named.count(name) > 1}:
        raise SettingError(f"{file.name} has two rows of {sorted(twice)[0]}. Keep one.")
    return Paper(
        tuple(rows),
        tuple(into(Number, one, f"{file.name}: numbers") for one in content["numbers"]),
        tuple(into(Claim, one, f"{file.name}: claims") for one in content["claims"]),
    )


@dataclass(frozen=True)
class _Lists:
    """The outermost level of the file."""

    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    numbers: Sequence[Mapping[str, Any]]
    claims: Sequence[Mapping[str, Any]]


def _check(topic: str, datasets: Sequence[str]) -> None:
    if topic not in get_args(Topic):
        raise ReportError(f"There is no topic {topic!r}. There are {list(get_args(Topic))}.")
    if unknown := [name for name in datasets if name not in DATASETS]:
        raise ReportError(f"There is no data set {unknown[0]!r}. There are {list(DATASETS)}.")


def _decimals(value: float) -> int:
    exponent = Decimal(repr(value)).as_tuple().exponent
    return -exponent if isinstance(exponent, int) else 0


def _listed(groups: Sequence[str] | None) -> list[str] | None:
    return None if groups is None else sorted(groups)
