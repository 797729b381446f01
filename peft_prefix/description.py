"""What a saved prefix says about itself, beside its numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import strict_json
from .config import PrefixConfig
from .errors import PrefixConfigError
from .training_record import TrainingRecord
from .version import __version__

FORMAT_VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes of a prefix's file."""
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
"""What transformers calls the kinds of labels."""
_MAX_NAME = 4096
"""Longest name of a model or a label, in characters."""
_MAX_LABELS = 10_000


@dataclass(frozen=True, kw_only=True)
class PrefixDescription:
    """What a saved prefix says about itself.

    Args:
        config: The configuration that it was made with.
        geometry_fingerprint: `Geometry.fingerprint` of its base model.
        weights_fingerprint: That of its base model (`fingerprint.py`), `None` if it could not be taken.
        dtype: Name of the tensors' dtype, e.g. `float32`.
        sha256: Hash over the tensors; the identity of this prefix.
        base_model_class: Name of the base model's class, e.g. `LlamaForCausalLM`; `None` if it is not known.
        labels: Names of a classifier's labels in order; `None` if the prefix has no head of its own.
        problem_type: What kind of labels a classifier learned, if transformers was told so.
        training: How it was trained, if that is known.
        format_version: Version of this format.
        library_version: Version of the library that wrote the file.

    Raises:
        PrefixConfigError: A value cannot be.
    """

    config: PrefixConfig
    geometry_fingerprint: str
    weights_fingerprint: str | None
    dtype: str
    sha256: str
    base_model_class: str | None = None
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    training: TrainingRecord | None = None
    format_version: int = FORMAT_VERSION
    library_version: str = __version__

    def __post_init__(self) -> None:
        for name, is_right in _CHECKS.items():
            if not is_right(value := getattr(self, name)):
                raise PrefixConfigError(f"The description of a prefix has an impossible {name}: {value!r:.100}.")
        for name in ("base_model_name_or_path", "base_model_revision"):
            value = getattr(self.config, name)
            if value is not None and not is_name(value):
                raise PrefixConfigError(f"The description of a prefix has an impossible {name}: {value[:100]!r}.")

    def to_json(self, indent: int | None = None) -> str:
        """All fields in one flat JSON object."""
        fields = {name: getattr(self, name) for name in _OWN}
        fields["training"] = None if self.training is None else self.training.to_dict()
        return json.dumps({**self.config.to_dict(), **fields}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> PrefixDescription:
        """The inverse of `to_json`.

        Raises:
            PrefixConfigError: A field is unknown, missing or its value cannot be.
        """
        try:
            fields = strict_json.parse(text)
        except ValueError as error:
            raise PrefixConfigError(f"The description of a prefix is no JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise PrefixConfigError("The description of a prefix must be a JSON object.")
        if "num_virtual_tokens" not in fields:
            raise PrefixConfigError("The description of a prefix is incomplete: num_virtual_tokens is missing.")
        config = PrefixConfig.from_dict({name: value for name, value in fields.items() if name not in _OWN})
        own = {name: value for name, value in fields.items() if name in _OWN}
        if isinstance(own.get("labels"), list):
            own["labels"] = tuple(own["labels"])
        if own.get("training") is not None:
            own["training"] = TrainingRecord.from_dict(own["training"])
        try:
            return cls(config=config, **own)
        except TypeError as error:
            raise PrefixConfigError(f"The description of a prefix is incomplete: {error}.") from error


def is_name(value: object) -> bool:
    """Whether it can be the name of a model or a label."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
        return False
    # Control characters, halves of surrogate pairs and breaks of lines; other spaces are found in real names.
    return not any(unicodedata.category(one) in {"Cc", "Cs", "Zl", "Zp"} for one in value)


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_fingerprint(value: object) -> bool:
    """Whether it is one or two of a dtype, a hash of names and a sample of float32 numbers in base64."""
    # Four numbers of each matrix are 16 bytes; base64 makes four characters of three bytes.
    part = r"[a-z0-9_]{1,30}:[0-9a-f]{8}:(?=\w|[+/])(?:[A-Za-z0-9+/]{64})*(?:[A-Za-z0-9+/]{22}==|[A-Za-z0-9+/]{43}=)?"
    return isinstance(value, str) and len(value) < 10_000 and re.fullmatch(f"{part}(?::{part})?", value) is not None


def are_labels(value: object) -> bool:
    """Whether they can be the labels of a description."""
    return isinstance(value, tuple) and 0 < len(value) <= _MAX_LABELS and all(map(is_name, value))


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "geometry_fingerprint": _is_hash,
    "weights_fingerprint": lambda value: value is None or _is_fingerprint(value),
    "dtype": lambda value: value in DTYPES,
    "sha256": _is_hash,
    "base_model_class": lambda value: value is None or (is_name(value) and value.isidentifier()),
    "problem_type": lambda value: value is None or value in PROBLEM_TYPES,
    "labels": lambda value: value is None or are_labels(value),
    "format_version": lambda value: type(value) is int and 0 < value < 2**31,
    "library_version": is_name,
}
"""Whether a value can be, by field."""
_OWN = tuple(field.name for field in dataclasses.fields(PrefixDescription) if field.name != "config")
