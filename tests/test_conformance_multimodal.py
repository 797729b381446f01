"""Models that read images: a prefix before a text with an image in it, against the base on the same tokens.

Text without an image is among the causal families (`test_conformance.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import MULTIMODAL, WINDOW, supported_attention
from families_multimodal import image_batch
from helpers import assert_close, model_with_tokens, random_model, tokens
from transformers import DynamicCache, PreTrainedModel

BACKENDS = [(name, attn) for name, family in MULTIMODAL.items() for attn in supported_attention(family)]
every_backend = pytest.mark.parametrize(("family", "attn"), BACKENDS)
every_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
P = 2


def batch_of(family: str, dtype: torch.dtype = torch.float32, **lengths: int) -> dict[str, Any]:
    """Two rows with one image each; short enough for the window where there is one."""
    short = dict(before=0, after=0) if MULTIMODAL[family].sliding else {}
    batch = image_batch(family, **{**short, **lengths})
    return {**batch, "pixel_values": batch["pixel_values"].to(dtype)}


def after(prefix: torch.Tensor, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with some tokens before each row."""
    rows = batch["input_ids"].shape[0]
    front = prefix.expand(rows, -1)
    wider = {**batch, "input_ids": torch.cat([front, batch["input_ids"]], dim=1)}
    for name, value in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in batch:
            wider[name] = torch.cat([torch.full_like(front, value), batch[name]], dim=1)
    return wider


@pytest.mark.conformance("image")
@every_precision
@every_backend
def test_prefix_of_real_tokens_acts_like_those_tokens_before_an_image(
    family: str, attn: str, dtype: torch.dtype
) -> None:
    base = MULTIMODAL[family].build(attn, dtype)
    prefix, batch = tokens(1, P, seed=2)[0], batch_of(family, dtype)
    assert batch["input_ids"].shape[1] + P <= WINDOW or not MULTIMODAL[family].sliding
    with torch.no_grad():
        expected = base(**after(prefix, batch)).logits[:, P:]
        plain = base(**batch).logits
        actual = model_with_tokens(base, prefix)(**batch).logits
        other_image = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
        changed = model_with_tokens(base, prefix)(**other_image).logits
    assert_close(actual, expected, dtype)
    assert (actual - plain).abs().max() > 10 * (actual - expected).abs().max()
    assert (actual - changed).abs().max() > 10 * (actual - expected).abs().max()


@pytest.mark.conformance("image")
@every_backend
def test_generates_what_the_base_generates_after_the_same_tokens(family: str, attn: str) -> None:
    base = MULTIMODAL[family].build(attn)
    prefix, batch, new = tokens(1, P, seed=2)[0], batch_of(family), 1 if MULTIMODAL[family].sliding else 8
    model = model_with_tokens(base, prefix)
    for options in (dict(do_sample=False), dict(do_sample=False, num_beams=3), dict(do_sample=True, top_k=20)):
        torch.manual_seed(0)
        expected = base.generate(**after(prefix, batch), **options, max_new_tokens=new)[:, -new:]
        torch.manual_seed(0)
        actual = model.generate(**batch, **options, max_new_tokens=new)[:, -new:]
        assert torch.equal(actual, expected), options


@pytest.mark.conformance("image")
@every_backend
def test_cached_generation_equals_full_forward_passes(family: str, attn: str) -> None:
    base = MULTIMODAL[family].build(attn)
    model, batch = random_model(base), batch_of(family, before=4, after=6)
    batch["attention_mask"][0, :3] = 0
    options = dict(max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


@pytest.mark.conformance("image")
@every_precision
@every_backend
def test_padding_does_not_matter(family: str, attn: str, dtype: torch.dtype) -> None:
    base = MULTIMODAL[family].build(attn, dtype)
    model, batch, pad = random_model(base), batch_of(family, dtype, before=6, after=6), 4
    batch["input_ids"][0, :pad] = 0
    batch["attention_mask"][0, :pad] = 0
    images = {
        name: value[: value.shape[0] // 2]
        for name, value in batch.items()
        if name in ("pixel_values", "image_grid_thw")
    }
    one = {name: value[:1, pad:] for name, value in batch.items() if name not in images}
    with torch.no_grad():
        together = model(**batch).logits[0, pad:]
        alone = model(**one, **images).logits[0]
    assert_close(together, alone, dtype)


@pytest.mark.conformance("image")
@every_backend
def test_the_prefix_learns_from_texts_with_images(family: str, attn: str) -> None:
    base = MULTIMODAL[family].build(attn)
    model, batch = random_model(base).train(), batch_of(family, before=10, after=20)
    model(**batch).logits[:, -1].square().sum().backward()
    for name, parameter in model.prefixes.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().sum(dim=(0, 2)) > 1e-9).all(), name


@pytest.mark.conformance("image")
@every_backend
def test_a_disabled_prefix_is_the_base_and_a_cache_is_continued(family: str, attn: str) -> None:
    base: PreTrainedModel = MULTIMODAL[family].build(attn)
    batch = batch_of(family, before=4, after=4)
    with torch.no_grad():
        expected = base(**batch).logits
        model = random_model(base)
        with model.disable_prefix():
            assert torch.equal(model(**batch).logits, expected)
        cache = DynamicCache(config=model.config)
        model(**batch, past_key_values=cache, use_cache=True)
        more = tokens(2, 3, seed=4)
        continued = model(input_ids=more, past_key_values=cache).logits
        full = {**batch, "input_ids": torch.cat([batch["input_ids"], more], dim=1)}
        del full["attention_mask"]
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in batch:
                full[name] = torch.cat([batch[name], torch.zeros_like(more)], dim=1)
        assert_close(continued, model(**full).logits[:, -3:])
