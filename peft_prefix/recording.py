"""The keys and values that a base model computes for real tokens, at every site."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast, get_args

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .arguments import by_name, new_tokens_of
from .backbone import backbone_of
from .cache import KeyValue
from .config import Site
from .errors import UnsupportedModelError
from .geometry import Geometry, LayerGeometry
from .passes import Entered, Intervention, intervening
from .structure import Structure, evaluation_mode, give_cache, store_in
from .written_out import WrittenOut

States = dict[str, list[KeyValue | None]]
"""Per site and layer, keys `(batch, H, tokens, Dk)` and values `(batch, H, tokens, Dv)`; `None` for a layer without."""


class Recording:
    """Caches that fill with everything a base computes.

    Args:
        structure: What the base consists of.

    Attributes:
        cache: That of the decoder, which keeps all tokens, in layers with a sliding window, too.
        encoder: One for each attention layer of an encoder.
    """

    def __init__(self, structure: Structure) -> None:
        self.encoder = [DynamicCache() for _ in structure.encoder_attention or structure.written_out]
        self.cache: Cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if structure.encoder is None:
            self.cache = DynamicCache(config=structure.text_config)
            layers = zip(self.cache.layers, self.cache.is_sliding, strict=True)
            self.cache.layers = [DynamicLayer() if sliding else layer for layer, sliding in layers]

    @property
    def states(self) -> States:
        """What was recorded so far."""
        states = states_of(self.cache)
        if self.encoder and all(cache.layers for cache in self.encoder):
            states["encoder"] = [_states(cache.layers[0]) for cache in self.encoder]
        return states


@contextmanager
def recording(structure: Structure) -> Iterator[Recording]:
    """While this is open, passes of the base in this context fill a recording."""
    record = Recording(structure)
    if structure.encoder is None:
        interventions = []
    elif structure.written_out:
        interventions = _listening(structure, record)
    else:
        interventions = [
            store_in(cache, attention)
            for attention, cache in zip(structure.encoder_attention, record.encoder, strict=True)
        ]
    with intervening([give_cache(structure.decoder, record.cache), *interventions]):
        yield record


def _listening(structure: Structure, record: Recording) -> list[Intervention]:
    """Interventions that record an encoder whose attention takes no cache."""
    assert structure.encoder is not None
    names = tuple(inspect.signature(structure.encoder.forward).parameters)
    lengths: list[int] = []

    def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
        arguments = by_name(names, args, kwargs)
        lengths.append(new_tokens_of(arguments).shape[1])
        return arguments, None

    def into(cache: Cache) -> Callable[[torch.Tensor, torch.Tensor], None]:
        return lambda keys, values: cast("None", cache.update(keys, values, 0))

    layers = zip(structure.written_out, record.encoder, strict=True)
    listening = [WrittenOut(layout).recording(into(cache), lambda: lengths[-1]) for layout, cache in layers]
    return [Intervention(structure.encoder, enter), *(one for many in listening for one in many)]


def record(base: PreTrainedModel, structure: Structure, arguments: dict[str, Any]) -> States:
    """Run the base without gradients or dropout, and return all keys and values that it computes.

    Args:
        base: The base model.
        structure: What it consists of.
        arguments: Arguments of its forward, without a cache.
    """
    with evaluation_mode(base), torch.no_grad(), recording(structure) as run:
        backbone_of(base)(**arguments)
    return run.states


def states_of(cache: Cache) -> States:
    """The keys and values of a filled cache."""
    if isinstance(cache, EncoderDecoderCache):
        decoder, cross = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        return {"decoder": [_states(layer) for layer in decoder], "cross": [_states(layer) for layer in cross]}
    return {"decoder": [_states(layer) for layer in cache.layers]}


def geometry_of(name: str, states: States) -> Geometry:
    """The shapes of recorded keys and values.

    Args:
        name: Name of the base's class, for the error.
        states: What one pass of the base gave.

    Raises:
        UnsupportedModelError: Some are not of the shape that attention with a cache has.
    """
    return Geometry(
        {
            site: tuple(_layer_geometry(name, layer) for layer in states[site])
            for site in get_args(Site)
            if site in states
        }
    )


def _states(layer: Any) -> KeyValue | None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return None if keys is None or values is None else (keys, values)


def _layer_geometry(name: str, layer: KeyValue | None) -> LayerGeometry | None:
    if layer is None:
        return None
    keys, values = layer
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise UnsupportedModelError(
            f"{name} caches keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)}; a prefix "
            "needs (batch, kv_heads, tokens, width) with equal heads for both."
        )
    return LayerGeometry(kv_heads=keys.shape[1], key_width=keys.shape[3], value_width=values.shape[3])
