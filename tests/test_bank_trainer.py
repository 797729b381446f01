"""Training several prefixes in the same batches, with the stock `Trainer` and with the one that keeps them apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, random_model, source_of, tokens
from tiny_tokenizer import tiny_tokenizer
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from peft_prefix import (
    PrefixBankTrainer,
    PrefixConfig,
    PrefixConfigError,
    PrefixInputError,
    PrefixModel,
    PrefixNamesCollator,
    PromptTargetCollator,
)

Row = dict[str, Any]
LENGTH = 10


def bank(family: str = "llama", lengths: tuple[int, int] = (4, 6), **config: Any) -> PrefixModel:
    """Two prefixes to be trained, and none active."""
    model = random_model(FAMILIES[family].build(), p=2)
    for seed, (name, p) in enumerate(zip("ab", lengths, strict=True)):
        model.add_prefix(
            name, PrefixConfig(num_virtual_tokens=p, init="normal", init_std=0.5, init_seed=seed, **config)
        )
    model.remove_prefix("default")
    model.set_prefix(None)
    return model


def rows_of(model: PrefixModel, names: list[str | None], seed: int = 5) -> list[Row]:
    """Random texts, some tokens of each with labels, of a different number for each prefix."""
    ids, rows = tokens(len(names), LENGTH, seed), []
    for index, name in enumerate(names):
        labels = ids[index].clone()
        labels[: 2 if name == "a" else 5] = -100
        row: Row = {"input_ids": ids[index].tolist(), "labels": labels.tolist(), "prefix_names": name}
        if model.config.is_encoder_decoder:
            row["input_ids"] = tokens(len(names), LENGTH, seed + 1)[index].tolist()
        rows.append(row)
    return rows


class InOrder:
    """A trainer that takes rows in their order."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class StockInOrder(InOrder, Trainer):
    pass


class BankInOrder(InOrder, PrefixBankTrainer):
    pass


def arguments_for(folder: Path, batch: int = 4, **more: Any) -> TrainingArguments:
    """Two epochs, with a norm that is always clipped."""
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        num_train_epochs=2,
        learning_rate=3e-2,
        max_grad_norm=0.05,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return TrainingArguments(**{**settings, **more})  # type: ignore[arg-type]


def train(
    kind: type[Trainer], model: PrefixModel, rows: list[Row], folder: Path, batch: int = 4, **arguments: Any
) -> tuple[Trainer, dict[str, dict[str, torch.Tensor]]]:
    """What both prefixes become in two epochs."""
    trainer = kind(
        model=model,
        args=arguments_for(folder, batch, **arguments),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=PrefixNamesCollator(default_data_collator),  # type: ignore[arg-type]
    )
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer, {name: model.prefix_state_dict(name) for name in ("a", "b")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_column_names_prefixes_in_the_stock_trainer(tmp_path: Path) -> None:
    model = bank()
    before = {name: model.prefix_state_dict(name) for name in ("a", "b")}
    rows = rows_of(model, ["a", "b", "b", "a"])
    twin = copy.deepcopy(model)
    _, trained = train(StockInOrder, model, rows, tmp_path, num_train_epochs=1, lr_scheduler_type="constant")
    assert not same(trained["a"], before["a"])
    assert not same(trained["b"], before["b"])
    batch = PrefixNamesCollator(default_data_collator)(rows)
    assert batch["prefix_names"] == ["a", "b", "b", "a"]
    twin.train()(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.prefixes.parameters(), 0.05)
    torch.optim.AdamW(twin.prefixes.parameters(), lr=3e-2, weight_decay=0.0).step()
    for name in ("a", "b"):
        for key, tensor in twin.prefix_state_dict(name).items():
            torch.testing.assert_close(tensor, trained[name][key], rtol=0, atol=1e-5)


def test_a_collator_that_drops_names_is_noticed(tmp_path: Path) -> None:
    model = bank()
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    rows: Any = rows_of(model, ["a", "b"])
    with pytest.raises(PrefixConfigError, match=r"No prefix is active.*prefix_names"):
        Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator).train()
    with pytest.raises(PrefixInputError, match=r"has no 'prefix_names'.*PrefixNamesCollator"):
        PrefixBankTrainer(model, arguments, train_dataset=rows, data_collator=default_data_collator).train()


