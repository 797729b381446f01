"""What the tests share: prefixes with known content, random tokens, hand-made masks."""

from __future__ import annotations

import torch
from families import VOCAB, WINDOW, Family
from transformers import PreTrainedModel

from peft_prefix import PrefixConfig, PrefixModel, get_prefix_model
from peft_prefix.geometry import activations

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
"""Largest difference between logits (whose standard deviation is about 0.65) that counts as equal."""


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random ordinary token ids of shape `(rows, length)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def model_with_tokens(base: PreTrainedModel, ids: torch.Tensor) -> PrefixModel:
    """A model whose prefix is the real cache of these tokens, `(p,)`: what the base must match with them as text."""
    config = PrefixConfig(num_virtual_tokens=len(ids), init="cache")
    return get_prefix_model(base, config, past_key_values=activations(base, ids[None]))


def random_model(base: PreTrainedModel, p: int = 4, **config: object) -> PrefixModel:
    """A model with a prefix of random numbers as large as real activations, so that its effect is plain to see."""
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=p, init="normal", init_std=1.0, **config))


def with_text(prefix: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Prefix tokens `(p,)` before each row of a text `(rows, length)`."""
    return torch.cat([prefix.expand(text.shape[0], -1), text], dim=1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Logits agree, and are not so uniform that anything would."""
    assert expected.float().std() > 0.1
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=TOLERANCE[dtype])


def pinned_masks(base: PreTrainedModel, p: int, length: int) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks by hand for `p` tokens that stay visible and `length` tokens with the model's windows.

    Args:
        base: A model with windows of `WINDOW` tokens.
        p: Tokens at the beginning that every later token sees.
        length: Number of tokens after them.
    """
    total = p + length
    query, key = torch.arange(total)[:, None], torch.arange(total)[None, :]
    causal = key <= query
    windowed = causal & ((query - key < WINDOW) | (key < p))

    def additive(visible: torch.Tensor) -> torch.Tensor:
        return torch.where(visible, 0.0, torch.finfo(base.dtype).min).to(base.dtype)[None, None]

    kinds = set(getattr(base.config, "layer_types", None) or [])
    if not kinds:
        return additive(windowed)
    return {kind: additive(windowed if kind == "sliding_attention" else causal) for kind in kinds}


def fits_window(family: Family, wanted: int) -> int:
    """A total length that fits the family's window, where it has one."""
    return min(wanted, WINDOW) if family.sliding else wanted
