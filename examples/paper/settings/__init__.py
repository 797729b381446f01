"""How each method is trained on each data set, in readable files; `paper.yaml` has the paper's hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from paper.methods import Method, method_from
from paper.yaml_files import SettingError, into, read

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Training:
    """How a method is trained: AdamW, gradients clipped at 1, the learning rate falling linearly to 0.

    Args:
        learning_rate: The highest one.
        batch_size: Rows of one optimizer step, over all processes.
        epochs: Times that the training data is seen; give this or `steps`.
        steps: Optimizer steps.
        warmup_steps: Steps until the highest learning rate.
        weight_decay: Of AdamW.
        evaluations: How often the dev loss is measured, the last time at the end.
        select: Which weights are kept: the last ones, or those with the lowest dev loss (early stopping).
        bf16: Train in bfloat16 autocast.
        base_dropout: Whether the base's own dropout acts in training.
    """

    learning_rate: float
    batch_size: int
    epochs: float | None = None
    steps: int | None = None
    warmup_steps: int = 0
    weight_decay: float = 0.0
    evaluations: int = 4
    select: Literal["last", "best"] = "last"
    bf16: bool = False
    base_dropout: bool = True

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise SettingError("A training needs epochs or steps, and not both.")
        if self.select not in ("last", "best"):
            raise SettingError(f'select is "last" or "best", not {self.select!r}.')
        if min(self.learning_rate, self.batch_size, self.evaluations, self.epochs or self.steps or 0) <= 0:
            raise SettingError("The learning rate, batch size, evaluations and epochs or steps must be above 0.")


TRAINING_FIELDS = frozenset(one.name for one in fields(Training))


@dataclass(frozen=True)
class MethodSettings:
    """A method and how it is trained; `training` is `None` for methods that do not train."""

    method: Method
    training: Training | None

    def described(self) -> dict[str, Any]:
        """All settings in one flat mapping, as they stand in a file of settings."""
        training = {} if self.training is None else _fields_of(self.training)
        return {"kind": self.method.kind, **_fields_of(self.method), **training}


@dataclass(frozen=True)
class DatasetSettings:
    """What all methods share on one data set.

    Args:
        separator: Stands between an input and its target, at the end of the prompt.
        instruction: A sentence that describes the task, for methods that start from words.
        max_new_tokens: Longest text that is generated.
        methods: Settings of each method, by the name that tables and `--only` use.
        target_start: What each target begins with, as a space for tokenizers that glue it to the word behind it.
        decoding: Further arguments of `generate`.
        max_source_tokens: Longest input in tokens, without separator and special tokens; longer ones lose their end.
    """

    separator: str
    instruction: str
    max_new_tokens: int
    methods: Mapping[str, Mapping[str, Any]]
    target_start: str = ""
    decoding: Mapping[str, Any] = field(default_factory=dict)
    max_source_tokens: int | None = None

    def method(self, name: str, changes: Mapping[str, Any]) -> MethodSettings:
        """A method with its training, some of their fields changed.

        Raises:
            SettingError: There is no such method or field.
        """
        if name not in self.methods:
            raise SettingError(f"There are no settings of a method {name!r}. There are {sorted(self.methods)}.")
        content = {**self.methods[name], **changes}
        for one, other in (("epochs", "steps"), ("steps", "epochs")):  # the change takes the place of its alternative
            if one in changes and other not in changes:
                content.pop(other, None)
        try:
            method = method_from({key: value for key, value in content.items() if key not in TRAINING_FIELDS})
        except ValueError as error:
            raise SettingError(f"{name}: {error}") from error
        training = {key: value for key, value in content.items() if key in TRAINING_FIELDS}
        if not method.trains and training:
            raise SettingError(f"{name} does not train, so {sorted(training)} would do nothing.")
        return MethodSettings(method, into(Training, training, f"The training of {name}") if method.trains else None)


def load(name: str) -> dict[str, DatasetSettings]:
    """The settings of a file in this folder, by data set.

    Args:
        name: The file's name without `.yaml`, or a path of another one.

    Raises:
        SettingError: There is no such file, or it says something that is not known.
    """
    file = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not file.is_file():
        known = sorted(one.stem for one in FOLDER.glob("*.yaml"))
        raise SettingError(f"There are no settings {name!r}. There are {known}; a path that ends in .yaml works too.")
    return {dataset: into(DatasetSettings, content, f"{file}: {dataset}") for dataset, content in read(file).items()}


def _fields_of(value: Any) -> dict[str, Any]:
    return {one.name: getattr(value, one.name) for one in fields(value)}
