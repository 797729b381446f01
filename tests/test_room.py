"""Growing caches with a prefix in front write their new tokens in place, and never what another cache shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, random_model, tokens
from transformers import DynamicCache

from peft_prefix import PrefixInputError, PrefixModel

TEXT = tokens(2, 12)


def read(model: PrefixModel, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, past_key_values=cache).logits


@pytest.fixture
def model() -> PrefixModel:
    return random_model(FAMILIES["llama"].build())


def expected(model: PrefixModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def test_decoding_steps_write_in_place(model: PrefixModel) -> None:
    pointers = []

    def look(step_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        pointers.append(cache.layers[0].keys.data_ptr())
        return torch.zeros(len(step_ids), dtype=torch.bool)

    cache = DynamicCache(config=model.config)
    model.generate(
        TEXT, past_key_values=cache, max_new_tokens=20, do_sample=False, stopping_criteria=[look], use_cache=True
    )
    assert len(set(pointers[1:])) == 1
    assert cache.get_seq_length() == 12 + 19


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_steps_equal_one_pass(model: PrefixModel, mode: Any) -> None:
    with mode():
        cache = DynamicCache(config=model.config)
        parts = [read(model, cache, TEXT[:, start : start + 2]) for start in range(0, 12, 2)]
        assert_close(torch.cat(parts, dim=1).detach(), expected(model, TEXT).detach())


def test_a_cache_filled_in_inference_mode_goes_on_outside(model: PrefixModel) -> None:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        read(model, cache, TEXT[:, :4])
        read(model, cache, TEXT[:, 4:6])
    with torch.no_grad():
        actual = read(model, cache, TEXT[:, 6:])
        assert_close(actual, expected(model, TEXT)[:, 6:])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_go_on_apart(model: PrefixModel, copied: Any) -> None:
    one, two = tokens(2, 3, seed=5), tokens(2, 3, seed=6)

    def copy_of(cache: DynamicCache) -> DynamicCache:
        other = copied(cache)
        other.layers = [copied(layer) for layer in cache.layers]
        return other

    with (
        torch.no_grad(),
        model._acting(model._readers(None, {}), {}),
    ):  # one call, as in `generate`, so that the prefix is the same object
        run = lambda cache, ids: model.base(input_ids=ids, past_key_values=cache).logits  # noqa: E731
        cache = DynamicCache(config=model.config)
        run(cache, TEXT[:, :6])
        run(cache, TEXT[:, 6:8])
        other = copy_of(cache)
        first = [run(cache, one[:, [step]]) for step in range(3)]
        second = [run(other, two[:, [step]]) for step in range(3)]
        again = run(cache, TEXT[:, 8:9])
        cache.crop(-4)
        third = run(cache, two)
    with torch.no_grad():
        base = expected(model, torch.cat([TEXT[:, :8], one, TEXT[:, 8:9]], dim=1))
        assert_close(torch.cat([*first, again], dim=1), base[:, 8:])
        base = expected(model, torch.cat([TEXT[:, :8], two], dim=1))[:, 8:]
        assert_close(torch.cat(second, dim=1), base)
        assert_close(third, base)


def test_gradients_flow_through_a_cache(model: PrefixModel) -> None:
    cache = DynamicCache(config=model.config)
    logits = [read(model, cache, TEXT[:, :6]), read(model, cache, TEXT[:, 6:8]), read(model, cache, TEXT[:, 8:])]
    torch.cat(logits, dim=1).square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.prefixes.named_parameters()}
    model.zero_grad()
    expected(model, TEXT).square().mean().backward()
    for name, parameter in model.prefixes.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_loop_of_ones_own_writes_in_place(model: PrefixModel) -> None:
    cache, pointers = DynamicCache(config=model.config), set()
    with torch.no_grad():
        for step in range(12):
            read(model, cache, TEXT[:, [step]])
            pointers.add(cache.layers[0].keys.data_ptr() if step > 1 else 0)
        assert len(pointers) == 2
        actual = read(model, cache, tokens(2, 1, seed=9))
        assert_close(actual, expected(model, torch.cat([TEXT, tokens(2, 1, seed=9)], dim=1))[:, -1:])


def test_a_cache_goes_on_after_the_prefix_has_learned_nothing_else(model: PrefixModel) -> None:
    """Numbers that are put back are other numbers as far as anybody can tell."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        read(model, cache, TEXT[:, :2])
        read(model, cache, TEXT[:, 2:4])
        next(model.prefixes.parameters()).add_(1.0)
        with pytest.raises(PrefixInputError, match="cannot be continued"):
            read(model, cache, TEXT[:, 4:])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_cache_filled_under_autocast_goes_on_outside(family: str) -> None:
    model = random_model(FAMILIES[family].build("sdpa"))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            read(model, cache, TEXT[:, :6])
            read(model, cache, TEXT[:, 6:8])
        actual = read(model, cache, TEXT[:, 8:])
        torch.testing.assert_close(actual, expected(model, TEXT)[:, 8:], rtol=0, atol=5e-2)
