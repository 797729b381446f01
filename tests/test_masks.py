from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

from peft_prefix import PrefixInputError
from peft_prefix.cache import RowOrder
from peft_prefix.hidden_tokens import HidingMasks
from peft_prefix.masks import (
    PrefixColumns,
    WideMasks,
    leading_padding,
    positions_of_real_tokens,
    with_prefix_columns,
)

NEW = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.bool])
def test_a_padding_mask_gets_visible_columns_of_its_own_dtype(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]]).to(dtype)
    wide = with_prefix_columns(mask, PrefixColumns(2), NEW, None)
    assert wide.dtype == dtype
    assert wide.long().tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]


def test_a_padding_mask_follows_the_row_order() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    order = RowOrder(leading_padding(mask), 2)
    assert with_prefix_columns(mask, PrefixColumns(2, order), NEW, None).tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_four_dimensional_masks_get_visible_columns() -> None:
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert with_prefix_columns(causal, PrefixColumns(2), NEW, None)[0, 0].long().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    additive = torch.where(causal, 0.0, -9.0)
    assert with_prefix_columns(additive, PrefixColumns(2), NEW, None)[0, 0, 0].tolist() == [0, 0, 0, -9, -9]
    with pytest.raises(PrefixInputError, match=r"must be boolean .* or floating point"):
        with_prefix_columns(causal.long(), PrefixColumns(2), NEW, None)


def test_no_mask_means_causal_and_every_key_for_a_single_token() -> None:
    parts = with_prefix_columns({"full_attention": None}, PrefixColumns(1), NEW, None)
    assert parts["full_attention"][0, 0].long().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    past = DynamicCache()
    past.update(torch.zeros(2, 1, 4, 2), torch.zeros(2, 1, 4, 2), 0)
    one = with_prefix_columns(None, PrefixColumns(1), NEW[:, :1], past)
    assert one.tolist() == [[[[True] * 6]]]


def test_the_causal_mask_of_a_fixed_size_cache_has_its_size() -> None:
    past = StaticCache(config=FAMILIES["gemma3_text"].build().config, max_cache_len=12)
    masks = with_prefix_columns({"full_attention": None, "sliding_attention": None}, PrefixColumns(1), NEW, past)
    assert masks["full_attention"].shape == (1, 1, 3, 13)
    assert masks["sliding_attention"].shape == (1, 1, 3, 9)


def test_block_masks_get_visible_columns() -> None:
    def causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= key

    block = create_block_mask(causal, 1, None, 3, 3, device="cpu")
    wide = with_prefix_columns(block, PrefixColumns(2), NEW, None)
    zero = torch.tensor(0)
    seen = [[bool(wide.mask_mod(zero, zero, torch.tensor(q), torch.tensor(k))) for k in range(5)] for q in range(3)]
    assert seen == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert positions_of_real_tokens(mask, 4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
    assert positions_of_real_tokens(mask, 2).tolist() == [[0, 1], [2, 2]]
    assert leading_padding(mask).tolist() == [2, 0]


def test_plain_windows_hide_the_prefix_from_tokens_that_are_far_away() -> None:
    class Config:
        sliding_window = 3
        attention_chunk_size = 2

    columns = PrefixColumns(2, positions=torch.tensor([[2, 3, 4]]), text_config=Config())
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    masks = dict.fromkeys(("full_attention", "sliding_attention", "chunked_attention"), causal)
    wide = with_prefix_columns(masks, columns, NEW, None)
    assert wide["full_attention"][0, 0, :, :2].all()
    assert wide["sliding_attention"][0, 0, :, :2].long().tolist() == [[1, 1], [0, 1], [0, 0]]
    assert wide["chunked_attention"][0, 0, :, :2].long().tolist() == [[1, 1], [1, 1], [0, 0]]
    additive = with_prefix_columns({"sliding_attention": torch.zeros(2, 1, 3, 3)}, columns, NEW, None)
    assert (additive["sliding_attention"][1, 0, :, :2] < -1e30).long().tolist() == [[0, 0], [1, 0], [1, 1]]


def test_masks_of_recurrent_layers_stay_as_they_are() -> None:
    padding = torch.tensor([[0, 1, 1], [1, 1, 1]])
    wide = with_prefix_columns({"linear_attention": padding, "conv": None}, PrefixColumns(2), NEW, None)
    assert wide["linear_attention"] is padding
    assert wide["conv"] is None


def test_a_mask_that_many_layers_share_is_made_once() -> None:
    masks, columns = WideMasks(), PrefixColumns(2)
    one, other = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 4)
    states = torch.zeros(1, 3, 8)
    first = masks.widened(one, columns, 3, states)
    assert first.shape == (1, 1, 3, 5)
    assert masks.widened(other, columns, 4, states).shape == (1, 1, 3, 6)
    assert masks.widened(one, columns, 3, states) is first
    assert masks.widened(None, columns, 3, states) is None


