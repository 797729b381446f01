from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, random_model, tokens
from transformers import DynamicCache, StaticCache

from peft_prefix.cache import PrefixedCache, RowOrder


def states(rows: int, length: int, width: int = 4) -> torch.Tensor:
    return torch.randn(rows, 2, length, width)


def test_without_a_cache_underneath_nothing_is_stored() -> None:
    prefix = (states(1, 3), states(1, 3, 5))
    cache = PrefixedCache([prefix], past=None)
    new = (states(2, 6), states(2, 6, 5))
    for _ in range(2):  # a layer may run twice, as gradient checkpointing does
        keys, values = cache.update(*new, 0)
        assert torch.equal(keys, torch.cat([prefix[0].expand(2, -1, -1, -1), new[0]], dim=2))
        assert torch.equal(values, torch.cat([prefix[1].expand(2, -1, -1, -1), new[1]], dim=2))
        assert cache.get_seq_length() == 3
        assert cache.get_mask_sizes(6, 0) == (9, 0)


@pytest.mark.parametrize("offset", [0, 1])
def test_the_users_cache_holds_real_tokens_only(offset: int) -> None:
    past = DynamicCache()
    pieces = [states(2, 4), states(2, 1), states(2, 2)]
    prefix = (states(1, 3), states(1, 3))
    for piece in pieces:
        cache = PrefixedCache([prefix], past)
        keys, values = cache.update(piece, piece + offset, 0)
    expected = torch.cat(pieces, dim=2)
    assert torch.equal(past.layers[0].keys, expected)
    assert torch.equal(past.layers[0].values, expected + offset)
    assert torch.equal(keys[:, :, 3:], expected)
    assert torch.equal(values[:, :, :3], prefix[1].expand(2, -1, -1, -1))
    assert (past.get_seq_length(), cache.get_seq_length()) == (7, 10)
    past.crop(-3)
    assert torch.equal(past.layers[0].keys, expected[:, :, :4])


def test_the_prefix_takes_dtype_and_device_of_the_new_tokens() -> None:
    cache = PrefixedCache([(states(1, 3), states(1, 3))], past=None)
    keys, values = cache.update(states(1, 2).bfloat16(), states(1, 2).bfloat16(), 0)
    assert keys.dtype == values.dtype == torch.bfloat16


def test_unread_layers_are_known() -> None:
    cache = PrefixedCache([(states(1, 3), states(1, 3))] * 3, past=None)
    cache.update(states(1, 2), states(1, 2), 1)
    assert cache.unread_layers() == [0, 2]


def test_row_order_puts_the_prefix_behind_the_left_padding() -> None:
    order = RowOrder(torch.tensor([0, 2, 4]), num_virtual_tokens=3)
    # entries of "prefix, row": 0-2 are the prefix, 3-6 the row
    assert order.indices(7).tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [3, 4, 0, 1, 2, 5, 6],
        [3, 4, 5, 6, 0, 1, 2],
    ]
    entries = torch.arange(7.0)[None, None, :, None].expand(3, 2, 7, 1)
    assert torch.equal(order.apply(entries)[:, 1, :, 0].long(), order.indices(7))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mistral"])
def test_a_static_cache_gives_the_same_logits(family: str) -> None:
    model = random_model(FAMILIES[family].build("sdpa"))
    text = tokens(2, 14)
    static = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        expected = model(input_ids=text, use_cache=False).logits
        first = model(input_ids=text[:, :5], past_key_values=static).logits
        rest = [model(input_ids=text[:, i : i + 1], past_key_values=static).logits for i in range(5, 14)]
    assert_close(torch.cat([first, *rest], dim=1), expected)
