from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from family import Family
from helpers import tokens
from test_trainer import make, make_trainer

from peft_prefix import PrefixConfig, PrefixWarning, get_prefix_model


def test_the_trainers_default_learning_rate_draws_one_warning_that_names_a_good_one(tmp_path: Path) -> None:
    trainer = make_trainer(make(), tmp_path, learning_rate=5e-5, warmup_steps=3, save_strategy="no")
    with pytest.warns(PrefixWarning, match="learning_rate=0.03") as caught:
        trainer.train()
    assert sum(issubclass(warning.category, PrefixWarning) for warning in caught) == 1


@pytest.mark.parametrize(
    ("reparameterization", "rate"), [("none", 3e-2), ("none", 1e-3), ("mlp", 5e-5)], ids=lambda value: str(value)
)
def test_a_sensible_learning_rate_draws_none(reparameterization: str, rate: float, tmp_path: Path) -> None:
    model = make(reparameterization=reparameterization)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrefixWarning)
        make_trainer(model, tmp_path, learning_rate=rate, warmup_steps=3, max_steps=4, save_strategy="no").train()


def test_optimizers_of_other_models_are_left_alone() -> None:
    model = get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(num_virtual_tokens=2))
    other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-5)
    other(torch.ones(1, 2)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrefixWarning)
        optimizer.step()
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model(input_ids=tokens(1, 4)).logits.sum().backward()
    with pytest.warns(PrefixWarning, match="hardly move"):
        own.step()


def test_several_models_and_prefixes_can_be_trained_side_by_side() -> None:
    models = [get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(num_virtual_tokens=2)) for _ in range(3)]
    models[0].add_prefix("second", PrefixConfig(num_virtual_tokens=2))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=3e-2) for m in models]
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            model(input_ids=tokens(1, 4)).logits.sum().backward()
            optimizer.step()


def test_a_smaller_one_is_recommended_where_a_head_is_trained_too() -> None:
    family = FAMILIES["llama"]
    head = Family(family.config, "LlamaForSequenceClassification", {**family.kwargs, "num_labels": 3})
    model = get_prefix_model(head.build(), PrefixConfig(num_virtual_tokens=2))
    model(input_ids=tokens(2, 4), labels=torch.tensor([0, 1])).loss.backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
    with pytest.warns(PrefixWarning, match="learning_rate=0.01"):
        optimizer.step()


def test_a_step_without_any_gradient_draws_a_warning() -> None:
    model = get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(num_virtual_tokens=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    with pytest.warns(PrefixWarning, match="no gradient has reached 6 of the prefix's 6 tensors"):
        optimizer.step()
    model(input_ids=tokens(1, 4)).logits.sum().backward()
    optimizer.step()


def test_a_layer_that_learns_nothing_draws_a_warning() -> None:
    model = get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(num_virtual_tokens=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    model.base.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, inputs, output: output.detach())
    model(input_ids=tokens(1, 4)).logits.sum().backward()
    with pytest.warns(PrefixWarning, match="no gradient has reached 2 of the prefix's 6 tensors"):
        optimizer.step()


def test_an_optimizer_that_computes_gradients_itself_draws_none() -> None:
    model = get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(num_virtual_tokens=2))
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=3e-2, max_iter=1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=tokens(1, 4)).logits.square().mean()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error", PrefixWarning)
        optimizer.step(closure)
