"""`sliding_window="plain"`: virtual tokens leave a sliding window as real tokens do, exactly as in the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CAUSAL, ENCODER_DECODERS, FAMILIES, supported_attention
from helpers import assert_close, cache_of_tokens, model_with_states, source_of, tokens, with_text

from peft_prefix import PrefixConfig, PrefixConfigError, PrefixModel, get_prefix_model
from peft_prefix.recording import record
from peft_prefix.structure import find_structure

P, LENGTH = 4, 30
WINDOWED = [
    (name, attn)
    for name, family in CAUSAL.items()
    if family.sliding and name not in ("gpt_neo", "llama4_text")
    for attn in supported_attention(family)
]


def plain_model(family: str, attn: str, prefix: torch.Tensor) -> PrefixModel:
    base = FAMILIES[family].build(attn)
    config = PrefixConfig(num_virtual_tokens=len(prefix), init="cache", sliding_window="plain")
    return get_prefix_model(base, config, past_key_values=cache_of_tokens(base, prefix[None]))


@pytest.mark.conformance("plain windows")
@pytest.mark.parametrize(("family", "attn"), WINDOWED)
def test_a_prefix_of_real_tokens_acts_like_them_at_every_distance(family: str, attn: str) -> None:
    prefix, text = tokens(1, P, seed=2)[0], tokens(2, LENGTH)
    model = plain_model(family, attn, prefix)
    with torch.no_grad():
        expected = model.base(input_ids=with_text(prefix, text)).logits[:, P:]
        actual = model(input_ids=text).logits
        left, mask = text.clone(), torch.ones_like(text)
        left[0, :9], mask[0, :9] = 0, 0
        padded = model(input_ids=left, attention_mask=mask).logits[0, 9:]
        alone = model(input_ids=text[:1, 9:]).logits[0]
    assert_close(actual, expected)
    assert_close(padded, alone)


@pytest.mark.conformance("plain windows")
@pytest.mark.parametrize(("family", "attn"), WINDOWED)
def test_it_generates_what_the_base_generates_after_the_same_tokens(family: str, attn: str) -> None:
    prefix, text = tokens(1, P, seed=2)[0], tokens(2, 6)
    model = plain_model(family, attn, prefix)
    options = dict(max_new_tokens=14, do_sample=False)
    expected = model.base.generate(with_text(prefix, text), **options)[:, P:]
    assert torch.equal(model.generate(text, **options), expected)
    assert torch.equal(model.generate(text, **options, cache_implementation="static"), expected)


@pytest.mark.conformance("plain windows")
@pytest.mark.parametrize("family", [name for name, family in ENCODER_DECODERS.items() if family.sliding])
def test_a_decoders_prefix_of_real_tokens_acts_like_them_at_every_distance(family: str) -> None:
    base = FAMILIES[family].build()
    prefix, text, source = tokens(1, P, seed=2)[0], tokens(1, LENGTH), source_of(base, 1)
    states = record(base, find_structure(base), {**source, "decoder_input_ids": prefix[None]})
    model = model_with_states(base, {"decoder": states["decoder"]}, P, sliding_window="plain")
    pinned = model_with_states(base, {"decoder": states["decoder"]}, P)
    with torch.no_grad():
        expected = base(**source, decoder_input_ids=with_text(prefix, text)).logits[:, P:]
        actual = model(**source, decoder_input_ids=text).logits
        other = pinned(**source, decoder_input_ids=text).logits
    assert_close(actual, expected)
    assert (other - expected).abs().max() > 1e-2


def test_a_chunk_of_the_past_takes_the_prefix_with_it() -> None:
    base = FAMILIES["llama4_text"].build()
    model = get_prefix_model(
        base, PrefixConfig(num_virtual_tokens=P, init="normal", init_std=1.0, sliding_window="plain")
    )
    full = [index for index, kind in enumerate(base.config.layer_types) if kind == "full_attention"]
    model(input_ids=tokens(1, LENGTH)).logits[:, -1].square().sum().backward()
    first = {index for index, kind in enumerate(base.config.layer_types) if kind == "chunked_attention"}
    for index in full:
        assert (model.prefixes["default"].decoder.layers[str(index)].key.grad.abs().sum(dim=(0, 2)) > 1e-9).all()
    last = max(first)  # nothing after it carries what the first chunk has seen to the last token
    if last > max(full):
        assert not model.prefixes["default"].decoder.layers[str(last)].key.grad.any()


def test_the_choice_is_saved_with_the_prefix(tmp_path: Path) -> None:
    prefix, text = tokens(1, P, seed=2)[0], tokens(2, LENGTH)
    model = plain_model("mistral", "sdpa", prefix)
    model.save_pretrained(tmp_path)
    loaded = PrefixModel.from_pretrained(FAMILIES["mistral"].build("sdpa"), tmp_path)
    pinned = FAMILIES["mistral"].build("sdpa")
    other = get_prefix_model(
        pinned, PrefixConfig(num_virtual_tokens=P, init="cache"), past_key_values=cache_of_tokens(pinned, prefix[None])
    )
    with torch.no_grad():
        expected = model(input_ids=text).logits
        assert torch.equal(loaded(input_ids=text).logits, expected)
        assert (other(input_ids=text).logits - expected).abs().max() > 1e-2


def test_windows_that_are_buffers_can_only_be_pinned() -> None:
    with pytest.raises(PrefixConfigError, match="keeps its windows in buffers"):
        get_prefix_model(FAMILIES["gpt_neo"].build(), PrefixConfig(sliding_window="plain"))
