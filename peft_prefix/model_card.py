"""The model card of a repository with prefixes, made from what is known of them.

A repository may hold many prefixes in folders, uploaded one after the other. Each has a section of its own in
README.md; the metadata at the top is about all of them. What anybody else has written there stays.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from .card_content import HUB, base_in, clean, content, is_hub_id
from .card_sections import sections, with_section
from .config import PrefixConfig
from .errors import PrefixConfigError, PrefixFileError
from .front_matter import FrontMatter
from .training_record import TrainingRecord

LIBRARY = "peft_prefix"
_ROOT = "."
"""What the section of a prefix is called that lies in no folder."""
_FOLDER = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card says about one prefix.

    Args:
        config: Its configuration, with the base model's name and revision.
        repo_id: Repository on the Hub, `None` as long as there is none.
        folder: Where it lies in the repository, `""` at the top.
        sites: Where it acts.
        numbers: How many numbers its file holds.
        file_size: Size of its file in bytes.
        dtype: Name of the numbers' dtype.
        sha256: Its identity.
        training: How it was trained.
        picture: Path of a picture of the losses, relative to README.md.
        evaluation: Results beside those of the training, for the text and the metadata, which leaderboards read.
        pipeline_tag: The task of the base model as the Hub names it, if it is certain.

    Raises:
        PrefixConfigError: The repository or the folder has a name that cannot be.
    """

    config: PrefixConfig
    repo_id: str | None = None
    folder: str = ""
    sites: Sequence[str] = ()
    numbers: int | None = None
    file_size: int | None = None
    dtype: str | None = None
    sha256: str | None = None
    training: TrainingRecord | None = None
    picture: str | None = None
    evaluation: Sequence[EvalResult] = ()
    pipeline_tag: str | None = None

    def __post_init__(self) -> None:
        if self.repo_id is not None and not is_hub_id(self.repo_id):
            raise PrefixConfigError(f'A repository on the Hub is named like "user/name", unlike {self.repo_id!r}.')
        if self.folder and not _FOLDER.fullmatch(self.folder):
            raise PrefixConfigError(
                "The folder of a prefix in a repository has a name of letters, digits, '_', '-' and '.', or several "
                f"with '/' between, unlike {self.folder!r}."
            )

    @property
    def modules(self) -> Sequence[str]:
        """Modules of the base that are saved with it."""
        return self.config.modules_to_save or ()

    @property
    def base(self) -> str | None:
        """The base model, if it is one on the Hub."""
        name = self.config.base_model_name_or_path
        return name if is_hub_id(name) else None


def card_text(existing: str | None, facts: CardFacts) -> str:
    """A README.md that says what is known of a prefix, and all that the existing one says about anything else.

    Args:
        existing: The README.md that is there.
        facts: What is known of the prefix.

    Raises:
        PrefixFileError: The existing metadata cannot be read.
    """
    card = FrontMatter(existing)
    before = _bases(card.body)
    if not card.body.strip():
        card.body += f"# {(facts.repo_id or facts.folder or 'Prefix').split('/')[-1]}{card.line_break}"
    card.body = with_section(card.body, facts.folder or _ROOT, content(facts), card.line_break)
    _name_bases(card, before)
    card.set("library_name", LIBRARY)
    card.add("tags", ["prefix-tuning", LIBRARY])
    if facts.pipeline_tag is not None and card.get("pipeline_tag") is None:
        card.set("pipeline_tag", facts.pipeline_tag)
    data = facts.training.training_data if facts.training is not None else None
    if data is not None and is_hub_id(data.name):
        card.add("datasets", [data.name])
    _add_results(card, facts)
    return str(card)


def loss_curve_png(record: TrainingRecord) -> bytes | None:
    """A picture of training and evaluation loss over steps.

    Returns:
        The file's content; `None` where matplotlib is not installed, or no loss was logged twice.
    """
    if max(len(record.training_losses), len(record.evaluation_losses)) < 2:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")  # no pyplot, which would choose a backend for everybody
    stream = io.BytesIO()
    try:
        _draw(record, figure)
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    except Exception:  # noqa: BLE001 - whatever numbers it stumbles over: a picture is not worth a prefix
        return None
    return stream.getvalue()


