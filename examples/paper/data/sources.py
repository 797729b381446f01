"""Where data come from: a folder with files, or a data set on the Hub. Errors say which file and line is at fault."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .item import Item

SPLITS = ("train", "dev", "test")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
_PARQUET = "refs/convert/parquet"
_HUB_SPLITS = {"train": ("train",), "dev": ("validation", "dev"), "test": ("test",)}


class DataError(ValueError):
    """Data are missing or not what they should be."""


@dataclass(frozen=True)
class HubData:
    """All splits of a data set on the Hub."""

    name: str
    splits: Mapping[str, Any]

    def columns(self, split: str) -> list[str]:
        """Names of the columns of a split."""
        return list(self.splits[self._name_of(split)].column_names)

    def rows(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of a split, each with the words by which an error can point to it."""
        name = self._name_of(split)
        return ((f"{self.name}, split {name}, row {i}", row) for i, row in enumerate(self.splits[name], start=1))

    def strange_columns(self, split: str, known: Sequence[str]) -> DataError:
        """The error for columns that no known layout has."""
        return DataError(f"{self.name} has the columns {self.columns(split)}; expected {', or '.join(known)}.")

    def _name_of(self, split: str) -> str:
        for name in _HUB_SPLITS[split]:
            if name in self.splits:
                return name
        raise DataError(f"{self.name} has the splits {list(self.splits)}, and so nothing to use as {split}.")


class Reader(Protocol):
    """What the module of a data set offers."""

    @property
    def LAYOUTS(self) -> str:  # noqa: N802
        """The files that a folder may hold, in words."""

    @property
    def CONFIGS(self) -> Mapping[str, str]:  # noqa: N802
        """The configuration to take of data sets on the Hub that have several."""

    @property
    def MERGED(self) -> bool:  # noqa: N802
        """Whether all texts of one input are its references, from whichever entries."""

    def from_folder(self, folder: Path, split: str) -> Iterator[Item]:
        """What the files of a folder say, equal inputs not yet merged."""

    def from_hub(self, data: HubData, split: str) -> Iterator[Item]:
        """What a data set on the Hub says, equal inputs not yet merged."""


def read(reader: Reader, dataset: str, source: str, split: str) -> Iterator[Item]:
    """The split of a data set, from a folder if `source` is one, otherwise from the Hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        inner = folder / dataset
        return reader.from_folder(inner if inner.is_dir() else folder, split)
    accepted = f"A folder for {dataset} holds {reader.LAYOUTS}."
    if not _HUB_ID.fullmatch(source):
        raise DataError(f"There is no folder {source}. {accepted}")
    return reader.from_hub(_load_from_hub(source, reader.CONFIGS, accepted), split)


def missing(folder: Path, looked_for: str, layouts: str) -> DataError:
    """The error for a folder without the files."""
    return DataError(f"{folder} has no {looked_for}. A folder may hold {layouts}.")


def lines_of(file: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with the words by which an error can point to it."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}, line {number}", line.rstrip("\n")


def json_of(file: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg}).") from error


def records_of(file: Path, fields: Mapping[str, type]) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line, each with at least these fields of these types."""
    for place, line in lines_of(file):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: not JSON ({error.msg}).") from error
        if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in fields.items()):
            wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
            raise DataError(f"{place}: expected a JSON object with the fields {wanted}.")
        yield record


def own_split(text: str) -> str:
    """A split drawn by the text's hash: eight tenths are train, one dev, one test; equal texts share a split."""
    tenth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return {0: "dev", 1: "test"}.get(tenth, "train")


def references_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of a row in GEM's form: `references` for evaluation, where training has one `target`."""
    return tuple(row.get("references") or (row["target"],))


def _load_from_hub(source: str, configs: Mapping[str, str], accepted: str) -> HubData:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"There is no folder {source}, and reading it from the Hub takes the package datasets: "
            f"pip install datasets. {accepted}"
        ) from error
    name, _, asked = source.partition(":")
    config = asked or configs.get(name)
    try:
        try:
            data = load_dataset(name, config)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # The Hub's own copy in Parquet, with a folder for each configuration.
            data = load_dataset(name, data_dir=config, revision=_PARQUET)
    except Exception as error:
        raise DataError(
            f"There is no folder {source}, and the Hub did not give a data set of that name ({error}). {accepted}"
        ) from error
    return HubData(source, data)
