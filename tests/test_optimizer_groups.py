"""Groups for an optimizer: every trained parameter once, each kind with its own rate and decay."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from families_encoder_decoder import ENCODER_DECODERS
from family import Family
from helpers import tokens

from peft_prefix import PrefixConfig, PrefixInputError, PrefixModel, get_prefix_model


def make(**config: object) -> PrefixModel:
    return get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(num_virtual_tokens=3, mlp_hidden_size=8, **config))


def classifier() -> PrefixModel:
    family = FAMILIES["llama"]
    head = Family(family.config, "LlamaForSequenceClassification", {**family.kwargs, "num_labels": 3})
    return get_prefix_model(head.build(), PrefixConfig(num_virtual_tokens=3))


@pytest.mark.parametrize("make_one", [make, lambda: make(reparameterization="mlp"), classifier])
def test_each_trained_parameter_is_in_one_group(make_one: object) -> None:
    model = make_one()  # type: ignore[operator]
    groups = model.optimizer_groups(1e-2)
    parameters = [one for group in groups for one in group["params"]]
    trained = [one for one in model.parameters() if one.requires_grad]
    assert sorted(map(id, parameters)) == sorted(map(id, trained))


def test_the_recommended_rate_depends_on_the_form_and_the_base() -> None:
    encoder_decoder = get_prefix_model(ENCODER_DECODERS["bart"].build(), PrefixConfig(num_virtual_tokens=3))
    models = [make(), make(reparameterization="mlp"), classifier(), encoder_decoder]
    assert [{group["lr"] for group in model.optimizer_groups()} for model in models] == [{3e-2}, {1e-3}, {1e-2}, {1e-1}]


def test_values_alone_move_where_keys_have_no_rate() -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.optimizer_groups(key_learning_rate=0.0, value_learning_rate=1e-1))
    before = model.prefix_state_dict()
    ids = tokens(2, 6)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, now in model.prefix_state_dict().items():
        assert torch.equal(now, before[name]) == name.endswith("key"), name


def test_weight_decay_is_for_heads_and_for_prefixes_only_if_asked_for() -> None:
    model = classifier()
    head, prefix = model.prefixes["default"].modules_to_save, model.prefixes["default"].decoder
    shares = []
    for options in (dict(weight_decay=0.5), dict(prefix_weight_decay=0.5)):
        before = [[one.detach().clone() for one in module.parameters()] for module in (head, prefix)]
        optimizer = torch.optim.AdamW(model.optimizer_groups(1e-1, **options))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        for module, old in zip((head, prefix), before, strict=True):
            now = torch.cat([one.detach().flatten() for one in module.parameters()])
            shares.append(float(now.norm() / torch.cat([one.flatten() for one in old]).norm()))
    assert shares == pytest.approx([0.95, 1.0, 1.0, 0.95])


def test_frozen_prefixes_are_left_out() -> None:
    model = make()
    model.add_prefix("second", PrefixConfig(num_virtual_tokens=2))
    model.prefixes["default"].requires_grad_(False)
    groups = model.optimizer_groups()
    assert {one.shape[1] for group in groups for one in group["params"]} == {2}
    model.prefixes["second"].requires_grad_(False)
    with pytest.raises(PrefixInputError, match="is_trainable=True"):
        model.optimizer_groups()


@pytest.mark.parametrize("kind", ["module", "adapter"])
def test_a_rate_for_what_is_not_trained_is_refused(kind: str) -> None:
    with pytest.raises(PrefixInputError, match="nothing of that kind"):
        make().optimizer_groups(**{f"{kind}_learning_rate": 1e-3})


def test_a_network_has_no_keys_of_its_own() -> None:
    with pytest.raises(PrefixInputError, match="keys and values together"):
        make(reparameterization="mlp").optimizer_groups(key_learning_rate=1e-3)


def test_an_adapter_needs_a_rate_of_its_own() -> None:
    peft = pytest.importorskip("peft")
    base = FAMILIES["llama"].build()
    base.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=3))
    with pytest.raises(PrefixInputError, match="adapter_learning_rate"):
        model.optimizer_groups()
    groups = model.optimizer_groups(adapter_learning_rate=2e-4)
    trained = [one for one in model.parameters() if one.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert [group["lr"] for group in groups] == [3e-2, 3e-2, 2e-4]
