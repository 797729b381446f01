"""The methods that are compared: each is read from a settings file and applied to a base model.

method = method_from({"kind": "prefix", "length": 10})
adapted = method.build(Setting(base, tokenizer, rows, separator, instruction, seed))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adapter import Adapter
from .infix import Infix
from .method import Adapted, Method, MethodError, Row, Setting, known_fields
from .peft_methods import Lora, PromptTuning
from .prefix import Prefix
from .prompting import Prompting
from .soft_prompt import EmbeddingOnly
from .tensors import stored_bytes
from .weights import FineTuning, TopLayers

__all__ = ["METHODS", "Adapted", "Method", "MethodError", "Row", "Setting", "method_from", "stored_bytes"]

METHODS: dict[str, type[Method]] = {
    method.kind: method
    for method in (
        Prefix,
        FineTuning,
        TopLayers,
        Adapter,
        Lora,
        PromptTuning,
        Prompting,
        EmbeddingOnly,
        Infix,
    )
}
"""The methods by the names that settings files know them by."""


def method_from(fields: Mapping[str, Any]) -> Method:
    """The method that a settings file describes: its `kind`, and fields of that method.

    Raises:
        ValueError: The kind or a field is unknown, or a value cannot be.
    """
    kind = fields.get("kind")
    if kind not in METHODS:
        raise ValueError(f"A method has a kind, one of {', '.join(METHODS)}; not {kind!r}.")
    method, known = METHODS[kind], known_fields(METHODS[kind])
    unknown = [name for name in fields if name not in (*known, "kind")]
    if unknown:
        has = f"It has {', '.join(known)}." if known else "It has none."
        raise ValueError(f"The method {kind} has no field {', '.join(map(repr, unknown))}. {has}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    values.pop("kind")
    return method(**values)
