"""Nothing that a user passes is swallowed, and a prefix that would not act is an error."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, random_model, tokens
from transformers import DynamicCache

from peft_prefix import PrefixInputError, PrefixNotConsumedError, PrefixWarning


def test_misspelled_arguments_are_errors() -> None:
    model = random_model(FAMILIES["llama"].build())
    with pytest.raises(PrefixInputError, match="does not understand attention_msk"):
        model(input_ids=tokens(1, 4), attention_msk=torch.ones(1, 4))
    with pytest.raises(ValueError, match="attention_msk"):
        model.generate(tokens(1, 4), attention_msk=torch.ones(1, 4), max_new_tokens=2)
    with pytest.raises(PrefixInputError, match="does not understand position_ids"):
        random_model(FAMILIES["mpt"].build())(input_ids=tokens(1, 4), position_ids=torch.arange(4)[None])
    with pytest.raises(PrefixInputError, match="given twice"):
        model(tokens(1, 4), input_ids=tokens(1, 4))
    with pytest.raises(PrefixInputError, match="Pass either input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(1, 4))


def test_positional_arguments_have_the_bases_order() -> None:
    model = random_model(FAMILIES["llama"].build())
    text, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        assert torch.equal(model(text, mask).logits, model(input_ids=text, attention_mask=mask).logits)


def test_tuples_are_returned_where_tuples_are_asked_for() -> None:
    model = random_model(FAMILIES["llama"].build())
    with torch.no_grad():
        logits, cache = model(input_ids=tokens(1, 4), return_dict=False)
        (alone,) = model(input_ids=tokens(1, 4), return_dict=False, use_cache=False)
    assert isinstance(cache, DynamicCache)
    assert cache.get_seq_length() == 4
    assert_close(alone, logits)


def test_a_mask_with_columns_for_the_prefix_is_refused() -> None:
    model = random_model(FAMILIES["llama"].build())
    with pytest.raises(PrefixInputError, match=r"shape \(1, 8\) where \(1, 4\) is needed.*gets its columns by itself"):
        model(input_ids=tokens(1, 4), attention_mask=torch.ones(1, 8))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_text_beyond_the_models_positions_is_refused(family: str) -> None:
    model = random_model(FAMILIES[family].build(), p=6)
    model(input_ids=tokens(1, 250))
    with pytest.raises(
        PrefixInputError, match=r"6 virtual tokens and 251 real tokens need 257 .* has 256.*max_length=250"
    ):
        model(input_ids=tokens(1, 251))
    padded = tokens(1, 260)
    mask = torch.ones(1, 260, dtype=torch.long)
    mask[:, :15] = 0  # padding needs no positions
    model(input_ids=padded, attention_mask=mask)


def test_mpt_is_limited_by_its_own_name_for_the_length() -> None:
    model = random_model(FAMILIES["mpt"].build(), p=6)
    with pytest.raises(PrefixInputError, match="has 256"):
        model(input_ids=tokens(1, 251))


def test_a_cache_that_was_filled_without_the_prefix_is_refused() -> None:
    model = random_model(FAMILIES["llama"].build())
    cache = DynamicCache()
    model.base(input_ids=tokens(1, 4), past_key_values=cache)
    with pytest.raises(PrefixInputError, match="holds 4 tokens that were read without a prefix"):
        model(input_ids=tokens(1, 2), past_key_values=cache)
    with model.disable_prefix():
        model(input_ids=tokens(1, 2), past_key_values=cache)


def test_a_cache_that_was_filled_with_another_prefix_is_refused() -> None:
    base = FAMILIES["llama"].build()
    one, other = random_model(base).requires_grad_(False), random_model(base)
    cache = one(input_ids=tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(PrefixInputError, match="read with prefix 'default' of model"):
        other(input_ids=tokens(1, 2), past_key_values=cache)
    with one.disable_prefix(), pytest.raises(PrefixInputError, match="cannot be continued without a prefix"):
        one(input_ids=tokens(1, 2), past_key_values=cache)
    with one.disable_prefix(), pytest.raises(PrefixInputError, match="cannot be continued without a prefix"):
        one.generate(tokens(1, 6), past_key_values=cache)
    with torch.no_grad():
        expected = one(input_ids=tokens(1, 2), past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(one(input_ids=tokens(1, 2), past_key_values=cache).logits, expected)


def test_old_style_caches_are_refused() -> None:
    model = random_model(FAMILIES["llama"].build())
    with pytest.raises(PrefixInputError, match=r"must be a cache such as DynamicCache\(\) makes, not tuple"):
        model(input_ids=tokens(1, 2), past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_a_prefix_that_is_dropped_on_the_way_is_an_error() -> None:
    model = random_model(FAMILIES["llama"].build("sdpa"))

    def drop(_: object, args: object, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        return args, {**kwargs, "past_key_values": None}

    model.base.model.layers[1].register_forward_pre_hook(drop, with_kwargs=True)
    with pytest.raises(PrefixNotConsumedError, match=r"not read by layers \[1\] of the base model"):
        model(input_ids=tokens(1, 1))
    with pytest.raises(PrefixNotConsumedError, match=r"not read by layers \[1\] of the base model"):
        model.generate(tokens(1, 1), max_new_tokens=2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_static_cache_is_limited_too(family: str) -> None:
    model = random_model(FAMILIES[family].build(), p=10)
    options = dict(do_sample=False, cache_implementation="static")
    assert model.generate(tokens(1, 230), max_new_tokens=16, **options).shape == (1, 246)
    with pytest.warns(PrefixWarning, match="has 256 positions, and the prefix takes 10"):
        assert model.generate(tokens(1, 240), max_new_tokens=20, **options).shape == (1, 246)


def test_masks_of_other_dimensions_are_refused() -> None:
    model = random_model(FAMILIES["llama"].build())
    with pytest.raises(PrefixInputError, match="2 or 4 dimensions, not 3"):
        model(input_ids=tokens(1, 4), attention_mask=torch.ones(1, 4, 4))


def test_caches_follow_what_their_tokens_were_read_with() -> None:
    model = random_model(FAMILIES["llama"].build()).requires_grad_(False)
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens(1, 4), past_key_values=cache)
    cache.crop(-4)
    with model.disable_prefix():
        model(input_ids=tokens(1, 4), past_key_values=cache)
    with pytest.raises(PrefixInputError, match="read without a prefix"):
        model(input_ids=tokens(1, 2), past_key_values=cache)
    again = model(input_ids=tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(PrefixInputError, match="read with prefix"):
        copy.deepcopy(model)(input_ids=tokens(1, 2), past_key_values=again)
    model.initialize_prefix(input_ids=tokens(1, 4))
    with pytest.raises(PrefixInputError, match="read with prefix"):
        model(input_ids=tokens(1, 2), past_key_values=again)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_packed_texts_see_the_prefix_and_themselves(family: str, attn: str) -> None:
    model = random_model(FAMILIES[family].build(attn)).train()
    one, other = tokens(1, 11), tokens(1, 14, seed=5)
    positions = torch.cat([torch.arange(11), torch.arange(14)])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([one, other], dim=1), position_ids=positions).logits
        assert_close(packed[:, :11], model(input_ids=one).logits)
        assert_close(packed[:, 11:], model(input_ids=other).logits)


def test_dropout_acts_on_each_row_and_only_in_training() -> None:
    model = random_model(FAMILIES["llama"].build(), dropout=0.5)
    text = tokens(1, 5).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(*model(input_ids=text).logits)
        torch.manual_seed(0)
        one, other = model.train()(input_ids=text).logits
    assert (one - other).abs().max() > 1e-2
