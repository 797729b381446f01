"""TRL's `SFTTrainer`, unmodified and with its usual arguments."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODER_DECODERS, FAMILIES, KINDS, supported_attention
from helpers import random_model
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

from peft_prefix import PrefixModel

datasets = pytest.importorskip("datasets")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the package's own futures
    trl = pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing:FutureWarning", "ignore:`return_outputs=True`:FutureWarning"
)
PAIRS = [
    ("name : Blue Spice | food : Thai", "the Blue Spice serves Thai food ."),
    ("name : Golden Palace | price : cheap", "the Golden Palace is cheap and it has a park near it ."),
    ("name : Punter | Type : pub | near : city centre", "the Punter is a pub ."),
] * 4


def completions() -> Any:
    """Prompts and completions."""
    return datasets.Dataset.from_list([{"prompt": f"{prompt} ", "completion": target} for prompt, target in PAIRS])


def conversations() -> Any:
    """The same as messages."""
    return datasets.Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]}
            for prompt, target in PAIRS
        ]
    )


def base(family: str = "llama") -> PreTrainedModel:
    """A tiny base whose tokens fit the tokenizer."""
    model = FAMILIES[family].build(supported_attention(FAMILIES[family])[-1])
    if hasattr(model.config, "router_aux_loss_coef"):
        model.config.router_aux_loss_coef = 0.0  # it depends on how rows are batched
    return model


def make_trainer(folder: Path, data: Any, model: PrefixModel | None = None, **arguments: Any) -> Any:
    settings: dict[str, Any] = dict(
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return trl.SFTTrainer(
        model=model or random_model(base()),
        args=trl.SFTConfig(str(folder), **{**settings, **arguments}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model: PrefixModel, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Mean loss over all learned tokens of some rows of ids and labels, each alone, from the model's logits."""
    total, count = torch.zeros(()), 0
    for ids, labels in rows:
        scores = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        learned = labels[1:] != -100
        total = total - scores.gather(1, ids[1:, None])[learned].sum()
        count += int(learned.sum())
    return total / count


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The rows that a batch consists of, padded or packed."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "attention_mask" in batch:
        kept = batch["attention_mask"].bool()
        return [(ids[row][kept[row]], labels[row][kept[row]]) for row in range(len(ids))]
    lengths = torch.diff((batch["position_ids"][0] == 0).nonzero()[:, 0], append=torch.tensor([ids.shape[1]]))
    return list(zip(ids[0].split(lengths.tolist()), labels[0].split(lengths.tolist()), strict=True))


REFUSE_PACKED = {"mpt", "qwen3_next"}
ALL = [("llama", kind) for kind in ("completions", "conversations", "assistant_only")]


@pytest.mark.ways("SFTTrainer")
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [*ALL, *((family, "completions") for family in KINDS if family not in (*ENCODER_DECODERS, "llama"))],
)
def test_loss_and_gradients_are_those_of_the_model_on_each_row(
    family: str, kind: str, packing: bool, tmp_path: Path
) -> None:
    if packing and family in REFUSE_PACKED:
        pytest.skip("packed texts are refused; see test_conformance_precision.py")
    data = completions() if kind == "completions" else conversations()
    trainer = make_trainer(
        tmp_path,
        data,
        random_model(base(family)),
        packing=packing,
        max_length=64,
        assistant_only_loss=kind == "assistant_only",
        bf16=False,
        per_device_eval_batch_size=12,
    )
    model = trainer.model
    model.gradient_checkpointing_enable()
    batch = next(iter(trainer.get_train_dataloader()))
    rows = rows_of(batch)
    assert ("position_ids" in batch) == packing
    assert (len(rows) > 4) if packing else (len(rows) == 4)
    for ids, labels in rows:
        learned = int((labels[1:] != -100).sum())
        assert (learned == len(ids) - 1) if kind == "conversations" else (5 < learned < len(ids) - 5)
    loss = trainer.compute_loss(model.train(), dict(batch))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.prefixes.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    expected = by_hand(model, rows)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.prefixes.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        everything = [row for batch in trainer.get_eval_dataloader() for row in rows_of(batch)]
        assert len(everything) == 12
        held_out = by_hand(model.eval(), everything).item()
        with model.disable_prefix():
            assert by_hand(model, everything).item() != pytest.approx(held_out, rel=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(held_out, rel=1e-5)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_only_the_prefix_learns_with_the_defaults_and_is_saved(tmp_path: Path) -> None:
    model = random_model(base())
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    trainer = make_trainer(tmp_path, completions(), model, save_strategy="steps", save_steps=4)
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    start = model.prefix_state_dict()
    trainer.train()
    for name, tensor in model.base.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in model.prefix_state_dict().items():
        assert tensor.dtype == torch.float32
        assert (tensor - start[name]).abs().max() > 1e-3, name
    trainer.save_model(str(tmp_path / "final"))
    files = {file.name for file in (tmp_path / "final").iterdir()}
    assert {"prefix.safetensors", "prefix_config.json"} < files
    assert not [
        name
        for name in files
        if name.endswith((".bin", ".safetensors")) and "prefix" not in name and "training" not in name
    ]
    loaded = PrefixModel.from_pretrained(base(), tmp_path / "final")
    for name, tensor in model.prefix_state_dict().items():
        assert torch.equal(loaded.prefix_state_dict()[name], tensor)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, completions(), save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make_trainer(tmp_path, completions())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    for name, tensor in whole.model.prefix_state_dict().items():
        assert torch.equal(resumed.model.prefix_state_dict()[name], tensor), name


def test_accuracy_and_entropy_are_those_with_the_prefix(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, completions(), bf16=False)
    model, hits, entropies = trainer.model.eval(), [], []
    for row in trainer.train_dataset:
        ids, learned = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)[learned]
        hits.append(scores.argmax(-1) == ids[0, 1:][learned])
        entropies.append(-(scores.exp() * scores).sum(-1))
    trainer.evaluate()
    (logged,) = [entry for entry in trainer.state.log_history if "eval_entropy" in entry]
    # TRL averages over batches of eight and four rows
    parts = [(slice(0, 8)), (slice(8, 12))]
    assert logged["eval_entropy"] == pytest.approx(
        sum(float(torch.cat(entropies[part]).mean()) for part in parts) / 2, rel=1e-4
    )
    assert logged["eval_mean_token_accuracy"] == pytest.approx(
        sum(float(torch.cat(hits[part]).float().mean()) for part in parts) / 2, abs=1e-6
    )


def test_metrics_of_logits_are_those_with_the_prefix(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, completions(), bf16=False)
    trainer.compute_metrics = lambda prediction: {
        "mean": float(prediction.predictions[prediction.label_ids != -100].mean())
    }
    model = trainer.model.eval()
    chosen = []
    for row in trainer.train_dataset:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        chosen.append(logits[torch.tensor(row["labels"]) != -100])
    assert trainer.evaluate()["eval_mean"] == pytest.approx(float(torch.cat(chosen).mean()), rel=1e-3)
