"""Logits only where there are labels: the same loss and gradients, and logits when somebody looks at them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODER_DECODERS, FAMILIES
from family import LLAMA
from helpers import random_model, source_of, tokens
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from peft_prefix import PrefixInputError, PrefixModel

SCALED = {"gemma2", "gemma3n_text", "gemma4_text", "cohere2", "granite", "granitemoehybrid", "granitemoehybrid_nope"}
SCALED |= {"t5gemma"}
"""Families that do something with what comes out of the head."""
OWN_LOSS = {"prophetnet", "plbart"}
"""Families whose loss compares labels in a way of its own."""
OWN_INPUTS = {"m2m_100", "blenderbot", "blenderbot_small", "whisper", "bert_bert", "bert_gpt2"}
"""Families that make decoder inputs from labels where they cannot be asked for, or warn when they are given."""


def batch(family: str, base: PreTrainedModel) -> dict[str, Any]:
    """Two rows, one padded, about half of the tokens labelled."""
    ids = tokens(2, 12)
    labels = ids.clone()
    labels[0, :5], labels[1, :2], labels[1, -3:] = -100, -100, -100
    if family in ENCODER_DECODERS:
        return {**source_of(base, 2), "labels": labels}
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def step(model: PrefixModel, arguments: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Output and gradients of one training step."""
    torch.manual_seed(0)
    output = model(**arguments)
    output.loss.backward(retain_graph=True)
    gradients = {name: p.grad.clone() for name, p in model.prefixes.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output, gradients


def rows_of_the_head(model: PrefixModel) -> list[int]:
    """The number of positions that the head gets in each pass from now on."""
    seen: list[int] = []
    head = model.base.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[0] * output.shape[1]))
    return seen


@pytest.mark.conformance("label-only logits")
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same(family: str) -> None:
    model = random_model(FAMILIES[family].build(), dropout=0.2).train()
    arguments = batch(family, model.base)
    if not model.label_only_logits:
        assert family in SCALED | OWN_LOSS | OWN_INPUTS
        pytest.skip("does something of its own between its head and its loss, so all logits are computed")
    seen = rows_of_the_head(model)
    labels = arguments["labels"]
    needed = int((labels[:, 0 if family in ENCODER_DECODERS else 1 :] != -100).sum())
    for more in ({}, {"num_items_in_batch": torch.tensor(7)}):
        model.label_only_logits = True
        output, gradients = step(model, {**arguments, **more})
        model.label_only_logits = False
        expected, expected_gradients = step(model, {**arguments, **more})
        assert seen == [needed + 1, labels.numel()]
        seen.clear()
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert set(gradients) == set(expected_gradients)
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(output.logits[:], expected.logits)
        seen.clear()


def test_logits_are_computed_when_they_are_used() -> None:
    model = random_model(FAMILIES["llama"].build()).train()
    arguments = batch("llama", model.base)
    model.label_only_logits = False
    expected = model(**arguments)
    model.label_only_logits = True
    seen = rows_of_the_head(model)
    output = model(**arguments)
    assert len(seen) == 1
    assert output.logits.shape == (2, 12, 200)
    assert len(output.logits) == 2
    assert torch.equal(torch.argmax(output.logits, dim=-1), expected.logits.argmax(-1))
    assert torch.equal(output["logits"][..., :-1, :].contiguous(), expected.logits[..., :-1, :])
    assert torch.equal(output[1].float(), expected.logits)
    assert len(seen) == 2  # once for all
    (gradient,) = torch.autograd.grad(output.logits.square().mean(), [next(model.prefixes.parameters())])
    (wanted,) = torch.autograd.grad(expected.logits.square().mean(), [next(model.prefixes.parameters())])
    torch.testing.assert_close(gradient, wanted)


def test_under_autocast_logits_have_the_same_dtype() -> None:
    model = random_model(FAMILIES["llama"].build()).train()
    arguments = batch("llama", model.base)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**arguments)
        model.label_only_logits = False
        expected = model(**arguments)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits[:], expected.logits)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_without_any_label_the_loss_is_what_the_base_says(family: str) -> None:
    model = random_model(FAMILIES[family].build()).train()
    arguments = batch(family, model.base)
    arguments["labels"] = torch.full_like(arguments["labels"], -100)
    if family == "t5":
        arguments["decoder_input_ids"] = tokens(2, 12)
    assert model.label_only_logits
    assert model(**arguments).loss.isnan()
    if family == "llama":  # T5's loss does not count items
        assert model(**arguments, num_items_in_batch=torch.tensor(3)).loss == 0


@pytest.mark.parametrize(
    "more", [dict(logits_to_keep=1), dict(return_dict=False), dict(labels=None)], ids=["kept", "tuple", "no labels"]
)
def test_other_calls_get_all_logits(more: dict[str, Any]) -> None:
    model = random_model(FAMILIES["llama"].build()).train()
    arguments = {**batch("llama", model.base), **more}
    if "logits_to_keep" in more:
        arguments["labels"] = None
    output = model(**arguments)
    logits = output[-1] if isinstance(output, tuple) else output.logits
    assert isinstance(logits, torch.Tensor)
    with torch.no_grad():
        assert isinstance(model.eval()(**batch("llama", model.base)).logits, torch.Tensor)


