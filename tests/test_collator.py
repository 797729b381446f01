from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import ENCODER_DECODERS, FAMILIES
from helpers import random_model
from tiny_tokenizer import tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from peft_prefix import PrefixConfigError, PrefixInputError, PrefixModel, PrefixWarning, PromptTargetCollator

ROWS = [
    {"prompt": "name : Blue Spice | food : Thai", "target": "Blue Spice serves Thai food ."},
    {"prompt": "name : Punter", "target": "the Punter is a pub in the city centre ."},
    {"prompt": "Golden Palace", "target": "it is cheap ."},
] * 2
END, PAD, START = 2, 0, 1


def model_of(family: str = "llama") -> PrefixModel:
    return random_model(FAMILIES[family].build())


def collator_of(family: str = "llama", tokenizer: Any = None, **settings: Any) -> PromptTargetCollator:
    return PromptTargetCollator(tokenizer or tiny_tokenizer(), model_of(family), **settings)


def ids_of(text: str) -> list[int]:
    """The words' ids, independent of how a tokenizer is called."""
    vocabulary = tiny_tokenizer().get_vocab()
    return [vocabulary[word] for word in text.split()]


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("adds", ["", "bos", "eos", "bos eos"])
def test_a_causal_row_is_the_prompt_and_the_target_with_one_start_and_one_end(adds: str) -> None:
    encode = collator_of(tokenizer=tiny_tokenizer(adds=adds)).encode
    start = [START] if "bos" in adds else []
    prompt, target = ids_of(ROWS[0]["prompt"]), [*ids_of(ROWS[0]["target"]), END]
    expected = {"input_ids": [*start, *prompt, *target], "labels": [-100] * len(start + prompt) + target}
    assert encode(ROWS[0]) == expected
    assert encode({"prompt": f"<s> {ROWS[0]['prompt']}", "target": f"{ROWS[0]['target']} </s>"}) == {
        "input_ids": [START, *prompt, *target],
        "labels": [-100] * (1 + len(prompt)) + target,
    }


@pytest.mark.parametrize("adds", ["", "eos", "bos eos"])
def test_an_encoder_decoder_gets_a_source_and_labels_with_the_tokenizers_own_special_tokens(adds: str) -> None:
    encoded = collator_of("t5", tiny_tokenizer(adds=adds)).encode(ROWS[0])
    start, end = [START] if "bos" in adds else [], [END] if "eos" in adds else []
    assert encoded["input_ids"] == [*start, *ids_of(ROWS[0]["prompt"]), *end]
    assert encoded["labels"] == [*start, *ids_of(ROWS[0]["target"]), END]


def test_a_targets_tokens_do_not_depend_on_the_prompt() -> None:
    encode = collator_of().encode
    targets = {
        tuple(label for label in encode({"prompt": prompt, "target": "it is cheap ."})["labels"] if label != -100)
        for prompt in ("the", "the ", "", "food : Thai\n")
    }
    assert targets == {(*ids_of("it is cheap ."), END)}


def test_without_a_prompt_a_text_begins_where_generation_would_begin() -> None:
    encoded = collator_of().encode({"prompt": "", "target": "it is cheap ."})
    assert encoded["input_ids"] == [START, *ids_of("it is cheap ."), END]
    assert encoded["labels"][0] == -100
    bare = collator_of(tokenizer=tiny_tokenizer(bos_token=None)).encode({"prompt": "", "target": "it is cheap ."})
    assert bare["input_ids"] == [*ids_of("it is cheap ."), END]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_messages_go_through_the_chat_template_which_opens_the_answer(family: str) -> None:
    messages = [{"role": "user", "content": "name : Punter"}]
    encoded = collator_of(family, tiny_tokenizer(adds="bos eos")).encode({"prompt": messages, "target": "a pub"})
    prompt = ids_of("<user> name : Punter <end> <assistant>")
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert encoded["input_ids"].count(START) == 0
    if family == "llama":
        assert encoded["input_ids"][len(prompt) :] == [*ids_of("a pub"), END]
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(PrefixInputError, match="no chat template"):
        collator_of(family, bare).encode({"prompt": messages, "target": "a pub"})


def test_token_ids_are_taken_as_they_are() -> None:
    collator = collator_of(tokenizer=tiny_tokenizer(adds="bos"), prompt_field="question", target_field="answer")
    assert collator.encode({"question": [5, 6], "answer": [7]}) == {
        "input_ids": [5, 6, 7, END],
        "labels": [-100, -100, 7, END],
    }
    assert collator_of(append_end=False).encode({"prompt": [5], "target": [7]})["input_ids"] == [5, 7]


