"""The paper's data sets, read from folders or from the Hub into items: one input with all its texts."""

from __future__ import annotations

from types import MappingProxyType

from . import bbc, dart, e2e, webnlg, xsum
from .counts import check
from .item import Item, digest, merged, with_texts
from .sources import SPLITS, DataError, Reader, read
from .subsets import PROTOCOLS, low_data, of_groups, rows_of, within

__all__ = [
    "DATASETS",
    "PROTOCOLS",
    "SPLITS",
    "DataError",
    "Item",
    "check",
    "digest",
    "load",
    "low_data",
    "of_groups",
    "rows_of",
    "within",
]

_READERS: MappingProxyType[str, Reader] = MappingProxyType(
    {"e2e": e2e, "webnlg": webnlg, "dart": dart, "xsum": xsum, "bbc": bbc}
)
DATASETS: tuple[str, ...] = tuple(_READERS)


def load(dataset: str, source: str, split: str) -> list[Item]:
    """One item for each distinct input of a split, in order of first appearance; of DART one for each entry.

    Args:
        dataset: One of `DATASETS`.
        source: A folder with the data set's files (or one that has a folder named like the data set), in the layout of
            the official release or of the paper; or a data set id on the Hub, with a configuration after a colon if it
            has several (`web_nlg:webnlg_challenge_2017`).
        split: `train`, `dev` or `test`.
    """
    if dataset not in _READERS:
        raise DataError(f"Unknown data set {dataset!r}; known are {', '.join(DATASETS)}.")
    if split not in SPLITS:
        raise DataError(f"Unknown split {split!r}; known are {', '.join(SPLITS)}.")
    reader = _READERS[dataset]
    entries = with_texts(read(reader, dataset, source, split))
    items = merged(entries) if reader.MERGED else list(entries)
    if not items:
        raise DataError(f"{source} has nothing for the {split} split of {dataset}.")
    return items
