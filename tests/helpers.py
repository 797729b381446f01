"""What the tests share: prefixes with known content, random tokens, hand-made masks."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from families import VOCAB, WINDOW, Family
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from peft_prefix import PrefixConfig, PrefixModel, get_prefix_model
from peft_prefix.initializers import tensors_from_states
from peft_prefix.recording import States, recording
from peft_prefix.structure import find_structure

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-1}
"""Largest difference between logits that counts as equal, where their standard deviation is 0.65."""

SOURCE_LENGTH = 12
"""Tokens that encoders read."""


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random ordinary token ids of shape `(rows, length)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def cache_of_tokens(base: PreTrainedModel, ids: torch.Tensor) -> Cache:
    """The complete cache that a causal base makes of some tokens, `(rows, tokens)`."""
    with torch.no_grad(), recording(find_structure(base)) as run:
        base(input_ids=ids)
    return run.cache


def model_with_tokens(base: PreTrainedModel, ids: torch.Tensor) -> PrefixModel:
    """A model whose prefix is the real cache of these tokens, `(p,)`: what the base must match with them as text."""
    config = PrefixConfig(num_virtual_tokens=len(ids), init="cache")
    return get_prefix_model(base, config, past_key_values=cache_of_tokens(base, ids[None]))


def attention_cache(base: PreTrainedModel, prefix: torch.Tensor, rows: int) -> Cache:
    """A cache whose attention layers know some tokens `(p,)` in every row, and whose recurrent layers know nothing."""
    known, cache = cache_of_tokens(base, prefix.expand(rows, -1)), DynamicCache(config=base.config)
    for index, layer in enumerate(known.layers):
        if getattr(layer, "keys", None) is not None:
            cache.update(layer.keys, layer.values, index)
    return cache


def after_tokens(
    base: PreTrainedModel, prefix: torch.Tensor, text: torch.Tensor, *, recurrent: bool = False
) -> torch.Tensor:
    """Logits of the plain base for a text `(rows, length)` behind some tokens `(p,)`.

    Args:
        base: A causal model.
        prefix: The tokens before the text.
        text: The text.
        recurrent: Read the tokens in attention only: behind a cache whose recurrent layers have seen nothing.
    """
    p, (rows, length) = len(prefix), text.shape
    if not recurrent:
        logits: torch.Tensor = base(input_ids=with_text(prefix, text)).logits[:, p:]
        return logits
    cache = attention_cache(base, prefix, rows)
    arguments = dict(input_ids=text, past_key_values=cache, attention_mask=torch.ones(rows, p + length))
    if "position_ids" in inspect.signature(base.forward).parameters:
        arguments["position_ids"] = torch.arange(p, p + length).expand(rows, -1)
    return base(**arguments).logits  # type: ignore[no-any-return]


def model_with_states(base: PreTrainedModel, states: States, p: int, **config: object) -> PrefixModel:
    """A model whose prefix holds given keys and values `(1, H, p, D)`, and which has no other sites."""
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=p, init="zeros", sites=tuple(states), **config))
    parameterization = model.prefixes.entry().module
    parameterization.start_from(tensors_from_states(states, model.geometry.only(states), p))
    return model


def random_model(base: PreTrainedModel, p: int = 4, **config: object) -> PrefixModel:
    """A model with a prefix of random numbers as large as real activations, so that its effect is plain to see."""
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=p, init="normal", init_std=1.0, **config))


def with_text(prefix: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Prefix tokens `(p,)` before each row of a text `(rows, length)`."""
    return torch.cat([prefix.expand(text.shape[0], -1), text], dim=1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Logits agree, and are not so uniform that anything would."""
    spread = float(expected.float().std())
    assert spread > 0.05
    tolerance = TOLERANCE[dtype] * max(0.3, spread / 0.65)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=tolerance)


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
    visible = {
        "full_attention": causal,
        "sliding_attention": causal & ((query - key < WINDOW) | (key < p)),
        "chunked_attention": causal & (((query - p) // WINDOW == (key - p) // WINDOW) | (key < p)),
    }
    kinds = getattr(base.config.get_text_config(decoder=True), "layer_types", None)
    masks = {
        kind: torch.where(mask, 0.0, torch.finfo(base.dtype).min).to(base.dtype)[None, None]
        for kind, mask in visible.items()
    }
    return {kind: masks[kind] for kind in set(kinds)} if kinds else masks["sliding_attention"]


def source_of(base: PreTrainedModel, rows: int, length: int = SOURCE_LENGTH) -> dict[str, torch.Tensor]:
    """Encoder inputs: text, or noise of the one length that an encoder of speech takes."""
    if base.main_input_name == "input_ids":
        return dict(input_ids=tokens(rows, length, seed=7), attention_mask=torch.ones(rows, length, dtype=torch.long))
    config: Any = base.config
    noise = torch.randn(
        rows, config.num_mel_bins, 2 * config.max_source_positions, generator=torch.Generator().manual_seed(7)
    )
    return dict(input_features=noise.to(base.dtype))


def without(encoded: Any, part: slice) -> Any:
    """An encoder's output with only a part of its positions."""
    return type(encoded)(**{**encoded, "last_hidden_state": encoded[0][:, part]})


def fits_window(family: Family, wanted: int) -> int:
    """A total length that fits the family's window, where it has one."""
    return min(wanted, WINDOW) if family.sliding else wanted


def assert_only_the_prefix_learns(model: PrefixModel, before: dict[str, torch.Tensor]) -> None:
    """After a backward pass: every virtual token has a gradient, and a step leaves the base as it was before."""
    for name, parameter in model.named_parameters():
        if name.startswith("prefixes."):
            assert parameter.grad is not None, name
            by_slot = parameter.grad.abs().sum(dim=(0, 2))
            assert (by_slot > 1e-9).all(), (name, by_slot)
        else:
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name, value in model.base.state_dict().items():
        assert torch.equal(value, before[name]), name


class Recorder(BaseStreamer):
    """A streamer that keeps the tokens it is given, and -1 for the end."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.received += value.flatten().tolist()

    def end(self) -> None:
        self.received.append(-1)


def prefix_metadata(description: str) -> dict[str, str]:
    """The metadata of a prefix's file with a description that somebody has written by hand."""
    return {"peft_prefix": description, "peft_prefix_sha256": hashlib.sha256(description.encode()).hexdigest()}