@pytest.mark.parametrize("bad", [None, 3, ["text"], [1.5], {"role": "user"}])
def test_other_things_are_no_prompts_and_no_targets(bad: object) -> None:
    with pytest.raises(PrefixInputError, match="'prompt' must hold a text, a list of messages"):
        collator_of().encode({"prompt": bad, "target": "it"})
    with pytest.raises(PrefixInputError, match="'target' must hold a text or a list of token ids"):
        collator_of().encode({"prompt": "it", "target": bad})


def test_settings_that_cannot_be_are_errors() -> None:
    with pytest.raises(PrefixConfigError, match="truncation_side"):
        collator_of(truncation_side="middle")
    with pytest.raises(PrefixConfigError, match="max_length must leave room"):
        collator_of(max_length=1)
    with pytest.raises(PrefixConfigError, match="no end token"):
        collator_of(tokenizer=tiny_tokenizer(eos_token=None))
    assert collator_of(tokenizer=tiny_tokenizer(eos_token=None), append_end=False).encode(ROWS[2])["labels"][-1] != END


# ---------------------------------------------------------------------- lengths


@pytest.mark.parametrize(("side", "kept"), [("left", "food : Thai"), ("right", "name : Blue")])
def test_a_row_that_is_too_long_loses_a_part_of_its_prompt(side: Any, kept: str) -> None:
    tokenizer, target = tiny_tokenizer(adds="bos"), [*ids_of(ROWS[0]["target"]), END]
    collator = collator_of(tokenizer=tokenizer, max_length=1 + 3 + len(target), truncation_side=side)
    assert collator.encode(ROWS[0])["input_ids"] == [START, *ids_of(kept), *target]
    exact = collator_of(tokenizer=tokenizer, max_length=1 + 8 + len(target), truncation_side=side)
    assert exact.encode(ROWS[0]) == collator_of(tokenizer=tokenizer).encode(ROWS[0])


