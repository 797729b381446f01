"""What the generated section of a model card says about one prefix, in Markdown."""

from __future__ import annotations

import bisect
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .training_record import Curve, DataSet, Evaluation, TrainingRecord, thinned

if TYPE_CHECKING:
    from .model_card import CardFacts

HUB = "https://huggingface.co"
_MOST_POINTS = 10
_PLAIN = re.compile(r"[^`|\\<>&]*")
_BASE_ROW = re.compile(rf"^\| base model \| \[[^\]\n]*\]\({HUB}/([A-Za-z0-9._/-]+)\)", re.MULTILINE)


def content(facts: CardFacts) -> str:
    """The section of one prefix.

    Args:
        facts: What is known of it.
    """
    parts = [_heading(facts), _summary(facts), _table(_properties(facts)), _loading(facts)]
    if facts.training is not None:
        parts += _training(facts.training)
        parts += _evaluation(facts.training)
    if facts.evaluation:
        rows = [
            (shown(one.dataset_name), shown(one.metric_name or one.metric_type), shown(one.metric_value))
            for one in facts.evaluation
        ]
        parts += ["### Results", _table(rows, ("data", "metric", "value"))]
    if facts.training is not None:
        parts += _losses(facts.training, facts.picture)
    return "\n\n".join(parts)


def base_in(section: str) -> str | None:
    """The base model that a section names, if it is one on the Hub."""
    match = _BASE_ROW.search(section)
    return match.group(1) if match else None


def is_hub_id(name: object) -> bool:
    """Whether a name may be that of a repository on the Hub: `name` or `user/name`, and no path."""
    if not isinstance(name, str) or name.startswith(("/", ".", "~")) or "\\" in name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def clean(text: str) -> str:
    """A text in one line, without characters that control anything."""
    return " ".join("".join(" " if unicodedata.category(one)[0] in "CZ" else one for one in text).split())


def shown(value: Any) -> str:
    """A value for a table or a sentence, from which nothing can break out.

    A text is a code span, in which nothing has a meaning; one with a character that has a meaning even there is written
    with all its punctuation as character references.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = clean(str(value))
    if not text:
        return "–"
    if _PLAIN.fullmatch(text):
        return f"`{text}`"
    return "".join(one if one.isalnum() or one == " " or ord(one) > 127 else f"&#{ord(one)};" for one in text)


def _heading(facts: CardFacts) -> str:
    name = facts.folder.replace("_", r"\_")
    return f"## {name or 'The prefix'}"


def _summary(facts: CardFacts) -> str:
    tokens = facts.config.num_virtual_tokens
    return (
        f"A prefix of {tokens:,} virtual token{'s' if tokens > 1 else ''} for {_base(facts)}, made with `peft_prefix`: "
        "keys and values that every attention layer reads before the text. The base model itself is unchanged."
    )


def _base(facts: CardFacts) -> str:
    name = facts.config.base_model_name_or_path
    if name is None or not is_hub_id(name):
        return "a local model"
    return f"[{name}]({HUB}/{name})"


def _properties(facts: CardFacts) -> list[tuple[str, str]]:
    revision = facts.config.base_model_revision
    known = {
        "base model": _base(facts) + (f", revision {shown(revision)}" if revision else ""),
        "virtual tokens": shown(facts.config.num_virtual_tokens),
        "sites": _all(facts.sites),
        "modules saved with it": _all(facts.modules),
        "numbers": shown(facts.numbers) if facts.numbers is not None else "",
        "size": f"{facts.file_size / 1000:,.0f} KB" if facts.file_size is not None else "",
        "dtype": shown(facts.dtype) if facts.dtype else "",
        "sha256": shown(facts.sha256) if facts.sha256 else "",
    }
    return [(name, value) for name, value in known.items() if value]


def _loading(facts: CardFacts) -> str:
    place = json.dumps(facts.repo_id or "path/to/this/folder")
    if facts.folder:
        place += f", subfolder={json.dumps(facts.folder)}"
    lines = ["from peft_prefix import PrefixModel", ""]
    if is_hub_id(facts.config.base_model_name_or_path):
        lines += [f"model = PrefixModel.from_pretrained({place})  # loads its base model, too", ""]
        lines += ["# or, onto a base model that is loaded already:"]
    lines += [f"model = PrefixModel.from_pretrained(base, {place})"]
    return "\n".join(["```python", *lines, "```"])


def _training(record: TrainingRecord) -> list[str]:
    rows = [
        ("data", _data(record.training_data)),
        ("steps", _steps(record)),
        ("epochs", shown(record.epochs) if record.epochs is not None else ""),
        ("hardware", _hardware(record)),
        ("versions", ", ".join(f"{shown(name)} {shown(version)}" for name, version in record.versions.items())),
    ]
    rows += [(shown(name), _setting(value)) for name, value in record.hyperparameters.items()]
    return ["### Training", _table([row for row in rows if row[1]])]


def _setting(value: Any) -> str:
    """A hyperparameter: exactly, and without thousands, for it may be copied."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else shown(value)


