"""The invariants of encoder-decoder models, over every family, attention backend and dtype.

The reference is the plain base model. In self-attention of the decoder a prefix acts like real tokens before the text.
In attention to the source, and in the encoder's attention to itself, every position sees every other: what some
positions contribute can be taken out of the source and given as a prefix, and nothing may change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import ENCODER_DECODERS, supported_attention
from helpers import (
    SOURCE_LENGTH as LENGTH,
)
from helpers import (
    TOLERANCE,
    assert_close,
    assert_only_the_prefix_learns,
    model_with_states,
    pinned_masks,
    random_model,
    source_of,
    tokens,
    with_text,
    without,
)
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from peft_prefix import PrefixModel
from peft_prefix.recording import record
from peft_prefix.structure import find_structure

BACKENDS = [(name, attn) for name, family in ENCODER_DECODERS.items() for attn in supported_attention(family)]
every_backend = pytest.mark.parametrize(("family", "attn"), BACKENDS)
every_family = pytest.mark.parametrize("family", ENCODER_DECODERS)
every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
RELATIVE = {"t5", "mt5", "umt5", "switch_transformers", "longt5_local", "longt5_global"}
"""Families whose encoder counts distances, so that a prefix stands before the text."""


@pytest.mark.conformance("oracle")
@every_precision
@every_backend
def test_decoder_prefix_of_real_tokens_acts_like_those_tokens(family: str, attn: str, dtype: torch.dtype) -> None:
    base = ENCODER_DECODERS[family].build(attn, dtype)
    p, length = (2, 5) if ENCODER_DECODERS[family].sliding else (3, 9)
    prefix, text, source = tokens(1, p, seed=2)[0], tokens(2, length), source_of(base, 2)
    one = {name: value[:1] for name, value in source.items()}
    # What a decoder computes depends on its source, so this prefix is right for the first row.
    states = record(base, find_structure(base), {**one, "decoder_input_ids": prefix[None]})
    model = model_with_states(base, {"decoder": states["decoder"]}, p)
    with torch.no_grad():
        expected = base(**one, decoder_input_ids=with_text(prefix, text[:1])).logits[:, p:]
        actual = model(**one, decoder_input_ids=text[:1]).logits
        plain = base(**one, decoder_input_ids=text[:1]).logits
        both = model(**source, decoder_input_ids=text).logits
    assert_close(actual, expected, dtype)
    assert_close(both[:1], expected, dtype)
    assert (actual - plain).abs().max() > 10 * (actual - expected).abs().max()


@pytest.mark.conformance("windows")
@every_precision
@every_backend
def test_decoder_prefix_stays_visible_beyond_the_window(family: str, attn: str, dtype: torch.dtype) -> None:
    if not ENCODER_DECODERS[family].sliding:
        pytest.skip("has no sliding window")
    base = ENCODER_DECODERS[family].build(attn, dtype)
    p, length, source = 3, 30, source_of(base, 1)
    prefix, text = tokens(1, p, seed=2)[0], tokens(1, length)
    states = record(base, find_structure(base), {**source, "decoder_input_ids": prefix[None]})
    model = model_with_states(base, {"decoder": states["decoder"]}, p)
    with torch.no_grad():
        masks = pinned_masks(base, p, length)
        ids = with_text(prefix, text)
        expected = base(**source, decoder_input_ids=ids, decoder_attention_mask=masks).logits[:, p:]
        actual = model(**source, decoder_input_ids=text).logits
    assert_close(actual, expected, dtype)


@pytest.mark.conformance("cross")
@every_precision
@every_backend
def test_cross_prefix_stands_for_a_part_of_the_source(family: str, attn: str, dtype: torch.dtype) -> None:
    base = ENCODER_DECODERS[family].build(attn, dtype)
    p, text, source = 3, tokens(1, 7), source_of(base, 1)
    with torch.no_grad():
        encoded = base.get_encoder()(**source)
        expected = base(encoder_outputs=encoded, decoder_input_ids=text).logits
        plain = base(encoder_outputs=without(encoded, slice(p, None)), decoder_input_ids=text).logits
    states = record(base, find_structure(base), {"encoder_outputs": encoded, "decoder_input_ids": text})["cross"]
    model = model_with_states(base, {"cross": _cut(states, slice(0, p))}, p)
    with torch.no_grad():
        actual = model(encoder_outputs=without(encoded, slice(p, None)), decoder_input_ids=text).logits
    assert_close(actual, expected, dtype)
    assert (actual - plain).abs().max() > 10 * (actual - expected).abs().max()


@pytest.mark.conformance("encoder")
@every_precision
@every_backend
def test_encoder_prefix_stands_for_a_part_of_the_source(family: str, attn: str, dtype: torch.dtype) -> None:
    base = ENCODER_DECODERS[family].build(attn, dtype)
    if base.main_input_name != "input_ids":
        pytest.skip("its encoder takes inputs of one length, so none can be left out; see test_encoder_by_hand.py")
    p, length, text = 2, 5, tokens(1, 7)  # short enough for the blocks and windows of long-input encoders
    source = source_of(base, 1, length)
    own, rest = (slice(0, p), slice(p, None)) if family in RELATIVE else (slice(-p, None), slice(0, -p))
    with torch.no_grad():
        encoded = base.get_encoder()(**source)
        expected = base(encoder_outputs=without(encoded, rest), decoder_input_ids=text).logits
    states = record(base, find_structure(base), {**source, "decoder_input_ids": text})["encoder"]
    model = model_with_states(base, {"encoder": _cut(states, own)}, p)
    with torch.no_grad():
        actual = model(input_ids=source["input_ids"][:, rest], decoder_input_ids=text).logits
        plain = base(input_ids=source["input_ids"][:, rest], decoder_input_ids=text).logits
        hidden = model.get_encoder()(input_ids=source["input_ids"][:, rest])[0]
    assert_close(actual, expected, dtype)
    assert_close(hidden, encoded[0][:, rest], dtype)
    assert (actual - plain).abs().max() > 10 * (actual - expected).abs().max()


@pytest.mark.conformance("backends")
@every_precision
@every_family
def test_backends_agree(family: str, dtype: torch.dtype) -> None:
    implementations = supported_attention(ENCODER_DECODERS[family])
    if len(implementations) < 2:
        pytest.skip("has one attention implementation on the CPU")
    logits = []
    for attn in implementations:
        base = ENCODER_DECODERS[family].build(attn, dtype)
        source = _padded(source_of(base, 2))
        with torch.no_grad():
            logits.append(random_model(base)(**source, decoder_input_ids=tokens(2, 9)).logits)
    assert_close(logits[0], logits[1], dtype)


@pytest.mark.conformance("padding")
@every_precision
@every_backend
def test_padding_does_not_matter(family: str, attn: str, dtype: torch.dtype) -> None:
    base = ENCODER_DECODERS[family].build(attn, dtype)
    model, text = random_model(base), tokens(2, 9)
    source = source_of(base, 2)
    text_mask = torch.ones_like(text)
    text_mask[0, 6:] = 0
    with torch.no_grad():
        alone = model(**{name: value[:1] for name, value in source.items()}, decoder_input_ids=text[:1]).logits
        together = model(**source, decoder_input_ids=text, decoder_attention_mask=text_mask).logits
    assert_close(together[:1, :6], alone[:, :6], dtype)
    if base.main_input_name != "input_ids":
        return
    shorter = LENGTH - 5
    ids = source["input_ids"]
    with torch.no_grad():
        alone = model(input_ids=ids[:1, :shorter], decoder_input_ids=text[:1]).logits
        padded = model(**_padded(source), decoder_input_ids=text).logits
        float_mask = {**_padded(source), "attention_mask": _padded(source)["attention_mask"].float()}
        padded_by_float = model(**float_mask, decoder_input_ids=text).logits
    assert_close(padded[:1], alone, dtype)
    assert_close(padded_by_float[:1], alone, dtype)
    if family in RELATIVE - {"longt5_global"}:  # others depend on padding on the left, with and without a prefix
        left = ids.roll(5, dims=1)
        left[0, :5] = 0
        left[1] = ids[1]
        mask = torch.ones_like(left)
        mask[0, :5] = 0
        left[0, 5:] = ids[0, :shorter]
        with torch.no_grad():
            padded_left = model(input_ids=left, attention_mask=mask, decoder_input_ids=text).logits
        assert_close(padded_left[:1], alone, dtype)


@pytest.mark.conformance("cached")
@every_precision
@every_backend
def test_cached_equals_uncached(family: str, attn: str, dtype: torch.dtype) -> None:
    base = ENCODER_DECODERS[family].build(attn, dtype)
    model, text, source = random_model(base), tokens(2, LENGTH), _padded(source_of(base, 2))
    if not _decodes_with_a_cache(base):
        pytest.skip("with a cache the base itself gets other results than without")
    cache = EncoderDecoderCache(DynamicCache(config=base.config.get_text_config(decoder=True)), DynamicCache())
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=text, use_cache=False)
        pieces = []
        for start, end in [(0, 5), (5, 6), (6, 7), (7, LENGTH)] if _continues_a_text(base) else _one_by_one():
            output = model(**source, decoder_input_ids=text[:, start:end], past_key_values=cache)
            assert output.past_key_values is cache
            pieces.append(output.logits)
        returned = model(**source, decoder_input_ids=text[:, :-1]).past_key_values
        continued = model(**source, decoder_input_ids=text[:, -1:], past_key_values=returned).logits
    assert expected.get("past_key_values") is None
    assert cache.get_seq_length() == LENGTH
    assert_close(torch.cat(pieces, dim=1), expected.logits, dtype)
    assert_close(continued, expected.logits[:, -1:], dtype)


@pytest.mark.conformance("inputs")
@every_precision
@every_backend
def test_all_ways_to_give_the_same_input_agree(family: str, attn: str, dtype: torch.dtype) -> None:
    base = ENCODER_DECODERS[family].build(attn, dtype)
    model, text, source = random_model(base), tokens(2, 7), source_of(base, 2)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=text).logits
        encoded = model.get_encoder()(**source)
        mask = {"attention_mask": source["attention_mask"]} if "attention_mask" in source else {}
        variants: dict[str, dict[str, Any]] = {
            "encoder_outputs": dict(encoder_outputs=encoded, decoder_input_ids=text),
            "encoder_outputs and mask": dict(encoder_outputs=encoded, decoder_input_ids=text, **mask),
            "decoder mask": dict(**source, decoder_input_ids=text, decoder_attention_mask=torch.ones_like(text)),
            "no cache": dict(**source, decoder_input_ids=text, use_cache=False),
        }
        if mask:
            variants["no encoder mask"] = dict(input_ids=source["input_ids"], decoder_input_ids=text)
        for name, arguments in variants.items():
            try:
                assert_close(model(**arguments).logits, expected, dtype)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


@pytest.mark.conformance("labels")
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way to train encoder-decoder models")
@every_family
def test_loss_is_that_of_the_logits_of_shifted_labels(family: str) -> None:
    base = ENCODER_DECODERS[family].build()
    model, source, labels = random_model(base), source_of(base, 2), tokens(2, 8)
    labels[0, 5:] = -100
    start = getattr(base.config, "decoder_start_token_id", None)
    if start is None:
        start = base.config.get_text_config(decoder=True).bos_token_id
    if family in ("mbart", "plbart"):  # their labels begin with the language, which they take from the end
        pytest.skip("shifts labels in a way of its own")
    if family == "prophetnet":
        pytest.skip("its loss adds those of the future tokens")
    shifted = torch.cat([torch.full((2, 1), start), labels[:, :-1]], dim=1).masked_fill_(
        torch.cat([torch.zeros(2, 1), labels[:, :-1]], dim=1) == -100, 0
    )
    with torch.no_grad():
        output = model(**source, labels=labels)
        logits = model(**source, decoder_input_ids=shifted).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.conformance("gradients")
@every_precision
@every_backend
def test_every_virtual_token_of_every_site_learns_and_nothing_else(family: str, attn: str, dtype: torch.dtype) -> None:
    base = ENCODER_DECODERS[family].build(attn, dtype)
    before = {name: parameter.detach().clone() for name, parameter in base.state_dict().items()}
    model = random_model(base).train()
    assert set(model.geometry.sites) == {"encoder", "decoder", "cross"}
    source = source_of(base, 1, 40)
    model(**source, decoder_input_ids=tokens(1, 30)).logits[:, -1].float().square().sum().backward()
    assert_only_the_prefix_learns(model, before)


@pytest.mark.conformance("causality")
@every_precision
@every_backend
def test_first_token_reaches_the_last_and_none_sees_a_later_one(family: str, attn: str, dtype: torch.dtype) -> None:
    base = ENCODER_DECODERS[family].build(attn, dtype)
    model, text, source = random_model(base), tokens(2, LENGTH), source_of(base, 2)
    source = {name: value[:1].expand(2, *value.shape[1:]) for name, value in source.items()}
    text[1] = text[0]
    text[1, 6:] = tokens(1, LENGTH - 6, seed=9)
    first = text[:1].clone()
    first[0, 0] = (first[0, 0] - 2) % 190 + 3
    with torch.no_grad():
        logits = model(**source, decoder_input_ids=text).logits
        changed = model(**{n: v[:1] for n, v in source.items()}, decoder_input_ids=first).logits
    assert_close(logits[0, :6], logits[1, :6], dtype)
    assert (logits[0, 6:] - logits[1, 6:]).abs().amax(-1).min() > 1e-2
    assert (changed[0, -1] - logits[0, -1]).abs().max() > 1e-4


@pytest.mark.conformance("disabled")
@every_precision
@every_backend
def test_disabled_prefix_is_the_base_bit_for_bit(family: str, attn: str, dtype: torch.dtype) -> None:
    base = ENCODER_DECODERS[family].build(attn, dtype)
    source, text = source_of(base, 2), tokens(2, 9)
    options = dict(max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        expected = base(**source, decoder_input_ids=text).logits
        expected_ids = base.generate(**source, **options)
        model = random_model(base)
        enabled = model(**source, decoder_input_ids=text).logits
        with model.disable_prefix():
            disabled = model(**source, decoder_input_ids=text).logits
            disabled_ids = model.generate(**source, **options)
        untouched = base(**source, decoder_input_ids=text).logits
        again = model(**source, decoder_input_ids=text).logits
    for same in (disabled, untouched):
        if family == "led":  # its strided views make results depend on the alignment of memory, by 1e-6
            assert_close(same, expected, dtype)
        else:
            assert torch.equal(same, expected)
    assert torch.equal(disabled_ids, expected_ids)
    assert not torch.allclose(enabled, expected, atol=1e-3)
    assert_close(again, enabled, dtype)


@pytest.mark.conformance("saved")
@every_precision
@every_family
def test_saved_equals_loaded(family: str, tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model(ENCODER_DECODERS[family].build(dtype=dtype), reparameterization="mlp", mlp_hidden_size=8)
    with torch.no_grad():
        for parameter in model.prefixes.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
    model.save_pretrained(tmp_path)
    loaded = PrefixModel.from_pretrained(ENCODER_DECODERS[family].build(dtype=dtype), tmp_path)
    source, text = source_of(model.base, 2), tokens(2, 9)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=text).logits
        assert torch.equal(loaded(**source, decoder_input_ids=text).logits, expected)


def _cut(states: list[Any], part: slice) -> list[Any]:
    return [(keys[:, :, part], values[:, :, part]) for keys, values in states]


def _padded(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The source with five tokens of padding at the end of its first row; features have no padding."""
    if "input_ids" not in source:
        return source
    ids, mask = source["input_ids"].clone(), source["attention_mask"].clone()
    ids[0, -5:] = 0
    mask[0, -5:] = 0
    return dict(input_ids=ids, attention_mask=mask)


def _decodes_with_a_cache(base: PreTrainedModel) -> bool:
    source, text = source_of(base, 1), tokens(1, 6)
    with torch.no_grad():
        cache = base(**source, decoder_input_ids=text[:, :5]).past_key_values
        last = base(**source, decoder_input_ids=text[:, 5:], past_key_values=cache).logits[:, -1]
        difference = (last - base(**source, decoder_input_ids=text).logits[:, -1]).abs().max()
    return bool(difference < 2 * TOLERANCE[base.dtype])


def _one_by_one() -> list[tuple[int, int]]:
    return [(0, 5), *((start, start + 1) for start in range(5, LENGTH))]


def _continues_a_text(base: PreTrainedModel) -> bool:
    source, text = source_of(base, 1), tokens(1, LENGTH)
    with torch.no_grad():
        cache = base(**source, decoder_input_ids=text[:, :5]).past_key_values
        try:
            continued = base(**source, decoder_input_ids=text[:, 5:], past_key_values=cache).logits
        except AssertionError:
            return False
        difference = (continued - base(**source, decoder_input_ids=text).logits[:, 5:]).abs().max()
    return bool(difference < 10 * TOLERANCE[base.dtype])
