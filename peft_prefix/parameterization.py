"""The trained form of a prefix: plain keys and values, or the paper's network that produces them.

Both forms answer the same three questions: which keys and values (`forward`), start from these (`start_from`), and how
many numbers (their parameters). Shapes: `p` virtual tokens, `H` key/value heads, `Dk` key width, `Dv` value width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn

from .config import PrefixConfig
from .geometry import Geometry

PrefixTensors = dict[str, torch.Tensor]
"""Plain keys `(H, p, Dk)` and values `(H, p, Dv)` by name: `decoder.layers.3.key`, `decoder.layers.3.value`, ..."""


class Parameterization(Protocol):
    """What every trained form of a prefix can do (each is also a `torch.nn.Module`)."""

    def __call__(self) -> PrefixTensors:
        """The keys and values, with gradients to whatever is trained."""
        ...

    def start_from(self, tensors: PrefixTensors) -> None:
        """Make `self()` return exactly these keys and values."""
        ...


class _KeyValue(nn.Module):
    """One layer's trained keys and values; exists so that parameters carry the names of the file format."""

    def __init__(self, key_shape: tuple[int, int, int], value_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.zeros(key_shape))
        self.value = nn.Parameter(torch.zeros(value_shape))


class DirectPrefix(nn.Module):
    """Keys and values themselves are the parameters.

    Args:
        geometry: Shapes of the base model.
        config: Its `num_virtual_tokens` is used.
    """

    def __init__(self, geometry: Geometry, config: PrefixConfig) -> None:
        super().__init__()
        p = config.num_virtual_tokens
        self.sites = tuple(geometry.sites)
        for site in self.sites:
            layers = nn.ModuleDict()
            for owner, index, shape in geometry.layers():
                if owner == site:
                    key_shape = (shape.kv_heads, p, shape.key_width)
                    layers[str(index)] = _KeyValue(key_shape, (shape.kv_heads, p, shape.value_width))
            self.add_module(site, nn.ModuleDict({"layers": layers}))

    def forward(self) -> PrefixTensors:
        """Keys `(H, p, Dk)` and values `(H, p, Dv)` by name."""
        sites = ((site, self.get_submodule(site)) for site in self.sites)
        return {name: tensor for site, module in sites for name, tensor in module.named_parameters(prefix=site)}

    def spread(self, devices: Mapping[tuple[str, int], torch.device]) -> None:
        """Move the keys and values of each site and layer to a device of their own."""
        for (site, index), device in devices.items():
            if site in self.sites and str(index) in (layers := cast("Any", self.get_submodule(f"{site}.layers"))):
                layers[str(index)].to(device)

    def start_from(self, tensors: PrefixTensors) -> None:
        """Copy the given keys and values into the parameters."""
        with torch.no_grad():
            for name, parameter in self().items():
                parameter.copy_(tensors[name])


class MLPPrefix(nn.Module):
    """The paper's reparameterization (Li & Liang 2021, section 4.3), in residual form, one network for each site.

    An embedding of `p` rows goes through hidden layer, tanh and output layer to the keys and values of all layers of a
    site. They are added to a fixed anchor, the initializer's keys and values, and the output layer starts at zero:
    training starts exactly at the initializer, which the network alone could only approach. One pass serves the whole
    batch.

    Args:
        geometry: Shapes of the base model.
        config: Its `num_virtual_tokens`, `mlp_hidden_size` and `init_seed` are used.
    """

    def __init__(self, geometry: Geometry, config: PrefixConfig) -> None:
        super().__init__()
        self.geometry = geometry
        self.config = config
        self.sites = tuple(geometry.sites)
        for number, site in enumerate(self.sites):
            self.add_module(site, _SiteMLP(geometry.only([site]), config, config.init_seed + number))

    def forward(self) -> PrefixTensors:
        """Keys `(H, p, Dk)` and values `(H, p, Dv)` by name."""
        return {name: tensor for site in self.sites for name, tensor in self.get_submodule(site)().items()}

    def folded(self, state: Mapping[str, torch.Tensor]) -> PrefixTensors:
        """What networks with this state give; this one's own parameters may be spread over processes."""
        network = MLPPrefix(self.geometry, self.config)
        network.load_state_dict(state)
        anchor = next(tensor for name, tensor in state.items() if name.endswith("anchor"))
        with torch.no_grad():
            return network.to(anchor.device, anchor.dtype).forward()

    def start_from(self, tensors: PrefixTensors) -> None:
        """Move the anchors to the given keys and values and set the output layers back to zero."""
        for site in self.sites:
            network = self.get_submodule(site)
            assert isinstance(network, _SiteMLP)
            network.start_from(tensors)


class _SiteMLP(nn.Module):
    """One site's network."""

    anchor: torch.Tensor

    def __init__(self, geometry: Geometry, config: PrefixConfig, seed: int) -> None:
        super().__init__()
        self.shapes = geometry.tensor_shapes(config.num_virtual_tokens)
        width = config.mlp_hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Parameter(torch.randn(config.num_virtual_tokens, width))
            self.hidden = nn.Linear(width, width)
            self.output = nn.Linear(width, geometry.numbers_per_token)
        self.register_buffer("anchor", torch.zeros(config.num_virtual_tokens, geometry.numbers_per_token))
        self._restart()

    def forward(self) -> PrefixTensors:
        rows = self.anchor + self.output(torch.tanh(self.hidden(self.embedding)))
        widths = [heads * width for heads, _, width in self.shapes.values()]
        columns = rows.split(widths, dim=1)
        return {
            name: column.unflatten(1, (heads, width)).transpose(0, 1)
            for (name, (heads, _, width)), column in zip(self.shapes.items(), columns, strict=True)
        }

    def start_from(self, tensors: PrefixTensors) -> None:
        with torch.no_grad():
            rows = [tensors[name].transpose(0, 1).flatten(1) for name in self.shapes]
            self.anchor.copy_(torch.cat([row.to(self.anchor) for row in rows], dim=1))
        self._restart()

    def _restart(self) -> None:
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)


def build_parameterization(geometry: Geometry, config: PrefixConfig) -> DirectPrefix | MLPPrefix:
    """The form that `config.reparameterization` names, filled with zeros."""
    if config.reparameterization == "mlp":
        return MLPPrefix(geometry, config)
    return DirectPrefix(geometry, config)
