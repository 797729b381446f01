from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import DynamicCache, PreTrainedTokenizerFast

from peft_prefix import PrefixConfig, PrefixConfigError, PrefixInputError, PrefixWarning, get_prefix_model


def tokenizer() -> PreTrainedTokenizerFast:
    """Words `w3`, `w4`, ... have the ids 3, 4, ..."""
    words = Tokenizer(WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(3, 100)}}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def cache_of(base: Any, ids: torch.Tensor) -> DynamicCache:
    """Independent of the library: the base's own cache."""
    with torch.no_grad():
        return base(input_ids=ids, use_cache=True).past_key_values


def assert_holds(model: Any, cache: Any) -> None:
    for index, layer in enumerate(cache.layers):
        state = model.prefix_state_dict()
        torch.testing.assert_close(state[f"decoder.layers.{index}.key"], layer.keys[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(state[f"decoder.layers.{index}.value"], layer.values[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3", "gpt_bigcode"])
def test_text_gives_the_activations_of_its_tokens(family: str) -> None:
    base = FAMILIES[family].build()
    config = PrefixConfig(num_virtual_tokens=4, init="text", init_text="w5 w9 w7 w11")
    model = get_prefix_model(base, config, tokenizer())
    assert_holds(model, cache_of(base, torch.tensor([[5, 9, 7, 11]])))
    by_ids = get_prefix_model(
        base, PrefixConfig(num_virtual_tokens=4, init="text"), input_ids=torch.tensor([5, 9, 7, 11])
    )
    assert_holds(by_ids, cache_of(base, torch.tensor([[5, 9, 7, 11]])))


def test_text_is_repeated_or_cut_to_fit() -> None:
    base = FAMILIES["llama"].build()
    config = PrefixConfig(num_virtual_tokens=5, init="text", init_text="w5 w9")
    assert_holds(get_prefix_model(base, config, tokenizer()), cache_of(base, torch.tensor([[5, 9, 5, 9, 5]])))
    with pytest.warns(PrefixWarning, match="has 3 tokens; the first 2 are used. Set num_virtual_tokens=3"):
        cut = get_prefix_model(base, config.replace(num_virtual_tokens=2, init_text="w5 w9 w7"), tokenizer())
    assert_holds(cut, cache_of(base, torch.tensor([[5, 9]])))


def test_windowed_models_give_activations_of_texts_longer_than_their_window() -> None:
    base = FAMILIES["mistral"].build()
    ids = tokens(1, 20)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=20, init="text"), input_ids=ids)
    with torch.no_grad():
        base.config.sliding_window, window = 100, base.config.sliding_window
        unlimited = cache_of(base, ids)
        base.config.sliding_window = window
    first = model.prefix_state_dict()["decoder.layers.0.key"]
    torch.testing.assert_close(first, unlimited.layers[0].keys[0])  # the first layer's keys see no other token


def test_vocabulary_gives_activations_of_ordinary_words_that_the_base_writes() -> None:
    base = FAMILIES["llama"].build()
    with torch.no_grad():
        base.lm_head.weight[:3] += 100 * base.lm_head.weight[3]  # special tokens would be likely now and then
    seen: list[int] = []
    base.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )

    def build(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=60, init_seed=seed))
        return model.prefix_state_dict(), torch.tensor([seen[-60:]])

    state = torch.get_rng_state()
    one, words = build(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not set(words.flatten().tolist()) & {0, 1, 2}  # padding, beginning, end
    cache = cache_of(base, words)
    for index, layer in enumerate(cache.layers):
        torch.testing.assert_close(one[f"decoder.layers.{index}.key"], layer.keys[0], rtol=0, atol=1e-4)
    again, same_words = build(0)
    _, other_words = build(1)
    assert torch.equal(same_words, words)
    assert not torch.equal(other_words, words)
    assert all(torch.equal(again[name], one[name]) for name in one)


def test_the_vocabulary_initializer_samples_from_the_bases_predictions() -> None:
    base = FAMILIES["gpt2"].build()
    with torch.no_grad():
        base.transformer.ln_f.bias.fill_(1.0)
        base.lm_head.weight.zero_()
        base.lm_head.weight[77] = 1.0  # now the base writes this word and nothing else
    seen: list[int] = []
    base.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    get_prefix_model(base, PrefixConfig(num_virtual_tokens=20))
    assert seen[-19:] == [77] * 19


def test_a_cache_is_taken_as_it_is() -> None:
    base = FAMILIES["qwen3"].build()
    cache = cache_of(base, tokens(1, 3))
    config = PrefixConfig(num_virtual_tokens=3, init="cache")
    model = get_prefix_model(base, config, past_key_values=cache)
    assert_holds(model, cache)
    cache.layers[0].keys.zero_()
    assert model.prefix_state_dict()["decoder.layers.0.key"].abs().sum() > 0


def test_zeros_and_normal() -> None:
    base = FAMILIES["llama"].build()
    zeros = get_prefix_model(base, PrefixConfig(init="zeros")).prefix_state_dict()
    assert all((tensor == 0).all() for tensor in zeros.values())
    normal = get_prefix_model(
        base, PrefixConfig(init="normal", init_std=0.5, num_virtual_tokens=100)
    ).prefix_state_dict()
    numbers = torch.cat([tensor.flatten() for tensor in normal.values()])
    assert numbers.std() == pytest.approx(0.5, rel=0.03)
    assert numbers.mean() == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_a_prefix_can_be_filled_anew(reparameterization: str) -> None:
    base = FAMILIES["llama"].build()
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=3, reparameterization=reparameterization))
    model.initialize_prefix(text="w5 w9 w7", tokenizer=tokenizer())
    assert_holds(model, cache_of(base, torch.tensor([[5, 9, 7]])))
    assert model.prefixes.entry("default").config.init_text == "w5 w9 w7"
    model.initialize_prefix(input_ids=tokens(1, 3))
    assert_holds(model, cache_of(base, tokens(1, 3)))
    cache = cache_of(base, tokens(1, 3, seed=9))
    model.initialize_prefix(past_key_values=cache)
    assert_holds(model, cache)
    with pytest.raises(PrefixConfigError, match="Give exactly one of"):
        model.initialize_prefix()


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (dict(init="text"), {}, "needs the text once"),
        (dict(init="text", init_text="w5"), {}, "needs a tokenizer"),
        (dict(init="text", init_text="w5"), dict(input_ids=torch.tensor([5])), "needs the text once"),
        (dict(init="cache"), {}, "pass past_key_values"),
        ({}, dict(input_ids=torch.tensor([5])), 'use init="text"'),
        ({}, dict(past_key_values=DynamicCache()), 'use init="cache"'),
    ],
)
def test_what_an_initializer_lacks_is_named(config: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(PrefixConfigError, match=message):
        get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(**config), **given)


