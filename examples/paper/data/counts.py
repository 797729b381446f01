"""How much data there should be, as published, and whether it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .item import Item


@dataclass(frozen=True)
class Counts:
    """Numbers of one split; `None` where nobody published one."""

    texts: int
    inputs: int | None = None
    seen: int | None = None
    unseen: int | None = None

    def __str__(self) -> str:
        words = {"texts": "texts", "inputs": "inputs", "seen": "seen inputs", "unseen": "unseen inputs"}
        return ", ".join(f"{count} {words[name]}" for name, count in asdict(self).items() if count is not None)


PUBLISHED: dict[tuple[str, str], Counts] = {
    ("e2e", "train"): Counts(42061, inputs=4862),
    ("e2e", "dev"): Counts(4672, inputs=547),
    ("e2e", "test"): Counts(4693, inputs=630),
    ("webnlg", "train"): Counts(18025),
    ("webnlg", "dev"): Counts(2258),
    ("webnlg", "test"): Counts(4928, seen=971, unseen=891),
    ("dart", "train"): Counts(62659),
    ("dart", "dev"): Counts(6980),
    ("dart", "test"): Counts(12552, inputs=5097),
    ("xsum", "train"): Counts(204045),
    ("xsum", "dev"): Counts(11332),
    ("xsum", "test"): Counts(11334),
    # 2225 articles are published; how they fall into splits is this package's doing
    ("bbc", "train"): Counts(1754),
    ("bbc", "dev"): Counts(227),
    ("bbc", "test"): Counts(244),
}


def check(dataset: str, split: str, items: Sequence[Item]) -> str | None:
    """`None` if a split has as much as was published, otherwise a sentence that says what was expected and found.

    Part of a data set is legitimate: the sentence is a note for the reader of results, no error.
    """
    expected = PUBLISHED[dataset, split]
    seen = sum(item.seen for item in items)
    found = Counts(
        texts=sum(len(item.references) for item in items),
        inputs=None if expected.inputs is None else len(items),
        seen=None if expected.seen is None else seen,
        unseen=None if expected.unseen is None else len(items) - seen,
    )
    return None if found == expected else f"{dataset} {split}: expected {expected}; found {found}."
