"""`generate` with a prefix acts in its own call and thread, and on real tokens."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import random_model, source_of, tokens
from test_conformance_ways_to_generate import word_tokenizer
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

from peft_prefix import PrefixInputError
from peft_prefix.passes import current_call


def test_generation_in_one_thread_does_not_touch_the_base_in_another() -> None:
    """Streaming runs `generate` in a thread, while others may use the same base."""
    base = FAMILIES["llama"].build()
    model, text = random_model(base), tokens(1, 6)
    with torch.no_grad():
        expected = base(input_ids=text).logits
    alone = model.generate(text, max_new_tokens=100, do_sample=False)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(model.generate(text, max_new_tokens=100, do_sample=False)))
    thread.start()
    while thread.is_alive():
        with torch.no_grad():
            assert torch.equal(base(input_ids=text).logits, expected)
    thread.join()
    assert torch.equal(results[0], alone)


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_a_logits_processor_may_use_the_model_while_it_generates(family: str) -> None:
    """As contrastive decoding does: with the prefix, without it, and generating itself."""
    model, text = random_model(FAMILIES[family].build()), tokens(1, 12)
    with torch.no_grad():
        with_prefix, without = model(input_ids=text).logits, model.base(input_ids=text).logits
    continued = model.generate(text, max_new_tokens=3, do_sample=False)
    expected = model.generate(text, max_new_tokens=1, do_sample=False)
    calls = []

    class Processor(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert torch.equal(model(input_ids=text).logits, with_prefix)
            with model.disable_prefix():
                assert torch.equal(model(input_ids=text).logits, without)
                assert torch.equal(model.base(input_ids=text).logits, without)
            assert torch.equal(model.generate(text, max_new_tokens=3, do_sample=False), continued)
            calls.append(input_ids)
            return scores

    processors = LogitsProcessorList([Processor()])
    assert torch.equal(model.generate(text, max_new_tokens=1, do_sample=False, logits_processor=processors), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_threads_may_generate_at_the_same_time(family: str) -> None:
    model = random_model(FAMILIES[family].build())
    texts = [tokens(1, 4 + i, seed=i) for i in range(4)]
    expected = [model.generate(text, max_new_tokens=20, do_sample=False) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda text: model.generate(text, max_new_tokens=20, do_sample=False), texts))
            assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_a_generation_that_fails_leaves_no_prefix_behind() -> None:
    base = FAMILIES["llama"].build()
    expected = base(input_ids=tokens(1, 3)).logits
    model = random_model(base)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(tokens(1, 3), max_new_tokens=-1)
    assert current_call() is None
    assert torch.equal(base(input_ids=tokens(1, 3)).logits, expected)


def test_max_length_counts_real_tokens() -> None:
    model = random_model(FAMILIES["llama"].build(), p=10)
    assert model.generate(tokens(2, 3), max_length=8, do_sample=False).shape == (2, 8)
    result = model.generate(
        tokens(2, 3), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert result.sequences.shape == (2, 7)
    assert len(result.scores) == 4
    assert result.past_key_values.get_seq_length() == 6


def test_a_streamer_in_a_thread_gives_the_text_with_the_prefix() -> None:
    model, text, tokenizer = random_model(FAMILIES["llama"].build()), tokens(1, 6), word_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments = dict(input_ids=text, max_new_tokens=20, do_sample=False, streamer=streamer)
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    received = "".join(streamer)
    thread.join()
    expected = model.generate(text, max_new_tokens=20, do_sample=False)[0, 6:]
    assert received.split() == tokenizer.decode(expected).split()


def test_a_way_to_generate_of_ones_own_runs_with_the_prefix() -> None:
    model, text = random_model(FAMILIES["llama"].build()), tokens(2, 6)

    def greedy(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        for _ in range(5):
            input_ids = torch.cat([input_ids, model(input_ids=input_ids).logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    options = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(text, custom_generate=greedy, **options), model.generate(text, **options))


@pytest.mark.parametrize(
    "option",
    [
        dict(penalty_alpha=0.6, top_k=4),
        dict(num_beam_groups=2, num_beams=4, diversity_penalty=0.5),
        dict(force_words_ids=[[5]], num_beams=2),
        dict(dola_layers="low"),
    ],
)
def test_ways_that_have_moved_to_the_hub_are_the_bases_own_errors(option: dict[str, Any]) -> None:
    model = random_model(FAMILIES["llama"].build())
    for one in (model.base, model):
        with pytest.raises(ValueError, match="trust_remote_code"):
            one.generate(tokens(1, 3), max_new_tokens=2, **option)


def test_arguments_that_nobody_knows_are_errors() -> None:
    model = random_model(FAMILIES["llama"].build())
    with pytest.raises(ValueError, match="max_newtokens"):
        model.generate(tokens(1, 3), max_newtokens=2)


@pytest.mark.parametrize("given", [dict(cache_implementation="paged"), None])
def test_requests_in_pages_run_in_another_thread_and_are_refused(given: dict[str, Any] | None) -> None:
    model = random_model(FAMILIES["llama"].build())
    config = GenerationConfig(max_new_tokens=2, cache_implementation="paged")
    with pytest.raises(PrefixInputError, match="generate_batch"):
        model.generate(tokens(1, 3), **(dict(generation_config=config) if given is None else given))


def test_a_decoder_alone_is_refused() -> None:
    for family in ("llama", "t5"):
        model = random_model(FAMILIES[family].build())
        with pytest.raises(PrefixInputError, match="without the prefix"):
            model.get_decoder()


def test_embeddings_and_output_are_replaced_in_the_base() -> None:
    model = random_model(FAMILIES["llama"].build())
    inputs, outputs = torch.nn.Embedding(210, 64), torch.nn.Linear(64, 210)
    model.set_input_embeddings(inputs)
    model.set_output_embeddings(outputs)
    assert model.base.get_input_embeddings() is inputs is model.get_input_embeddings()
    assert model.base.get_output_embeddings() is outputs is model.get_output_embeddings()
    assert model(input_ids=tokens(1, 4)).logits.shape == (1, 4, 210)


def test_an_assistants_encoder_has_the_assistants_prefix() -> None:
    """Of another prefix on the same base, whose encoder runs inside the main model's call."""
    base = FAMILIES["bart"].build()
    model, other, source = random_model(base), random_model(base, p=2), source_of(base, 1)
    encoded = []
    hook = base.get_encoder().register_forward_hook(lambda _, __, output: encoded.append(output[0]))
    model.generate(**source, max_new_tokens=6, do_sample=False, assistant_model=other)
    hook.remove()
    with torch.no_grad():
        expected = [one.get_encoder()(**source)[0] for one in (model, other)]
    assert [any(torch.equal(found, one) for found in encoded) for one in expected] == [True, True]


def test_an_assistant_may_have_another_tokenizer() -> None:
    base, other = FAMILIES["llama"].build(), FAMILIES["gpt2"].build(seed=3)
    model, text = random_model(base), tokens(1, 8, seed=4)
    other.resize_token_embeddings(210)
    ours, theirs = word_tokenizer(), word_tokenizer(210)
    options = dict(max_new_tokens=8, do_sample=False)
    expected = model.generate(text, **options)
    for assistant in (other, random_model(other, p=3)):
        actual = model.generate(text, **options, assistant_model=assistant, tokenizer=ours, assistant_tokenizer=theirs)
        assert torch.equal(actual, expected)