def test_where_prefixes_differ_in_length_what_is_missing_is_hidden() -> None:
    columns = PrefixColumns(3, lengths=torch.tensor([1, 3, 0]))
    there = [[0, 0, 1], [1, 1, 1], [0, 0, 0]]
    assert with_prefix_columns(torch.ones(3, 2), columns, NEW, None)[:, :3].tolist() == there
    whole = with_prefix_columns(None, columns, NEW, None)
    assert whole.shape == (3, 1, 3, 6)
    assert whole[:, 0, 0].long().tolist() == [[*row, 1, 0, 0] for row in there]
    masks, states = WideMasks(), torch.zeros(3, 2, 8)
    made = masks.widened(None, columns, 4, states)
    assert (made[:, 0, 1] == 0).long().tolist() == [[*row, 1, 1, 1, 1] for row in there]
    assert masks.widened(None, columns, 4, states) is made
    assert masks.widened(None, columns, 5, states).shape[-1] == 8
    assert WideMasks("flash_attention_2").widened(None, columns, 1, states).tolist() == [[*row, 1] for row in there]


def test_each_row_has_the_windows_that_its_prefix_wants() -> None:
    class Config:
        sliding_window = 3

    lengths, pinned = torch.tensor([1, 2, 2]), torch.tensor([False, False, True])
    positions = torch.arange(3)[None, :] + lengths[:, None]
    columns = PrefixColumns(2, lengths=lengths, positions=positions, text_config=Config(), pinned=pinned)
    near = columns.visible("sliding_attention")
    assert near[:, 0].long().tolist() == [
        [[0, 1], [0, 1], [0, 0]],
        [[1, 1], [0, 1], [0, 0]],
        [[1, 1], [1, 1], [1, 1]],
    ]
    assert columns.visible("full_attention")[:, 0].long().tolist() == [[[0, 1]], [[1, 1]], [[1, 1]]]


def test_hidden_columns_are_hidden_in_every_kind_of_mask_and_move_nothing() -> None:
    class Config:
        sliding_window = 3

    hidden = torch.tensor([[False, True], [False, False]])
    columns, seen = PrefixColumns(2, hidden=hidden), [[1, 0], [1, 1]]
    assert not columns.all_exist
    assert PrefixColumns(2).all_exist
    assert PrefixColumns(2).exists() is None
    assert with_prefix_columns(torch.ones(2, 3), columns, NEW, None)[:, :2].tolist() == seen
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    kinds = dict(boolean=causal, additive=torch.zeros(1, 1, 3, 3), none=None)
    for name, mask in with_prefix_columns(kinds, columns, NEW, None).items():
        assert mask.shape == (2, 1, 3, 5)
        there = mask[..., :2] if mask.dtype == torch.bool else mask[..., :2] == 0
        assert (there.long() == torch.tensor(seen)[:, None, None, :]).all(), name
    order = RowOrder(torch.tensor([1, 0]), 2)
    ordered = with_prefix_columns(torch.tensor([[0, 1, 1], [1, 1, 1]]), replace(columns, order=order), NEW, None)
    assert ordered.tolist() == [[0, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
    lengths = replace(columns, lengths=torch.tensor([2, 1]))
    assert lengths.exists().long().tolist() == [[1, 0], [0, 1]]
    windows = replace(columns, positions=torch.tensor([[2, 3, 4]]), text_config=Config())
    assert windows.visible("sliding_attention")[:, 0].long().tolist() == [
        [[1, 0], [0, 0], [0, 0]],
        [[1, 1], [0, 1], [0, 0]],
    ]
    masks, states = WideMasks(), torch.zeros(2, 3, 8)
    assert (masks.widened(None, columns, 4, states)[:, 0, 0, :2] == 0).long().tolist() == seen


def test_hidden_columns_are_hidden_in_block_masks() -> None:
    def causal(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= key

    block = create_block_mask(causal, 1, None, 3, 3, device="cpu")
    hidden = torch.tensor([[False, True], [False, False]])
    columns, states = PrefixColumns(2, hidden=hidden), torch.zeros(2, 3, 8)
    wide = with_prefix_columns(block, columns, NEW, None)
    later = HidingMasks().hidden(with_prefix_columns(block, PrefixColumns(2), NEW, None), columns, 5, None, states)
    zero = torch.tensor(0)
    for mask in (wide, later):
        for row in range(2):
            seen = [mask.mask_mod(torch.tensor(row), zero, zero, torch.tensor(key)) for key in range(5)]
            assert [int(one) for one in seen] == [1, 1 - int(hidden[row, 1]), 1, 0, 0]


def test_layers_masks_get_hidden_columns_where_the_prefix_stands() -> None:
    hidden = torch.tensor([[False, True], [True, False]])
    columns, states = PrefixColumns(2, hidden=hidden), torch.zeros(2, 1, 8)
    masks, order = HidingMasks(), RowOrder(torch.tensor([1, 0]), 2)
    made = masks.hidden(None, columns, 4, order, states)
    assert (made[:, 0, 0] < 0).long().tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert masks.hidden(None, columns, 4, order, states) is made
    flat = masks.hidden(torch.ones(2, 4), columns, 4, None, states)
    assert flat.tolist() == [[1, 0, 1, 1], [0, 1, 1, 1]]
    plain = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    assert masks.hidden(plain, columns, 4, None, states)[:, 0, 0].long().tolist() == [[1, 0, 1, 1], [0, 1, 1, 1]]
    assert masks.hidden(plain, PrefixColumns(2), 4, None, states) is plain


def test_padding_is_what_no_token_sees() -> None:
    visible = torch.ones(2, 2, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    visible[0, :, :, 0] = False
    assert leading_padding(visible).tolist() == [1, 0]
    assert leading_padding(torch.where(visible, 0.0, -1e30)).tolist() == [1, 0]
    assert leading_padding(torch.tensor([[0, 0, 1], [1, 0, 1]])).tolist() == [2, 0]
