"""Where a model keeps keys and values, and in which shapes: found by running it, not by reading config names.

One tiny forward pass with a cache shows everything that config fields describe only for some families: grouped and
multi-query heads, a head width that is not `hidden / heads`, latent attention whose key and value differ in width,
layers without attention, layers that reuse another layer's cache. It runs the base as it is, so a quantized, spread
or patched model is seen as it will be used.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerGeometry:
    """Shape of one layer's cache: keys `(kv_heads, tokens, key_width)`, values `(kv_heads, tokens, value_width)`."""

    kv_heads: int
    key_width: int
    value_width: int

    @property
    def numbers_per_token(self) -> int:
        """How many numbers one virtual token has in this layer."""
        return self.kv_heads * (self.key_width + self.value_width)


@dataclass(frozen=True)
class Geometry:
    """Per site, the shape of every cache layer."""

    sites: dict[str, tuple[LayerGeometry, ...]]

    def layers(self) -> Iterator[tuple[str, int, LayerGeometry]]:
        """All layers, as `(site, layer index, shape)`."""
        for site, layers in self.sites.items():
            for index, layer in enumerate(layers):
                yield site, index, layer

    @property
    def numbers_per_token(self) -> int:
        """How many numbers one virtual token has in the whole model."""
        return sum(layer.numbers_per_token for _, _, layer in self.layers())

    def tensor_shapes(self, num_virtual_tokens: int) -> dict[str, tuple[int, int, int]]:
        """Name and shape of every tensor of a saved prefix."""
        shapes = {}
        for site, index, layer in self.layers():
            shapes[f"{site}.layers.{index}.key"] = (layer.kv_heads, num_virtual_tokens, layer.key_width)
            shapes[f"{site}.layers.{index}.value"] = (layer.kv_heads, num_virtual_tokens, layer.value_width)
        return shapes

    @property
    def fingerprint(self) -> str:
        """A hash that is equal exactly where prefixes of one model fit the other."""
        shapes = json.dumps(self.tensor_shapes(1), sort_keys=True)
        return hashlib.sha256(shapes.encode()).hexdigest()


def trace_geometry(base: PreTrainedModel) -> Geometry:
    """Find the geometry of a causal language model, or of a backbone without a head, by running it on one token.

    Args:
        base: Any transformers model.

    Returns:
        Its geometry, with the one site `decoder`.

    Raises:
        UnsupportedModelError: The model has no keys and values that a prefix could join.
    """
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; this version prefixes causal language models only."
        )
    if base.config.get_text_config(decoder=True) is not base.config:
        raise UnsupportedModelError(
            f"{name} is multimodal; this version prefixes text models only. Load its language model by itself, for "
            "example with AutoModelForCausalLM."
        )
    if "past_key_values" not in inspect.signature(base.forward).parameters:
        raise UnsupportedModelError(
            f"{name} keeps no keys and values: its forward takes no `past_key_values`, which is how a prefix reaches "
            "attention. Prefix-tuning needs a model with attention layers and a key/value cache."
        )
    with evaluation_mode(base), torch.no_grad():
        output = base(input_ids=torch.ones(1, 1, dtype=torch.long, device=base.device), use_cache=True)
    cache = output.get("past_key_values")
    found = [_layer_geometry(name, layer) for layer in cache.layers] if isinstance(cache, Cache) else []
    layers = tuple(layer for layer in found if layer is not None)
    if not layers:
        raise UnsupportedModelError(
            f"{name} keeps no keys and values: it ran with `use_cache=True` and returned no filled cache. "
            "Prefix-tuning needs a causal language model, for example from AutoModelForCausalLM (BERT-like models with "
            "`is_decoder=True`)."
        )
    if len(layers) < len(found):
        without = [index for index, layer in enumerate(found) if layer is None]
        raise UnsupportedModelError(
            f"{name} keeps no keys and values in its layers {without} (they are recurrent, or share a cache); this "
            "version prefixes models that keep them in every layer."
        )
    return Geometry({"decoder": layers})


def recording_cache(base: PreTrainedModel) -> DynamicCache:
    """An empty cache for the base that keeps all tokens, in layers with a sliding window, too."""
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    cache.layers = [
        DynamicLayer() if sliding else layer for layer, sliding in zip(cache.layers, cache.is_sliding, strict=True)
    ]
    return cache


def activations(base: PreTrainedModel, input_ids: torch.Tensor) -> DynamicCache:
    """The complete keys and values that the base computes for some tokens, without gradients or dropout.

    Args:
        base: A causal language model.
        input_ids: Token ids of shape `(1, tokens)`.

    Returns:
        The filled cache.
    """
    cache = recording_cache(base)
    with evaluation_mode(base), torch.no_grad():
        base(input_ids=input_ids.to(base.device), past_key_values=cache, use_cache=True)
    return cache


def ordinary_tokens(base: PreTrainedModel) -> torch.Tensor:
    """1.0 for every word of the vocabulary and 0.0 for the special tokens that the config names, `(vocabulary,)`."""
    text_config = base.config.get_text_config(decoder=True)
    ordinary = torch.ones(text_config.vocab_size)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(text_config, name, None)
        for index in value if isinstance(value, list) else [] if value is None else [value]:
            if 0 <= index < len(ordinary):
                ordinary[index] = 0.0
    return ordinary


@contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off, and afterwards give every submodule its own mode back."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def _layer_geometry(name: str, layer: Any) -> LayerGeometry | None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        return None
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise UnsupportedModelError(
            f"{name} caches keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)}; a prefix "
            "needs (batch, kv_heads, tokens, width) with equal heads for both."
        )
    return LayerGeometry(kv_heads=keys.shape[1], key_width=keys.shape[3], value_width=values.shape[3])
