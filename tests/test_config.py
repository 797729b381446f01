from __future__ import annotations

import json
from typing import Any

import pytest

from peft_prefix import PrefixConfig, PrefixConfigError


@pytest.mark.parametrize("value", [0, -3, 2.5, "20", True, None])
def test_num_virtual_tokens_must_be_a_positive_integer(value: Any) -> None:
    with pytest.raises(PrefixConfigError, match=r"num_virtual_tokens must be an integer of at least 1, not"):
        PrefixConfig(num_virtual_tokens=value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(init="nonsense"), "init must be one of 'vocabulary', 'text'"),
        (dict(reparameterization="lstm"), "reparameterization must be one of 'none', 'mlp'"),
        (dict(dropout=1.0), "dropout must be a number from 0.0 to below 1.0"),
        (dict(dropout="0.1"), "dropout must be a number"),
        (dict(token_dropout=1.0), "token_dropout must be a number from 0.0 to below 1.0"),
        (dict(token_dropout=True), "token_dropout must be a number"),
        (dict(freeze_first_token=1), "freeze_first_token must be True or False, not 1"),
        (dict(leave_one_out=None), "leave_one_out must be True or False, not None"),
        (dict(init_std=-1.0), "init_std must be a number"),
        (dict(mlp_hidden_size=0), "mlp_hidden_size must be an integer of at least 1"),
        (dict(sites=[]), "sites must name each of"),
        (dict(sites="decoder"), "sites must be a list"),
        (dict(sites=["decoder", "decoders"]), "sites must name each of"),
        (dict(sliding_window="none"), "sliding_window must be one of"),
        (dict(init_text="A text"), 'use init="text"'),
        (dict(base_model_name_or_path=3), "must be a string or None"),
    ],
)
def test_values_that_cannot_be_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PrefixConfigError, match=message):
        PrefixConfig(**fields)


def test_unknown_fields_are_named_with_the_nearest_known_one() -> None:
    with pytest.raises(PrefixConfigError, match="no field 'num_virtual_token': did you mean 'num_virtual_tokens'"):
        PrefixConfig(num_virtual_token=20)
    with pytest.raises(PrefixConfigError, match="no field 'task_type': it has num_virtual_tokens, init"):
        PrefixConfig.from_dict({"task_type": "CAUSAL_LM"})
    with pytest.raises(PrefixConfigError, match="keyword arguments only"):
        PrefixConfig(20)  # type: ignore[misc]


def test_a_config_survives_json() -> None:
    config = PrefixConfig(num_virtual_tokens=7, init="text", init_text="Hello", dropout=0.1, reparameterization="mlp")
    for modules in (None, (), ("score", "model.norm")):
        config = config.replace(modules_to_save=modules)
        assert PrefixConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_replace_validates_again() -> None:
    with pytest.raises(PrefixConfigError):
        PrefixConfig().replace(num_virtual_tokens=0)
