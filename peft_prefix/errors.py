"""What can go wrong, one class each. Every message names the cause and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixError(Exception):
    """Base class of all errors that this library raises on purpose."""


class PrefixConfigError(PrefixError, ValueError):
    """A `PrefixConfig` has an unknown field or a value that cannot be."""


class UnsupportedModelError(PrefixError, TypeError):
    """The base model keeps no keys and values that a prefix could join."""


class PrefixInputError(PrefixError, ValueError):
    """An argument of a call (mask, positions, cache, keyword, initializer input) does not fit."""


class PrefixNotConsumedError(PrefixError, RuntimeError):
    """The base model ran without reading the prefix, so its output would silently ignore the task."""


class PrefixFileError(PrefixError, OSError):
    """A saved prefix is missing, truncated, corrupted or not a prefix."""


class IncompatibleBaseError(PrefixError, ValueError):
    """A saved prefix has other shapes than the base model that it is loaded onto."""


class PrefixWarning(UserWarning):
    """Something is probably not what the user wants, but could be."""


def some_of(names: Iterable[str]) -> str:
    """The first few of many names, for a message."""
    names = list(names)
    return ", ".join(map(plain, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def plain(name: str, longest: int = 100) -> str:
    """A text from a file, for a message: not too long, and without characters that would do something to a terminal."""
    short = name if len(name) <= longest else f"{name[:longest]}..."
    return short if short.isprintable() else short.encode("unicode_escape").decode()


def name_of(base: PreTrainedModel) -> str:
    """What to call a base model in a message."""
    return base.config.name_or_path or f"this {type(base).__name__}"
