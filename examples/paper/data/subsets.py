"""What a run takes of the data: small training sets, groups to extrapolate between, and the rows to learn.

WebNLG needs no protocol: its training is all seen, and `Item.seen` divides its test.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .item import Item, pairs_of
from .sources import DataError

PROTOCOLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "news-to-sport": (("business", "entertainment", "politics", "tech"), ("sport",)),
    "within-news": (("business", "politics"), ("entertainment", "tech")),
}
"""Groups to train on and to test on. The paper trains within news on world, UK and business and tests on health,
science and technology; these are the nearest topics that the BBC articles have."""


def low_data(train: Sequence[Item], dev: Sequence[Item], size: int, subset: int) -> tuple[list[Item], list[Item]]:
    """A small training set, and development data of 30 % of its size, or all if that is more than there are.

    As in the paper, what is counted and drawn (without replacement) are pairs of an input and one text, and the
    subsets of any size are independent of each other. Each returned item has one text; an input of which two texts
    were drawn comes twice.

    Args:
        train: All training data.
        dev: All development data.
        size: How many pairs to train on.
        subset: Number of the subset; the same size and number give the same draw.
    """
    measured = min(max(1, size * 3 // 10), sum(len(item.references) for item in dev))
    return _draw(train, size, f"train {size} {subset}"), _draw(dev, measured, f"dev {size} {subset}")


def of_groups(items: Sequence[Item], groups: Sequence[str]) -> list[Item]:
    """The items of some groups, in data order."""
    known = {item.group for item in items}
    if unknown := sorted(set(groups) - known):
        raise DataError(f"No items of {', '.join(unknown)}; the data have the groups {', '.join(sorted(known))}.")
    return [item for item in items if item.group in groups]


def within(
    protocol: str, train: Sequence[Item], dev: Sequence[Item], test: Sequence[Item]
) -> tuple[list[Item], list[Item], list[Item]]:
    """The three splits under a protocol: train and dev have the groups to train on, test those to test on."""
    if protocol not in PROTOCOLS:
        raise DataError(f"Unknown protocol {protocol!r}; known are {', '.join(PROTOCOLS)}.")
    trained, tested = PROTOCOLS[protocol]
    return of_groups(train, trained), of_groups(dev, trained), of_groups(test, tested)


def rows_of(items: Sequence[Item], separator: str, target_start: str) -> list[dict[str, str]]:
    """Rows with `prompt` and `target`, in data order, one for each text of an input.

    Args:
        items: What to make rows of.
        separator: What stands between input and text; each prompt ends with it.
        target_start: What each target begins with, usually a space or nothing.
    """
    return [
        {"prompt": item.source + separator, "target": target_start + item.references[0]} for item in pairs_of(items)
    ]


def _draw(items: Sequence[Item], count: int, seed: str) -> list[Item]:
    pairs = list(pairs_of(items))
    if not 0 < count <= len(pairs):
        raise DataError(f"Cannot draw {count} of {len(pairs)} pairs of an input and a text ({seed}).")
    return random.Random(seed).sample(pairs, count)
