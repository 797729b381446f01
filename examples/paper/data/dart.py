"""DART v1.1.1: triples of an open domain.

Relations are written in lower case, subjects and objects as they are: that is what the published code of the paper
does. The test set holds one empty text; it stays, as the official count of 12552 texts includes it. Entries of equal
inputs stay apart, since the published evaluation scores each with its own references: 891 of the test's 5097 entries
are copies of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import triples
from .item import Item
from .sources import DataError, HubData, json_of, missing, references_of

LAYOUTS = (
    "dart-v1.1.1-full-train.json, dart-v1.1.1-full-dev.json and dart-v1.1.1-full-test.json, or the same files named "
    "train.json, dev.json and test.json"
)
MERGED = False
CONFIGS: Mapping[str, str] = {}


def from_folder(folder: Path, split: str) -> Iterator[Item]:
    """The official file, or the one with the short name."""
    for name in (f"dart-v1.1.1-full-{split}.json", f"{split}.json"):
        if (folder / name).is_file():
            return _read(folder / name)
    raise missing(folder, f"dart-v1.1.1-full-{split}.json or {split}.json", LAYOUTS)


def from_hub(data: HubData, split: str) -> Iterator[Item]:
    """`dart` or GEM's variant of it."""
    columns = set(data.columns(split))
    for place, row in data.rows(split):
        if {"tripleset", "annotations"} <= columns:
            texts = row["annotations"]
            # a list of objects is stored by column, or by row in newer versions of the package
            by_column = isinstance(texts, Mapping)
            yield _item(place, row["tripleset"], texts["text"] if by_column else [one["text"] for one in texts])
        elif {"tripleset", "target"} <= columns:
            yield _item(place, row["tripleset"], references_of(row))
        else:
            raise data.strange_columns(split, ["tripleset and annotations", "tripleset and target"])


def _item(place: str, tripleset: Sequence[Sequence[str]], texts: Sequence[str]) -> Item:
    try:
        lowered = [[part.lower() if i == 1 else part for i, part in enumerate(triple)] for triple in tripleset]
        return Item(triples.linearised(lowered), tuple(texts))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{place}: {error}.") from error


def _read(file: Path) -> Iterator[Item]:
    entries: Any = json_of(file)
    if not isinstance(entries, list):
        raise DataError(f"{file}: expected a list of objects with tripleset and annotations.")
    for number, entry in enumerate(entries, start=1):
        place = f"{file}, entry {number}"
        try:
            tripleset, texts = entry["tripleset"], [one["text"] for one in entry["annotations"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{place}: expected an object with tripleset and annotations, each with a text.") from error
        yield _item(place, tripleset, texts)