def test_collators_carry_names() -> None:
    model, tokenizer = bank(), tiny_tokenizer()
    collator = PromptTargetCollator(tokenizer, model)
    rows = [
        {"prompt": "name : the ", "target": "Blue Spice", "prefix_names": "a"},
        {"prompt": "name : ", "target": "pub", "prefix_names": None},
    ]
    encoded = [{**collator.encode(row), "prefix_names": row["prefix_names"]} for row in rows]
    assert collator(rows)["prefix_names"] == ["a", None]
    assert collator(encoded)["prefix_names"] == ["a", None]
    assert "prefix_names" not in collator([{key: row[key] for key in ("prompt", "target")} for row in rows])  # type: ignore[misc]
    padded = PrefixNamesCollator(DataCollatorForSeq2Seq(tokenizer))(encoded)
    assert padded["prefix_names"] == ["a", None]
    assert padded["input_ids"].shape == padded["labels"].shape
    for broken in (collator, PrefixNamesCollator(DataCollatorForSeq2Seq(tokenizer))):
        with pytest.raises(PrefixInputError, match="1 of 2 rows have a column 'prefix_names'"):
            broken([encoded[0], {key: value for key, value in encoded[1].items() if key != "prefix_names"}])


OTHERS: dict[str, Callable[[Row], Row]] = {
    "without a prefix": lambda row: {**row, "prefix_names": None},
    "other texts": lambda row: {**row, "input_ids": row["input_ids"][::-1], "labels": [*row["labels"][:5], *([7] * 5)]},
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("form", ["none", "mlp"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_prefix_is_the_same_bit_for_bit_whatever_the_others_learn(
    family: str, form: str, accumulation: int, other: str, tmp_path: Path
) -> None:
    lengths = (4, 4) if other == "without a prefix" else (4, 6)  # the longest one is a part of a batch's shape
    model = bank(family, lengths, reparameterization=form, mlp_hidden_size=8)
    rows = rows_of(model, ["a", "b", "b", "a", "b", "b", "b", "b", "b", "a", "a", "b"])
    changed = [OTHERS[other](row) if row["prefix_names"] == "b" else row for row in rows]
    options = dict(gradient_accumulation_steps=accumulation, num_train_epochs=4)
    one, two = (train(BankInOrder, copy.deepcopy(model), own, tmp_path, **options)[1] for own in (rows, changed))
    assert same(one["a"], two["a"])
    assert not same(one["b"], two["b"])
    if other == "other texts":  # so it is the trainer that keeps them apart
        one, two = (train(StockInOrder, copy.deepcopy(model), own, tmp_path, **options)[1] for own in (rows, changed))
        assert not same(one["a"], two["a"])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", ["llama", "bart", "t5"])
def test_a_prefix_becomes_what_it_becomes_alone(family: str, accumulation: int, tmp_path: Path) -> None:
    model = bank(family)
    rows = rows_of(model, ["a", "b", "b", "a"] * 4)
    options: dict[str, Any] = dict(gradient_accumulation_steps=accumulation, lr_scheduler_type="constant")
    _, together = train(BankInOrder, copy.deepcopy(model), rows, tmp_path, **options)
    for name in ("a", "b"):
        own = [row for row in rows if row["prefix_names"] == name]
        _, alone = train(BankInOrder, copy.deepcopy(model), own, tmp_path, batch=2, **options)
        one = copy.deepcopy(model)
        one.set_prefix(name)
        plain = [{key: value for key, value in row.items() if key != "prefix_names"} for row in own]
        _, stock = train(StockInOrder, one, plain, tmp_path, batch=2, **options)
        for key, tensor in together[name].items():
            torch.testing.assert_close(tensor, alone[name][key], rtol=0, atol=2e-3)
            torch.testing.assert_close(tensor, stock[name][key], rtol=0, atol=2e-3)
            moved = (tensor - model.prefix_state_dict(name)[key]).abs().max()
            assert moved > 0.02


@pytest.mark.parametrize("batch", [4, 2])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_logged_is_the_mean_over_tokens_and_the_norm_of_a_prefix(
    family: str, batch: int, tmp_path: Path
) -> None:
    model = bank(family)
    rows = rows_of(model, ["a", "b", "a", "b"])
    whole = PrefixNamesCollator(default_data_collator)(rows)
    with torch.no_grad():
        loss = float(model.train()(**whole).loss)
    norms = []
    for name in ("a", "b"):
        one = copy.deepcopy(model).train()
        own = [row for row in rows if row["prefix_names"] == name]
        one(**PrefixNamesCollator(default_data_collator)(own)).loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in one.prefixes[name].parameters()])))
    trainer, _ = train(
        BankInOrder, model, rows, tmp_path, batch=batch, num_train_epochs=1, gradient_accumulation_steps=4 // batch
    )
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss, abs=1e-4)
    assert logged["grad_norm"] == pytest.approx(max(norms), rel=1e-3)
    evaluated = trainer.evaluate(rows)["eval_loss"]  # type: ignore[arg-type]
    with torch.no_grad():
        assert evaluated == pytest.approx(
            float(model.eval()(**PrefixNamesCollator(default_data_collator)(rows)).loss), abs=1e-4
        )


