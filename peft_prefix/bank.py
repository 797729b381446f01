"""The named prefixes of one base model, and which of them is active."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .config import PrefixConfig
from .errors import PrefixConfigError, some_of
from .geometry import Geometry
from .hidden_tokens import Hiding
from .learning_rate import LearningRateWatch, good_learning_rate
from .leave_one_out import LEAVE_ONE_OUT, Demonstration, KnownDemonstrations
from .modules_to_save import MODULES, ModuleWeights
from .ownership import Owner
from .parameterization import DirectPrefix, Parameterization, PrefixTensors, StoredPrefix, build_parameterization
from .processes import require_all_used, require_whole, whole
from .steps import changes
from .training_record import TrainingRecord


@dataclass(eq=False)
class BankEntry:
    """One prefix of a bank.

    Args:
        name: Its name.
        config: Its configuration.
        module: Its numbers.
        weights: Its weights for modules of the base.
        serial: A number that no other prefix of the bank has had.
        fillings: How often it was filled anew.
        saved_as: What it was when it was last saved, or made.
        training: How it was trained, as far as it is known.
    """

    name: str
    config: PrefixConfig
    module: Parameterization
    weights: ModuleWeights
    serial: int
    fillings: int = 0
    saved_as: Owner | None = None
    training: TrainingRecord | None = None
    _owner: Owner | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it has parameters that are trained."""
        return any(parameter.requires_grad for parameter in self.module.parameters())

    @property
    def hiding(self) -> Hiding:
        """What is hidden from rows that it is trained with."""
        config = self.config
        known = self.module._modules.get(LEAVE_ONE_OUT)
        assert known is None or isinstance(known, KnownDemonstrations)
        return Hiding(config.num_virtual_tokens, config.token_dropout, config.freeze_first_token, known)

    def remember(self, demonstrations: Sequence[Demonstration]) -> None:
        """Keep the demonstrations that it is made of now, as far as they are to be hidden from themselves."""
        self.module._modules.pop(LEAVE_ONE_OUT, None)
        config = self.config
        if config.init == "demonstrations" and config.leave_one_out and not isinstance(self.module, StoredPrefix):
            known = KnownDemonstrations(config.num_virtual_tokens, demonstrations)
            self.module.add_module(LEAVE_ONE_OUT, known.train(self.module.training))

    def owner(self, bank: PrefixBank) -> Owner:
        """The prefix as it is now: caches from before a training step are as foreign as those of another prefix."""
        if self._owner is None or not torch.compiler.is_compiling():  # versions are not seen there
            version = changes(self.module.parameters())
            label = f"{self.name!r} of model {id(bank):x}.{self.serial}.{self.fillings}.{version}"
            if self._owner is None or self._owner.label != label:
                self._owner = Owner(label)
        return self._owner


