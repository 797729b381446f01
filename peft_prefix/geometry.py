"""Where a model keeps keys and values, and in which shapes, site by site and layer by layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


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
    """Per site, the shape of every layer's keys and values.

    Args:
        sites: `None` stands for a layer that keeps no keys and values: it is recurrent, or reads another layer's.
    """

    sites: dict[str, tuple[LayerGeometry | None, ...]]

    def layers(self) -> Iterator[tuple[str, int, LayerGeometry]]:
        """All layers that keep keys and values, as `(site, layer index, shape)`."""
        for site, layers in self.sites.items():
            for index, layer in enumerate(layers):
                if layer is not None:
                    yield site, index, layer

    def only(self, sites: Iterable[str]) -> Geometry:
        """The part of some sites, in this geometry's order."""
        wanted = set(sites)
        return Geometry({site: layers for site, layers in self.sites.items() if site in wanted})

    @property
    def numbers_per_token(self) -> int:
        """How many numbers one virtual token has at all sites together."""
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
