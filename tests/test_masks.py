from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

from peft_prefix import PrefixInputError
from peft_prefix.cache import RowOrder
from peft_prefix.masks import leading_padding, positions_of_real_tokens, with_prefix_columns

NEW = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.bool])
def test_a_padding_mask_gets_visible_columns_of_its_own_dtype(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]]).to(dtype)
    wide = with_prefix_columns(mask, 2, NEW, None)
    assert wide.dtype == dtype
    assert wide.long().tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]


def test_a_padding_mask_follows_the_row_order() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    order = RowOrder(leading_padding(mask), 2)
    assert with_prefix_columns(mask, 2, NEW, None, order).tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_four_dimensional_masks_get_visible_columns() -> None:
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert with_prefix_columns(causal, 2, NEW, None)[0, 0].long().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    additive = torch.where(causal, 0.0, -9.0)
    assert with_prefix_columns(additive, 2, NEW, None)[0, 0, 0].tolist() == [0, 0, 0, -9, -9]
    with pytest.raises(PrefixInputError, match=r"must be boolean .* or floating point"):
        with_prefix_columns(causal.long(), 2, NEW, None)


def test_no_mask_means_causal_and_every_key_for_a_single_token() -> None:
    parts = with_prefix_columns({"full_attention": None}, 1, NEW, None)
    assert parts["full_attention"][0, 0].long().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    past = DynamicCache()
    past.update(torch.zeros(2, 1, 4, 2), torch.zeros(2, 1, 4, 2), 0)
    one = with_prefix_columns(None, 1, NEW[:, :1], past)
    assert one.tolist() == [[[[True] * 6]]]


def test_the_causal_mask_of_a_fixed_size_cache_has_its_size() -> None:
    past = StaticCache(config=FAMILIES["gemma3_text"].build().config, max_cache_len=12)
    masks = with_prefix_columns({"full_attention": None, "sliding_attention": None}, 1, NEW, past)
    assert masks["full_attention"].shape == (1, 1, 3, 13)
    assert masks["sliding_attention"].shape == (1, 1, 3, 9)


def test_block_masks_get_visible_columns() -> None:
    def causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= key

    block = create_block_mask(causal, 1, None, 3, 3, device="cpu")
    wide = with_prefix_columns(block, 2, NEW, None)
    zero = torch.tensor(0)
    seen = [[bool(wide.mask_mod(zero, zero, torch.tensor(q), torch.tensor(k))) for k in range(5)] for q in range(3)]
    assert seen == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert positions_of_real_tokens(mask, 4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    assert positions_of_real_tokens(mask, 2).tolist() == [[0, 1], [2, 2]]
    assert leading_padding(mask).tolist() == [2, 0]
