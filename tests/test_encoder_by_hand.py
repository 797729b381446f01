"""Encoders whose attention is computed by hand in plain torch, layer by layer, with the prefix concatenated.

The base's own attention modules are replaced by the dense functions below, which use nothing of it but the projections'
weights; what surrounds attention stays. Windows, blocks and global tokens become masks over all pairs of positions.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import ENCODER_DECODERS
from helpers import assert_close, random_model, source_of, tokens
from torch import nn

from peft_prefix import PrefixModel

P = 4
LENGTH = 20
PAD = 3
Prefix = tuple[torch.Tensor, torch.Tensor]
"""One layer's keys and values `(H, p, D)`."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: Prefix,
    visible: torch.Tensor,
    scale: float,
    bias: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Attention to the prefix and to the visible positions.

    Args:
        query: `(batch, H, queries, D)`.
        key: `(batch, H, keys, D)`.
        value: As `key`.
        prefix: Keys and values of the virtual tokens.
        visible: Which positions each query sees, `(batch, 1, queries, keys)`; all see the prefix.
        scale: Factor of the scores.
        bias: Added to the scores of prefix and positions, `(1, H, queries, p + keys)`.

    Returns:
        `(batch, queries, H * D)`.
    """
    rows = query.shape[0]
    keys = torch.cat([prefix[0].expand(rows, -1, -1, -1), key], dim=2)
    values = torch.cat([prefix[1].expand(rows, -1, -1, -1), value], dim=2)
    scores = scale * torch.einsum("bhqd,bhkd->bhqk", query, keys) + bias
    seen = nn.functional.pad(visible, (prefix[0].shape[1], 0), value=True)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, values).flatten(2)


def heads(projection: nn.Module, states: torch.Tensor, count: int) -> torch.Tensor:
    return projection(states).unflatten(-1, (count, -1)).transpose(1, 2)


def relative_bias(table: Any, queries: int, keys: int, p: int) -> torch.Tensor:
    """T5's bias of positions `-p..keys-1` as seen from `0..queries-1`: virtual tokens stand before the text."""
    distance = torch.arange(-p, keys)[None, :] - torch.arange(queries)[:, None]
    buckets, largest, exact = 4, 20, 2  # 8 buckets, half of them for each direction, half of those for each distance
    far = exact + (
        torch.log(distance.abs().clamp(min=1) / exact) / torch.log(torch.tensor(largest / exact)) * (buckets - exact)
    ).long().clamp(max=buckets - exact - 1)
    near = distance.abs()
    index = torch.where(near < exact, near, far) + buckets * (distance > 0).long()
    return table.weight[index].permute(2, 0, 1)[None]


