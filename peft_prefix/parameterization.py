"""The forms of a prefix: plain keys and values, the paper's network that produces them, or one that is not trained.

All answer the same questions: which keys and values (`forward`), the same as one row for each virtual token (`rows`),
start from these (`start_from`), and what a file contains (`plain`). Shapes: `p` virtual tokens, `H` key/value heads,
`Dk` key width, `Dv` value width, `N` numbers of one virtual token in all layers of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import nn

from .config import PrefixConfig
from .errors import PrefixInputError
from .first_token import FIRST, FirstToken
from .geometry import Geometry

PrefixTensors = dict[str, torch.Tensor]
"""Plain keys `(H, p, Dk)` and values `(H, p, Dv)` by name: `decoder.layers.3.key`, `decoder.layers.3.value`, ..."""


Shapes = Mapping[str, tuple[int, int, int]]
"""Shapes `(H, p, D)` of a prefix's tensors by name; a site's order is the order of its numbers in a row."""


def as_rows(tensors: PrefixTensors, shapes: Shapes) -> torch.Tensor:
    """All numbers of each virtual token side by side, `(p, N)`, where the first tensor is."""
    columns = [tensors[name].transpose(0, 1).flatten(1) for name in shapes]
    return torch.cat([column.to(columns[0]) for column in columns], dim=1)


def from_rows(rows: torch.Tensor, shapes: Shapes) -> PrefixTensors:
    """The inverse of `as_rows`, without a copy: keys and values `(..., H, p, D)` of rows `(..., p, N)`."""
    columns = rows.split([heads * width for heads, _, width in shapes.values()], dim=-1)
    return {
        name: column.unflatten(-1, (heads, width)).transpose(-3, -2)
        for (name, (heads, _, width)), column in zip(shapes.items(), columns, strict=True)
    }


class Parameterization(nn.Module):
    """A form of a prefix.

    Args:
        geometry: Shapes of the base model, at the sites that the prefix has.
        config: Its `num_virtual_tokens` and `freeze_first_token` are used.
    """

    def __init__(self, geometry: Geometry, config: PrefixConfig) -> None:
        super().__init__()
        p = config.num_virtual_tokens
        self.geometry = geometry
        self.sites = tuple(geometry.sites)
        self.shapes = {site: geometry.only([site]).tensor_shapes(p) for site in self.sites}
        sizes = {site: geometry.only([site]).numbers_per_token for site in self.sites}
        self.first = FirstToken(sizes) if config.freeze_first_token else None

    def forward(self) -> PrefixTensors:
        """Keys `(H, p, Dk)` and values `(H, p, Dv)` by name, with gradients to whatever is trained."""
        sites = (from_rows(self.rows(site), shapes) for site, shapes in self.shapes.items())
        return {name: tensor for tensors in sites for name, tensor in tensors.items()}

    @property
    def stays_behind(self) -> bool:
        """Whether the numbers stay where they are when the model moves."""
        return False

    def rows(self, site: str) -> torch.Tensor:
        """The numbers of one site, `(p, N)`, with gradients to whatever is trained."""
        raise NotImplementedError

    def start_from(self, tensors: PrefixTensors) -> None:
        """Make `self()` return exactly these keys and values."""
        raise NotImplementedError

    def plain(self, state: PrefixTensors) -> PrefixTensors:
        """What a file contains: the keys and values that a form with this state gives, without gradients."""
        raise NotImplementedError

    def _keep_first(self, tensors: PrefixTensors) -> None:
        """Take over the first token of these keys and values, if it is frozen; for `start_from`."""
        if self.first is not None:
            for site, shapes in self.shapes.items():
                self.first.keep(site, as_rows(tensors, shapes))

    def _with_first(self, site: str, rows: torch.Tensor) -> torch.Tensor:
        """The numbers of one site, `(p, N)`, with the first token as it is kept, if it is frozen; for `rows`."""
        return rows if self.first is None else self.first.put_into(site, rows)


class _KeyValue(nn.Module):
    """One layer's trained keys and values; exists so that parameters carry the names of the file format."""

    def __init__(self, key_shape: tuple[int, int, int], value_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.zeros(key_shape))
        self.value = nn.Parameter(torch.zeros(value_shape))


class DirectPrefix(Parameterization):
    """Keys and values themselves are the parameters.

    Args: as `Parameterization`.
    """

    def __init__(self, geometry: Geometry, config: PrefixConfig) -> None:
        super().__init__(geometry, config)
        p = config.num_virtual_tokens
        for site in self.sites:
            layers = nn.ModuleDict()
            for owner, index, shape in geometry.layers():
                if owner == site:
                    key_shape = (shape.kv_heads, p, shape.key_width)
                    layers[str(index)] = _KeyValue(key_shape, (shape.kv_heads, p, shape.value_width))
            self.add_module(site, nn.ModuleDict({"layers": layers}))

    def forward(self) -> PrefixTensors:
        """Keys `(H, p, Dk)` and values `(H, p, Dv)` by name: the parameters themselves, if all of them are trained."""
        return self._parameters_by_name() if self.first is None else super().forward()

    def rows(self, site: str) -> torch.Tensor:
        """The numbers of one site, `(p, N)`."""
        return self._with_first(site, as_rows(self._of(site), self.shapes[site]))

    def spread(self, devices: Mapping[tuple[str, int], torch.device]) -> None:
        """Move the keys and values of each site and layer to a device of their own."""
        for (site, index), device in devices.items():
            if site in self.sites and str(index) in (layers := cast("Any", self.get_submodule(f"{site}.layers"))):
                layers[str(index)].to(device)

    def start_from(self, tensors: PrefixTensors) -> None:
        """Copy the given keys and values into the parameters."""
        with torch.no_grad():
            for name, parameter in self._parameters_by_name().items():
                parameter.copy_(tensors[name])
            self._keep_first(tensors)

    def plain(self, state: PrefixTensors) -> PrefixTensors:
        """The parameters, with the first token as the state keeps it."""
        tensors = {name: tensor for name, tensor in state.items() if not name.startswith(f"{FIRST}.")}
        for site in self.sites if self.first is not None else ():
            for name, first in from_rows(state[f"{FIRST}.{site}"], self.shapes[site]).items():
                tensors[name] = torch.cat([first.to(tensors[name]), tensors[name][:, 1:]], dim=1)
        return tensors

    def _parameters_by_name(self) -> PrefixTensors:
        return {name: tensor for site in self.sites for name, tensor in self._of(site).items()}

    def _of(self, site: str) -> PrefixTensors:
        return dict(self.get_submodule(site).named_parameters(prefix=site))


