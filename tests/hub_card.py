"""Metadata at the top of a model card, checked as the Hub checks them when a README.md is pushed."""

from __future__ import annotations

import re
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_MODEL_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_LICENSES = {
    *("afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigscience-bloom-rail-1.0", "bigscience-openrail-m"),
    *("bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m", "gemma", "gpl-2.0", "gpl-3.0", "isc", "lgpl-2.1", "lgpl-3.0"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "mit", "mpl-2.0", "openrail", "openrail++"),
    *("other", "unknown", "unlicense", "wtfpl", "zlib"),
}
_RELATIONS = {"adapter", "finetune", "merge", "quantized"}
_WORDS = ("library_name", "pipeline_tag", "license_name", "license_link")
_LISTS = ("tags", "language", "datasets", "metrics", "base_model")


class CardError(ValueError):
    """The metadata are no YAML mapping."""


def metadata(card: str) -> dict[str, Any]:
    """The metadata of a card, `{}` if it has none."""
    found = _FRONT_MATTER.match(card)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise CardError(f"YAML Metadata Error: {error}") from error
    if not isinstance(data, dict | None):
        raise CardError("YAML Metadata Error: the metadata must be a mapping")
    return data or {}


def check(card: str) -> tuple[list[str], list[str]]:
    """Errors, for which a push is refused, and warnings."""
    try:
        data = metadata(card)
    except CardError as error:
        return [str(error)], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [f'"{name}" must be a string' for name in _WORDS if not isinstance(data.get(name, ""), str)]
    errors += [f'"{name}" must be an array' for name in _LISTS if not _is_list(name, data.get(name, []))]
    if data.get("license", "other") not in _LICENSES:
        errors.append(f'"license" must be one of {sorted(_LICENSES)}')
    if data.get("base_model_relation", "adapter") not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(_RELATIONS)}')
    for base in _listed(data.get("base_model", [])):
        if not _MODEL_ID.fullmatch(str(base)):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    return errors + _index_errors(data.get("model-index", [])), []


def tags(data: dict[str, Any], paths: set[str]) -> list[str]:
    """The tags that the Hub derives from metadata and files."""
    bases = [str(base) for base in _listed(data.get("base_model", []))]
    relation = data.get("base_model_relation")
    derived = [
        *[data[name] for name in ("library_name", "pipeline_tag") if name in data],
        *["safetensors" for path in sorted(paths) if path.endswith(".safetensors")],
        *_listed(data.get("tags", [])),
        *_listed(data.get("language", [])),
        *[f"base_model:{base}" for base in bases],
        *[f"base_model:{relation}:{base}" for base in bases if relation],
        *[f"license:{data[name]}" for name in ("license",) if name in data],
        "region:us",
    ]
    return list(dict.fromkeys(derived))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_list(name: str, value: Any) -> bool:
    """Whether a value is a list of words; all but the tags may be one word, too."""
    if name != "tags" and isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _index_errors(index: Any) -> list[str]:
    """What results of evaluations lack."""
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for number, model in enumerate(index):
        place = f"model-index[{number}]"
        errors += [f'"{place}.{name}" is required' for name in ("name", "results") if name not in model]
        for row, result in enumerate(model.get("results", [])):
            needed = {"task": ["type"], "dataset": ["type", "name"]}
            errors += [
                f'"{place}.results[{row}].{part}.{name}" is required'
                for part, names in needed.items()
                for name in names
                if name not in result.get(part, {})
            ]
            errors += [
                f'"{place}.results[{row}].metrics[{column}].{name}" is required'
                for column, metric in enumerate(result.get("metrics", []))
                for name in ("type", "value")
                if name not in metric
            ]
    return errors
