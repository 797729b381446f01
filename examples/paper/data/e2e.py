"""E2E NLG: restaurants, written as `name : Blue Spice | Type : coffee shop | area : city centre`.

The paper's files are the official release, tokenised. What is read from the official release gets the paper's field
names and tokenised values, so that inputs are equal to the last character; texts stay as they were published, without
blanks before punctuation marks.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from .item import Item
from .sources import DataError, HubData, lines_of, missing, references_of

LAYOUTS = (
    "the paper's src1_train.txt, src1_valid.txt and src1_test.txt, or the official trainset.csv, devset.csv and "
    "testset_w_refs.csv with the columns mr and ref"
)
MERGED = True
CONFIGS: Mapping[str, str] = {}
_PAPER_FILES = {"train": "src1_train.txt", "dev": "src1_valid.txt", "test": "src1_test.txt"}
_OFFICIAL_FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
_FIELD = re.compile(r"([^,\[\]]+)\[([^\[\]]*)\]")
_MEANING = re.compile(rf"{_FIELD.pattern}\s*(,{_FIELD.pattern}\s*)*")
_RENAMED = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_TOKEN_BORDER = re.compile(r"(?<=£)(?=\d)|(?<=\d)(?=-\d)|(?<=\d-)(?=\d)")


def linearised(meaning: str) -> str:
    """`name[Aromi], priceRange[£20-25]` as the paper writes it: `name : Aromi | price : £ 20 - 25`."""
    if not _MEANING.fullmatch(meaning):
        raise ValueError(f"{meaning!r} is no list of fields such as name[Aromi], area[riverside]")
    fields = ((name.strip(), value.strip()) for name, value in _FIELD.findall(meaning))
    return " | ".join(f"{_RENAMED.get(name, name)} : {_TOKEN_BORDER.sub(' ', value)}" for name, value in fields)


def from_folder(folder: Path, split: str) -> Iterator[Item]:
    """The paper's files where they are, otherwise the official ones."""
    paper, official = folder / _PAPER_FILES[split], folder / _OFFICIAL_FILES[split]
    if paper.is_file():
        return _read_paper(paper)
    if official.is_file():
        return _read_official(official)
    raise missing(folder, f"{paper.name} or {official.name}", LAYOUTS)


def from_hub(data: HubData, split: str) -> Iterator[Item]:
    """`e2e_nlg` (as published) or GEM's variant (cleaned, so with other counts)."""
    columns = set(data.columns(split))
    for place, row in data.rows(split):
        if {"meaning_representation", "human_reference"} <= columns:
            yield _item(place, row["meaning_representation"], (row["human_reference"],))
        elif {"meaning_representation", "target"} <= columns:
            yield _item(place, row["meaning_representation"], references_of(row))
        elif {"mr", "ref"} <= columns:
            yield _item(place, row["mr"], (row["ref"],))
        else:
            known = ["meaning_representation and human_reference", "meaning_representation and target", "mr and ref"]
            raise data.strange_columns(split, known)


def _item(place: str, meaning: str, references: tuple[str, ...]) -> Item:
    try:
        return Item(linearised(meaning), references)
    except ValueError as error:
        raise DataError(f"{place}: {error}.") from error


def _read_paper(file: Path) -> Iterator[Item]:
    for place, line in lines_of(file):
        parts = line.split("||")
        if len(parts) != 2:
            raise DataError(f"{place}: expected an input, ||, and a text.")
        yield Item(parts[0], (parts[1],))


def _read_official(file: Path) -> Iterator[Item]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            meaning, text = row.get("mr"), row.get("ref")
            if meaning is None or text is None or None in row:  # csv keeps fields without a column under None
                raise DataError(f"{place}: expected the columns mr and ref, as the file's first line names them.")
            yield _item(place, meaning, (text,))
