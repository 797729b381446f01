"""The metrics of a run's texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paper.data import Item
from paper.files import write_json, write_lines
from paper.metrics import score_dataset
from paper.metrics.evaluations import EVALUATIONS


def score_texts(
    dataset: str, items: Sequence[Item], predictions: Sequence[str], folder: Path, also: Sequence[str] = ()
) -> None:
    """Write `predictions.txt` and `metrics.json`, for all inputs and for those of seen and unseen categories apart.

    Args:
        dataset: Name of the data set.
        items: Its inputs with their references.
        predictions: A text for each.
        folder: Where the files are written.
        also: Metrics beside the usual ones.
    """
    write_lines(folder / "predictions.txt", predictions)
    parts = {"all": list(range(len(items)))}
    if not all(item.seen for item in items):
        for part, is_seen in (("seen", True), ("unseen", False)):
            parts[part] = [index for index, item in enumerate(items) if item.seen == is_seen]
    metrics = {}
    names = (*EVALUATIONS[dataset].metrics, *also)
    for part, chosen in parts.items():
        if chosen:
            texts, references = [predictions[index] for index in chosen], [items[index].references for index in chosen]
            metrics[part] = score_dataset(dataset, texts, references, names)
    write_json(folder / "metrics.json", {"metrics": metrics, "inputs_scored": len(items)})
