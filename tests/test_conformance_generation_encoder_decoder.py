"""Generation of encoder-decoder models in every decoding mode, over every family.

What a prefix does in one forward pass is proved elsewhere (`test_conformance_encoder_decoder.py`); here full forward
passes without a cache are the reference for every way of generating, and the base itself for prefixes of real tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import ENCODER_DECODERS, supported_attention
from helpers import Recorder, assert_close, model_with_states, random_model, source_of, tokens, with_text
from packaging.version import Version
from transformers import PreTrainedModel

from peft_prefix import PrefixModel
from peft_prefix.recording import record
from peft_prefix.structure import find_structure

BACKENDS = [(name, attn) for name, family in ENCODER_DECODERS.items() for attn in supported_attention(family)]
every_backend = pytest.mark.parametrize(("family", "attn"), BACKENDS)
every_family = pytest.mark.parametrize("family", ENCODER_DECODERS)
NEW = 10
MODES: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, top_k=20),
    "beams of the paper": dict(do_sample=False, num_beams=6, length_penalty=0.8),
    "beam samples": dict(do_sample=True, num_beams=2, num_return_sequences=2),
    "several sequences": dict(do_sample=True, num_return_sequences=3),
    "no repeats": dict(do_sample=False, no_repeat_ngram_size=2, repetition_penalty=1.3),
}
FROM_THE_START = {"prophetnet"}
"""Families whose base itself gets other results with a cache than without."""


@pytest.mark.conformance("generate")
@every_backend
def test_decoder_prefix_generates_what_the_base_generates_after_the_same_tokens(family: str, attn: str) -> None:
    if family == "whisper":
        pytest.skip("its own generate does not continue a given text in a model without an end token")
    base = ENCODER_DECODERS[family].build(attn)
    p, length, new = (2, 3, 3) if ENCODER_DECODERS[family].sliding else (3, 4, NEW)
    source, start = source_of(base, 1), base.generate(**source_of(base, 1), max_new_tokens=1)[:, :1]
    prefix = torch.cat([start[0], tokens(1, p - 1, seed=2)[0]])
    text = torch.cat([start, tokens(1, length - 1)], dim=1)  # otherwise `generate` puts the start token there
    states = record(base, find_structure(base), {**source, "decoder_input_ids": prefix[None]})
    model = model_with_states(base, {"decoder": states["decoder"]}, p)
    for mode in ("greedy", "sampling", "beams of the paper", "several sequences"):
        options = {**MODES[mode], "max_new_tokens": new, "use_cache": family not in FROM_THE_START}
        torch.manual_seed(0)
        expected = base.generate(**source, decoder_input_ids=with_text(prefix, text), **options)
        torch.manual_seed(0)
        actual = model.generate(**source, decoder_input_ids=text, **options)
        assert torch.equal(actual[:, -new:], expected[:, -new:]), mode


@pytest.mark.conformance("generate, long")
@pytest.mark.parametrize("mode", MODES)
@every_backend
def test_cached_generation_equals_full_forward_passes(family: str, attn: str, mode: str) -> None:
    if family in FROM_THE_START:
        pytest.skip("with a cache the base itself gets other results than without")
    base = ENCODER_DECODERS[family].build(attn)
    model, source = random_model(base), source_of(base, 2)
    options = {**MODES[mode], "max_new_tokens": NEW}
    torch.manual_seed(0)
    expected = model.generate(**source, **options, use_cache=False)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**source, **options), expected)


@pytest.mark.conformance("generate, long")
@every_family
def test_greedy_generation_takes_the_best_token_of_a_full_forward_pass(family: str) -> None:
    base = ENCODER_DECODERS[family].build()
    model, source = random_model(base), source_of(base, 2)
    if family in FROM_THE_START:
        pytest.skip("in the base itself earlier logits depend on later tokens")
    output = model.generate(
        **source, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        full = model(**source, decoder_input_ids=output.sequences[:, :-1]).logits
    assert_close(torch.stack(output.logits, dim=1), full, torch.float32)


@pytest.mark.conformance("generate, padded")
@every_backend
def test_rows_generate_what_they_generate_alone(family: str, attn: str) -> None:
    base = ENCODER_DECODERS[family].build(attn)
    model, source = random_model(base), source_of(base, 2)
    if "input_ids" in source:
        source["input_ids"][0, -5:] = 0
        source["attention_mask"][0, -5:] = 0
    for options in ({}, dict(num_beams=3), dict(use_cache=False)):
        together = model.generate(**source, max_new_tokens=NEW, do_sample=False, **options)
        for row, length in ((0, -5), (1, None)):
            one = {name: value[row : row + 1] for name, value in source.items()}
            if "input_ids" in source:
                one = {name: value[:, :length] for name, value in one.items()}
            alone = model.generate(**one, max_new_tokens=NEW, do_sample=False, **options)
            assert torch.equal(together[row], alone[0]), (row, options)


@pytest.mark.conformance("encoder_outputs")
@every_family
def test_generates_the_same_from_encoder_outputs(family: str) -> None:
    base = ENCODER_DECODERS[family].build()
    model, source = random_model(base), source_of(base, 2)
    options = dict(max_new_tokens=NEW, do_sample=False)
    expected = model.generate(**source, **options)
    with torch.no_grad():
        encoded = model.get_encoder()(**source)
    mask = {"attention_mask": source["attention_mask"]} if "attention_mask" in source else {}
    assert torch.equal(model.generate(encoder_outputs=encoded, **mask, **options), expected)


@pytest.mark.conformance("static cache")
@every_backend
def test_a_static_cache_generates_the_same(family: str, attn: str) -> None:
    base = ENCODER_DECODERS[family].build(attn)
    _compare_with_option(base, "does not work with a static cache", dict(cache_implementation="static"))


@pytest.mark.conformance("chunked prefill")
@every_family
def test_chunked_prefill_generates_the_same(family: str) -> None:
    base = ENCODER_DECODERS[family].build()
    reason = "does not read a prompt in chunks"
    _compare_with_option(base, reason, dict(prefill_chunk_size=4), decoder_input_ids=tokens(2, 7))


@pytest.mark.conformance("prompt lookup")
@every_family
def test_prompt_lookup_equals_greedy(family: str) -> None:
    base = ENCODER_DECODERS[family].build()
    if Version(transformers.__version__) < Version("5.23") and hasattr(base.config, "num_decoder_layers"):
        pytest.skip("the base itself crops a cache wrongly that is sized by its encoder")
    _compare_with_option(base, "does not support prompt lookup", dict(prompt_lookup_num_tokens=3), rows=1)


@pytest.mark.conformance("streaming")
@every_family
def test_streaming_yields_the_generated_tokens(family: str) -> None:
    model = random_model(ENCODER_DECODERS[family].build())
    if family == "whisper":
        pytest.skip("its own generate cuts the result differently from what it streams")
    recorder = Recorder()
    ids = model.generate(**source_of(model.base, 1), max_new_tokens=5, do_sample=False, streamer=recorder)
    assert recorder.received == [*ids[0].tolist(), -1]


def _compare_with_option(
    base: PreTrainedModel, otherwise: str, option: dict[str, Any], rows: int = 2, **more: Any
) -> None:
    """An option changes nothing with a prefix, if it changes nothing in the base."""
    source = source_of(base, rows)
    options = dict(max_new_tokens=NEW, do_sample=False, use_cache=True, **more)

    def unchanged(model: PreTrainedModel | PrefixModel) -> bool:
        return torch.equal(model.generate(**source, **options, **option), model.generate(**source, **options))

    try:
        works = unchanged(base)
    except (ValueError, TypeError, RuntimeError, AttributeError, AssertionError, IndexError):
        works = False
    if not works:
        pytest.skip(f"the base itself {otherwise}")
    assert unchanged(random_model(base))
