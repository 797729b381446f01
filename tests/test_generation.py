"""`generate` with a prefix acts in its own call and thread, and on real tokens."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import random_model, tokens
from transformers import LogitsProcessor, LogitsProcessorList


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


def test_generation_leaves_no_hooks_behind() -> None:
    model = random_model(FAMILIES["llama"].build())
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(tokens(1, 3), max_new_tokens=-1)
    assert not model.base._forward_pre_hooks
    assert not model.base._forward_hooks


def test_max_length_counts_real_tokens() -> None:
    model = random_model(FAMILIES["llama"].build(), p=10)
    assert model.generate(tokens(2, 3), max_length=8, do_sample=False).shape == (2, 8)
    result = model.generate(
        tokens(2, 3), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert result.sequences.shape == (2, 7)
    assert len(result.scores) == 4
    assert result.past_key_values.get_seq_length() == 6
