"""`freeze_first_token`: virtual token 0 keeps the initializer's numbers, whatever an optimizer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import random_model, tokens
from hidden_reference import unseen
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from peft_prefix import PrefixConfig, PrefixConfigError, PrefixFileError, PrefixModel, get_prefix_model

FORMS = pytest.mark.parametrize("reparameterization", ["none", "mlp"])
RATES = {"none": 3e-2, "mlp": 1e-2}


def make(family: str = "llama", **config: Any) -> PrefixModel:
    """A model with a frozen first token."""
    return random_model(FAMILIES[family].build(), 4, freeze_first_token=True, mlp_hidden_size=8, **config)


def first_and_others(model: PrefixModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Virtual token 0, and the others."""
    state = model.prefix_state_dict()
    return {name: t[:, :1] for name, t in state.items()}, {name: t[:, 1:] for name, t in state.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name


def trained(model: PrefixModel, optimizer: torch.optim.Optimizer, steps: int = 20) -> list[float]:
    """The losses of some steps."""
    ids, losses = tokens(4, 10), []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def learned(model: PrefixModel) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@FORMS
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_weight_decay_and_momentum_do_not_move_it(family: str, reparameterization: str) -> None:
    for kind in ("adamw", "sgd"):
        model = make(family, reparameterization=reparameterization)
        first, others = first_and_others(model)
        start = random_model(FAMILIES[family].build(), 4).prefix_state_dict()
        assert_same(first, {name: tensor[:, :1] for name, tensor in start.items()})
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(learned(model), lr=RATES[reparameterization], weight_decay=0.3)
            if kind == "adamw"
            else torch.optim.SGD(learned(model), lr=3.0, momentum=0.9, weight_decay=0.01)
        )
        losses = trained(model, optimizer, 20 if kind == "adamw" else 5)
        first_now, others_now = first_and_others(model)
        assert_same(first, first_now)
        assert_same(first, {name: tensor[:, :1].detach() for name, tensor in model.prefixes["default"]().items()})
        for name, tensor in others.items():
            assert ((others_now[name] - tensor).abs().amax(dim=(0, 2)) > 1e-4).all(), name
        if kind == "adamw":
            assert losses[-1] < losses[0] - 0.1


@FORMS
def test_it_gets_no_gradient_and_the_others_get_theirs(reparameterization: str) -> None:
    frozen = make(reparameterization=reparameterization).train()
    free = random_model(FAMILIES["llama"].build(), 4, reparameterization=reparameterization, mlp_hidden_size=8).train()
    ids = tokens(2, 6)
    logits = [model(input_ids=ids).logits for model in (frozen, free)]
    assert torch.equal(logits[0], logits[1])
    for one in logits:
        one.square().mean().backward()
    if reparameterization == "mlp":
        # Without the first token's part, the output layer's bias has the gradient of the others alone.
        own, all_of_it = (model.prefixes["default"].decoder.output.bias.grad for model in (frozen, free))
        assert not torch.equal(own, all_of_it)
        return
    parameters = dict(free.prefixes.named_parameters())
    for name, parameter in frozen.prefixes.named_parameters():
        assert (parameter.grad[:, 0] == 0).all(), name
        torch.testing.assert_close(parameter.grad[:, 1:], parameters[name].grad[:, 1:])