def _data(data: DataSet | None) -> str:
    if data is None:
        return ""
    parts = []
    if data.name is not None:
        linked = is_hub_id(data.name)
        parts.append(f"[{data.name}]({HUB}/datasets/{data.name})" if linked else shown(data.name))
    if data.config is not None:
        parts.append(f"configuration {shown(data.config)}")
    if data.split is not None:
        parts.append(f"split {shown(data.split)}")
    if data.examples is not None:
        parts.append(f"{data.examples:,} examples")
    return ", ".join(parts)


def _steps(record: TrainingRecord) -> str:
    if record.kept_step == record.steps:
        return shown(record.steps)
    return f"{record.steps:,}, of which the best model was kept, that of step {record.kept_step:,}"


def _hardware(record: TrainingRecord) -> str:
    processes = f"{record.num_processes:,} processes" if record.num_processes > 1 else ""
    return ", ".join(part for part in (shown(record.hardware) if record.hardware else "", processes) if part)


def _evaluation(record: TrainingRecord) -> list[str]:
    found: dict[int, tuple[str, Evaluation]] = {}
    for title, one in (("last", record.last_evaluation), ("best", record.best_evaluation)):
        if one is not None:
            found[one.step] = (f"{found[one.step][0]} and {title}" if one.step in found else title, one)
    if not found:
        return []
    names = dict.fromkeys(name for _, one in found.values() for name in one.metrics)
    head = ["metric", *(f"{title}, step {step:,}" for step, (title, _) in found.items())]
    rows = [
        (shown(name), *(shown(one.metrics[name]) if name in one.metrics else "–" for _, one in found.values()))
        for name in names
    ]
    data = _data(record.evaluation_data)
    return ["### Evaluation", *([f"On {data}."] if data else []), _table(rows, head)]


def _losses(record: TrainingRecord, picture: str | None) -> list[str]:
    training, evaluation = dict(record.training_losses), dict(record.evaluation_losses)
    parts = ["### Loss"]
    if picture is not None:
        parts.append(f"![Training and evaluation loss over steps]({quote(picture)})")
    steps = thinned(sorted(evaluation if len(evaluation) > 1 else {**training, **evaluation}), _MOST_POINTS)
    rows = [(shown(step), _loss_at(record.training_losses, step), _number(evaluation, step)) for step in steps]
    if rows:
        parts.append(_table(rows, ("step", "training loss", "evaluation loss")))
    return parts if len(parts) > 1 else []


def _loss_at(curve: Curve, step: int) -> str:
    """The last loss that was logged up to a step."""
    index = bisect.bisect_right(curve, step, key=lambda point: point[0])
    return shown(curve[index - 1][1]) if index else "–"


def _number(curve: Mapping[int, float], step: int) -> str:
    return shown(curve[step]) if step in curve else "–"


def _all(values: Iterable[str]) -> str:
    return ", ".join(shown(value) for value in values)


def _table(rows: Iterable[Iterable[str]], head: Iterable[str] = ("", "")) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
