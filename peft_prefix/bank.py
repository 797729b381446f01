"""The named prefixes of one base model, and which of them is active."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping

import torch
from torch import nn

from .call import SiteStates
from .config import PrefixConfig
from .errors import PrefixConfigError
from .geometry import Geometry
from .learning_rate import GOOD_LEARNING_RATE, GOOD_LEARNING_RATE_WITH_MODULES, LearningRateWatch
from .modules_to_save import MODULES, ModuleWeights
from .parameterization import DirectPrefix, MLPPrefix, Parameterization, PrefixTensors, build_parameterization
from .processes import require_all_used, require_whole, whole

SiteNames = dict[str, list[tuple[str, str] | None]]
"""Names of the tensors of keys and values by site and layer; `None` for layers that keep none."""


class CallStates:
    """A prefix's keys and values for one call of the base.

    They are computed once, so that all passes of a call, and all sites, see the same prefix.

    Args:
        parameterization: The prefix.
        names: Which of its tensors belong where.
        dropout: Probability with which each number is set to zero.
    """

    def __init__(self, parameterization: Parameterization, names: SiteNames, dropout: float) -> None:
        self.parameterization = parameterization
        self.names = names
        self.dropout = dropout
        self._tensors: PrefixTensors | None = None
        self._known: list[tuple[int, SiteStates]] = []

    def __call__(self, rows: int) -> SiteStates:
        """Keys `(1 or rows, H, p, Dk)` and values `(1 or rows, H, p, Dv)` by site and layer, for a number of rows.

        Dropout differs between rows; without it one row serves all.
        """
        rows = rows if self.dropout else 1
        for known, states in self._known:
            if known == rows:
                return states
        if self._tensors is None:
            self._tensors = self.parameterization()
        tensors = {name: self._for(rows, tensor) for name, tensor in self._tensors.items()}
        states = {
            site: [None if names is None else (tensors[names[0]], tensors[names[1]]) for names in layers]
            for site, layers in self.names.items()
        }
        self._known.append((rows, states))
        return states

    def _for(self, rows: int, tensor: torch.Tensor) -> torch.Tensor:
        if not self.dropout:
            return tensor[None]
        return nn.functional.dropout(tensor[None].expand(rows, -1, -1, -1), self.dropout)


class PrefixBank(nn.ModuleDict):
    """Parameterizations by prefix name.

    Args:
        geometry: Shapes of the base model.

    Attributes:
        configs: The configuration of each prefix, by name.
        active: Name of the prefix in use, `None` while there is none.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.configs: dict[str, PrefixConfig] = {}
        self.active: str | None = None
        self._names: dict[str, SiteNames] = {}

    def install(
        self,
        name: str,
        config: PrefixConfig,
        tensors: PrefixTensors,
        devices: Mapping[tuple[str, int], torch.device],
        device: torch.device,
        weights: ModuleWeights,
        is_trainable: bool = True,
    ) -> None:
        """Add a prefix that starts from the given keys and values; one that is not trained needs no network.

        Args:
            name: A name that is not taken.
            config: What it looks like.
            tensors: Its keys and values by name.
            devices: Where the keys and values of each site and layer go.
            device: Where a network goes, and layers that are not in `devices`.
            weights: Its weights for modules of the base.
            is_trainable: Whether it is trained.
        """
        self.check_new(name)
        geometry = self.geometry.only(config.sites or self.geometry.sites)
        module = build_parameterization(geometry, config) if is_trainable else DirectPrefix(geometry, config)
        module.start_from(tensors)
        module.to(device)
        if isinstance(module, DirectPrefix):
            module.spread(devices)
        if is_trainable and isinstance(module, DirectPrefix):
            good_rate = GOOD_LEARNING_RATE_WITH_MODULES if weights.module_names else GOOD_LEARNING_RATE
            watch = LearningRateWatch(module.parameters(), good_rate)  # of the prefix alone
            weakref.finalize(module, watch.stop)
        module.add_module(MODULES, weights)
        self[name] = module.train(self.training).requires_grad_(is_trainable)
        self.configs[name] = config
        self._names[name] = {
            site: [
                None if shape is None else (f"{site}.layers.{index}.key", f"{site}.layers.{index}.value")
                for index, shape in enumerate(layers)
            ]
            for site, layers in geometry.sites.items()
        }

    def in_use(self) -> tuple[str, PrefixConfig, DirectPrefix | MLPPrefix]:
        """Name, configuration and parameterization of the active prefix.

        Raises:
            PrefixConfigError: There is none.
        """
        if self.active is None:
            raise PrefixConfigError("The model has no prefix yet: call add_prefix or load_prefix first.")
        module = self[self.active]
        assert isinstance(module, (DirectPrefix, MLPPrefix))
        return self.active, self.configs[self.active], module

    def weights(self) -> ModuleWeights:
        """The active prefix's weights for modules of the base."""
        weights = self.in_use()[2].get_submodule(MODULES)
        assert isinstance(weights, ModuleWeights)
        return weights

    def saved(self, state: Mapping[str, torch.Tensor] | None = None) -> PrefixTensors:
        """What a file of the active prefix contains, without gradients.

        Args:
            state: A gathered training state of this bank; without one, the parameters themselves are read, for which
                all processes must ask where they are spread over several.

        Returns:
            Plain keys and values, and the weights of the modules that are saved with them, by name.
        """
        name, _, module = self.in_use()
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        tensors = whole(own) if state is None else {key: state[f"{name}.{key}"].detach().clone() for key in own}
        modules = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{MODULES}.")}
        plain: PrefixTensors = {key: tensor for key, tensor in tensors.items() if key not in modules}
        if isinstance(module, MLPPrefix):
            plain = module.folded(plain)
        return {**plain, **modules}

    def states(self) -> CallStates:
        """The active prefix for one call of the base."""
        name, config, module = self.in_use()
        if not torch.compiler.is_compiling():
            require_whole(module)
            require_all_used(dict(self.items()), name)
        return CallStates(module, self._names[name], config.dropout if self.training else 0.0)

    def get_extra_state(self) -> torch.Tensor:
        """The active prefix's name, so that a resumed training goes on with the same one; bytes, as uint8."""
        return torch.tensor(list((self.active or "").encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Make the prefix active that was when the state was taken."""
        self.active = bytes(state.tolist()).decode() or None

    def check_new(self, name: object) -> None:
        """Check that a name can be given to a new prefix.

        Raises:
            PrefixConfigError: It is taken, or could not name a file or a parameter.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise PrefixConfigError(f"A prefix's name consists of letters, digits, '_' and '-', unlike {name!r}.")
        if name in self.configs:
            raise PrefixConfigError(f"There is a prefix {name!r} already; choose another name.")
        if hasattr(self, name):
            raise PrefixConfigError(f"{name!r} means something else in Python; choose another name.")

    def check_known(self, name: object) -> None:
        """Check that there is a prefix of this name.

        Raises:
            PrefixConfigError: There is none.
        """
        if name not in self.configs:
            raise PrefixConfigError(f"There is no prefix {name!r}; there are {sorted(self.configs)}.")