class StoredPrefix(Parameterization):
    """Numbers that are not trained: one tensor for each site, as small as their file.

    They are no parameters and no buffers, so optimizers, wrappers for several processes and the states of a training
    pass them by.

    Args:
        geometry: Shapes of the base model, at the sites that the prefix has.
        config: Its `num_virtual_tokens` is used.
        device: Where the numbers stay, wherever the model goes; `None` lets them go with it.
    """

    def __init__(self, geometry: Geometry, config: PrefixConfig, device: torch.device | None = None) -> None:
        super().__init__(geometry, config.replace(freeze_first_token=False))  # nothing of it is trained
        self.device = device
        self.stored: dict[str, torch.Tensor] = {}
        self._kept: list[nn.Module] = []

    @property
    def stays_behind(self) -> bool:
        """Whether a device was named for them."""
        return self.device is not None

    def rows(self, site: str) -> torch.Tensor:
        """The numbers of one site, `(p, N)`."""
        return self.stored[site]

    def keep(self, module: nn.Module) -> None:
        """Take a module along that belongs to the prefix; it is none of the model's either."""
        self._kept.append(module)

    def start_from(self, tensors: PrefixTensors) -> None:
        """Keep the given keys and values, in their dtype."""
        rows = {site: as_rows(tensors, shapes).detach() for site, shapes in self.shapes.items()}
        self.stored = {site: one if self.device is None else one.to(self.device) for site, one in rows.items()}

    def plain(self, state: PrefixTensors) -> PrefixTensors:
        """A copy of the keys and values; there is no other state."""
        return {name: tensor.clone() for name, tensor in self().items()}

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Refused, if it were to be trained.

        Raises:
            PrefixInputError: `requires_grad` is true.
        """
        if requires_grad:
            raise PrefixInputError("A prefix that was loaded frozen is not trained: load it with is_trainable=True.")
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for module in self._kept:
            module._apply(fn, recurse)
        if self.device is None:
            self.stored = {site: fn(rows) for site, rows in self.stored.items()}
        return self


class MLPPrefix(Parameterization):
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
        super().__init__(geometry, config)
        self.config = config
        for number, site in enumerate(self.sites):
            self.add_module(site, _SiteMLP(geometry.only([site]), config, config.init_seed + number))

    def rows(self, site: str) -> torch.Tensor:
        """The numbers of one site, `(p, N)`."""
        return self._with_first(site, self.get_submodule(site)())

    def plain(self, state: PrefixTensors) -> PrefixTensors:
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
            network.start_from(as_rows(tensors, self.shapes[site]))
        self._keep_first(tensors)


class _SiteMLP(nn.Module):
    """One site's network."""

    anchor: torch.Tensor

    def __init__(self, geometry: Geometry, config: PrefixConfig, seed: int) -> None:
        super().__init__()
        width = config.mlp_hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Parameter(torch.randn(config.num_virtual_tokens, width))
            self.hidden = nn.Linear(width, width)
            self.output = nn.Linear(width, geometry.numbers_per_token)
        self.register_buffer("anchor", torch.zeros(config.num_virtual_tokens, geometry.numbers_per_token))
        self._restart()

    def forward(self) -> torch.Tensor:
        rows: torch.Tensor = self.anchor + self.output(torch.tanh(self.hidden(self.embedding)))
        return rows

    def start_from(self, rows: torch.Tensor) -> None:
        with torch.no_grad():
            self.anchor.copy_(rows)
        self._restart()

    def _restart(self) -> None:
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)


def network_size(geometry: Geometry, config: PrefixConfig) -> int:
    """How many numbers the network of the reparameterization has, without making it; 0 if there is none."""
    if config.reparameterization != "mlp":
        return 0
    p, width = config.num_virtual_tokens, config.mlp_hidden_size
    sizes = (geometry.only([site]).numbers_per_token for site in geometry.sites)
    return sum(p * width + width * (width + 1) + size * (width + 1) for size in sizes)


def build_parameterization(geometry: Geometry, config: PrefixConfig) -> DirectPrefix | MLPPrefix:
    """The form that `config.reparameterization` names, filled with zeros."""
    if config.reparameterization == "mlp":
        return MLPPrefix(geometry, config)
    return DirectPrefix(geometry, config)