def test_caches_and_texts_that_do_not_fit_are_refused() -> None:
    base = FAMILIES["llama"].build()
    config = PrefixConfig(num_virtual_tokens=3, init="cache")
    with pytest.raises(PrefixInputError, match=r"keys of shape \(1, 2, 5, 16\) where \(1, 2, 3, 16\) is needed"):
        get_prefix_model(base, config, past_key_values=cache_of(base, tokens(1, 5)))
    with pytest.raises(PrefixInputError, match=r"keys of shape \(2, 2, 3, 16\)"):
        get_prefix_model(base, config, past_key_values=cache_of(base, tokens(2, 3)))
    with pytest.raises(PrefixInputError, match="Layer 0 of the cache holds nothing"):
        get_prefix_model(base, config, past_key_values=DynamicCache())
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=3))
    with torch.no_grad():
        filled = model(input_ids=tokens(1, 3), use_cache=True).past_key_values
    with pytest.raises(PrefixInputError, match="read with prefix 'default'"):
        model.initialize_prefix(past_key_values=filled)
    for ids in (tokens(2, 3), torch.zeros(0, dtype=torch.long), torch.rand(3)):
        with pytest.raises(PrefixInputError, match="one row of at least one token id"):
            model.initialize_prefix(input_ids=ids)