def bart_layer(module: Any, prefix: Prefix, real: torch.Tensor, _: Any) -> Callable[..., Any]:
    """Bart, Marian, M2M100, Whisper and their like."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key, value = (
            heads(part, hidden_states, module.num_heads) for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        visible = real[:, None, None, : key.shape[2]].expand(-1, -1, query.shape[2], -1)
        return module.out_proj(attend(query, key, value, prefix, visible, module.head_dim**-0.5)), None

    return forward


def bert_layer(module: Any, prefix: Prefix, real: torch.Tensor, _: Any) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key, value = (
            heads(part, hidden_states, module.num_attention_heads) for part in (module.query, module.key, module.value)
        )
        visible = real[:, None, None].expand(-1, -1, query.shape[2], -1)
        return attend(query, key, value, prefix, visible, module.attention_head_size**-0.5), None

    return forward


def t5_layer(module: Any, prefix: Prefix, real: torch.Tensor, table: Any) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key, value = (heads(part, hidden_states, module.n_heads) for part in (module.q, module.k, module.v))
        length = query.shape[2]
        visible = real[:, None, None].expand(-1, -1, length, -1)
        bias = relative_bias(table, length, length, P)
        return module.o(attend(query, key, value, prefix, visible, 1.0, bias)), None, None

    return forward


def longt5_layer(module: Any, prefix: Prefix, real: torch.Tensor, table: Any) -> Callable[..., Any]:
    """A radius of 4 around each token, and, in the transient-global kind, one mean for each 8 tokens."""
    radius, block = 4, 8

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        query, key, value = (heads(part, hidden_states, module.n_heads) for part in (module.q, module.k, module.v))
        length = query.shape[2]
        place = torch.arange(length)
        near = (place[:, None] - place[None, :]).abs() <= radius
        visible = (near & real[:, None, :])[:, None]
        bias = relative_bias(table, length, length, P)
        if hasattr(module, "global_input_layer_norm"):
            blocks = length // block
            # Tokens behind the last whole block belong to it; those of padding to none.
            of_block = (place // block).clamp(max=blocks - 1)[None, :] == torch.arange(blocks)[:, None]
            sums = (of_block & real[:, None, :]).float() @ hidden_states
            means = module.global_input_layer_norm(sums)
            side = [heads(part, means, module.n_heads) for part in (module.k, module.v)]
            key, value = (torch.cat([own, more], dim=2) for own, more in zip((key, value), side, strict=True))
            shift = torch.arange(blocks)[None, :] - (place // block).clamp(max=blocks - 1)[:, None]
            side_table = table_of_globals(module)
            bias = torch.cat([bias, distance_bias(side_table, shift)], dim=-1)
            has_tokens = (of_block & real[:, None, :]).any(-1)
            visible = torch.cat([visible, has_tokens[:, None, None, :].expand(-1, 1, length, -1)], dim=-1)
        return module.o(attend(query, key, value, prefix, visible, 1.0, bias)), None

    return forward


def table_of_globals(module: Any) -> Any:
    return module.first.global_relative_attention_bias


def distance_bias(table: Any, distance: torch.Tensor) -> torch.Tensor:
    buckets, largest, exact = 4, 20, 2
    near = distance.abs()
    far = exact + (
        torch.log(near.clamp(min=1) / exact) / torch.log(torch.tensor(largest / exact)) * (buckets - exact)
    ).long().clamp(max=buckets - exact - 1)
    return table.weight[torch.where(near < exact, near, far) + buckets * (distance > 0).long()].permute(2, 0, 1)[None]


def led_layer(module: Any, prefix: Prefix, real: torch.Tensor, _: Any) -> Callable[..., Any]:
    """Four tokens to each side, and global tokens that see and are seen by all, with projections of their own."""

    def forward(
        self: Any, hidden_states: torch.Tensor, is_index_masked: Any, is_index_global_attn: Any, **kwargs: Any
    ) -> Any:
        own = module.longformer_self_attn
        real, is_global, scale = ~is_index_masked, is_index_global_attn, own.head_dim**-0.5
        query, key, value = (heads(part, hidden_states, own.num_heads) for part in (own.query, own.key, own.value))
        place = torch.arange(query.shape[2])
        near = (place[:, None] - place[None, :]).abs() <= 4
        visible = ((near[None] | is_global[:, None, :]) & real[:, None, :])[:, None]
        result = attend(query, key, value, prefix, visible, scale)
        names = (own.query_global, own.key_global, own.value_global)
        query, key, value = (heads(part, hidden_states, own.num_heads) for part in names)
        everything = real[:, None, None].expand(-1, -1, query.shape[2], -1)
        of_globals = attend(query, key, value, prefix, everything, scale)
        return (module.output(torch.where(is_global[:, :, None], of_globals, result)),)

    return forward


def pegasus_x_layer(module: Any, prefix: Prefix, real: torch.Tensor, _: Any) -> Callable[..., Any]:
    """Blocks of 16 tokens, and four global tokens that see and are seen by all."""

    def forward(
        self: Any, token_hidden_states: torch.Tensor, global_hidden_states: torch.Tensor, attention_mask: Any, **_: Any
    ) -> Any:
        states = torch.cat([global_hidden_states, token_hidden_states], dim=1)
        query, key, value = (
            heads(part, states, module.num_heads) for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        count, length = global_hidden_states.shape[1], token_hidden_states.shape[1]
        block = torch.cat([torch.full((count,), -1), torch.arange(length) // 16])
        together = (block[:, None] == block[None, :]) | (block[:, None] < 0) | (block[None, :] < 0)
        is_real = nn.functional.pad(attention_mask > -1, (count, 0), value=True)
        result = module.out_proj(
            attend(query, key, value, prefix, (together & is_real[:, None, :])[:, None], module.scaling)
        )
        return result[:, count:], result[:, :count], None

    return forward


HANDS: dict[str, tuple[str, Callable[..., Any]]] = {
    "bart": ("self_attn", bart_layer),
    "m2m_100": ("self_attn", bart_layer),
    "whisper": ("self_attn", bart_layer),
    "bert_gpt2": ("self", bert_layer),
    "t5": ("SelfAttention", t5_layer),
    "switch_transformers": ("SelfAttention", t5_layer),
    "longt5_local": ("LocalSelfAttention", longt5_layer),
    "longt5_global": ("TransientGlobalSelfAttention", longt5_layer),
    "led": ("self_attn", led_layer),
    "pegasus_x": ("self_attn", pegasus_x_layer),
}
"""Name of a layer's attention module in its parent, and what computes it by hand."""


