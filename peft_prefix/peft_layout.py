"""Where PEFT keeps the keys and values of each layer in its one matrix, and what it can express at all.

PEFT's prefix-tuning and Cartridge adapters hold one row for each virtual token. A row is `num_layers` pairs of a key
and a value, each of `num_attention_heads` heads (those of keys and values), each of `token_dim / num_attention_heads`
numbers. A decoder alone reads its pairs in order. In an encoder-decoder model PEFT writes the row twice in a row,
gives four entries to each decoder layer and throws the latter two away (`PeftModel.get_prompt` in PEFT 0.21), so layer
`i` reads pair `2i` modulo `num_layers`: all different where that number is odd, each read twice where it is even.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .backbone import backbone_of
from .config import Site
from .example_inputs import example_inputs, ordinary_ids
from .geometry import Geometry, LayerGeometry
from .local_windows import LocalWindows
from .parameterization import PrefixTensors
from .placement import can_run, home
from .processes import is_sharded
from .structure import evaluation_mode

SITE: Site = "decoder"
"""The only site that PEFT has."""


@dataclass(frozen=True)
class PeftLayout:
    """The layout of one base model.

    Args:
        heads: `num_attention_heads`: heads of keys and values, of the layer that has the largest.
        width: Their width.
        pairs: `num_layers`: pairs of keys and values in a row.
        submodules: `num_transformer_submodules`: 2 in an encoder-decoder model, otherwise 1.
        layers: Shapes of the decoder's layers; `None` for those that read another layer's keys and values.
    """

    heads: int
    width: int
    pairs: int
    submodules: int
    layers: tuple[LayerGeometry | None, ...]

    @property
    def token_dim(self) -> int:
        """Numbers of a key."""
        return self.heads * self.width

    @property
    def row(self) -> int:
        """Numbers of a virtual token."""
        return self.pairs * 2 * self.token_dim

    def pair(self, layer: int) -> int:
        """Which pair of keys and values a layer reads."""
        return (layer * self.submodules) % self.pairs

    def tensors(self, rows: torch.Tensor) -> PrefixTensors:
        """Keys and values `(H, p, D)` by name, of PEFT's matrix `(p, row)`.

        A layer with fewer or narrower heads than the largest takes the first ones, as PEFT cuts them (gemma 4).
        """
        pairs = rows.view(rows.shape[0], self.pairs, 2, self.heads, self.width)
        found = {}
        for index, layer in self._own():
            for role, name in enumerate(("key", "value")):
                part = pairs[:, self.pair(index), role, : layer.kv_heads, : layer.key_width]
                found[f"{SITE}.layers.{index}.{name}"] = part.transpose(0, 1).clone(
                    memory_format=torch.contiguous_format
                )
        return found

    def rows(self, tensors: Mapping[str, torch.Tensor], num_virtual_tokens: int) -> torch.Tensor:
        """The inverse of `tensors`, `(p, row)` in float32 on the CPU, with zeros where no layer reads."""
        pairs = torch.zeros(num_virtual_tokens, self.pairs, 2, self.heads, self.width)
        for index, layer in self._own():
            for role, name in enumerate(("key", "value")):
                part = pairs[:, self.pair(index), role, : layer.kv_heads, : layer.key_width]
                part.copy_(tensors[f"{SITE}.layers.{index}.{name}"].transpose(0, 1))
        return pairs.flatten(1)

    def _own(self) -> list[tuple[int, LayerGeometry]]:
        return [(index, layer) for index, layer in enumerate(self.layers) if layer is not None]


def layout_for(base: PreTrainedModel, geometry: Geometry, pairs: int | None = None) -> PeftLayout:
    """The layout that a base model needs.

    Args:
        base: The base model, one for which `obstacle` is `None`.
        geometry: Its geometry.
        pairs: `num_layers`, where a file says it; by default the smallest number with which no two layers share a pair.
    """
    layers = geometry.sites[SITE]
    is_pair = bool(base.config.is_encoder_decoder)
    if pairs is None:
        pairs = len(layers) + (is_pair and len(layers) % 2 == 0)
    largest = _largest(layers)
    return PeftLayout(largest.kv_heads, largest.key_width, pairs, 2 if is_pair else 1, layers)


def has_windows(base: PreTrainedModel) -> bool:
    """Whether some decoder layer has a sliding window, which virtual tokens leave in PEFT as real ones do."""
    return any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=_text_config(base)).layers)


def obstacle(base: PreTrainedModel, geometry: Geometry) -> str | None:
    """Why PEFT cannot do to this base what a prefix of this library does; `None` if it can.

    Args:
        base: The base model.
        geometry: Its geometry.
    """
    config = _text_config(base)
    name = type(base).__name__
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers):
        return f"{name} has recurrent layers, and PEFT's prefixes run on attention alone"
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"{name} attends in chunks, in which PEFT counts virtual tokens as text"
    if LocalWindows(base).modules:
        return f"{name} keeps its sliding windows in buffers, which virtual tokens leave in PEFT and not here"
    if not _reads_text_behind_a_cache(base, geometry):
        return f"{name} takes a cache for single tokens only, and PEFT gives it a whole text behind one"
    layers = geometry.sites[SITE]
    if any(layer is not None and layer.key_width != layer.value_width for layer in layers):
        return f"the keys and values of {name} differ in width, and PEFT has one width for both"
    largest = _largest(layers)
    if any(layer is not None and layer.kv_heads > largest.kv_heads for layer in layers):
        return f"the layers of {name} with the widest heads have fewer than others, and PEFT gives those no prefix"
    return None


def _largest(layers: tuple[LayerGeometry | None, ...]) -> LayerGeometry:
    """The layer that PEFT makes room for: the one with the widest heads, and most of them among equals."""
    return max((layer for layer in layers if layer is not None), key=lambda layer: (layer.key_width, layer.kv_heads))


def _text_config(base: PreTrainedModel) -> Any:
    return base.config.get_text_config(decoder=True)


def _reads_text_behind_a_cache(base: PreTrainedModel, geometry: Geometry) -> bool:
    """Whether the decoder, given two tokens and the cache of one, does not complain."""
    if not can_run(base) or any(map(is_sharded, base.parameters())):
        return True  # there is nothing to compute with, or only together with other processes
    known = DynamicCache()
    for site, index, layer in geometry.layers():
        if site == SITE:
            key = torch.zeros(1, layer.kv_heads, 1, layer.key_width, dtype=base.dtype, device=home(base))
            known.update(key, key.new_zeros(*key.shape[:-1], layer.value_width), index)
    cache: Cache = EncoderDecoderCache(known, DynamicCache()) if base.config.is_encoder_decoder else known
    try:
        with evaluation_mode(base), torch.no_grad():
            backbone_of(base)(**example_inputs(base, ordinary_ids(base, 2)[None]), past_key_values=cache)
    except AssertionError:
        return False
    return True
