"""Markdown tables: our scores with the paper's under them, and what each method costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from paper.report.groups import Group, Spread, setting_text, telling_settings
from paper.report.metric_names import METRICS, in_order, shown
from paper.report.published import Paper, Scores
from paper.report.runs import model_name

PARTS = ("seen", "unseen", "all")

CAPTION = (
    "Mean ± standard deviation over seeds and subsets; {percent} in per cent, {plain} as their tools print them. "
    "Higher is better, but for {losses} and the dev loss (nats per target token). An empty cell is a number that there "
    "is not. Rows marked “paper” are Li & Liang's (2021), with as many digits as they print, trained and scored on the "
    "whole data. Trained parameters count an MLP that a prefix is trained through; it is not stored."
)


@dataclass(frozen=True)
class Column:
    """A column of a table of results.

    Args:
        title: Its head.
        ours: The cell of a group of runs.
        theirs: The cell of a row of the paper.
    """

    title: str
    ours: Callable[[Group], str]
    theirs: Callable[[Scores], str] = lambda _: ""


def caption() -> str:
    """How to read the tables of scores."""
    losses = [one for one in METRICS.values() if one.is_loss]
    return CAPTION.format(
        percent=_enumerated(one.title for one in METRICS.values() if one.percent),
        plain=_enumerated(one.title for one in METRICS.values() if not one.percent),
        losses=_enumerated(one.title for one in losses),
    )


def results_table(groups: Sequence[Group], paper: Paper) -> str:
    """Scores of groups on one data set; under the last group of a method the paper's rows for it.

    Args:
        groups: Of one data set.
        paper: What the paper reports.
    """
    beside = [paper.beside(group.one) for group in groups]
    columns = [*_naming_columns(groups), *_score_columns(groups, paper, [row for rows in beside for row in rows])]
    rows: list[list[str]] = []
    for index, group in enumerate(groups):
        rows.append([column.ours(group) for column in columns])
        later = [row for rows_later in beside[index + 1 :] for row in rows_later]
        rows += [[column.theirs(row) for column in columns] for row in beside[index] if row not in later]
    return markdown([column.title for column in columns], rows)


def cost_table(groups: Sequence[Group]) -> str:
    """What each group trains and stores."""
    columns = [
        *_naming_columns(groups),
        Column("trained parameters", lambda group: f"{group.one.trained_parameters:,}"),
        Column("of the base", lambda group: _share(group.one.trained_parameters, group.one.base_parameters)),
        Column("bytes stored per task", lambda group: f"{round(_mean(group.spread(lambda run: run.stored_bytes))):,}"),
        Column("seconds of training", lambda group: spread_text(group.spread(lambda run: run.seconds), 0)),
    ]
    return markdown([column.title for column in columns], [[one.ours(group) for one in columns] for group in groups])


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with these cells."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def spread_text(spread: Spread | None, digits: int, factor: float = 1, of: int | None = None) -> str:
    """`66.2 ± 0.3`; empty where there is nothing.

    Args:
        spread: What is shown.
        digits: Decimals.
        factor: What it is multiplied with.
        of: How many values there should be; fewer are said.
    """
    if spread is None:
        return ""
    text = f"{spread.mean * factor:.{digits}f}"
    if spread.deviation is not None:
        text += f" ± {spread.deviation * factor:.{digits}f}"
    return text if of is None or spread.count == of else f"{text} ({spread.count} of {of})"


def _naming_columns(groups: Sequence[Group]) -> list[Column]:
    """What tells the groups apart."""
    runs = [group.one for group in groups]
    columns = [Column("method", lambda group: group.method, lambda row: f"{row.name}, paper")]
    for name in telling_settings(groups):
        columns.append(
            Column(
                name.replace("_", " "),
                lambda group, name=name: _setting_cell(name, group.one.setting.get(name)),  # type: ignore[misc]
                lambda row, name=name: _setting_cell(name, row.setting.get(name)),  # type: ignore[misc]
            )
        )
    if any(run.train_size is not None for run in runs):
        columns.append(Column("training pairs", lambda group: str(group.one.train_size or "all"), lambda _: "all"))
    for title in ("train_groups", "test_groups"):
        if any(getattr(run, title) is not None for run in runs):
            columns.append(
                Column(
                    title.replace("_", " "),
                    lambda group, title=title: ", ".join(getattr(group.one, title) or ()),  # type: ignore[misc]
                    lambda row, title=title: ", ".join(getattr(row, title) or ()),  # type: ignore[misc]
                )
            )
    columns.append(Column("model", lambda group: model_name(group.one.model), lambda row: row.model))
    if len({run.inputs_scored for run in runs}) > 1:
        columns.append(Column("inputs scored", lambda group: str(group.one.inputs_scored)))
    columns.append(Column("runs", lambda group: str(len(group.runs))))
    return columns


def _score_columns(groups: Sequence[Group], paper: Paper, beside: Sequence[Scores]) -> list[Column]:
    scored = {
        (part, name) for group in groups for run in group.runs for part in run.metrics for name in run.metrics[part]
    }
    parts = [part for part in PARTS if any(part == one for one, _ in scored)]
    columns = []
    for name in in_order(name for _, name in scored):
        digits = max([shown(name).digits, *(paper.digits(row, name) for row in beside)])
        for part in (part for part in parts if (part, name) in scored):
            columns.append(_score_column(name, part, f" {part}" if len(parts) > 1 else "", digits, paper))
    if any(group.spread(lambda run: run.dev_loss) for group in groups):
        columns.append(Column("dev loss", lambda group: _spread_cell(group, group.spread(lambda run: run.dev_loss), 3)))
    return columns


def _score_column(metric: str, part: str, suffix: str, digits: int, paper: Paper) -> Column:
    one = shown(metric)

    def theirs(row: Scores) -> str:
        score = row.metrics.get(part, {}).get(metric)
        return "" if score is None else f"{score * one.factor:.{paper.digits(row, metric)}f}"

    return Column(
        one.title + suffix, lambda group: _spread_cell(group, group.score(part, metric), digits, one.factor), theirs
    )


def _spread_cell(group: Group, spread: Spread | None, digits: int, factor: float = 1) -> str:
    return spread_text(spread, digits, factor, of=len(group.runs))


def _setting_cell(name: str, value: object) -> str:
    text = setting_text(name, value)
    return text if isinstance(value, str) else text.removeprefix(f"{name.replace('_', ' ')} ")


def _share(trained: int, base: int) -> str:
    return f"{100 * trained / base:.2g} %" if 0 < trained < base / 10 else f"{100 * trained / base:.0f} %"


def _mean(spread: Spread | None) -> float:
    assert spread is not None  # every run has it
    return spread.mean


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _enumerated(names: Iterable[str]) -> str:
    *first, last = dict.fromkeys(names)
    return f"{', '.join(first)} and {last}" if first else last
