"""Targets on disk: the same as the teacher's, found again whatever the batch, and never half a store."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import random_model, tokens
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer

from peft_prefix import (
    ContextTeacher,
    IncompatibleBaseError,
    PrefixConfigError,
    PrefixFileError,
    PrefixInputError,
    StoredTeacher,
    teacher_store,
)
from peft_prefix.collator import PromptTargetCollator
from peft_prefix.teacher_store import STORE_FILE

Row = dict[str, Any]
FLOAT16 = 8e-3
"""Rounding of a logarithm of about -8."""


def context() -> torch.Tensor:
    return tokens(1, 20, seed=3)[0]


def rows(count: int = 9, seed: int = 5) -> list[Row]:
    """Rows of several lengths, for causal and other models."""
    result = []
    for index, ids in enumerate(tokens(count, 12, seed).tolist()):
        length = 6 + index % 5
        result.append({"input_ids": ids[:length], "labels": [-100] * 2 + ids[2:length]})
    return result


def teacher(family: str = "llama", seed: int = 0, **options: Any) -> tuple[ContextTeacher, PromptTargetCollator]:
    model = random_model(FAMILIES[family].build(seed=seed))
    return ContextTeacher(model, context(), **options), PromptTargetCollator(tiny_tokenizer(), model)


@pytest.mark.parametrize("top_k", [7, None])
@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
def test_what_is_stored_is_what_the_teacher_says(family: str, top_k: int | None, tmp_path: Path) -> None:
    live, collator = teacher(family, top_k=top_k)
    some = rows()
    stored = live.store(some, tmp_path, collator, batch_size=4)
    assert len(stored) == len(some)
    assert (stored.top_k, stored.context_hash, stored.context_tokens) == (top_k, live.context_hash, 20)
    for order in ([0], [8, 2, 5], list(range(9)), [3, 3]):
        batch = collator([some[index] for index in order])
        expected, actual = live.targets(batch), stored.targets(batch)
        assert (actual.ids is None) is (top_k is None)
        if expected.ids is not None:
            assert actual.ids is not None
            assert torch.equal(actual.ids, expected.ids)
        torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=FLOAT16)
        student = torch.randn(len(actual.log_probs), 200, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(actual.divergence(student), expected.divergence(student), rtol=0, atol=FLOAT16)
        torch.testing.assert_close(actual.log_probs.exp().sum(dim=-1), torch.ones(len(student)))
    (shard,) = tmp_path.glob("*.safetensors")
    found = {name: str(tensor.dtype) for name, tensor in load_file(shard).items()}
    assert found["log_probs"] == "torch.float16"
    assert found.get("ids") == (None if top_k is None else "torch.int32")


def test_a_row_is_found_in_any_padding(tmp_path: Path) -> None:
    live, collator = teacher()
    some = rows()
    stored = live.store(iter(some), tmp_path, collator, batch_size=2)
    expected = stored.targets(collator([some[4]])).log_probs
    ids = torch.tensor([some[4]["input_ids"]])
    left = torch.nn.functional.pad
    batch = dict(
        input_ids=left(ids, (5, 0)),
        attention_mask=left(torch.ones_like(ids), (5, 0)),
        labels=left(torch.tensor([some[4]["labels"]]), (5, 0), value=-100),
    )
    assert torch.equal(stored.targets(batch).log_probs, expected)


def test_a_row_without_labels_has_no_targets(tmp_path: Path) -> None:
    live, collator = teacher()
    silent = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    stored = live.store([*rows(2), silent], tmp_path, collator)
    assert len(stored.targets(collator([silent])).log_probs) == 0
    assert len(stored.targets(collator([rows(1)[0], silent])).log_probs) == 4


def test_a_row_that_was_not_stored_is_an_error(tmp_path: Path) -> None:
    live, collator = teacher()
    stored = live.store(rows(3), tmp_path, collator)
    with pytest.raises(PrefixInputError, match=r"Row 1 of this batch is not in .*3 rows.*Store the targets of all"):
        stored.targets(collator([rows(3)[0], rows(3, seed=6)[0]]))


def test_another_base_and_another_context_are_errors(tmp_path: Path) -> None:
    live, collator = teacher()
    stored = live.store(rows(3), tmp_path, collator)
    stored.require_base(live.model.base)
    stored.require_base(FAMILIES["llama"].build(dtype=torch.bfloat16))
    with pytest.raises(IncompatibleBaseError, match=r"has the same shape with other weights.*store the targets"):
        stored.require_base(FAMILIES["llama"].build(seed=1))
    with pytest.raises(IncompatibleBaseError, match="is of another kind"):
        stored.require_base(FAMILIES["t5"].build())
    assert len(StoredTeacher(tmp_path, context=context())) == 3
    with pytest.raises(PrefixInputError, match="about another context, of 20 tokens, than this one of 2"):
        StoredTeacher(tmp_path, context=[4, 5])


def test_a_store_is_replaced_only_on_demand(tmp_path: Path) -> None:
    live, collator = teacher()
    live.store(rows(3), tmp_path, collator)
    with pytest.raises(PrefixFileError, match=r"holds the targets of a teacher already.*overwrite=True"):
        live.store(rows(4), tmp_path, collator)
    assert len(live.store(rows(4), tmp_path, collator, overwrite=True)) == 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    for wrong in (0, True, 2.5):
        with pytest.raises(PrefixConfigError, match="batch_size must be a number of rows"):
            live.store(rows(4), tmp_path / "other", collator, batch_size=wrong)  # type: ignore[arg-type]
    with pytest.raises(PrefixInputError, match="no rows"):
        live.store([], tmp_path / "other", collator)


@pytest.mark.parametrize("there", [False, True])
def test_interrupted_writing_leaves_no_half_store(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, collator = teacher()
    if there:
        live.store(rows(3), tmp_path, collator)
    monkeypatch.setattr(teacher_store, "_SHARD_BYTES", 1)

    def breaking() -> Any:
        yield from rows(6)
        assert len(list(tmp_path.glob("*.safetensors"))) == 3 + there  # some are there already
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        live.store(breaking(), tmp_path, collator, batch_size=2, overwrite=there)
    assert len(list(tmp_path.glob("*.safetensors"))) == there
    if there:
        assert len(StoredTeacher(tmp_path)) == 3
        return
    with pytest.raises(PrefixFileError, match=r"holds no finished store.*written last"):
        StoredTeacher(tmp_path)


def test_a_process_that_dies_while_writing_leaves_no_half_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, collator = teacher()
    monkeypatch.setattr(teacher_store, "_SHARD_BYTES", 1)
    monkeypatch.setattr(teacher_store, "_clear", lambda *_, **__: None)  # a killed process clears nothing away

    def breaking() -> Any:
        yield from rows(6)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        live.store(breaking(), tmp_path, collator, batch_size=2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    with pytest.raises(PrefixFileError, match="holds no finished store"):
        StoredTeacher(tmp_path)
    monkeypatch.undo()
    assert len(live.store(rows(6), tmp_path, collator)) == 6
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # what lay about is gone


def _with_metadata(folder: Path, **changes: Any) -> None:
    file = folder / STORE_FILE
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in {**facts, **changes}.items() if value != "gone"}))


@pytest.mark.parametrize(
    "damage",
    [
        dict(top_k="7"),
        dict(top_k=8),
        dict(top_k=None),
        dict(vocabulary_size=-1),
        dict(shards=[]),
        dict(shards=["../other.safetensors"]),
        dict(shards=["targets-00000000-00000.safetensors"]),
        dict(base="gone"),
        dict(is_encoder_decoder=1),
        dict(format=2),
    ],
    ids=str,
)
def test_a_description_that_cannot_be_is_an_error(damage: dict[str, Any], tmp_path: Path) -> None:
    live, collator = teacher(top_k=7)
    live.store(rows(3), tmp_path, collator)
    _with_metadata(tmp_path, **damage)
    with pytest.raises(PrefixFileError, match=r"[Ss]tore the targets|write to"):
        StoredTeacher(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "no JSON", "dtype", "ends", "names", "tokens", "numbers"])
def test_damaged_files_are_errors(damage: str, tmp_path: Path) -> None:
    live, collator = teacher(top_k=7)
    live.store(rows(3), tmp_path, collator)
    (shard,) = tmp_path.glob("*.safetensors")
    tensors = load_file(shard)
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif damage == "no JSON":
        (tmp_path / STORE_FILE).write_text("{")
    else:
        changes = {
            "dtype": {"log_probs": tensors["log_probs"].float()},
            "ends": {"ends": tensors["ends"].flip(0)},
            "names": {"more": torch.zeros(1)},
            "tokens": {"ids": tensors["ids"] + 200},
            "numbers": {"log_probs": tensors["log_probs"] * float("nan")},
        }
        save_file({**tensors, **changes[damage]}, shard)
    with pytest.raises(PrefixFileError, match="damaged"):
        StoredTeacher(tmp_path).targets(collator(rows(3)))


def test_memory_does_not_grow_with_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of many megabytes is written and read; in memory are a few shards' worth at most."""
    shard = 2**20
    monkeypatch.setattr(teacher_store, "_SHARD_BYTES", shard)
    live, collator = teacher("gpt2", top_k=None)
    count, alive = 600, []
    many = [{"input_ids": ids, "labels": ids} for ids in tokens(count, 60).tolist()]
    original = teacher_store._Shard.taken

    def taken(self: Any) -> bytes:
        alive.append(self.bytes)
        return original(self)

    monkeypatch.setattr(teacher_store._Shard, "taken", taken)
    stored = live.store(many, tmp_path, collator, batch_size=8)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 12 * shard
    assert max(alive) < shard + 8 * 60 * 200 * 2
    assert len(alive) > 10
    tracemalloc.start()
    held: list[int] = []
    try:
        again = StoredTeacher(tmp_path)
        for start in range(0, count, 8):
            targets = again.targets(collator(many[start : start + 8]))
            held.append(targets.log_probs.nbytes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < shard  # the index, in Python's own memory
    assert max(held) < shard
    kept = [value for value in vars(again).values() if isinstance(value, torch.Tensor)]
    assert not kept
    assert len(stored) == len(again) == count
