"""Carrying the names of prefixes from the rows of a data set to the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import PrefixInputError

COLUMN = "prefix_names"
"""The column with the name of each row's prefix. The `Trainer` keeps it, since the model's forward has it, too."""


class PrefixNamesCollator:
    """Lets a collator that knows tensors only make batches of rows that name their prefixes.

    A row's column `prefix_names` holds the name of its prefix, or `None` for a row without one. The batch gets the list
    of them, as `PrefixModel.forward` and `generate` take it. (`PromptTargetCollator` does that by itself; the stock
    collators drop strings or fail.)

    Args:
        collator: Makes batches of the other columns.

    Example:
        >>> from transformers import DataCollatorForSeq2Seq, Trainer
        >>> collator = PrefixNamesCollator(DataCollatorForSeq2Seq(tokenizer))  # doctest: +SKIP
        >>> Trainer(model, train_dataset=data, data_collator=collator)  # doctest: +SKIP
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch.

        Raises:
            PrefixInputError: Only some of the rows name their prefix.
        """
        batch = self.collator([{key: value for key, value in row.items() if key != COLUMN} for row in rows])
        return {**batch, **names_of(rows)}


def names_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """The argument `prefix_names` for a batch of rows; nothing where they name no prefixes.

    Raises:
        PrefixInputError: Only some of the rows name their prefix.
    """
    named = [COLUMN in row for row in rows]
    if not any(named):
        return {}
    if not all(named):
        raise PrefixInputError(
            f"{sum(named)} of {len(rows)} rows have a column {COLUMN!r}. Give it to all, with None for rows without a "
            "prefix."
        )
    return {COLUMN: [row[COLUMN] for row in rows]}
