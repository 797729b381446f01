"""What is known of how a prefix was trained: plain values that travel with its file and make its model card.

Files come from strangers. A record is therefore small, and every value in it has been checked: `TrainingRecord` cannot
exist otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from .errors import PrefixConfigError

Value = str | int | float | bool | None
Curve = tuple[tuple[int, float], ...]
"""Pairs of an optimizer step and a loss, in nats per target token with a language model's own loss."""
LARGEST_RECORD = 64 * 1024
"""Bytes of a record as JSON."""
LONGEST_CURVE = 200
LONGEST_TEXT = 200
LONGEST_NAME = 64
MOST_VALUES = 48
"""Entries of a dictionary."""
_LARGEST_INT = 2**53
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set, as far as it is known.

    Args:
        name: Its id on the Hub, or the name that its builder has.
        config: Which configuration of it.
        split: Which split.
        examples: How many examples there were.

    Raises:
        PrefixConfigError: A value cannot be.
    """

    name: str | None = None
    config: str | None = None
    split: str | None = None
    examples: int | None = None

    def __post_init__(self) -> None:
        for one in ("name", "config", "split"):
            _require_text(one, getattr(self, one))
        if self.examples is not None:
            _require_count("examples", self.examples)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation measured.

    Args:
        step: The optimizer step that it came after.
        metrics: Numbers by name, without `eval_` before it.

    Raises:
        PrefixConfigError: A value cannot be.
    """

    step: int
    metrics: Mapping[str, float]

    def __post_init__(self) -> None:
        _require_count("step", self.step)
        metrics = _dictionary("metrics", self.metrics)
        object.__setattr__(self, "metrics", {name: _finite(name, value) for name, value in metrics.items()})


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """How a prefix was trained.

    Args:
        hyperparameters: Plain values by name.
        training_data: What it learned from.
        evaluation_data: What it was evaluated on.
        steps: Optimizer steps done.
        kept_step: The step whose numbers the prefix has: the last one, or that of the best model, if it was loaded at
            the end.
        epochs: Passes through the data done.
        hardware: Name of the processor or accelerator.
        num_processes: How many processes trained.
        versions: Version by package, and that of Python.
        training_losses: At most `LONGEST_CURVE` pairs of step and training loss.
        evaluation_losses: The same for evaluations.
        last_evaluation: The last evaluation.
        best_evaluation: The best one, where the training looked for it.

    Raises:
        PrefixConfigError: A value has another type, is not finite or is too long.
    """

    hyperparameters: Mapping[str, Value] = field(default_factory=dict)
    training_data: DataSet | None = None
    evaluation_data: DataSet | None = None
    steps: int = 0
    kept_step: int = 0
    epochs: float | None = None
    hardware: str | None = None
    num_processes: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)
    training_losses: Curve = ()
    evaluation_losses: Curve = ()
    last_evaluation: Evaluation | None = None
    best_evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "hyperparameters", _dictionary("hyperparameters", self.hyperparameters))
        object.__setattr__(self, "versions", _dictionary("versions", self.versions))
        for name, value in self.hyperparameters.items():
            _require_plain(name, value)
        for name, version in self.versions.items():
            if version is None:
                raise PrefixConfigError(f"versions must have a string for {name!r}, not None.")
            _require_text(name, version)
        for name in ("steps", "kept_step", "num_processes"):
            _require_count(name, getattr(self, name))
        if self.epochs is not None:
            object.__setattr__(self, "epochs", _finite("epochs", self.epochs))
        _require_text("hardware", self.hardware)
        for name in ("training_losses", "evaluation_losses"):
            object.__setattr__(self, name, _curve(name, getattr(self, name)))
        for name, kind in _PARTS.items():
            if not isinstance(getattr(self, name), kind | None):
                raise PrefixConfigError(f"{name} must be a {kind.__name__} or None, not {_short(getattr(self, name))}.")
        size = len(json.dumps(self.to_dict()).encode())
        if size > LARGEST_RECORD:
            raise PrefixConfigError(f"A training record has at most {LARGEST_RECORD} bytes as JSON, not {size}.")

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of the numbers that the prefix has, if they were evaluated."""
        found = (self.last_evaluation, self.best_evaluation)
        return next((one for one in found if one is not None and one.step == self.kept_step), None)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        fields = dataclasses.asdict(self)
        for name in ("training_losses", "evaluation_losses"):
            fields[name] = [list(point) for point in fields[name]]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainingRecord:
        """The inverse of `to_dict`.

        Raises:
            PrefixConfigError: A field is unknown or its value cannot be.
        """
        values = _known(cls, fields)
        for name, kind in _PARTS.items():
            if values.get(name) is not None:
                values[name] = _made(kind, values[name])
        return _made(cls, values)


_PARTS: dict[str, type] = {
    "training_data": DataSet,
    "evaluation_data": DataSet,
    "last_evaluation": Evaluation,
    "best_evaluation": Evaluation,
}
"""Fields that have fields themselves."""


def thinned(points: Sequence[_T], limit: int = LONGEST_CURVE) -> tuple[_T, ...]:
    """At most `limit` points of many, evenly chosen, the first and the last among them."""
    if len(points) <= limit:
        return tuple(points)
    last = len(points) - 1
    return tuple(points[round(index * last / (limit - 1))] for index in range(limit))


def _known(cls: type, fields: object) -> dict[str, Any]:
    known = {one.name for one in dataclasses.fields(cls)}
    if not isinstance(fields, Mapping) or not known.issuperset(fields):
        raise PrefixConfigError(
            f"This {cls.__name__} must be a dictionary with the fields {', '.join(sorted(known))}, not "
            f"{_short(fields)}. The file was written by another version of peft_prefix, or by something else."
        )
    return dict(fields)


def _made(cls: type[_T], fields: object) -> _T:
    try:
        return cls(**_known(cls, fields))
    except TypeError as error:
        raise PrefixConfigError(f"This {cls.__name__} is incomplete: {error}.") from error


def _dictionary(name: str, value: object) -> dict[str, Any]:
    """A copy of a dictionary whose keys are names."""
    if not isinstance(value, Mapping) or len(value) > MOST_VALUES:
        raise PrefixConfigError(f"{name} must be a dictionary of at most {MOST_VALUES} entries, not {_short(value)}.")
    for key in value:
        if not isinstance(key, str) or not 0 < len(key) <= LONGEST_NAME or not key.isprintable():
            raise PrefixConfigError(
                f"The keys of {name} must be printable names of at most {LONGEST_NAME} characters, not {_short(key)}."
            )
    return dict(value)


def _require_plain(name: str, value: object) -> None:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        if abs(value) > _LARGEST_INT:
            raise PrefixConfigError(f"{name} must be an integer of at most 2^53, not {_short(value)}.")
    elif isinstance(value, float):
        _finite(name, value)
    else:
        _require_text(name, value)


def _require_text(name: str, value: object) -> None:
    if value is not None and not (isinstance(value, str) and len(value) <= LONGEST_TEXT and value.isprintable()):
        raise PrefixConfigError(
            f"{name} must be a printable string of at most {LONGEST_TEXT} characters, not {_short(value)}."
        )


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_INT:
        raise PrefixConfigError(f"{name} must be an integer from 0 to 2^53, not {_short(value)}.")


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise PrefixConfigError(f"{name} must be a finite number, not {_short(value)}.")
    try:
        return float(value)
    except OverflowError as error:
        raise PrefixConfigError(f"{name} must be a finite number, not {_short(value)}.") from error


def _curve(name: str, points: object) -> Curve:
    if not isinstance(points, (list, tuple)) or len(points) > LONGEST_CURVE:
        raise PrefixConfigError(f"{name} must be a list of at most {LONGEST_CURVE} points, not {_short(points)}.")
    curve = []
    for point in points:
        if not isinstance(point, (list, tuple)) or len(point) != 2:
            raise PrefixConfigError(f"{name} must have pairs of a step and a loss, not {_short(point)}.")
        _require_count(f"A step of {name}", point[0])
        curve.append((point[0], _finite(f"A loss of {name}", point[1])))
    if any(later[0] <= earlier[0] for earlier, later in pairwise(curve)):
        raise PrefixConfigError(f"The steps of {name} must be in ascending order.")
    return tuple(curve)


def _short(value: object) -> str:
    """A value for a message, whatever its size."""
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        return "a larger one"
    if isinstance(value, (Mapping, list, tuple)) and len(value) > 5:
        return f"one of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