def test_a_trained_head_gets_all_positions() -> None:
    model = random_model(FAMILIES["llama"].build(), modules_to_save=["lm_head"]).train()
    assert isinstance(model(**batch("llama", model.base)).logits, torch.Tensor)


def test_where_it_is_impossible_it_cannot_be_switched_on() -> None:
    model = random_model(FAMILIES["gemma2"].build()).train()
    assert model.label_only_logits is False
    assert isinstance(model(**batch("gemma2", model.base)).logits, torch.Tensor)
    with pytest.raises(PrefixInputError, match="does something of its own"):
        model.label_only_logits = True


def both(model: PrefixModel, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The output with logits only where there are labels, and with all of them."""
    model._label_only_logits = True
    output = model(**arguments)
    model._label_only_logits = False
    expected = model(**arguments)
    model._label_only_logits = True
    return output, expected


def test_logits_first_seen_without_gradients_have_gradients_later() -> None:
    model = random_model(FAMILIES["llama"].build()).train()
    output, expected = both(model, batch("llama", model.base))
    with torch.no_grad():
        assert output.logits.argmax(-1).shape == (2, 12)
    parameter = next(model.prefixes.parameters())
    for one, other in zip(
        torch.autograd.grad(torch.log_softmax(output.logits / 2.0, -1).square().mean(), [parameter]),
        torch.autograd.grad(torch.log_softmax(expected.logits / 2.0, -1).square().mean(), [parameter]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_logits_on_demand_compute_like_a_tensor() -> None:
    model = random_model(FAMILIES["llama"].build()).train()
    output, expected = both(model, batch("llama", model.base))
    one, other = output.logits, expected.logits
    for actual, wanted in [
        (-one, -other),
        (one / 2, other / 2),
        (2 - one, 2 - other),
        (one**2, other**2),
        (one > 0, other > 0),
        (one == one, other == other),
        (one @ one.transpose(1, 2), other @ other.transpose(1, 2)),
        (torch.stack([one, one]), torch.stack([other, other])),
        (one.to(torch.bfloat16), other.to(torch.bfloat16)),
        (one.float().double(), other.double()),
        (pickle.loads(pickle.dumps(one)), other),
    ]:
        torch.testing.assert_close(actual, wanted)
    assert (one.ndim, one.dim(), one.size(-1), one.dtype, one.device) == (3, 3, 200, other.dtype, other.device)
    one[0, 0] = 0.0
    assert torch.equal(one[0, 0], torch.zeros(200))
    assert len({one, one}) == 1


def mean_of_rows(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return (each.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


def mean_with_places(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return (each * torch.arange(each.shape[1])).mean()


@pytest.mark.parametrize("loss", [mean_of_rows, mean_with_places])
@pytest.mark.parametrize("late", [False, True], ids=["from the start", "later"])
def test_a_loss_of_the_users_own_gets_all_logits(loss: Any, late: bool) -> None:
    model = random_model(FAMILIES["llama"].build()).train()
    arguments = batch("llama", model.base)
    if late:
        model(**arguments)
        assert model.label_only_logits
    model.base.loss_function = loss
    assert not model.label_only_logits
    output, expected = both(model, arguments)
    assert torch.equal(output.loss, expected.loss)


def test_what_a_base_adds_only_in_training_is_seen() -> None:
    class WithPenalty(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if self.training and output.loss is not None:
                output.loss = output.loss + 1e-1 * output.logits.logsumexp(-1).square().mean()
            return output

    model = random_model(WithPenalty(LlamaConfig(**LLAMA))).train()
    assert not model.label_only_logits


def test_a_bias_that_comes_later_is_an_error_when_logits_are_used() -> None:
    model = random_model(FAMILIES["bart"].build()).train()
    arguments = batch("bart", model.base)
    assert model.label_only_logits
    model.base.final_logits_bias.normal_()
    output, expected = both(model, arguments)
    torch.testing.assert_close(output.loss, expected.loss)
    with pytest.raises(PrefixInputError, match="changes its head's output"):
        output.logits.argmax(-1)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_the_trainer_computes_no_other_logits(precision: dict[str, bool], tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"].build())
    arguments = batch("llama", model.base)
    rows = [{name: value[row] for name, value in arguments.items()} for row in range(2)]
    assert model.label_only_logits
    seen = rows_of_the_head(model)
    settings = dict(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none")
    settings |= dict(use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-2, **precision)
    Trainer(model=model, args=TrainingArguments(**settings), train_dataset=rows).train()
    needed = int((arguments["labels"][:, 1:] != -100).sum()) + 1
    assert seen[-2:] == [needed, needed]
    assert max(seen) == needed  # before, the Trainer has tried whether the loss counts items
