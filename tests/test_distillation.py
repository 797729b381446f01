"""Training a prefix to stand for a context."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import cache_of_tokens, model_with_tokens, random_model, tokens
from safetensors.torch import load_file
from tiny_tokenizer import tiny_tokenizer
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_prefix import (
    ContextTeacher,
    IncompatibleBaseError,
    PrefixConfig,
    PrefixConfigError,
    PrefixDistillationTrainer,
    PrefixModel,
    PrefixNamesCollator,
    PromptTargetCollator,
    StoredTeacher,
)

Row = dict[str, Any]
CONTEXT = 20


def context() -> torch.Tensor:
    return tokens(1, CONTEXT, seed=3)[0]


def rows_for(family: str = "llama", count: int = 8, seed: int = 5) -> list[Row]:
    """Rows of several lengths with several numbers of labels."""
    result = []
    for index, ids in enumerate(tokens(count, 14, seed).tolist()):
        length, prompt = 8 + index % 5, 1 + index % 3
        labels = [-100] * prompt + ids[prompt:length]
        if FAMILIES[family].model.endswith("ConditionalGeneration"):
            labels = labels[prompt:]
        result.append({"input_ids": ids[:length], "labels": labels})
    return result


class InOrder(PrefixDistillationTrainer):
    """Takes rows in their order."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def arguments_for(folder: Path, batch: int = 4, **more: Any) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=3,
        num_train_epochs=1,
        learning_rate=3e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return TrainingArguments(**{**settings, **more})  # type: ignore[arg-type]


def make(
    model: PrefixModel,
    folder: Path,
    rows: list[Row],
    teacher: Any = None,
    batch: int = 4,
    own: dict[str, Any] | None = None,
    **more: Any,
) -> PrefixDistillationTrainer:
    return InOrder(
        model,
        arguments_for(folder, batch, **more),
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=rows,  # type: ignore[arg-type]
        data_collator=PromptTargetCollator(tiny_tokenizer(), model),  # type: ignore[arg-type]
        teacher=teacher or ContextTeacher(model, context(), top_k=10),
        **(own or {}),
    )


def logits_by_hand(model: PrefixModel, row: Row, before: torch.Tensor | None) -> torch.Tensor:
    """The plain base's logits at the labelled positions of a row, behind a context as text, or with the prefix."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    if model.config.is_encoder_decoder:
        if before is None:
            return model(input_ids=ids, labels=labels).logits[0][labels[0] != -100]
        return model.base(input_ids=torch.cat([before[None], ids], dim=1), labels=labels).logits[0][labels[0] != -100]
    if before is None:
        logits = model(input_ids=ids).logits[0]
    else:
        logits = model.base(input_ids=torch.cat([before[None], ids], dim=1)).logits[0, len(before) :]
    return logits[:-1][labels[0, 1:] != -100]


def by_hand(
    model: PrefixModel, rows: list[Row], k: int | None, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence and agreement at each labelled position, with a full softmax in float64."""
    divergence, agreed = [], []
    for row in rows:
        p = logits_by_hand(model, row, context()).double().softmax(dim=-1)
        q = logits_by_hand(model, row, None).double().softmax(dim=-1)
        agreed.append(p.argmax(dim=-1) == q.argmax(dim=-1))
        if k is not None:
            top = p.argsort(dim=-1, descending=True)[:, :k]
            p, q = (torch.cat([one.gather(1, top), 1 - one.gather(1, top).sum(1, keepdim=True)], 1) for one in (p, q))
        p, q = (one ** (1 / temperature) for one in (p, q))
        p, q = (one / one.sum(dim=1, keepdim=True) for one in (p, q))
        divergence.append((p * (p / q).log()).sum(dim=1))
    return torch.cat(divergence), torch.cat(agreed).double()


@pytest.mark.parametrize(
    ("family", "k", "temperature", "only_labels"),
    [
        ("llama", 10, 1.0, True),
        ("llama", 10, 1.0, False),
        ("llama", None, 2.0, True),
        ("mistral", 3, 2.0, True),
        ("t5", 10, 1.5, True),
        ("t5", 10, 1.5, False),
        ("bart", None, 1.0, True),
    ],
)
def test_the_loss_is_the_divergence_from_the_base_that_reads_the_context(
    family: str, k: int | None, temperature: float, only_labels: bool, tmp_path: Path
) -> None:
    base = FAMILIES[family].build()
    model = random_model(base) if base.config.is_encoder_decoder else model_with_tokens(base, context()[1:])
    if not only_labels:
        model.label_only_logits = False
    rows = rows_for(family)
    with torch.no_grad():
        expected, agreement = by_hand(model, rows, k)
        hot, _ = by_hand(model, rows, k, temperature)
    if family == "llama":
        assert 0.1 < float(agreement.mean()) < 0.9
    teacher = ContextTeacher(model, context(), top_k=k)
    trainer = make(model, tmp_path, rows, teacher, batch=8, own=dict(temperature=temperature))
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found["eval_top1_agreement"] == pytest.approx(float(agreement.mean()))
    assert float(expected.mean()) > 0.001
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(model.train(), batch).detach()
    assert float(loss) == pytest.approx(float(hot.mean()) * temperature**2, rel=1e-4)
    halves = trainer.compute_loss(model, batch, num_items_in_batch=2 * len(hot)).detach()
    assert float(halves) == pytest.approx(float(loss) / 2, rel=1e-5)


