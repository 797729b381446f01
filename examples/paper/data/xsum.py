"""XSum: articles of the BBC, each with a summary of one sentence. An article's lines are joined by blanks.

Which article belongs to which split is what the official split file says, where it lies beside the articles. Without
it, `subset.jsonl` is divided here, by a hash of the article: eight tenths train, one dev, one test. Scores on such a
division are not those of the official test. With the file, articles that it does not list are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from .item import Item
from .sources import DataError, HubData, json_of, lines_of, missing, own_split, records_of, references_of

SPLIT_FILE = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
LAYOUTS = (
    f"subset.jsonl (id, document, summary), with or without {SPLIT_FILE}, or the official bbc-summary-data/*.summary "
    f"with {SPLIT_FILE}, or train, val and test, each as .source and .target with one article and summary a line"
)
MERGED = True
CONFIGS: Mapping[str, str] = {}
_LINE_FILES = {"train": "train", "dev": "val", "test": "test"}
_OFFICIAL_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
# what buttons for sharing left in the official articles
_BUTTONS = (
    *("Share this with", "Email", "Facebook", "Messenger", "Twitter", "Pinterest", "WhatsApp", "LinkedIn", "Linkedin"),
    *("Copy this link", "These are external links and will open in a new window"),
)


def from_folder(folder: Path, split: str) -> Iterator[Item]:
    """One of the layouts, whichever is there."""
    ids = _official_ids(folder / SPLIT_FILE, split)
    if (folder / "subset.jsonl").is_file():
        return _read_subset(folder / "subset.jsonl", split, ids)
    if (folder / "bbc-summary-data").is_dir():
        if ids is None:
            raise missing(folder, f"{SPLIT_FILE}, which says what bbc-summary-data is used for", LAYOUTS)
        return (_read_summary(folder / "bbc-summary-data" / f"{one}.summary") for one in ids)
    source = folder / f"{_LINE_FILES[split]}.source"
    if source.is_file():
        return _read_lines(source)
    raise missing(folder, f"subset.jsonl, bbc-summary-data or {source.name}", LAYOUTS)


def from_hub(data: HubData, split: str) -> Iterator[Item]:
    """`xsum`, `EdinburghNLP/xsum` or GEM's variant."""
    columns = set(data.columns(split))
    for _, row in data.rows(split):
        if {"document", "summary"} <= columns:
            yield _item(row["document"], (row["summary"],))
        elif {"document", "target"} <= columns:
            yield _item(row["document"], references_of(row))
        else:
            raise data.strange_columns(split, ["document and summary", "document and target"])


def _item(document: str, references: tuple[str, ...]) -> Item:
    return Item(" ".join(document.split("\n")), references)


def _official_ids(file: Path, split: str) -> list[str] | None:
    if not file.is_file():
        return None
    content = json_of(file)
    name = _OFFICIAL_SPLITS[split]
    if not isinstance(content, dict) or name not in content:
        raise DataError(f"{file}: expected an object with a list of ids under {name}.")
    return list(content[name])


def _read_subset(file: Path, split: str, ids: list[str] | None) -> Iterator[Item]:
    records = records_of(file, {"document": str, "summary": str})
    if ids is None:
        own = [record for record in records if own_split(record["document"]) == split]
    else:
        listed = set(ids)
        own = [record for record in records if record.get("id") in listed]
        if not own:
            raise DataError(
                f"{file} has no article that {SPLIT_FILE} lists for {split}. Without that file beside it, its articles "
                f"are divided into splits by a hash."
            )
    return (_item(record["document"], (record["summary"],)) for record in own)


def _read_summary(file: Path) -> Item:
    if not file.is_file():
        raise missing(file.parent, f"{file.name}, which {SPLIT_FILE} lists", LAYOUTS)
    lines = [line for _, line in lines_of(file) if line.strip() not in _BUTTONS]
    # [SN]URL[SN] ... [SN]TITLE[SN] ... [SN]FIRST-SENTENCE[SN] ... [SN]RESTBODY[SN] ...
    marked = "\n".join(lines).split("[SN]")
    parts = dict(zip(marked[1::2], marked[2::2], strict=False))
    if not {"FIRST-SENTENCE", "RESTBODY"} <= parts.keys():
        raise DataError(f"{file}: expected the parts [SN]FIRST-SENTENCE[SN] and [SN]RESTBODY[SN].")
    return _item(parts["RESTBODY"].strip(), (parts["FIRST-SENTENCE"],))


def _read_lines(source: Path) -> Iterator[Item]:
    target = source.with_suffix(".target")
    if not target.is_file():
        raise missing(source.parent, target.name, LAYOUTS)
    documents = source.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    summaries = target.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(documents) != len(summaries):
        raise DataError(f"{source} has {len(documents)} lines, {target} {len(summaries)}; each article needs one.")
    return (_item(one, (summary,)) for one, summary in zip(documents, summaries, strict=True))
