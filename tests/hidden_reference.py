"""What a model gives if rows do not see some virtual tokens, made without the library's masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from families import WINDOW
from helpers import pinned_masks
from transformers import DynamicCache

from peft_prefix import PrefixModel


def unseen(attentions: Any, p: int) -> torch.Tensor:
    """Which virtual tokens each row gives no attention at all in any layer and head, `(rows, p)`.

    Args:
        attentions: The weights, `(rows, H, tokens, p + keys)` by layer.
        p: Length of the prefix.
    """
    return torch.stack([layer[..., :p].amax(dim=(1, 2)) == 0 for layer in attentions]).all(dim=0)


def logits_without(
    model: PrefixModel, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of the plain base behind a cache of the prefix, in whose columns a 4D mask hides some.

    Args:
        model: A causal model, whose windows have `WINDOW` tokens if it has any.
        hidden: Virtual tokens that a row does not see, `(rows, p)`.
        ids: A text, `(rows, length)`.
        mask: 2D mask of real tokens, `(rows, length)`.
    """
    base, (rows, length), p = model.base, ids.shape, hidden.shape[1]
    state, cache = model.prefix_state_dict(), DynamicCache()
    for index in range(base.config.num_hidden_layers):
        keys, values = (state[f"decoder.layers.{index}.{role}"] for role in ("key", "value"))
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
    mask = torch.ones(rows, length) if mask is None else mask
    unseen_columns = torch.cat([hidden, mask == 0], dim=1)[:, None, None, :]
    places = mask.long().cumsum(dim=1) - 1
    whole = pinned_masks(base, p, length)
    if getattr(base.config, "sliding_window", None) is None and not isinstance(whole, dict):
        whole = torch.full((p + length, p + length), torch.finfo(base.dtype).min).triu(1)[None, None]
    assert length <= WINDOW or bool((mask == 1).all()) or not isinstance(whole, dict)

    def part(one: torch.Tensor) -> torch.Tensor:
        return one[:, :, p:].expand(rows, -1, -1, -1).masked_fill(unseen_columns, torch.finfo(base.dtype).min)

    masks: Any = {kind: part(one) for kind, one in whole.items()} if isinstance(whole, dict) else part(whole)
    positions = places.clamp(min=0) + p
    with torch.no_grad():
        logits: torch.Tensor = base(
            input_ids=ids, attention_mask=masks, position_ids=positions, past_key_values=cache
        ).logits
    return logits


@contextmanager
def hidden_at_layers(model: PrefixModel, hidden: dict[str, torch.Tensor]) -> Iterator[None]:
    """While this is open, attention layers are given masks in which virtual tokens `(rows, p)` of a site are hidden."""
    structure = model._injection.structure
    modules = {
        "decoder": structure.self_attention,
        "encoder": structure.encoder_attention,
        "cross": structure.cross_attention,
    }
    handles = []
    for site, columns in hidden.items():
        for attention in modules[site]:

            def hide(module: Any, args: Any, kwargs: Any, attention: Any = attention, columns: Any = columns) -> Any:
                named = dict(zip(attention.names, args, strict=False)) | kwargs
                given = named.get(attention.mask)
                assert given is not None  # give masks of padding to the model
                wide = torch.nn.functional.pad(columns, (0, given.shape[-1] - columns.shape[1]))[:, None, None, :]
                lowest = torch.finfo(torch.float32).min
                named[attention.mask] = given & ~wide if given.dtype == torch.bool else given.masked_fill(wide, lowest)
                return (), named

            handles.append(attention.module.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
