"""The keys and values of one call of the base: of one prefix for all rows, or of one for each row.

They are computed once, so that all passes of a call, and all sites, see the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .cache import KeyValue
from .call import SiteStates
from .geometry import Geometry
from .parameterization import Parameterization, PrefixTensors, from_rows

Devices = Mapping[tuple[str, int], torch.device]
"""Where the layers of each site are, as far as that is not one device."""


class CallStates:
    """Keys and values for any number of rows.

    Args:
        geometry: Shapes of the base model, at the sites where prefixes act.
        device: Where the base is; `None` leaves keys and values where they are.
        devices: Where those layers are that are elsewhere.
    """

    def __init__(self, geometry: Geometry, device: torch.device | None, devices: Devices) -> None:
        self.geometry = geometry
        self.devices = devices
        self.device = device
        self._known: list[tuple[int, SiteStates]] = []  # no dict: numbers of rows may be symbols in traced code

    def __call__(self, rows: int) -> SiteStates:
        """Keys `(1 or rows, H, p, Dk)` and values `(1 or rows, H, p, Dv)` by site and layer, for a number of rows."""
        kind = self._kind(rows)
        for known, states in self._known:
            if known == kind:
                return states
        tensors = self._tensors(kind) if self.device is None else self._moved(self._tensors(kind), self.device)
        states = {
            site: [
                None if shape is None else _pair(tensors, f"{site}.layers.{index}")
                for index, shape in enumerate(layers)
            ]
            for site, layers in self.geometry.sites.items()
        }
        self._known.append((kind, states))
        return states

    def _moved(self, tensors: PrefixTensors, device: torch.device) -> PrefixTensors:
        """Keys and values where their layers are."""
        result = {}
        for site, index, _ in self.geometry.layers():
            for name in (f"{site}.layers.{index}.key", f"{site}.layers.{index}.value"):
                result[name] = tensors[name].to(self.devices.get((site, index), device))
        return result

    def _kind(self, rows: int) -> int:
        """Numbers of rows of the same kind have the same states."""
        raise NotImplementedError

    def _tensors(self, kind: int) -> PrefixTensors:
        """Keys `(1 or rows, H, p, Dk)` and values `(1 or rows, H, p, Dv)` by name."""
        raise NotImplementedError


def _pair(tensors: PrefixTensors, layer: str) -> KeyValue:
    return tensors[f"{layer}.key"], tensors[f"{layer}.value"]


class OnePrefix(CallStates):
    """A prefix that all rows read.

    Args:
        prefix: The prefix.
        dropout: Probability with which each number is set to zero, in each row for itself.
        device: As in `CallStates`.
        devices: As in `CallStates`.
    """

    def __init__(self, prefix: Parameterization, dropout: float, device: torch.device | None, devices: Devices) -> None:
        super().__init__(prefix.geometry, device, devices)
        self.prefix = prefix
        self.dropout = dropout
        self._numbers: PrefixTensors | None = None

    def _kind(self, rows: int) -> int:
        return rows if self.dropout else 1  # without dropout one row serves all

    def _tensors(self, kind: int) -> PrefixTensors:
        if self._numbers is None:
            self._numbers = self.prefix()
        return {name: self._for(kind, tensor) for name, tensor in self._numbers.items()}

    def _for(self, rows: int, tensor: torch.Tensor) -> torch.Tensor:
        if not self.dropout:
            return tensor[None]
        return nn.functional.dropout(tensor[None].expand(rows, -1, -1, -1), self.dropout)


class OnePerRow(CallStates):
    """A prefix for each row, or none. Shorter ones have zeros in front, which masks hide.

    Args:
        prefixes: The prefix of each row of the call.
        dropouts: Probability with which each of its numbers is set to zero.
        geometry: As in `CallStates`.
        device: As in `CallStates`.
        devices: As in `CallStates`.
    """

    def __init__(
        self,
        prefixes: Sequence[Parameterization | None],
        dropouts: Sequence[float],
        geometry: Geometry,
        device: torch.device,
        devices: Devices,
    ) -> None:
        super().__init__(geometry, device, devices)
        self.prefixes = prefixes
        self.dropouts = dropouts
        self._numbers: dict[str, torch.Tensor] = {}

    def _kind(self, rows: int) -> int:
        return rows

    def _tensors(self, kind: int) -> PrefixTensors:
        copies = kind // len(self.prefixes)
        tensors: PrefixTensors = {}
        for site in self.geometry.sites:
            if site not in self._numbers:
                self._numbers[site] = self._gathered(site)
            rows = self._numbers[site].repeat_interleave(copies, dim=0) if copies > 1 else self._numbers[site]
            shapes = self.geometry.only([site]).tensor_shapes(rows.shape[1])
            tensors |= from_rows(self._with_dropout(rows, copies), shapes)
        return tensors

    def _gathered(self, site: str) -> torch.Tensor:
        """The numbers of each row's prefix, `(rows, p, N)`."""
        distinct = {one: one.rows(site).to(self.device) for one in self.prefixes if one and site in one.sites}
        dtype = torch.float32
        if len({rows.dtype for rows in distinct.values()}) == 1:
            dtype = next(iter(distinct.values())).dtype
        nothing = torch.empty(0, self.geometry.only([site]).numbers_per_token, dtype=dtype, device=self.device)
        rows = [nothing if one is None else distinct.get(one, nothing).to(dtype) for one in self.prefixes]
        return pad_sequence(rows, batch_first=True, padding_side="left")

    def _with_dropout(self, rows: torch.Tensor, copies: int) -> torch.Tensor:
        if not any(self.dropouts):
            return rows
        rates = torch.tensor(self.dropouts, device=rows.device).repeat_interleave(copies)[:, None, None]
        kept = torch.rand_like(rows, dtype=torch.float32) >= rates
        return rows * (kept / (1 - rates)).to(rows.dtype)