class PrefixBank(nn.ModuleDict):
    """Parameterizations by prefix name.

    Args:
        geometry: Shapes of the base model.

    Attributes:
        entries: What is known of each prefix, by name.
        active: Name of the prefix in use, `None` while there is none.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.entries: dict[str, BankEntry] = {}
        self.active: str | None = None
        self._installed = 0

    def install(
        self,
        name: str,
        config: PrefixConfig,
        tensors: PrefixTensors,
        devices: Mapping[tuple[str, int], torch.device],
        device: torch.device,
        weights: ModuleWeights,
        is_trainable: bool = True,
        stays_on: torch.device | None = None,
    ) -> None:
        """Add a prefix that starts from the given keys and values.

        Args:
            name: A name that is not taken.
            config: What it looks like.
            tensors: Its keys and values by name.
            devices: Where the keys and values of each site and layer go.
            device: Where a network goes, and layers that are not in `devices`.
            weights: Its weights for modules of the base.
            is_trainable: Whether it is trained.
            stays_on: Where the numbers of one that is not trained stay, wherever the model goes.
        """
        self.check_new(name)
        geometry = self.geometry.only(config.sites or self.geometry.sites)
        module: Parameterization = (
            build_parameterization(geometry, config) if is_trainable else StoredPrefix(geometry, config, stays_on)
        )
        module.start_from(tensors)
        module.to(device)
        if isinstance(module, DirectPrefix):
            module.spread(devices)
            bank = weakref.ref(self)
            watch = LearningRateWatch(
                module.parameters(),  # of the prefix alone
                self.good_learning_rate(config, weights),
                lambda: [] if (known := bank()) is None else list(known.parameters()),
            )
            weakref.finalize(module, watch.stop)
        if isinstance(module, StoredPrefix):
            module.keep(weights.requires_grad_(False))
        else:
            module.add_module(MODULES, weights)
        self._installed += 1
        self[name] = module.train(self.training)
        entry = BankEntry(name, config, module, weights, self._installed)
        entry.remember(())
        entry.saved_as = entry.owner(self)
        self.entries[name] = entry  # at last: another thread may be reading

    def good_learning_rate(self, config: PrefixConfig, weights: ModuleWeights) -> float:
        """What is recommended for a prefix of this configuration with weights for these modules."""
        return good_learning_rate(
            config.reparameterization,
            is_encoder_decoder=not {"encoder", "cross"}.isdisjoint(self.geometry.sites),
            has_modules=bool(weights.module_names),
        )

    def remove(self, name: str) -> None:
        """Forget a prefix; calls that run with it go on.

        Raises:
            PrefixConfigError: There is none of that name, or it is the active one.
        """
        self.entry(name)
        if name == self.active:
            raise PrefixConfigError(
                f"{name!r} is the active prefix. Choose another one first: set_prefix(name), or set_prefix(None)."
            )
        del self.entries[name], self[name]

    def entry(self, name: str | None = None) -> BankEntry:
        """A prefix by its name, the active one if left out.

        Raises:
            PrefixConfigError: There is none.
        """
        name = self.active if name is None else name
        if name is None:
            raise PrefixConfigError(
                f"No prefix is active; there are {self._some()}. Call set_prefix, or name one for each row with "
                "prefix_names=[...]."
                if self.entries
                else "The model has no prefix yet: call add_prefix or load_prefix first."
            )
        entry = self.entries.get(name)
        if entry is None:
            raise PrefixConfigError(f"There is no prefix {name!r}; there are {self._some()}.")
        return entry

    def saved(self, entry: BankEntry, state: Mapping[str, torch.Tensor] | None = None) -> PrefixTensors:
        """What a prefix's file contains, without gradients.

        Args:
            entry: The prefix.
            state: A gathered training state of this bank; without one, the parameters themselves are read, for which
                all processes must ask where they are spread over several.

        Returns:
            Plain keys and values, and the weights of the modules that are saved with them, by name.
        """
        module, held = entry.module, entry.weights.saved()
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if state is None or isinstance(module, StoredPrefix):
            tensors = whole({**own, **held})
        else:
            tensors = {key: state[f"{entry.name}.{key}"].detach().clone() for key in own}
        modules = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{MODULES}.")}
        return {**module.plain({key: tensor for key, tensor in tensors.items() if key not in modules}), **modules}

    def require_usable(self, used: Mapping[str, Parameterization], by_row: bool = False) -> None:
        """Check that prefixes can be read and trained here, in this process.

        Args:
            used: Those that a call reads, by name.
            by_row: Whether other processes may read others.

        Raises:
            PrefixInputError: Their numbers are elsewhere, or others would be waited for.
        """
        if torch.compiler.is_compiling():
            return
        for module in used.values():
            require_whole(module)
        require_all_used(self, used, by_row)

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
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
            raise PrefixConfigError(
                f"A prefix's name consists of letters, digits, '_' and '-', at most 100, unlike {name!r}."
            )
        if name in self.entries:
            raise PrefixConfigError(f"There is a prefix {name!r} already; choose another name.")
        if name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            raise PrefixConfigError(f"{name!r} would name the folder of a training checkpoint; choose another name.")
        if hasattr(self, name):
            raise PrefixConfigError(f"{name!r} means something else in Python; choose another name.")

    def _some(self) -> str:
        return some_of(sorted(map(repr, list(self.entries)))) or "none"
