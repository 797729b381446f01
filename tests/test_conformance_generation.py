"""Generation in every decoding mode, over every family, against the base model on the same tokens as text."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import CAUSAL, supported_attention
from helpers import Recorder, attention_cache, model_with_tokens, random_model, tokens, with_text
from transformers import DynamicCache, PreTrainedModel

from peft_prefix import PrefixModel

BACKENDS = [(name, attn) for name, family in CAUSAL.items() for attn in supported_attention(family)]
every_backend = pytest.mark.parametrize(("family", "attn"), BACKENDS)
every_family = pytest.mark.parametrize("family", CAUSAL)

MODES: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, top_k=20),
    "beams": dict(do_sample=False, num_beams=3, length_penalty=0.8),
    "beam samples": dict(do_sample=True, num_beams=2, num_return_sequences=2),
    "several sequences": dict(do_sample=True, num_return_sequences=3),
    "no cache": dict(do_sample=False, use_cache=False),
    "no repeats": dict(do_sample=False, no_repeat_ngram_size=2, repetition_penalty=1.3),
}


def _lengths(family: str) -> tuple[int, int, int]:
    """Prefix, text and new tokens; all within the window where there is one."""
    return (2, 3, 3) if CAUSAL[family].sliding else (3, 6, 8)


@pytest.mark.conformance("generate")
@pytest.mark.parametrize("mode", MODES)
@every_backend
def test_generates_what_the_base_generates_after_the_same_tokens(family: str, attn: str, mode: str) -> None:
    base = CAUSAL[family].build(attn)
    p, length, new = _lengths(family)
    prefix, text = tokens(1, p, seed=2)[0], tokens(2, length)
    options = {**MODES[mode], "max_new_tokens": new}
    if mode == "no repeats":  # these look at the prompt, which must not contain the prefix
        model = random_model(base, p)
        torch.manual_seed(0)
        actual = model.generate(text, **options)
        assert torch.equal(actual, _greedy_by_hand(model, text, new, base, options))
        return
    torch.manual_seed(0)
    if CAUSAL[family].recurrent:
        expected = _generated_after_cache(base, prefix, text, options)
    else:
        expected = base.generate(with_text(prefix, text), **options)[:, p:]
    torch.manual_seed(0)
    actual = model_with_tokens(base, prefix).generate(text, **options)
    assert torch.equal(actual, expected)


def _generated_after_cache(
    base: PreTrainedModel, prefix: torch.Tensor, text: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """What the base generates behind a cache whose attention layers know some tokens, and no other layer does."""
    rows = text.shape[0] * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    mask = torch.ones(text.shape[0], len(prefix) + text.shape[1], dtype=torch.long)
    options = {**options, "use_cache": True}
    return base.generate(text, attention_mask=mask, past_key_values=attention_cache(base, prefix, rows), **options)


def _works(base: PreTrainedModel, text: torch.Tensor, options: dict[str, Any], **more: Any) -> bool:
    """Whether the base itself supports a way of generating, and gets the same tokens as without it."""
    try:
        return torch.equal(base.generate(text, **options, **more), base.generate(text, **options))
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return False


def _greedy_by_hand(
    model: PrefixModel, text: torch.Tensor, new: int, base: Any, options: dict[str, Any]
) -> torch.Tensor:
    """Greedy decoding from full forward passes, with the logits processors that `generate` would make."""
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]),
            NoRepeatNGramLogitsProcessor(options["no_repeat_ngram_size"]),
        ]
    )
    ids = text
    with torch.no_grad():
        for _ in range(new):
            scores = processors(ids, model(input_ids=ids, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.conformance("generate, padded")
@every_backend
def test_left_padded_rows_generate_what_they_generate_alone(family: str, attn: str) -> None:
    model = random_model(CAUSAL[family].build(attn))
    text, pad = tokens(2, 14), 6
    text[0, :pad] = 0
    mask = (text != 0).long()
    for options in ({}, dict(num_beams=2), dict(use_cache=False)):
        together = model.generate(text, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)
        for row, start in ((0, pad), (1, 0)):
            alone = model.generate(text[row : row + 1, start:], max_new_tokens=12, do_sample=False, **options)
            assert torch.equal(together[row, start:], alone[0]), (row, options)


@pytest.mark.conformance("generate, long")
@every_backend
def test_cached_generation_equals_full_forward_passes(family: str, attn: str) -> None:
    """Several windows long: the cache drops old tokens, but never the prefix."""
    model = random_model(CAUSAL[family].build(attn))
    text, new = tokens(2, 10), 14
    ids = text
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(text, max_new_tokens=new, do_sample=False), ids)
    embeddings = model.get_input_embeddings()(text)
    if "inputs_embeds" not in inspect.signature(model.base.prepare_inputs_for_generation).parameters:
        return  # the base does not generate from embeddings
    assert torch.equal(model.generate(inputs_embeds=embeddings, max_new_tokens=new, do_sample=False), ids[:, 10:])


@pytest.mark.conformance("static cache")
@every_backend
def test_a_static_cache_generates_the_same(family: str, attn: str) -> None:
    base = CAUSAL[family].build(attn)
    text = tokens(2, 14)
    text[0, :6] = 0
    options = dict(attention_mask=(text != 0).long(), max_new_tokens=12, do_sample=False, use_cache=True)
    if not _works(base, text, options, cache_implementation="static"):
        pytest.skip("the base itself does not work with a static cache")
    model = random_model(base)
    expected = model.generate(text, **options)
    assert torch.equal(model.generate(text, **options, cache_implementation="static"), expected)


@pytest.mark.conformance("chunked prefill")
@every_family
def test_chunked_prefill_generates_the_same(family: str) -> None:
    base = CAUSAL[family].build()
    text = tokens(2, 14)
    text[0, :6] = 0
    options = dict(attention_mask=(text != 0).long(), max_new_tokens=12, do_sample=False, use_cache=True)
    if not _works(base, text, options, prefill_chunk_size=4):
        pytest.skip("the base itself does not read a prompt in chunks")
    model = random_model(base)
    expected = model.generate(text, **options)
    assert torch.equal(model.generate(text, **options, prefill_chunk_size=4), expected)


@pytest.mark.conformance("prompt lookup")
@every_family
def test_prompt_lookup_equals_greedy(family: str) -> None:
    base = CAUSAL[family].build()
    text = tokens(1, 4).repeat(1, 3)  # repeats itself, so that candidates are found
    options = dict(max_new_tokens=10, do_sample=False, use_cache=True)
    if not _works(base, text, options, prompt_lookup_num_tokens=3):
        pytest.skip("the base itself does not support prompt lookup")
    model = random_model(base)
    expected = model.generate(text, **options)
    assert torch.equal(model.generate(text, **options, prompt_lookup_num_tokens=3), expected)


@pytest.mark.conformance("several turns")
@every_family
def test_a_users_cache_is_continued_over_several_turns(family: str) -> None:
    model = random_model(CAUSAL[family].build())
    first, second = tokens(1, 6), tokens(1, 3, seed=5)
    cache = DynamicCache(config=model.config)
    options = dict(max_new_tokens=4, do_sample=False, use_cache=True)
    turn = model.generate(first, past_key_values=cache, **options)
    history = torch.cat([turn, second], dim=1)
    expected = model.generate(history, **options)
    assert torch.equal(model.generate(history, past_key_values=cache, **options), expected)


@pytest.mark.conformance("streaming")
@every_family
def test_streaming_yields_the_generated_tokens(family: str) -> None:
    model = random_model(CAUSAL[family].build())
    text, recorder = tokens(1, 5), Recorder()
    ids = model.generate(text, max_new_tokens=5, do_sample=False, streamer=recorder)
    assert recorder.received == [*ids[0].tolist(), -1]