def test_a_source_that_is_too_long_keeps_its_special_tokens() -> None:
    collator = collator_of("t5", tiny_tokenizer(adds="bos eos"), max_length=8)
    encoded = collator.encode({"prompt": ROWS[0]["prompt"], "target": "it is cheap ."})
    assert encoded["input_ids"] == [START, *ids_of("Blue Spice | food : Thai"), END]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_target_that_is_too_long_is_cut_with_one_warning(family: str) -> None:
    collator = collator_of(family, max_length=5)
    long = {"prompt": "name", "target": "the Punter is a pub in the city centre ."}
    with pytest.warns(PrefixWarning, match="11 tokens, more than max_length=5 .* Raise max_length") as caught:
        batch = collator([long, long, {"prompt": "name", "target": "it is"}])
    assert len(caught) == 1
    assert batch["labels"][0].tolist() == ids_of("the Punter is a pub")
    assert batch["labels"][2][batch["labels"][2] != -100].tolist() == [*ids_of("it is"), END]
    if family == "llama":
        assert batch["input_ids"][0].tolist() == ids_of("the Punter is a pub")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collator([long])


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("pad_token", ["<pad>", None])
def test_a_batch_is_padded_on_the_right_and_padding_is_hidden(multiple: int | None, pad_token: str | None) -> None:
    tokenizer = tiny_tokenizer(pad_token=pad_token)
    collator = collator_of(tokenizer=tokenizer, pad_to_multiple_of=multiple)
    batch = collator(ROWS[:3])
    encoded = [collator.encode(row) for row in ROWS[:3]]
    longest = max(len(row["input_ids"]) for row in encoded)
    assert batch["input_ids"].shape == (3, longest if multiple is None else -(-longest // 8) * 8)
    for index, row in enumerate(encoded):
        count = len(row["input_ids"])
        assert batch["input_ids"][index, :count].tolist() == row["input_ids"]
        assert batch["labels"][index, :count].tolist() == row["labels"]
        assert batch["attention_mask"][index].sum() == count
        assert (batch["input_ids"][index, count:] == (END if pad_token is None else PAD)).all()
        assert (batch["labels"][index, count:] == -100).all()
        assert batch["labels"][index, count - 1] == END
    assert tokenizer.pad_token == pad_token


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoders_batch_is_that_of_the_collator_of_transformers(family: str) -> None:
    model, tokenizer = model_of(family), tiny_tokenizer(adds="eos")
    collator = PromptTargetCollator(tokenizer, model)
    expected = DataCollatorForSeq2Seq(tokenizer, model=model)([dict(collator.encode(row)) for row in ROWS[:3]])
    batch = collator(ROWS[:3])
    assert set(batch) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


@pytest.mark.parametrize("pad_token", ["<pad>", None])
def test_the_loss_of_a_batch_is_that_of_its_rows_alone(pad_token: str | None) -> None:
    model = model_of()
    collator = PromptTargetCollator(tiny_tokenizer(pad_token=pad_token), model)
    total, count = 0.0, 0
    for row in ROWS[:3]:
        prompt, target = ids_of(row["prompt"]), [*ids_of(row["target"]), END]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
        count += len(target)
    with torch.no_grad():
        assert float(model(**collator(ROWS[:3])).loss) == pytest.approx(total / count, rel=1e-5)


def test_rows_of_token_ids_and_labels_are_padded_as_they_are() -> None:
    batch = collator_of()([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": torch.tensor([7]), "labels": [7]}])
    assert batch["input_ids"].tolist() == [[5, 6], [7, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    given = [{"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [0, 1]}]
    assert collator_of()(given)["attention_mask"].tolist() == [[0, 1]]
    with pytest.raises(PrefixInputError, match="2 input_ids and 1 labels"):
        collator_of()([{"input_ids": [5, 6], "labels": [5]}])
    with pytest.raises(PrefixInputError, match="must have 'prompt' and 'target'"):
        collator_of()([{"input_ids": [5, 6]}])


def test_workers_give_the_same_batches() -> None:
    for family in ("llama", "t5"):
        collator = pickle.loads(pickle.dumps(collator_of(family)))
        loader = DataLoader(ROWS, batch_size=3, collate_fn=collator, num_workers=1)
        for batch, start in zip(loader, (0, 3), strict=True):
            expected = collator(ROWS[start : start + 3])
            for name, tensor in expected.items():
                assert torch.equal(batch[name], tensor)


# ---------------------------------------------------------------------- trainers


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> Any:
    settings = dict(max_steps=12, per_device_train_batch_size=3, learning_rate=3e-2, save_strategy="no", seed=3)
    quiet = dict(report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False)
    return kind(str(folder), **{**settings, **quiet, **more})


def losses_before_and_after(trainer: Trainer) -> tuple[float, float]:
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("way", ["encoded", "kept columns"])
def test_the_trainer_trains_on_a_dataset_of_texts(way: str, workers: int, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    model = model_of()
    collator = PromptTargetCollator(tiny_tokenizer(), model)
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path, dataloader_num_workers=workers, remove_unused_columns=way == "encoded", save_strategy="steps"
        ),
        train_dataset=data.map(collator.encode) if way == "encoded" else data,
        eval_dataset=data.map(collator.encode) if way == "encoded" else data,
        data_collator=collator,
    )
    with torch.no_grad():
        expected = float(model.eval()(**collator(ROWS)).loss)
    before, after = losses_before_and_after(trainer)
    assert before == pytest.approx(expected, rel=1e-4)
    assert after < before - 0.1
    assert (tmp_path / "checkpoint-12" / "prefix.safetensors").is_file()


def test_texts_that_the_trainer_has_taken_away_are_an_error_that_says_so(tmp_path: Path) -> None:
    model = model_of()
    collator = PromptTargetCollator(tiny_tokenizer(), model)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=ROWS, data_collator=collator)
    with pytest.raises(PrefixInputError, match=r"has nothing.*dataset.map\(collator.encode\).*remove_unused_columns"):
        trainer.train()


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_seq2seq_trainer_trains_and_generates(family: str, smoothing: float, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    model, tokenizer = model_of(family), tiny_tokenizer(adds="eos")
    collator = PromptTargetCollator(tokenizer, model)
    data = datasets.Dataset.from_list(ROWS).map(collator.encode)
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments(
            tmp_path,
            Seq2SeqTrainingArguments,
            learning_rate=1e-1,
            predict_with_generate=True,
            generation_max_length=6,
            label_smoothing_factor=smoothing,
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator,
    )
    before, after = losses_before_and_after(trainer)
    assert after < before - 0.1
    texts = trainer.predict(data).predictions
    batch = collator(ROWS)
    ids = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=6)
    width = min(ids.shape[1], texts.shape[1])
    assert torch.equal(torch.tensor(texts)[:, :width], ids[:, :width])
    assert family in ENCODER_DECODERS


def test_a_tokenizer_that_changes_its_special_tokens_is_followed() -> None:
    tokenizer = tiny_tokenizer(adds="bos")
    collator = collator_of("bart", tokenizer)
    assert collator.encode(ROWS[0])["input_ids"][0] == START
    tokenizer._tokenizer.post_processor = tiny_tokenizer(adds="eos")._tokenizer.post_processor
    assert collator.encode(ROWS[0])["input_ids"] == tokenizer(ROWS[0]["prompt"])["input_ids"]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_ids_that_are_cut_keep_their_start_token(kind: Any) -> None:
    row = {"prompt": kind([START, 5, 6, 7, 8]), "target": kind([9, 10])}
    encoded = collator_of(max_length=6).encode(row)
    assert encoded["input_ids"] == [START, 7, 8, 9, 10, END]
    assert encoded["labels"] == [-100, -100, -100, 9, 10, END]
