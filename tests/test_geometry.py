from __future__ import annotations

import pytest
import torch
import transformers
from families import COMMON, FAMILIES
from helpers import tokens
from transformers import BertConfig, BertLMHeadModel, BertModel, MambaConfig, MambaForCausalLM, T5Config

from peft_prefix import LayerGeometry, PrefixInputError, UnsupportedModelError, get_prefix_model
from peft_prefix.geometry import activations, evaluation_mode, trace_geometry


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
    geometry = trace_geometry(FAMILIES[family].build())
    assert geometry.sites == {"decoder": (shape,) * layers}
    assert geometry.numbers_per_token == layers * shape.numbers_per_token


def test_tracing_changes_neither_modes_nor_random_state_nor_weights() -> None:
    base = FAMILIES["gpt2"].build().train()
    base.transformer.h[1].eval()
    modes = {name: module.training for name, module in base.named_modules()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    trace_geometry(base)
    assert torch.equal(torch.rand(3), expected)
    assert {name: module.training for name, module in base.named_modules()} == modes


def test_modes_are_restored_after_an_error() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())

    def fail() -> None:
        with evaluation_mode(module):
            assert not module[0].training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module[0].training
    assert not module[1].training


def test_windowed_layers_record_all_tokens() -> None:
    cache = activations(FAMILIES["gemma3_text"].build(), tokens(1, 20))
    assert {layer.keys.shape[2] for layer in cache.layers} == {20}


def test_fingerprints_tell_shapes_apart() -> None:
    prints = {name: trace_geometry(FAMILIES[name].build()).fingerprint for name in ("gpt2", "gptj", "llama", "qwen3")}
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


def test_encoder_decoder_models_are_refused() -> None:
    config = T5Config(**COMMON, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        get_prefix_model(transformers.T5ForConditionalGeneration(config))


def test_hybrid_models_are_refused() -> None:
    config = transformers.JambaConfig(
        **COMMON,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        use_mamba_kernels=False,
    )
    with pytest.raises(UnsupportedModelError, match=r"keeps no keys and values in its layers \[0\]"):
        get_prefix_model(transformers.JambaForCausalLM(config))


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(PrefixInputError, match="must be a transformers model"):
        get_prefix_model(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
