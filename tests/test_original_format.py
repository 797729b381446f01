"""The paper's own checkpoints, against a small module of the same form and the plain base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, random_model, tokens
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from peft_prefix import IncompatibleBaseError, PrefixInputError, PrefixModel
from peft_prefix.original_format import read_original

P, LAYERS, HEADS, HIDDEN = 5, 3, 4, 64
"""Virtual tokens, and the tiny GPT-2."""


class Original(nn.Module):
    """What the paper describes: `p` rows, a hidden layer with tanh, and keys and values of all layers as output."""

    def __init__(self, hidden_layers: int = 1, middle: int = 24) -> None:
        super().__init__()
        self.wte = nn.Embedding(P, HIDDEN)
        parts: list[nn.Module] = []
        for layer in range(hidden_layers):
            parts += [nn.Linear(middle if layer else HIDDEN, middle), nn.Tanh()]
        self.control_trans = nn.Sequential(*parts, nn.Linear(middle, LAYERS * 2 * HIDDEN))


def original(hidden_layers: int = 1) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A state dict, and the numbers `(p, layers * 2 * hidden)` that it means."""
    torch.manual_seed(0)
    module = Original(hidden_layers)
    last = module.control_trans[-1]
    with torch.no_grad():
        last.weight.normal_(0.0, 0.3)
        return module.state_dict(), module.control_trans(module.wte.weight)


def cache_of(numbers: torch.Tensor, rows: int) -> DynamicCache:
    """A cache with these numbers as the keys and values of each layer, in this order."""
    cache, width = DynamicCache(), HIDDEN // HEADS
    for layer in range(LAYERS):
        key, value = (
            torch.stack(
                [numbers[:, (2 * layer + role) * HIDDEN + head * width :][:, :width] for head in range(HEADS)]
            ).expand(rows, -1, -1, -1)
            for role in (0, 1)
        )
        cache.update(key, value, layer)
    return cache


def load(base: PreTrainedModel, state: Mapping[str, Any]) -> PrefixModel:
    model = PrefixModel(base)
    model.load_original_prefix(state)
    return model.eval()


def assert_means(state: Mapping[str, Any], numbers: torch.Tensor) -> None:
    """The state dict gives the logits and the texts of the base behind a cache with these numbers."""
    base, text = FAMILIES["gpt2"].build(), tokens(2, 9)
    model = load(FAMILIES["gpt2"].build(), state)
    with torch.no_grad():
        expected = base(input_ids=text, past_key_values=cache_of(numbers, 2)).logits
        assert_close(model(input_ids=text).logits, expected)
        assert (base(input_ids=text).logits - expected).abs().max() > 0.1
    whole_mask = torch.ones(2, P + 9, dtype=torch.long)
    options = dict(max_new_tokens=8, do_sample=False)
    behind = base.generate(text, past_key_values=cache_of(numbers, 2), attention_mask=whole_mask, **options)
    assert torch.equal(model.generate(text, **options), behind)


@pytest.mark.parametrize("hidden_layers", [1, 2], ids=["standard", "deep"])
def test_a_network(hidden_layers: int) -> None:
    assert_means(*original(hidden_layers))


def test_a_network_beside_the_frozen_model() -> None:
    state, numbers = original()
    frozen = FAMILIES["gpt2"].build().state_dict()
    around = {f"model.{name}": one for name, one in state.items()}
    assert_means({**around, **{f"gpt2.{name}": one for name, one in frozen.items()}}, numbers)
    assert_means({**state, **frozen}, numbers)
    assert_means({f"module.{name}": one for name, one in state.items()}, numbers)


