"""The invariants of a forward pass, over every family, attention backend and dtype.

The reference is always the plain base model on real tokens: a prefix that holds the cache of some tokens must act
exactly like those tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CAUSAL, supported_attention
from helpers import (
    TOLERANCE,
    after_tokens,
    assert_close,
    assert_only_the_prefix_learns,
    fits_window,
    model_with_tokens,
    pinned_masks,
    random_model,
    tokens,
    with_text,
)
from transformers import DynamicCache, PreTrainedModel

from peft_prefix import PrefixModel

BACKENDS = [(name, attn) for name, family in CAUSAL.items() for attn in supported_attention(family)]
every_backend = pytest.mark.parametrize(("family", "attn"), BACKENDS)
every_family = pytest.mark.parametrize("family", CAUSAL)
every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
LONG = 30
"""Length of texts that are several windows long."""


@pytest.mark.conformance("oracle")
@every_precision
@every_backend
def test_prefix_of_real_tokens_acts_like_those_tokens(family: str, attn: str, dtype: torch.dtype) -> None:
    base = CAUSAL[family].build(attn, dtype)
    total, p = fits_window(CAUSAL[family], 16), 3
    prefix, text = tokens(1, p, seed=2)[0], tokens(2, total - p)
    with torch.no_grad():
        expected = after_tokens(base, prefix, text, recurrent=CAUSAL[family].recurrent)
        actual = model_with_tokens(base, prefix)(input_ids=text).logits
        without = base(input_ids=text).logits
    assert_close(actual, expected, dtype)
    assert (actual - without).abs().max() > 10 * (actual - expected).abs().max()


@pytest.mark.conformance("windows")
@every_precision
@every_backend
def test_prefix_stays_visible_beyond_the_window(family: str, attn: str, dtype: torch.dtype) -> None:
    base = CAUSAL[family].build(attn, dtype)
    if not CAUSAL[family].sliding:
        pytest.skip("has no sliding window")
    if family == "gpt_neo":
        pytest.skip("its windows are no masks, so none can be given by hand; see test_local_windows.py")
    prefix, text = tokens(1, 4, seed=2)[0], tokens(2, LONG)
    with torch.no_grad():
        masks = pinned_masks(base, 4, LONG)
        expected = base(input_ids=with_text(prefix, text), attention_mask=masks).logits[:, 4:]
        actual = model_with_tokens(base, prefix)(input_ids=text).logits
    assert_close(actual, expected, dtype)


@pytest.mark.conformance("backends")
@every_precision
@every_family
def test_backends_agree(family: str, dtype: torch.dtype) -> None:
    implementations = supported_attention(CAUSAL[family])
    if len(implementations) < 2:
        pytest.skip("has one attention implementation on the CPU")
    if dtype == torch.bfloat16 and "num_experts_per_tok" in CAUSAL[family].kwargs:
        pytest.skip("routed experts: rounding to bfloat16 can change which ones are chosen")
    text, mask = tokens(2, LONG), torch.ones(2, LONG, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        bases = [CAUSAL[family].build(attn, dtype) for attn in implementations]
        one, other = (base(input_ids=text).logits for base in bases)
        if (one - other).abs().max() > TOLERANCE[dtype]:
            pytest.skip("the backends of the base itself do not agree")
        eager, sdpa = (random_model(base)(input_ids=text, attention_mask=mask).logits for base in bases)
    assert_close(sdpa[mask.bool()], eager[mask.bool()], dtype)


@pytest.mark.conformance("padding")
@every_precision
@every_backend
def test_padding_does_not_matter(family: str, attn: str, dtype: torch.dtype) -> None:
    model = random_model(CAUSAL[family].build(attn, dtype))
    text, pad = tokens(2, LONG), 11
    left, right = text.clone(), text.clone()
    left[0, :pad], right[0, LONG - pad :] = 0, 0
    right[0, : LONG - pad] = text[0, pad:]
    left_mask, right_mask = torch.ones(2, LONG, dtype=torch.long), torch.ones(2, LONG, dtype=torch.long)
    left_mask[0, :pad], right_mask[0, LONG - pad :] = 0, 0
    with torch.no_grad():
        alone = model(input_ids=text[:1, pad:]).logits[0]
        padded_left = model(input_ids=left, attention_mask=left_mask).logits
        padded_right = model(input_ids=right, attention_mask=right_mask).logits
        float_mask = model(input_ids=left, attention_mask=left_mask.float()).logits
        other = model(input_ids=text[1:]).logits[0]
    assert_close(padded_left[0, pad:], alone, dtype)
    assert_close(padded_right[0, : LONG - pad], alone, dtype)
    assert_close(float_mask[0, pad:], alone, dtype)
    assert_close(padded_left[1], other, dtype)


@pytest.mark.conformance("cached")
@every_precision
@every_backend
def test_cached_equals_uncached(family: str, attn: str, dtype: torch.dtype) -> None:
    base = CAUSAL[family].build(attn, dtype)
    text, mask = tokens(2, LONG), torch.ones(2, LONG, dtype=torch.long)
    mask[0, :5] = 0
    if not _continues_a_text(CAUSAL[family].build(), text):
        pytest.skip("the base itself does not continue a text by several tokens at once")
    model = random_model(base)
    cache = DynamicCache(config=model.config)
    pieces = []
    with torch.no_grad():
        expected = model(input_ids=text, attention_mask=mask, use_cache=False)
        for start, end in [(0, 12), (12, 13), (13, 14), (14, LONG)]:
            output = model(input_ids=text[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            assert output.past_key_values is cache
            pieces.append(output.logits)
        returned = model(input_ids=text[:, :12], attention_mask=mask[:, :12], use_cache=True).past_key_values
        continued = model(input_ids=text[:, 12:], attention_mask=mask, past_key_values=returned).logits
    assert expected.past_key_values is None
    assert cache.get_seq_length() == LONG
    assert_close(torch.cat(pieces, dim=1)[mask.bool()], expected.logits[mask.bool()], dtype)
    assert_close(continued, expected.logits[:, 12:], dtype)


def _continues_a_text(base: PreTrainedModel, text: torch.Tensor) -> bool:
    with torch.no_grad():
        cache = base(input_ids=text[:, :12], use_cache=True).past_key_values
        continued = base(input_ids=text[:, 12:], past_key_values=cache).logits
        return (continued - base(input_ids=text).logits[:, 12:]).abs().max() < 1e-3


@pytest.mark.conformance("inputs")
@every_precision
@every_backend
def test_all_ways_to_give_the_same_input_agree(family: str, attn: str, dtype: torch.dtype) -> None:
    model = random_model(CAUSAL[family].build(attn, dtype))
    text = tokens(2, 7)
    ones = torch.ones(2, 7, dtype=torch.long)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].expand(2, 1, 7, 7)
    additive = torch.where(causal, 0.0, torch.finfo(dtype).min).to(dtype)
    with torch.no_grad():
        expected = model(input_ids=text).logits
        variants = {
            "2D mask": dict(input_ids=text, attention_mask=ones),
            "embeddings": dict(inputs_embeds=model.get_input_embeddings()(text)),
            "embeddings and mask": dict(inputs_embeds=model.get_input_embeddings()(text), attention_mask=ones),
            "no cache": dict(input_ids=text, use_cache=False),
        }
        if "position_ids" in CAUSAL[family].arguments():
            variants["positions"] = dict(input_ids=text, position_ids=torch.arange(7).expand(2, 7))
        if family not in ("bloom", "mpt", "falcon_alibi"):  # their position bias is made from a 2D mask
            variants["4D additive mask"] = dict(input_ids=text, attention_mask=additive)
            variants["4D boolean mask"] = dict(input_ids=text, attention_mask=causal)
        for name, arguments in variants.items():
            try:
                assert_close(model(**arguments).logits, expected, dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        if "logits_to_keep" in CAUSAL[family].arguments():
            assert_close(model(input_ids=text, logits_to_keep=2).logits, expected[:, -2:], dtype)


@pytest.mark.conformance("labels")
@every_family
def test_loss_is_that_of_the_base_on_the_same_text(family: str) -> None:
    base = CAUSAL[family].build()
    total, p = fits_window(CAUSAL[family], 12), 3
    prefix, text = tokens(1, p, seed=2)[0], tokens(2, total - p)
    with torch.no_grad():
        logits = after_tokens(base, prefix, text, recurrent=CAUSAL[family].recurrent)
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        actual = model_with_tokens(base, prefix)(input_ids=text, labels=text).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.conformance("gradients")
@every_precision
@every_backend
def test_every_virtual_token_of_every_layer_learns_and_nothing_else(family: str, attn: str, dtype: torch.dtype) -> None:
    base = CAUSAL[family].build(attn, dtype)
    before = {name: parameter.detach().clone() for name, parameter in base.state_dict().items()}
    model = random_model(base).train()
    text = tokens(1, 40)
    model(input_ids=text).logits[:, -1].square().sum().backward()
    assert_only_the_prefix_learns(model, before)


@pytest.mark.conformance("causality")
@every_precision
@every_backend
def test_first_token_reaches_the_last_and_none_sees_a_later_one(family: str, attn: str, dtype: torch.dtype) -> None:
    model = random_model(CAUSAL[family].build(attn, dtype))
    length = 12
    embeddings = model.get_input_embeddings()(tokens(1, length)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits[0]
    (last,) = torch.autograd.grad(logits[-1].square().sum(), embeddings, retain_graph=True)
    (middle,) = torch.autograd.grad(logits[5].square().sum(), embeddings)
    reached = last[0].abs().sum(-1) > 1e-9
    assert reached[[0, -1]].all()
    assert (middle[0, 6:] == 0).all()
    assert (middle[0, 5].abs() > 0).any()


@pytest.mark.conformance("disabled")
@every_precision
@every_backend
def test_disabled_prefix_is_the_base_bit_for_bit(family: str, attn: str, dtype: torch.dtype) -> None:
    base = CAUSAL[family].build(attn, dtype)
    text = tokens(2, LONG)
    with torch.no_grad():
        expected = base(input_ids=text).logits
        expected_ids = base.generate(text, max_new_tokens=4, do_sample=False)
        model = random_model(base)
        enabled = model(input_ids=text).logits
        with model.disable_prefix():
            disabled = model(input_ids=text).logits
            disabled_ids = model.generate(text, max_new_tokens=4, do_sample=False)
        untouched = base(input_ids=text).logits
        again = model(input_ids=text).logits
    assert torch.equal(disabled, expected)
    assert torch.equal(disabled_ids, expected_ids)
    assert torch.equal(untouched, expected)
    assert not torch.allclose(enabled, expected, atol=1e-3)
    assert torch.equal(again, enabled)


@pytest.mark.conformance("saved")
@every_precision
@every_family
def test_saved_equals_loaded(family: str, tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model(CAUSAL[family].build(dtype=dtype), reparameterization="mlp", mlp_hidden_size=8)
    with torch.no_grad():
        for parameter in model.prefixes.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
    model.save_pretrained(tmp_path)
    loaded = PrefixModel.from_pretrained(CAUSAL[family].build(dtype=dtype), tmp_path)
    text = tokens(2, LONG)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=text).logits, model(input_ids=text).logits)
