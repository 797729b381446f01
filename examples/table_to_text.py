"""Table-to-text as a training task: examples of E2E and WebNLG as rows with a prompt and a target, dev loss."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

IGNORED = -100
"""Label of a token that is not learned."""

SAMPLE = Path(__file__).with_name("restaurants.jsonl")
DATA_BESIDE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "data"
E2E_BESIDE_CHECKOUT = DATA_BESIDE_CHECKOUT / "e2e"
WEBNLG_BESIDE_CHECKOUT = DATA_BESIDE_CHECKOUT / "webnlg"
_E2E_FILES = {"train": "src1_train.txt", "dev": "src1_valid.txt", "test": "src1_test.txt"}
_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_HUB_COLUMNS = (("meaning_representation", "human_reference"), ("meaning_representation", "target"), ("mr", "ref"))


@dataclass(frozen=True)
class Example:
    """One table, written as `name : X | Type : Y`, and all texts that describe it."""

    table: str
    references: tuple[str, ...]

    @property
    def target(self) -> str:
        """The text to learn."""
        return self.references[0]


def load(source: str | None, split: str) -> tuple[list[Example], str]:
    """The examples of one split, one for each distinct table in order of first appearance, and where they came from.

    Args:
        source: A folder with the E2E files `src1_train.txt`, `src1_valid.txt`, `src1_test.txt` or with WebNLG's
            `train.json`, `dev.json`, `test.json`, or a data set id on the Hub. `None` takes the E2E folder beside the
            checkout if it is there, and the shipped sample otherwise.
        split: `train`, `dev` or `test`.
    """
    if source is None:
        source = str(E2E_BESIDE_CHECKOUT) if E2E_BESIDE_CHECKOUT.is_dir() else str(SAMPLE)
    if source == str(SAMPLE):
        pairs = _read_sample(split)
    elif (Path(source) / f"{split}.json").is_file():
        pairs = _read_webnlg(Path(source) / f"{split}.json")
    elif Path(source).is_dir():
        pairs = _read_e2e(Path(source) / _E2E_FILES[split])
    else:
        pairs = _read_hub(source, split)
    references: dict[str, list[str]] = {}
    for table, text in pairs:
        references.setdefault(table, []).append(text)
    return [Example(table, tuple(texts)) for table, texts in references.items()], source


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Some of the examples, always the same for the same seed."""
    return random.Random(seed).sample(list(examples), min(count, len(examples)))


def prompt_of(example: Example) -> str:
    """What the model reads."""
    return f"{example.table}\n"


def row_of(example: Example) -> dict[str, str]:
    """One row for a collator."""
    return {"prompt": prompt_of(example), "target": example.target}


@torch.no_grad()
def loss_per_token(
    model: torch.nn.Module,
    rows: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], Any],
    batch_size: int = 16,
) -> float:
    """Mean loss over all target tokens, in nats."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collate(list(rows[start : start + batch_size]))
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    model.train(training)
    return total / tokens


def _read_e2e(file: Path) -> list[tuple[str, str]]:
    if not file.is_file():
        raise SystemExit(f"{file} is missing. Give a folder with the E2E files {', '.join(_E2E_FILES.values())}.")
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("||") for line in lines if line.strip()]
    return [(table.strip(), text.strip()) for table, text in pairs]


def _read_webnlg(file: Path) -> list[tuple[str, str]]:
    """WebNLG's triples, written as `subject : property : object | ...`, with each text that is marked as good."""
    pairs = []
    for numbered in json.loads(file.read_text(encoding="utf-8"))["entries"]:
        for entry in numbered.values():
            triples = (
                f"{one['subject']} : {one['property']} : {one['object']}".replace("_", " ")
                for one in entry["modifiedtripleset"]
            )
            table = " | ".join(triples)
            texts = (text["lex"] for text in entry["lexicalisations"] if text["comment"] == "good")
            pairs += [(table, text) for text in texts]
    return pairs


def _read_sample(split: str) -> list[tuple[str, str]]:
    """The first three quarters of the shipped sample are for training, the rest for development and test."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    border = len(rows) * 3 // 4
    chosen = rows[:border] if split == "train" else rows[border:]
    return [(row["table"], row["text"]) for row in chosen]


def _read_hub(name: str, split: str) -> list[tuple[str, str]]:
    from datasets import load_dataset

    try:
        data = load_dataset(name, split=_HUB_SPLITS[split])
    except Exception as error:
        raise SystemExit(
            f"{name} is no folder here, and the Hub did not give a data set of that name ({error})."
        ) from error
    for table, text in _HUB_COLUMNS:
        if {table, text} <= set(data.column_names):
            return list(zip(data[table], data[text], strict=True))
    raise SystemExit(f"{name} has the columns {data.column_names}; expected one of {_HUB_COLUMNS}.")