def test_labels_have_the_share_that_they_are_given(tmp_path: Path) -> None:
    model, rows = random_model(FAMILIES["llama"].build()).train(), rows_for()
    trainer = make(model, tmp_path, rows, own=dict(label_weight=0.25))
    batch = trainer.data_collator(rows)
    alone = make(model, tmp_path, rows).compute_loss(model, batch)
    expected = 0.75 * alone + 0.25 * model(**batch).loss
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt"])
def test_a_prefix_that_is_the_contexts_cache_has_nothing_to_learn(family: str, tmp_path: Path) -> None:
    model = model_with_tokens(FAMILIES[family].build(), context())
    found = make(model, tmp_path, rows_for()).evaluate()
    assert abs(found["eval_loss"]) < 1e-6
    assert found["eval_top1_agreement"] == 1.0


def test_in_windows_it_is_the_cache_that_leaves_them(tmp_path: Path) -> None:
    base = FAMILIES["mistral"].build()
    config = PrefixConfig(num_virtual_tokens=CONTEXT, init="cache", sliding_window="plain")
    model = PrefixModel(base)
    model.add_prefix("plain", config, past_key_values=cache_of_tokens(base, context()[None]))
    model.add_prefix(
        "pinned", config.replace(sliding_window="pinned"), past_key_values=cache_of_tokens(base, context()[None])
    )
    trainer = make(model, tmp_path, rows_for())
    assert trainer.evaluate()["eval_loss"] > 1e-4
    model.set_prefix("plain")
    assert abs(trainer.evaluate()["eval_loss"]) < 1e-6


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_training_brings_the_student_to_the_teacher(family: str, tmp_path: Path) -> None:
    model, rows = random_model(FAMILIES[family].build()), rows_for(family)
    trainer = make(model, tmp_path, rows, num_train_epochs=10)
    before = trainer.evaluate()
    base = {name: value.clone() for name, value in model.base.state_dict().items()}
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(before["eval_loss"], rel=0.5)  # of the first rows alone
    assert all(torch.equal(value, base[name]) for name, value in model.base.state_dict().items())


def trained(model: PrefixModel, folder: Path, rows: list[Row], **more: Any) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    make(model, folder, rows, **more).train()
    return model.prefix_state_dict()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_accumulated_gradients_are_those_of_one_batch(family: str, tmp_path: Path) -> None:
    model, rows = random_model(FAMILIES[family].build()), rows_for(family)
    # With SGD a gradient of another size shows; Adam would hide it.
    options: dict[str, Any] = dict(optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0)
    options["own"] = dict(label_weight=0.3, temperature=1.5)
    whole = trained(model, tmp_path, rows, batch=8, **options)
    parts = trained(model, tmp_path, rows, batch=2, gradient_accumulation_steps=4, **options)
    assert_same(whole, parts, 1e-5)
    start = model.prefix_state_dict()
    assert max(float((whole[name] - start[name]).abs().max()) for name in whole) > 1e-3


def test_a_stored_teacher_teaches_the_same(tmp_path: Path) -> None:
    model, rows = random_model(FAMILIES["llama"].build()), rows_for()
    live = ContextTeacher(model, context(), top_k=10)
    stored = live.store(rows, tmp_path / "store", PromptTargetCollator(tiny_tokenizer(), model), batch_size=3)
    one, two = (make(model, tmp_path, rows, teacher).evaluate() for teacher in (live, stored))
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], abs=1e-3)
    assert one["eval_top1_agreement"] == two["eval_top1_agreement"]
    options: dict[str, Any] = dict(optim="sgd", learning_rate=1.0, num_train_epochs=2)
    shuffled = [rows[index] for index in (3, 1, 7, 0, 5, 2, 6, 4)]
    expected = trained(model, tmp_path, shuffled, **options)
    actual = trained(model, tmp_path, shuffled, teacher=StoredTeacher(tmp_path / "store"), **options)
    assert_same(expected, actual, 1e-3)
    with pytest.raises(IncompatibleBaseError, match="were made with"):
        make(random_model(FAMILIES["llama"].build(seed=1)), tmp_path, rows, stored)


