"""BBC articles of 2004 and 2005, with their topic: what the extrapolation between topics is tried on.

The input is the article, its paragraphs joined by blanks. These data have no summaries: the text to write is the
article's title. They have no official splits either; articles are divided by a hash of their text, eight tenths train,
one dev, one test, so that the copies of an article share a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from .item import Item
from .sources import DataError, HubData, missing, own_split, records_of

LAYOUTS = "bbc.jsonl (topic, title, paragraphs)"
MERGED = True
CONFIGS: Mapping[str, str] = {}


def from_folder(folder: Path, split: str) -> Iterator[Item]:
    """The articles of `bbc.jsonl` that fall into the split."""
    file = folder / "bbc.jsonl"
    if not file.is_file():
        raise missing(folder, file.name, LAYOUTS)
    return _read(file, split)


def from_hub(data: HubData, split: str) -> Iterator[Item]:
    """No data set on the Hub is known to have these articles with topics and titles."""
    raise DataError(f"{data.name}: the BBC articles are read from a folder only, which holds {LAYOUTS}.")


def _read(file: Path, split: str) -> Iterator[Item]:
    for record in records_of(file, {"topic": str, "title": str, "paragraphs": list}):
        source = " ".join(record["paragraphs"])
        if own_split(source) == split:
            yield Item(source, (record["title"],), group=record["topic"])
