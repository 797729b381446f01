"""The part of PEFT's `adapter_config.json` that matters for a prefix, read without trusting it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import strict_json
from .errors import PrefixFileError
from .plain_file import opened_file

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PEFT_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
"""The methods of PEFT that are keys and values of virtual tokens; the first is the one that is written."""
MAX_BYTES = 2**20
MAX_MODULES = 1000
"""Names in `modules_to_save`: each is compared with each module of the base."""


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter says about itself. Older versions of PEFT left some of it out.

    Args:
        num_virtual_tokens: Length `p` of the prefix.
        num_transformer_submodules: 2 for an encoder-decoder model, otherwise 1.
        num_layers: Pairs of keys and values of a virtual token.
        num_attention_heads: Heads of keys and values.
        token_dim: Numbers of a key.
        task_type: PEFT's name for the base's task.
        modules_to_save: Ends of the names of modules that were trained with the prefix.
        base_model_name_or_path: Name of the base model.
        revision: Its revision on the Hub.
        starts_at_zero: Whether the prefix was all zeros before training.
    """

    num_virtual_tokens: int
    num_transformer_submodules: int | None
    num_layers: int | None
    num_attention_heads: int | None
    token_dim: int | None
    task_type: str | None
    modules_to_save: tuple[str, ...]
    base_model_name_or_path: str | None
    revision: str | None
    starts_at_zero: bool


def read_config(file: Path) -> PeftConfig:
    """Read and check `adapter_config.json`; what does not matter for a prefix is passed over.

    Raises:
        PrefixFileError: The file is missing, too long, no JSON, about another method, or says what cannot be.
    """
    fields = _json_object(file)
    method = fields.get("peft_type")
    if method not in PEFT_TYPES:
        kind = f"an adapter of the kind {method[:40]!r}" if isinstance(method, str) else "something without a peft_type"
        raise PrefixFileError(
            f"{file} describes {kind}, and only {' and '.join(PEFT_TYPES)} are prefixes. Load others with PEFT: "
            "PeftModel.from_pretrained(base, folder), or base.load_adapter(folder) for an adapter that is to act "
            "beside a prefix."
        )
    modules = _value(file, fields, "modules_to_save", list) or []
    if len(modules) > MAX_MODULES or not all(isinstance(name, str) and name for name in modules):
        raise _wrong(file, "modules_to_save", f"must be a list of at most {MAX_MODULES} names")
    length = _number(file, fields, "num_virtual_tokens")
    if length is None:
        raise _wrong(file, "num_virtual_tokens", "is missing")
    _value(file, fields, "prefix_projection", bool)  # what was learned is stored the same way with and without
    return PeftConfig(
        num_virtual_tokens=length,
        num_transformer_submodules=_number(file, fields, "num_transformer_submodules"),
        num_layers=_number(file, fields, "num_layers"),
        num_attention_heads=_number(file, fields, "num_attention_heads"),
        token_dim=_number(file, fields, "token_dim"),
        task_type=_text(file, fields, "task_type"),
        modules_to_save=tuple(modules),
        base_model_name_or_path=_text(file, fields, "base_model_name_or_path"),
        revision=_text(file, fields, "revision"),
        starts_at_zero=_text(file, fields, "init_weights") == "zero",
    )


def _json_object(file: Path) -> dict[str, Any]:
    with opened_file(file) as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise PrefixFileError(f"{file} is longer than {MAX_BYTES} bytes; PEFT's configurations take a few thousand.")
    try:
        fields = strict_json.parse(content.decode())
    except ValueError as error:
        raise PrefixFileError(f"{file} is damaged: it is no JSON ({error}). Save or download it again.") from error
    if not isinstance(fields, dict):
        raise PrefixFileError(f"{file} is damaged: it is no JSON object. Save or download it again.")
    return fields


def _value(file: Path, fields: dict[str, Any], name: str, kind: type) -> Any:
    """A field of a type, or `None`."""
    value = fields.get(name)
    if value is not None and type(value) is not kind:
        raise _wrong(file, name, f"must be of type {kind.__name__}")
    return value


def _number(file: Path, fields: dict[str, Any], name: str) -> int | None:
    number: int | None = _value(file, fields, name, int)
    if number is not None and not 1 <= number < 2**31:
        raise _wrong(file, name, "must be at least 1 and fit 31 bits")
    return number


def _text(file: Path, fields: dict[str, Any], name: str) -> str | None:
    text: str | None = _value(file, fields, name, str)
    if text is not None and not text.isprintable():  # half a surrogate pair could not be written again
        raise _wrong(file, name, "must be plain text")
    return text


def _wrong(file: Path, name: str, what: str) -> PrefixFileError:
    return PrefixFileError(f"{file} is damaged: {name} {what}. Save or download it again.")
