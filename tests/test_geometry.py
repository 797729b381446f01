from __future__ import annotations

import pytest
import torch
import transformers
from families import FAMILIES
from transformers import BertConfig, BertLMHeadModel, BertModel, MambaConfig, MambaForCausalLM

from peft_prefix import LayerGeometry, PrefixInputError, PrefixModel, UnsupportedModelError, get_prefix_model


@pytest.mark.parametrize(
    ("family", "layers", "shape"),
    [
        ("gpt2", 3, LayerGeometry(4, 16, 16)),
        ("gpt_bigcode", 3, LayerGeometry(1, 16, 16)),  # multi-query
        ("llama", 3, LayerGeometry(2, 16, 16)),  # grouped heads
        ("llama_wide_heads", 2, LayerGeometry(2, 24, 24)),  # head width is not hidden / heads
        ("deepseek_v3", 2, LayerGeometry(1, 16, 8)),  # latent attention: key and value differ
    ],
)
def test_geometry_is_that_of_the_cache(family: str, layers: int, shape: LayerGeometry) -> None:
    geometry = PrefixModel(FAMILIES[family].build()).geometry
    assert geometry.sites == {"decoder": (shape,) * layers}
    assert geometry.numbers_per_token == layers * shape.numbers_per_token


def test_layers_without_keys_and_values_are_known() -> None:
    sites = PrefixModel(FAMILIES["qwen3_next"].build()).geometry.sites
    assert sites == {"decoder": (None, LayerGeometry(2, 16, 16), None, LayerGeometry(2, 16, 16))}


def test_layers_that_share_a_cache_or_differ_in_width() -> None:
    layers = PrefixModel(FAMILIES["gemma4_text"].build()).geometry.sites["decoder"]
    assert layers[:3] == (LayerGeometry(2, 8, 8), LayerGeometry(2, 8, 8), LayerGeometry(2, 16, 16))
    assert not any(layers[3:])  # these read the caches of layers 1 and 2


def test_the_two_sides_of_an_encoder_decoder_model_differ() -> None:
    geometry = PrefixModel(FAMILIES["bart"].build()).geometry
    narrow, wide = LayerGeometry(4, 16, 16), LayerGeometry(2, 32, 32)
    assert geometry.sites == {"encoder": (narrow,) * 3, "decoder": (wide,) * 2, "cross": (wide,) * 2}
    assert list(geometry.only(["cross", "encoder"]).sites) == ["encoder", "cross"]
    assert geometry.only(["decoder"]).fingerprint != geometry.fingerprint


def test_fingerprints_tell_shapes_apart() -> None:
    prints = {
        name: PrefixModel(FAMILIES[name].build()).geometry.fingerprint for name in ("gpt2", "gptj", "llama", "qwen3")
    }
    assert prints["gpt2"] == prints["gptj"]
    assert len(set(prints.values())) == 3


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


@pytest.mark.parametrize(
    "base",
    [
        lambda: MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4)),
        lambda: BertModel(BertConfig(vocab_size=50, **SMALL)),
        lambda: BertLMHeadModel(BertConfig(vocab_size=50, **SMALL)),
        lambda: transformers.BertForSequenceClassification(BertConfig(vocab_size=50, **SMALL)),
    ],
    ids=["mamba", "bert", "bert-lm-head", "bert-classifier"],
)
def test_models_without_keys_and_values_are_refused(base: object) -> None:
    with pytest.raises(UnsupportedModelError, match="keeps no keys and values"):
        get_prefix_model(base())  # type: ignore[operator]


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(PrefixInputError, match="must be a transformers model"):
        get_prefix_model(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
