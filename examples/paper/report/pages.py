"""A page with tables and pictures for each experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from paper.report import figures
from paper.report.groups import Group, UnlikeRunsError, group_runs
from paper.report.metric_names import DATASETS
from paper.report.panels import save
from paper.report.published import Number, Paper, read_paper
from paper.report.runs import FinishedRun, by_experiment, model_name
from paper.report.tables import caption, cost_table, results_table


@dataclass(frozen=True)
class Picture:
    """A picture that some experiments have.

    Args:
        what: End of the file's name.
        alt: What it shows.
        is_for: Whether an experiment has it.
        draw: Draws it.
    """

    what: str
    alt: str
    is_for: Callable[[Sequence[Group]], bool]
    draw: Callable[[Sequence[Group]], Figure]


def build(runs: Iterable[FinishedRun], folder: Path, about: Mapping[str, str] | None = None) -> list[Path]:
    """Write `<experiment>.md` with its tables, and `<experiment>-<what>.png`, for each experiment of the runs.

    Args:
        runs: Finished runs.
        folder: Where the files are written; made if it does not exist.
        about: A sentence on what is compared, by experiment.

    Returns:
        The files, each page behind its pictures.

    Raises:
        UnlikeRunsError: Runs of the same name and settings must not be averaged.
    """
    paper = read_paper()
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for experiment, some in by_experiment(runs).items():
        groups = group_runs(some)
        pictures = [picture for picture in PICTURES if picture.is_for(groups)]
        for picture in pictures:
            files.append(folder / f"{experiment}-{picture.what}.png")
            save(picture.draw(groups), files[-1])
        files.append(folder / f"{experiment}.md")
        files[-1].write_text(
            _page(experiment, (about or {}).get(experiment), groups, pictures, paper), encoding="utf-8"
        )
    return files


def topics_of(groups: Sequence[Group]) -> set[str]:
    """What an experiment is about, by what varies in it."""
    methods = {group.one.method for group in groups}
    found = {
        "comparison": len(methods) > 1 and any(group.one.train_size is None for group in groups),
        "cost": len(methods) > 1,
        "low_data": _varies_size(groups),
        "extrapolation": any(figures.has_unseen(group) or group.one.test_groups for group in groups),
        "length": _varies(groups, "length"),
        "embedding": any(method.startswith("embedding_only") for method in methods),
        "infix": any(method.startswith("infix") for method in methods),
        "initialization": _varies_init(groups),
    }
    return {topic for topic, is_there in found.items() if is_there}


def _page(
    experiment: str, about: str | None, groups: Sequence[Group], pictures: Sequence[Picture], paper: Paper
) -> str:
    parts = [f"# {experiment}", *([f"{about}."] if about else []), _origin(groups), caption()]
    for dataset in dict.fromkeys(group.one.dataset for group in groups):
        own = [group for group in groups if group.one.dataset == dataset]
        _require_one_task(own)
        parts += [f"## {DATASETS.get(dataset, dataset)}", results_table(own, paper), cost_table(own)]
    if pictures:
        parts += ["## Pictures", *(f"![{one.alt}]({experiment}-{one.what}.png)" for one in pictures)]
    told = paper.said(topics_of(groups), {group.one.dataset for group in groups})
    said = [f"- {_number(one) if isinstance(one, Number) else one.sentence} ({one.where})" for one in told]
    if said:
        parts += ["## What the paper says of this", "\n".join(said)]
    return "\n\n".join(parts) + "\n"


def _require_one_task(groups: Sequence[Group]) -> None:
    """Scores side by side must be of texts that were asked for in the same way.

    Raises:
        UnlikeRunsError: They are not.
    """
    first = groups[0].one
    for other in (group.one for group in groups[1:]):
        if other.task != first.task:
            raise UnlikeRunsError(
                f"{first.method} ({first.source}) and {other.method} ({other.source}) must not be compared: prompts, "
                f"texts or development data were made in other ways, {first.task} and {other.task}. Run them again "
                "with the settings of today, or remove one of them."
            )


def _origin(groups: Sequence[Group]) -> str:
    """Which models, inputs and versions the numbers come from."""
    runs = [run for group in groups for run in group.runs]
    versions: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run.versions.items():
            versions.setdefault(name, set()).add(version)
    packages = ", ".join(f"{name} {' and '.join(sorted(some))}" for name, some in sorted(versions.items()))
    models = ", ".join(sorted({model_name(run.model) for run in runs}))
    scored = sorted({run.inputs_scored for run in runs})
    inputs = f"{scored[0]:,}" if len(scored) == 1 else f"{scored[0]:,} to {scored[-1]:,}"
    notes = "".join(f"\n- {note}" for note in dict.fromkeys(note for run in runs for note in run.notes))
    others = f"\n\nThe data are not the published ones:\n{notes}" if notes else ""
    return f"Base: {models}. Scored on {inputs} inputs. With {packages}.{others}"


def _number(number: Number) -> str:
    return f"{number.what[0].upper()}{number.what[1:]}: {number.value:,}"


def _varies(groups: Sequence[Group], name: str) -> bool:
    """Whether a method is there with several values of a setting, all else of the data being alike."""
    found: dict[tuple[str, str, str, int | None], set[str]] = {}
    for group in groups:
        run = group.one
        if name in run.setting:
            key = run.dataset, run.model, run.method, run.train_size
            found.setdefault(key, set()).add(repr(run.setting[name]))
    return any(len(values) > 1 for values in found.values())


def _varies_init(groups: Sequence[Group]) -> bool:
    return any(_varies(groups, name) for name in figures.INIT_SETTINGS)


def _varies_size(groups: Sequence[Group]) -> bool:
    return len({group.one.train_size for group in groups}) > 1


def _has_curve(groups: Sequence[Group]) -> bool:
    return any(run.curve for group in groups for run in group.runs)


PICTURES = (
    Picture("data-size", "Scores over the number of training pairs", _varies_size, figures.data_size_figure),
    Picture(
        "length", "Scores over the prefix's length", lambda groups: _varies(groups, "length"), figures.length_figure
    ),
    Picture("initialization", "Scores by initialization", _varies_init, figures.initialization_figure),
    Picture(
        "seen-unseen",
        "Scores on seen and unseen categories",
        lambda groups: any(map(figures.has_unseen, groups)),
        figures.seen_unseen_figure,
    ),
    Picture("dev-loss", "Dev loss over steps", _has_curve, figures.dev_loss_figure),
)
"""All kinds of pictures."""
