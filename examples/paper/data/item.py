"""One input with all its texts: the unit that every data set is read into."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace


@dataclass(frozen=True)
class Item:
    """An input and the texts that people wrote for it."""

    source: str
    """The linearised input, without a separator at its end."""
    references: tuple[str, ...]
    """All texts of that input in the data's order; what the data say twice stays there twice."""
    group: str = ""
    """Category (WebNLG) or topic (BBC), empty elsewhere."""
    seen: bool = True
    """WebNLG: whether training has inputs of this category."""


def with_texts(items: Iterable[Item]) -> Iterator[Item]:
    """Items that have texts; blanks around inputs and texts are cut off."""
    for item in items:
        if item.references:
            yield replace(item, source=item.source.strip(), references=tuple(text.strip() for text in item.references))


def merged(items: Iterable[Item]) -> list[Item]:
    """One item for each distinct input, in order of first appearance.

    An input that comes with several groups keeps the first one, and is seen if training has any of them. (WebNLG lists
    33 training inputs under two categories, such as a country among airports and cities; none of its test.)
    """
    found: dict[str, Item] = {}
    for item in items:
        if before := found.get(item.source):
            both = before.references + item.references
            found[item.source] = replace(before, references=both, seen=before.seen or item.seen)
        else:
            found[item.source] = item
    return list(found.values())


def pairs_of(items: Iterable[Item]) -> Iterator[Item]:
    """Each item once for each of its texts, in data order."""
    return (replace(item, references=(text,)) for item in items for text in item.references)


def digest(items: Iterable[Item]) -> str:
    """The sha256 of the items' contents and order: two runs with equal digests used the same data."""
    total = hashlib.sha256()
    for item in items:
        total.update(json.dumps(astuple(item)).encode() + b"\n")
    return total.hexdigest()