def _draw(record: TrainingRecord, figure: Any) -> None:
    axes = figure.add_subplot()
    for points, label, style in (
        (record.training_losses, "training", "-"),
        (record.evaluation_losses, "evaluation", "o-"),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(title="Loss of the prefix", xlabel="optimizer step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()


def merge_model_index(index: Any, name: str, added: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A model-index with more results for one name.

    Args:
        index: The existing one, or `None`.
        name: Which entry the results belong to.
        added: Results in the form of a model-index. A metric that is there already for the same task and data gets
            the new value.

    Raises:
        PrefixFileError: The existing one is not valid.
    """
    entries = _copied(index)
    entry = next((one for one in entries if one["name"] == name), None)
    if entry is None and added:
        entries.append(entry := {"name": name, "results": []})
    for result in added:
        assert entry is not None
        known = next((one for one in entry["results"] if _subject(one) == _subject(result)), None)
        if known is None:
            entry["results"].append(result)
            continue
        names = {_metric(metric): number for number, metric in enumerate(known["metrics"])}
        for metric in result["metrics"]:
            if _metric(metric) in names:
                known["metrics"][names[_metric(metric)]] = metric
            else:
                known["metrics"].append(metric)
    return entries


def _add_results(card: FrontMatter, facts: CardFacts) -> None:
    """Write the results of a prefix, in the place of those that were written for it before."""
    if facts.repo_id is None:  # a model-index needs names, and this will be one
        return
    name = facts.folder or facts.repo_id.split("/")[-1]
    entries = _copied(card.get("model-index"))
    for entry in entries:
        if entry["name"] == name:
            entry["results"] = [one for one in entry["results"] if (one.get("source") or {}).get("name") != LIBRARY]
    source = {"source_name": LIBRARY, "source_url": f"{HUB}/{facts.repo_id}"}
    results = [*_measured(facts), *facts.evaluation]
    own = [one if one.source_url else dataclasses.replace(one, **source) for one in results]  # type: ignore[arg-type]
    added = eval_results_to_model_index(name, own)[0]["results"] if own else []
    entries = [one for one in merge_model_index(entries, name, _cleaned(added)) if one["results"]]
    card.set("model-index", entries or None)


def _measured(facts: CardFacts) -> list[EvalResult]:
    """What the training measured of these numbers, if it is known what the task and the data were."""
    record = facts.training
    if record is None or record.evaluation is None or facts.pipeline_tag is None:
        return []
    data = record.evaluation_data
    if data is None or data.name is None:
        return []
    return [
        EvalResult(
            task_type=facts.pipeline_tag,
            dataset_type=data.name,
            dataset_name=data.name,
            dataset_config=data.config,
            dataset_split=data.split,
            metric_type=name,
            metric_name=" ".join(part.capitalize() for part in name.split("_")),  # as the Trainer's card has them
            metric_value=value,
        )
        for name, value in record.evaluation.metrics.items()
    ]


def _copied(index: Any) -> list[dict[str, Any]]:
    """A model-index of which every part that is changed is a copy.

    Raises:
        PrefixFileError: It is not valid.
    """
    if not index:
        return []
    try:
        model_index_to_eval_results(index)
        return [
            {**entry, "results": [{**one, "metrics": [*one["metrics"]]} for one in entry["results"]]} for entry in index
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PrefixFileError(
            f"'model-index' in the metadata at the top of README.md is not valid ({type(error).__name__}: {error}). "
            "Correct it as https://huggingface.co/docs/hub/model-cards says, or delete it; nothing has been changed."
        ) from error


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_cleaned(one) for one in value]
    return clean(value) if isinstance(value, str) else value


def _subject(result: dict[str, Any]) -> tuple[Any, ...]:
    data = result["dataset"]
    source = (result.get("source") or {}).get("name")
    return result["task"]["type"], data["type"], data.get("config"), data.get("split"), source


def _metric(metric: dict[str, Any]) -> tuple[Any, ...]:
    return metric["type"], metric.get("name")


def _bases(body: str) -> list[str]:
    """The base models that the sections of a text name."""
    found = (base_in(body[section.start : section.end]) for section in sections(body))
    return [base for base in dict.fromkeys(found) if base is not None]


def _name_bases(card: FrontMatter, before: Sequence[str]) -> None:
    """Name the base models of all sections; those that a section named before, and none does now, are gone."""
    now, present = _bases(card.body), card.texts("base_model")
    kept = [base for base in present if base in now or base not in before]
    named = list(dict.fromkeys([*kept, *now]))
    if named != present:
        card.set("base_model", named[0] if len(named) == 1 else named or None)
    card.set("base_model_relation", "adapter" if named else None)