def test_a_checkpoint_holds_the_prefix_and_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    model, rows = random_model(FAMILIES["llama"].build(), reparameterization="mlp", mlp_hidden_size=8), rows_for()
    options: dict[str, Any] = dict(save_strategy="steps", save_steps=3, num_train_epochs=3, learning_rate=1e-2)
    expected = trained(model, tmp_path / "one", rows, **options)
    folder = tmp_path / "one" / "checkpoint-3"
    state = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in state} == {"prefixes"}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 500_000
    assert not [file for file in folder.iterdir() if "teacher" in file.name or "context" in file.name]
    assert all(CONTEXT not in tensor.shape for tensor in state.values())
    resumed = copy.deepcopy(model)
    make(resumed, tmp_path / "two", rows, **options).train(resume_from_checkpoint=str(folder))
    assert_same(expected, resumed.prefix_state_dict())
    loaded = PrefixModel.from_pretrained(model.base, tmp_path / "one" / "checkpoint-6")
    assert_same(expected, loaded.prefix_state_dict())
    record = json.loads((tmp_path / "one" / "checkpoint-6" / "trainer_state.json").read_text())
    assert record["global_step"] == 6


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    model, rows = random_model(FAMILIES["llama"].build()), rows_for()
    options: dict[str, Any] = dict(optim="sgd", learning_rate=1.0)
    expected = trained(model, tmp_path, rows, **options)
    options |= dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(expected, trained(model, tmp_path, rows, **options), 1e-5)


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_works(how: str, tmp_path: Path) -> None:
    rows = rows_for()
    exact = trained(random_model(FAMILIES["llama"].build()), tmp_path, rows, optim="sgd", learning_rate=1.0)
    dtype = torch.bfloat16 if how == "weights" else torch.float32
    model = random_model(FAMILIES["llama"].build(dtype=dtype))
    rounded = trained(model, tmp_path, rows, optim="sgd", learning_rate=1.0, bf16=how == "autocast")
    assert all(tensor.dtype == torch.float32 for tensor in rounded.values())
    assert_same(exact, rounded, 2e-2)


def test_the_active_prefix_is_trained_or_those_of_the_rows(tmp_path: Path) -> None:
    model, rows = random_model(FAMILIES["llama"].build()), rows_for()
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=3, init="normal", init_std=1.0))
    before = {name: model.prefix_state_dict(name) for name in ("default", "other")}
    model.set_prefix("default")
    make(model, tmp_path, rows).train()
    assert_same(before["other"], model.prefix_state_dict("other"))
    assert not torch.equal(*(one["decoder.layers.0.key"] for one in (before["default"], model.prefix_state_dict())))
    named = [{**row, "prefix_names": name} for row, name in zip(rows, ["other", None] * 4, strict=True)]
    model.set_prefix(None)
    one_length = [{**row, "input_ids": row["input_ids"][:8], "labels": row["labels"][:8]} for row in named]
    trainer = InOrder(
        model,
        arguments_for(tmp_path),
        train_dataset=one_length,
        data_collator=PrefixNamesCollator(default_data_collator),
        teacher=ContextTeacher(model, context()),
    )
    before = {name: model.prefix_state_dict(name) for name in ("default", "other")}
    trainer.train()
    assert_same(before["default"], model.prefix_state_dict("default"))
    key = "decoder.layers.0.key"
    assert not torch.equal(before["other"][key], model.prefix_state_dict("other")[key])


def test_it_is_a_trainer_like_the_stock_one(tmp_path: Path) -> None:
    model, rows = random_model(FAMILIES["llama"].build()), rows_for()
    trainer = make(model, tmp_path, rows, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch")
    stock = Trainer(model, arguments_for(tmp_path))
    kinds = [[type(one) for one in some.callback_handler.callbacks] for some in (trainer, stock)]
    assert kinds[0] == kinds[1]
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_top1_agreement" in entry]
    assert len(evaluated) == 2
    trainer.save_model(str(tmp_path / "final"))
    trainer.create_model_card()
    assert (tmp_path / "final" / "prefix.safetensors").is_file()
    assert "peft_prefix" in (tmp_path / "README.md").read_text()
    assert trainer.evaluate(rows[:3], metric_key_prefix="test")["test_top1_agreement"] >= 0  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unknown"):
        make(model, tmp_path, rows, own=dict(unknown=1))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model, rows = random_model(FAMILIES["llama"].build()), rows_for()
    with pytest.raises(PrefixConfigError, match="trains a PrefixModel"):
        PrefixDistillationTrainer(model.base, arguments_for(tmp_path))
    with pytest.raises(PrefixConfigError, match="teacher must be a ContextTeacher or a StoredTeacher, not None"):
        PrefixDistillationTrainer(model, arguments_for(tmp_path))
    for own in (dict(temperature=0), dict(temperature=True), dict(label_weight=1.0), dict(label_weight=-0.1)):
        with pytest.raises(PrefixConfigError, match="must be a number"):
            make(model, tmp_path, rows, own=own)
    with pytest.raises(PrefixConfigError, match="smooths no labels"):
        make(model, tmp_path, rows, label_smoothing_factor=0.1)
    with pytest.raises(PrefixConfigError, match="leave compute_loss_func out"):
        make(model, tmp_path, rows, own=dict(compute_loss_func=lambda *_, **__: None))
    other = random_model(FAMILIES["llama"].build(seed=1))
    with pytest.raises(IncompatibleBaseError, match="Make the teacher with the model that is trained"):
        make(model, tmp_path, rows, ContextTeacher(other, context()))


def test_an_adapter_that_learns_is_no_teacher(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = FAMILIES["llama"].build()
    base.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(PrefixConfigError, match="must not change, and adapters in its base are trained"):
        make(random_model(base), tmp_path, rows_for())