def test_a_prefix_without_a_network() -> None:
    _, numbers = original()
    assert_means({"control_trans": numbers.flatten()}, numbers)
    words = torch.cat([torch.stack([layer.keys, layer.values]) for layer in cache_of(numbers, 1).layers])
    assert words.shape == (2 * LAYERS, 1, HEADS, P, HIDDEN // HEADS)
    assert_means({"control_trans": words}, numbers)


def test_half_precision_is_computed_in_single() -> None:
    state, _ = original()
    half = {name: one.half() for name, one in state.items()}
    exact = Original()
    exact.load_state_dict({name: one.float() for name, one in half.items()})
    with torch.no_grad():
        numbers = exact.control_trans(exact.wte.weight)
    assert_means(half, numbers)


STATE, NUMBERS = original()
NETWORK = {name: one for name, one in STATE.items() if name.startswith("control_trans")}
OTHERS: list[tuple[Any, str]] = [
    ({**STATE, "wte_enc.weight": torch.zeros(P, HIDDEN)}, r"BART, whose decoder counted .* from 0"),
    ({**STATE, "control_trans2.0.weight": torch.zeros(1, 1), "wte2.weight": torch.zeros(1, 1)}, "BART"),
    ({**STATE, "wte2.weight": torch.zeros(P, HIDDEN)}, "belongs to an infix"),
    ({"wte.weight": torch.zeros(P, HIDDEN)}, "holds embeddings"),
    (NETWORK, "without wte computes the prefix anew"),
    ({**STATE, "control_trans.4.weight": torch.zeros(1, 1)}, "two or three linear layers is known, and this is"),
    ({**STATE, "control_trans.1.weight": torch.zeros(1, 1)}, "two or three linear layers"),
    ({**NETWORK, "wte": torch.zeros(P, HIDDEN)}, "two or three linear layers"),
    ({name: one for name, one in STATE.items() if name != "control_trans.2.bias"}, "two or three linear layers"),
    ({**STATE, "control_trans": NUMBERS}, "two or three linear layers"),
    ({**STATE, "decoder.weight": torch.zeros(1)}, "no state dict of the paper's code.*decoder.weight"),
    ({**STATE, "model.wte.weight": torch.zeros(1)}, "no state dict of the paper's code"),
    ({**STATE, f"control_trans.{'9' * 5000}.bias": torch.zeros(1)}, "no state dict of the paper's code"),
    ({}, "it has no names"),
    (FAMILIES["gpt2"].build().state_dict(), "it has no names"),
    ([], "dictionary of tensors by name"),
    ({1: torch.zeros(1)}, "dictionary of tensors by name"),
    ({**STATE, "wte.weight": [[0.0]]}, "wte.weight of the state dict are no tensors"),
    ({**STATE, "wte.weight": torch.zeros(P, HIDDEN, dtype=torch.long)}, "no tensors of floating-point numbers"),
    ({**STATE, "wte.weight": torch.zeros(P, HIDDEN, device="meta")}, "no tensors of floating-point numbers"),
    ({**STATE, "wte.weight": torch.zeros(P, HIDDEN + 1)}, r"control_trans.0 .* do not fit what goes in, \(5, 65\)"),
    ({**STATE, "wte.weight": torch.zeros(0, HIDDEN)}, "do not fit what goes in"),
    ({**STATE, "wte.weight": torch.tensor(0.0)}, "do not fit what goes in"),
    ({**STATE, "control_trans.2.bias": torch.zeros(3)}, r"control_trans.2 .* do not fit"),
    ({**STATE, "control_trans.2.bias": torch.zeros(3, 1)}, r"control_trans.2 .* do not fit"),
    ({**STATE, "control_trans.2.weight": torch.zeros(HIDDEN, 24), "control_trans.2.bias": torch.zeros(HIDDEN)}, "Emb"),
    ({**STATE, "control_trans.2.bias": torch.full((LAYERS * 2 * HIDDEN,), torch.nan)}, "contains NaN"),
]


@pytest.mark.parametrize(("state", "message"), OTHERS, ids=[message[:30] for _, message in OTHERS])
def test_other_state_dicts_are_refused(state: Any, message: str) -> None:
    with pytest.raises(PrefixInputError, match=message):
        load(FAMILIES["gpt2"].build(), state)


@pytest.mark.parametrize(
    "state",
    [
        {**STATE, "control_trans.2.weight": torch.zeros(256, 24), "control_trans.2.bias": torch.zeros(256)},
        {"control_trans": torch.zeros(P * LAYERS * 2 * HIDDEN + 1)},
        {"control_trans": torch.zeros(0)},
        {"control_trans": torch.zeros(P, LAYERS * 2 * HIDDEN)},
        {"control_trans": torch.zeros(2 * LAYERS, 1, HEADS, P, 8)},
        {"control_trans": torch.zeros(2 * LAYERS, 1, HEADS, 0, 16)},
    ],
    ids=lambda state: str([tuple(one.shape) for one in state.values()][-1]),
)
def test_a_prefix_for_another_gpt2_is_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(IncompatibleBaseError, match="3 layers with 4 heads of width 16, that is 384 numbers"):
        load(FAMILIES["gpt2"].build(), state)


@pytest.mark.parametrize("family", ["t5", "deepseek_v3", "gemma4_text", "qwen3_next"])
def test_bases_of_another_kind_are_refused(family: str) -> None:
    with pytest.raises(IncompatibleBaseError, match="prefixes for GPT-2"):
        read_original(STATE, random_model(FAMILIES[family].build()).geometry)
