"""WebNLG challenge 2017: triples of DBpedia, with names as they stand there (`Abilene,_Texas`).

Only texts marked `good` are kept. The published code of the paper also writes ` | ` before the first triple; here it
stands between triples only, as in DART. The official test folder holds its entries several times (without texts, and
the unseen categories alone): only `testdata_with_lex` counts.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import triples
from .item import Item
from .sources import DataError, HubData, json_of, missing, references_of

LAYOUTS = (
    "train.json, dev.json and test.json, or the official folders train and dev with XML files (1triples/*.xml and so "
    "on) and test with testdata_with_lex.xml; the training files are needed for every split, since they tell which "
    "categories are seen"
)
MERGED = True
CONFIGS: Mapping[str, str] = {
    "web_nlg": "webnlg_challenge_2017",
    "webnlg-challenge/web_nlg": "webnlg_challenge_2017",
    "GEM/web_nlg": "en",
}
_TEST = "testdata_with_lex"


def from_folder(folder: Path, split: str) -> Iterator[Item]:
    """JSON where it is, otherwise XML. Training is read, too, to tell which categories it has."""
    return _marked(_read(folder, split), _read(folder, "train"))


def from_hub(data: HubData, split: str) -> Iterator[Item]:
    """`web_nlg` in its configuration `webnlg_challenge_2017`, or GEM's variant (the challenge of 2020)."""
    return _marked(_rows(data, split), _rows(data, "train"))


def _marked(items: Iterable[Item], training: Iterable[Item]) -> Iterator[Item]:
    trained = {item.group for item in training}
    return (replace(item, seen=item.group in trained) for item in items)


def _read(folder: Path, split: str) -> Iterator[Item]:
    file = folder / f"{split}.json"
    if file.is_file():
        return _read_json(file)
    files = [folder / "test" / f"{_TEST}.xml"] if split == "test" else sorted((folder / split).rglob("*.xml"))
    if not files or not files[0].is_file():
        looked_for = f"{split}.json or test/{_TEST}.xml" if split == "test" else f"{split}.json or {split}/*/*.xml"
        raise missing(folder, looked_for, LAYOUTS)
    return (item for one in files for item in _read_xml(one))


def _read_json(file: Path) -> Iterator[Item]:
    content = json_of(file)
    try:
        entries = [(number, entry) for numbered in content["entries"] for number, entry in numbered.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{file}: expected {{"entries": [{{"1": ...}}, {{"2": ...}}]}}.') from error
    for number, entry in entries:
        place = f"{file}, entry {number}"
        try:
            found = [(one["subject"], one["property"], one["object"]) for one in entry["modifiedtripleset"]]
            texts = [(one["comment"], one["lex"]) for one in entry["lexicalisations"]]
            category = entry["category"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{place}: expected category, modifiedtripleset and lexicalisations.") from error
        yield _item(place, found, texts, category)


def _read_xml(file: Path) -> Iterator[Item]:
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{file}, line {error.position[0]}: not XML ({error}).") from error
    for entry in root.iter("entry"):
        texts = [(one.get("comment", ""), one.text or "") for one in entry.iter("lex")]
        found = [_parts(one.text or "") for one in entry.iterfind("modifiedtripleset/mtriple")]
        yield _item(f"{file}, entry {entry.get('eid')}", found, texts, entry.get("category", ""))


def _rows(data: HubData, split: str) -> Iterator[Item]:
    columns = set(data.columns(split))
    for place, row in data.rows(split):
        if {"modified_triple_sets", "lex", "category"} <= columns:
            # empty for training and development, a file's name for test
            if row.get("test_category") in (None, "", _TEST):
                found = [_parts(one) for one in _column(row["modified_triple_sets"], "mtriple_set")[0]]
                texts = zip(_column(row["lex"], "comment"), _column(row["lex"], "text"), strict=True)
                yield _item(place, found, list(texts), row["category"])
        elif {"input", "target", "category"} <= columns:
            texts_of_gem = [("good", text) for text in references_of(row)]
            yield _item(place, [_parts(one) for one in row["input"]], texts_of_gem, row["category"])
        else:
            known = ["modified_triple_sets, lex and category", "input, target and category"]
            raise data.strange_columns(split, known)


def _column(objects: Any, name: str) -> list[Any]:
    """A field of a list of objects, which is stored by column, or by row in newer versions of the package."""
    return list(objects[name]) if isinstance(objects, Mapping) else [one[name] for one in objects]


def _parts(triple: str) -> list[str]:
    return [part.strip() for part in triple.split(" | ")]


def _item(place: str, found: Sequence[Sequence[str]], texts: Sequence[tuple[str, str]], category: str) -> Item:
    try:
        source = triples.linearised(found)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: {error}.") from error
    return Item(source, tuple(text for comment, text in texts if comment == "good"), group=category)