@FORMS
def test_it_is_saved_and_loaded_and_trained_on_as_it_was(reparameterization: str, tmp_path: Path) -> None:
    model = make(reparameterization=reparameterization)
    first, _ = first_and_others(model)
    trained(model, torch.optim.AdamW(learned(model), lr=RATES[reparameterization], weight_decay=0.3), 5)
    model.eval().save_pretrained(tmp_path)
    assert_same(model.prefix_state_dict(), load_file(tmp_path / "prefix.safetensors"))
    logits = model(input_ids=tokens(2, 5)).logits
    for is_trainable in (False, True):
        loaded = PrefixModel.from_pretrained(FAMILIES["llama"].build(), tmp_path, is_trainable=is_trainable)
        assert loaded.prefixes.entry().config.freeze_first_token
        assert torch.equal(loaded.eval()(input_ids=tokens(2, 5)).logits, logits)
        assert_same(loaded.prefix_state_dict(), model.prefix_state_dict())
    trained(loaded, torch.optim.AdamW(learned(loaded), lr=RATES[reparameterization], weight_decay=0.3), 5)
    assert_same(first_and_others(loaded)[0], first)
    loaded.initialize_prefix(input_ids=tokens(1, 4))
    fresh = get_prefix_model(
        FAMILIES["llama"].build(), PrefixConfig(num_virtual_tokens=4, init="text"), input_ids=tokens(1, 4)
    )
    assert_same(loaded.prefix_state_dict(), fresh.prefix_state_dict())


@FORMS
def test_a_resumed_run_equals_an_uninterrupted_one(reparameterization: str, tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 6)]

    def trainer(folder: str) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=RATES[reparameterization],
            weight_decay=0.3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(make(reparameterization=reparameterization, token_dropout=0.3), arguments, train_dataset=data)

    whole, resumed = trainer("whole"), trainer("resumed")
    first, _ = first_and_others(whole.model)
    whole.train()
    with torch.no_grad():  # what a resumed run starts with does not matter
        resumed.model.prefixes["default"].start_from(
            {name: torch.zeros_like(tensor) for name, tensor in whole.model.prefix_state_dict().items()}
        )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(resumed.model.prefix_state_dict(), whole.model.prefix_state_dict())
    assert_same(first_and_others(resumed.model)[0], first)
    other = random_model(FAMILIES["llama"].build(), 4, reparameterization=reparameterization, mlp_hidden_size=8)
    with pytest.raises(PrefixFileError, match=r"does not fit this model's prefixes: .*first\.decoder"):
        other.load_state_dict(whole.model.state_dict())


def test_it_is_never_dropped() -> None:
    model = make(token_dropout=0.95)
    model.add_prefix("free", PrefixConfig(num_virtual_tokens=2, init="normal", init_std=1.0, token_dropout=0.95))
    model.add_prefix(
        "short",
        PrefixConfig(num_virtual_tokens=2, init="normal", init_std=1.0, token_dropout=0.95, freeze_first_token=True),
    )
    model.train()
    torch.manual_seed(0)
    names = ["default", "short", "free"] * 10
    hidden = unseen(model(input_ids=tokens(30, 3), prefix_names=names, output_attentions=True).attentions, 4)
    hidden = hidden.view(10, 3, 4).float().mean(dim=0)
    assert hidden[0, 0] == 0
    assert hidden[0, 1:].min() > 0.5
    assert hidden[1].tolist()[:3] == [1, 1, 0]  # the short one's columns are the last two
    assert hidden[1, 3] > 0.5
    assert hidden[2, 2:].min() > 0.5


def test_compositions_keep_it_where_all_of_their_parts_do() -> None:
    model = make()
    model.add_prefix("same", PrefixConfig(num_virtual_tokens=4, init="normal", freeze_first_token=True))
    model.add_prefix("free", PrefixConfig(num_virtual_tokens=4, init="normal", token_dropout=0.1))
    model.average_prefixes(["default", "same"], "both")
    model.average_prefixes(["default", "free"], "either")
    assert model.prefixes.entry("both").config.freeze_first_token
    assert not model.prefixes.entry("either").config.freeze_first_token
    assert model.prefixes.entry("either").config.token_dropout == 0


def test_a_prefix_of_one_token_would_have_nothing_to_learn() -> None:
    with pytest.raises(PrefixConfigError, match="leaves nothing to train of a prefix with one virtual token"):
        PrefixConfig(num_virtual_tokens=1, freeze_first_token=True)
