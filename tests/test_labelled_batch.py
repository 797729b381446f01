"""Which labels of a batch count, and by what a row is known again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tokens

from peft_prefix import PrefixInputError
from peft_prefix.labelled_batch import LabelledBatch


def padded(text: torch.Tensor, labels: torch.Tensor, left: int, right: int) -> dict[str, torch.Tensor]:
    """One row of a causal model with padding on both sides."""
    pad = torch.nn.functional.pad
    mask = pad(torch.ones_like(text), (left, right))
    return dict(
        input_ids=pad(text, (left, right))[None],
        attention_mask=mask[None],
        labels=pad(labels, (left, right), value=-100)[None],
    )


def test_padding_changes_neither_what_counts_nor_the_key() -> None:
    text = tokens(1, 6)[0]
    labels = text.clone()
    labels[3] = -100
    alone = LabelledBatch.of({"input_ids": text[None], "labels": labels[None]}, False)
    assert alone.targets.tolist() == text[[1, 2, 4, 5]].tolist()  # nothing stands before the first token
    for left, right in ((0, 3), (4, 0), (2, 2)):
        other = LabelledBatch.of(padded(text, labels, left, right), False)
        assert other.keys() == alone.keys()
        assert other.targets.tolist() == alone.targets.tolist()
        assert other.counts.tolist() == [4]


@pytest.mark.parametrize("changed", ["token", "label", "fewer labels", "shorter", "order"])
def test_another_row_has_another_key(changed: str) -> None:
    text = tokens(1, 6)[0]
    labels = text.clone()
    labels[:2] = -100
    key = LabelledBatch.of({"input_ids": text[None], "labels": labels[None]}, False).keys()
    if changed == "token":
        text = text.index_fill(0, torch.tensor([0]), 2)
    elif changed == "label":
        labels = labels.index_fill(0, torch.tensor([4]), 2)
    elif changed == "fewer labels":
        labels = labels.index_fill(0, torch.tensor([2]), -100)
    elif changed == "shorter":
        text, labels = text[:-1], labels[:-1]
    else:
        text = text[[1, 0, 2, 3, 4, 5]]
    assert LabelledBatch.of({"input_ids": text[None], "labels": labels[None]}, False).keys() != key


def test_a_source_and_its_target_are_known_again_with_and_without_decoder_inputs() -> None:
    source, target = tokens(1, 7), tokens(1, 5, seed=2)
    batch: dict[str, Any] = {"input_ids": source, "labels": target}
    key = LabelledBatch.of(batch, True).keys()
    pad = torch.nn.functional.pad
    wide = {
        "input_ids": pad(source, (0, 2)),
        "attention_mask": pad(torch.ones_like(source), (0, 2)),
        "labels": pad(target, (0, 3), value=-100),
        "decoder_input_ids": pad(target, (1, 2), value=1),
    }
    assert LabelledBatch.of(wide, True).keys() == key
    assert LabelledBatch.of(wide, True).counts.tolist() == [5]
    other = {**wide, "decoder_input_ids": wide["decoder_input_ids"].flip(1)}
    with pytest.raises(PrefixInputError, match="not the labels moved by one place"):
        LabelledBatch.of(other, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "has no 'labels'"),
        ({"position_ids": torch.arange(4)[None]}, "has 'position_ids', which is not understood"),
        ({"labels": torch.ones(1, 3, dtype=torch.long)}, "do not belong to the same rows"),
        ({"decoder_input_ids": torch.ones(1, 4, dtype=torch.long)}, "reads no decoder_input_ids"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    ids = tokens(1, 4)
    with pytest.raises(PrefixInputError, match=message):
        LabelledBatch.of({"input_ids": ids, "labels": ids, **change}, False)