def computed_by_hand(model: PrefixModel, real: torch.Tensor) -> nn.Module:
    """The base's encoder with attention by hand."""
    family = model.name
    name, hand = HANDS[family]
    encoder: Any = model.base.get_encoder()
    tensors = model.prefix_state_dict()
    modules = [module for path, module in encoder.named_modules() if path.split(".")[-1] == name]
    first = modules[0]
    for index, module in enumerate(modules):
        prefix = tuple(tensors[f"encoder.layers.{index}.{role}"] for role in ("key", "value"))
        object.__setattr__(module, "first", first)
        table = getattr(first, "relative_attention_bias", None)
        module.forward = types.MethodType(hand(module, prefix, real, table), module)
    return encoder


def prefixed(family: str, attn: str = "eager") -> PrefixModel:
    model = random_model(ENCODER_DECODERS[family].build(attn), P)
    model.name = family
    return model


@pytest.mark.parametrize("family", HANDS)
def test_an_encoder_with_a_prefix_is_what_attention_by_hand_gives(family: str) -> None:
    model = prefixed(family)
    source = source_of(model.base, 2, LENGTH)
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    if "attention_mask" in source:
        source["input_ids"][0, -PAD:] = 0
        source["attention_mask"][0, -PAD:] = 0
        real[0, -PAD:] = False
    if family == "led":
        source["global_attention_mask"] = torch.zeros(2, LENGTH, dtype=torch.long)
        source["global_attention_mask"][:, 0] = 1
        source["global_attention_mask"][1, 7] = 1
    with torch.no_grad():
        actual = model.get_encoder()(**source)[0]
        plain = model.base.get_encoder()(**source)[0]
        expected = computed_by_hand(model, real)(**source)[0]
    if family == "whisper":
        real = torch.ones(2, actual.shape[1], dtype=torch.bool)
    assert_close(actual[real], expected[real])
    assert (actual[real] - plain[real]).abs().max() > 1e-2


@pytest.mark.parametrize("family", HANDS)
def test_its_gradients_are_those_of_attention_by_hand(family: str) -> None:
    model = prefixed(family)
    source = source_of(model.base, 1, LENGTH)
    actual = model.get_encoder()(**source)[0]
    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(0))
    (actual * weights).sum().backward()
    given = {
        name: parameter.grad.clone()
        for name, parameter in model.prefixes["default"].named_parameters()
        if name.startswith("encoder.")
    }
    leaves = {name: tensor.requires_grad_() for name, tensor in model.prefix_state_dict().items()}
    model.prefix_state_dict = lambda: leaves  # type: ignore[method-assign]
    expected = computed_by_hand(model, torch.ones(1, LENGTH, dtype=torch.bool))(**source)[0]
    (expected * weights).sum().backward()
    assert len(given) > 3
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-3, atol=1e-4)
        assert (gradient.abs().sum(dim=(0, 2)) > 1e-9).all(), name


def test_a_decoder_reads_what_the_encoder_with_its_prefix_has_written() -> None:
    """In one call, and in `generate`, the encoder is the one that was checked above."""
    model = prefixed("bart")
    source, text = source_of(model.base, 2, LENGTH), tokens(2, 5)
    with torch.no_grad():
        actual = model(**source, decoder_input_ids=text).logits
        encoded = computed_by_hand(model, torch.ones(2, LENGTH, dtype=torch.bool))(**source)
        for layer in model.base.get_encoder().layers:
            del layer.self_attn.forward
        expected = model(
            encoder_outputs=_signed(model, encoded), attention_mask=source["attention_mask"], decoder_input_ids=text
        ).logits
    assert_close(actual, expected)


def _signed(model: PrefixModel, encoded: Any) -> Any:
    from peft_prefix.ownership import sign_encoding

    sign_encoding(encoded, model.prefixes.entry().owner(model.prefixes))
    return encoded