def test_rows_that_train_nothing_are_no_obstacle(tmp_path: Path) -> None:
    model = bank()
    rows = rows_of(model, ["a", None, "a", "a", None, None, None, None])
    model.prefixes["b"].requires_grad_(False)
    before = model.prefix_state_dict("b")
    _, trained = train(BankInOrder, model, rows, tmp_path)
    assert same(trained["b"], before)


def test_it_wants_a_bank(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(PrefixConfigError, match="trains a PrefixModel"):
        PrefixBankTrainer(FAMILIES["llama"].build(), arguments)
    settings = arguments.max_grad_norm
    PrefixBankTrainer(bank(), arguments)
    assert arguments.max_grad_norm == settings


def test_an_adapter_that_learns_from_all_rows_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = FAMILIES["llama"].build()
    base.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = random_model(base)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(PrefixConfigError, match="does not train adapters in the base"):
        PrefixBankTrainer(model, arguments)
    for name, parameter in base.named_parameters():
        if "lora" in name:
            parameter.requires_grad_(False)
    PrefixBankTrainer(model, arguments)


def test_an_optimizer_of_ones_own_is_separated_too(tmp_path: Path) -> None:
    model = bank()
    rows = rows_of(model, ["a", "b", "b", "a"])
    _, expected = train(BankInOrder, copy.deepcopy(model), rows, tmp_path, optim="sgd", lr_scheduler_type="constant")
    optimizer = torch.optim.SGD(model.prefixes.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = BankInOrder(
        model=model,
        args=arguments_for(tmp_path),
        train_dataset=rows,
        data_collator=PrefixNamesCollator(default_data_collator),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    for name in ("a", "b"):
        assert same(model.prefix_state_dict(name), expected[name])


def test_a_step_that_was_skipped_or_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    model = bank()
    rows = rows_of(model, ["a", "b", "b", "a"])
    _, expected = train(BankInOrder, copy.deepcopy(model), rows, tmp_path, num_train_epochs=1)
    broken = [{**row, "prefix_names": "typo"} if place == 3 else row for place, row in enumerate(rows)]
    trainer = BankInOrder(
        model=model,
        args=arguments_for(tmp_path, num_train_epochs=1),
        train_dataset=broken,
        data_collator=PrefixNamesCollator(default_data_collator),
    )
    with pytest.raises(PrefixConfigError, match="no prefix 'typo'"):
        trainer.train()
    trainer._targets["a"] += 100  # as a step counts that a gradient scaler has skipped
    trainer.train_dataset = rows
    trainer.train()
    for name in ("a", "b"):
        assert same(model.prefix_state_dict(name), expected[name])


def test_a_label_on_the_first_token_counts_for_nobody(tmp_path: Path) -> None:
    model = bank("qwen2_5_vl")
    rows = rows_of(model, ["a", "b", "b", "a"])
    changed = copy.deepcopy(rows)
    changed[1]["labels"][0] = 7  # no causal model learns it
    one, two = (train(BankInOrder, copy.deepcopy(model), own, tmp_path)[1] for own in (rows, changed))
    assert same(one["a"], two["a"])
    assert same(one["b"], two["b"])


def test_what_cannot_be_kept_apart_is_refused(tmp_path: Path) -> None:
    def arguments(**more: Any) -> TrainingArguments:
        return TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **more)

    with pytest.raises(PrefixConfigError, match="does not smooth labels for BartForConditionalGeneration"):
        PrefixBankTrainer(bank("bart"), arguments(label_smoothing_factor=0.1))
    PrefixBankTrainer(bank("llama"), arguments(label_smoothing_factor=0.1))
    with pytest.raises(PrefixConfigError, match="leave compute_loss_func out"):
        PrefixBankTrainer(bank(), arguments(), compute_loss_func=lambda *_, **__: None)
    model = bank("mixtral")
    PrefixBankTrainer(model, arguments())
    model.base.config.output_router_logits = True
    with pytest.raises(PrefixConfigError, match="does not balance experts"):
        PrefixBankTrainer(model, arguments())
    config = LlamaConfig(**FAMILIES["llama"].kwargs)  # type: ignore[arg-type]
    with pytest.raises(PrefixConfigError, match="is for language models"):
        PrefixBankTrainer(random_model(LlamaForTokenClassification(config)), arguments())


@pytest.mark.parametrize("kind", [StockInOrder, BankInOrder])
def test_a_mixed_training_is_saved_and_resumed(kind: type[Trainer], tmp_path: Path) -> None:
    model = bank(reparameterization="mlp", mlp_hidden_size=8)
    rows = rows_of(model, ["a", "b", "b", "a"] * 4)
    options: dict[str, Any] = dict(save_strategy="steps", save_steps=3, seed=2)
    trainer, expected = train(kind, copy.deepcopy(model), rows, tmp_path / "one", **options)
    folder = tmp_path / "one" / "checkpoint-3"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["a", "b"]
    _, resumed = train(
        kind, copy.deepcopy(model), rows, tmp_path / "two", **options, resume_from_checkpoint=str(folder)
    )
    for name in ("a", "b"):
        assert same(resumed[name], expected[name])
    trainer.save_model(str(tmp_path / "final"))
    loaded = PrefixModel.from_pretrained(model.base, tmp_path / "final", subfolder="b", name="b")
    loaded.load_prefix(tmp_path / "final", "a", subfolder="a")
    with torch.no_grad():
        names = ["a", None, "b"]
        own: Any = trainer.model
        expected_logits = own.eval()(input_ids=tokens(3, 6), prefix_names=names).logits
        assert_close(loaded(input_ids=tokens(3, 6), prefix_names=names).logits, expected_logits)


def test_the_seq2seq_trainer_generates_with_each_rows_prefix(tmp_path: Path) -> None:
    model = bank("bart")
    source = source_of(model.base, 4)["input_ids"].tolist()
    names = ["a", "b", None, "a"]
    rows = [
        {"input_ids": ids, "labels": ids[:5], "prefix_names": name} for ids, name in zip(source, names, strict=True)
    ]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=8, report_to="none", use_cpu=True
    )
    collator: Any = PrefixNamesCollator(default_data_collator)
    trainer = Seq2SeqTrainer(model, arguments, data_collator=collator)
    predicted = torch.as_tensor(trainer.predict(rows).predictions)  # type: ignore[arg-type]
    expected = model.generate(input_ids=torch.tensor(source), max_length=8, prefix_names=names)
    assert torch.equal(predicted[:, : expected.shape[1]], expected)
