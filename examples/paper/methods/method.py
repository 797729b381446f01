"""What a method is: settings that can be read from a file, and what they make of a base model."""

from __future__ import annotations

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class MethodError(ValueError):
    """A method does not fit the base model or the data. The message says what to change."""


Row = dict[str, str]
"""A training example: `prompt`, which ends with the separator, and `target`."""


@dataclass(frozen=True)
class Setting:
    """What a method may use.

    Args:
        base: The base model; methods change it.
        tokenizer: Its tokenizer.
        rows: The training rows.
        separator: What each prompt ends with, between input and target.
        instruction: A sentence that describes the task.
        seed: Of the method's own random numbers.
    """

    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]
    separator: str
    instruction: str
    seed: int


class Adapted(ABC):
    """A base model with a method.

    Attributes:
        model: Takes the base's batches, `model(**batch).loss` and `model.generate(**batch, ...)`. Its parameters that
            require gradients are what is trained.
        end: A text that ends an answer: whoever generates cuts what was written there. `None` where the model itself
            has learned to stop.
    """

    end: str | None = None

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def prompt(self, prompt: str) -> str:
        """What the model reads for a prompt."""
        return prompt

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what the task has to store, nothing of a frozen base, as safetensors."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Put back what `save` wrote, into a model that was built with the same settings."""


class Method(ABC):
    """A way to adapt a model. Its subclasses are frozen dataclasses whose fields are its settings.

    Raises:
        ValueError: A setting has the wrong type.
    """

    kind: ClassVar[str]
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for name in known_fields(type(self)):
            value = getattr(self, name)
            if not _fits(value, hints[name]):
                raise ValueError(f"{self.kind}: {name} must be {_shown(hints[name])}, not {value!r}.")

    @abstractmethod
    def build(self, setting: Setting) -> Adapted:
        """The base with this method, before any training."""


def known_fields(method: type[Method]) -> list[str]:
    """Names of a method's settings."""
    return [field.name for field in dataclasses.fields(typing.cast("Any", method))]


def require_positive(method: Method, *names: str) -> None:
    """Check that some settings are above zero, where they are given.

    Raises:
        ValueError: One is not.
    """
    for name in names:
        value = getattr(method, name)
        if value is not None and value <= 0:
            raise ValueError(f"{method.kind}: {name} must be above 0, not {value!r}.")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type, as far as settings have types. A whole number is a number, too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, arguments[0]) for one in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _shown(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_shown, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return f"a list of {_shown(arguments[0])}"
    return "nothing" if hint is type(None) else str(hint.__name__)
