"""Reading a saved prefix of any format, checked against a base model before anything is allocated for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from .checkpoint import read_description, read_tensors, read_training_state
from .config import PrefixConfig
from .description import PrefixDescription
from .errors import IncompatibleBaseError, PrefixFileError, name_of, some_of
from .fingerprint import difference
from .geometry import Geometry
from .hub import SavedFiles
from .leave_one_out import LEAVE_ONE_OUT, Demonstration, read_demonstrations
from .modules_to_save import module_shapes, resolved_modules
from .parameterization import PrefixTensors, network_size
from .peft_format import read_peft
from .tensor_file import opened

_ACTIVE = "prefixes._extra_state"
"""Where a training state says which prefix was active."""
_SMALL_NETWORK = 2**25
"""Numbers that a reparameterization may have on any base."""


@dataclass(frozen=True)
class LoadedPrefix:
    """What a saved prefix contains.

    Args:
        source: What to call it in messages.
        config: Its configuration.
        tensors: Its keys and values, and weights of modules of the base, by name.
        description: What it says about itself; `None` if this library did not save it.
    """

    source: Path | str
    config: PrefixConfig
    tensors: PrefixTensors
    description: PrefixDescription | None = None

    def another_base(self, name: str | None, fingerprint: str | None) -> str | None:
        """What is another one in a base than where this was trained, as a part of a sentence; `None` for nothing.

        Args:
            name: Name of the base at hand.
            fingerprint: Fingerprint of its weights.
        """
        if self.description is not None:
            return difference(self.description.weights_fingerprint, fingerprint)
        trained_on = self.config.base_model_name_or_path  # others write down nothing but the name
        is_other = trained_on and name and Path(trained_on).name != Path(name).name
        return "may be another model" if is_other else None


def read_prefix(files: SavedFiles, base: PreTrainedModel, geometry: Geometry) -> LoadedPrefix:
    """Read a prefix of this library or of PEFT.

    Args:
        files: Where it is.
        base: The model that it is for.
        geometry: Geometry of that, at all sites.

    Raises:
        PrefixFileError: A file is missing, damaged, no prefix, or contains NaN.
        IncompatibleBaseError: The base has other sites, layers, heads, widths or modules.
    """
    if files.peft_config is not None:
        return LoadedPrefix(files.tensors, *read_peft(files.peft_config, files.tensors, base, geometry))
    file = files.tensors
    with opened(file) as content:
        description = read_description(content)
        # A file says what it holds; one without this entry holds keys and values alone.
        config = description.config.replace(modules_to_save=description.config.modules_to_save or ())
        missing = set(config.sites or ()) - geometry.sites.keys()
        if missing:
            raise IncompatibleBaseError(
                f"{file} has the sites {some_of(sorted(missing))}, which {name_of(base)} does not have. Load it onto "
                "the model that it was trained on."
            )
        own_geometry = geometry.only(config.sites or geometry.sites)
        expected: dict[str, tuple[int, ...]] = {**own_geometry.tensor_shapes(config.num_virtual_tokens)}
        expected |= module_shapes(base, _modules(config, file, base))
        return LoadedPrefix(file, config, read_tensors(content, description, expected, name_of(base)), description)


def require_modest_network(loaded: LoadedPrefix, base: PreTrainedModel, geometry: Geometry) -> None:
    """Check that training on does not take more memory than the base does, whatever a file asks for.

    Raises:
        PrefixFileError: It would.
    """
    config = loaded.config
    size = network_size(geometry.only(config.sites or geometry.sites), config)
    limit = max(_SMALL_NETWORK, sum(parameter.numel() for parameter in base.parameters()))
    if size > limit:
        raise PrefixFileError(
            f"{loaded.source} asks for a reparameterization of {size:,} numbers (mlp_hidden_size="
            f"{config.mlp_hidden_size:,}), more than the base model has. Load it without is_trainable=True."
        )


def demonstrations_beside(file: Path | str, num_virtual_tokens: int) -> tuple[Demonstration, ...] | None:
    """The demonstrations in the training state to which a prefix's file belongs; `None` if there is no such state.

    Args:
        file: The prefix's file: in the folder of a training checkpoint, or in one of the prefix's name inside of it.
        num_virtual_tokens: Length `p` of the prefix.

    Raises:
        PrefixFileError: The training state is damaged.
    """
    inner = Path(file).parent
    for folder, name in ((inner, None), (inner.parent, inner.name)):
        state_file = folder / SAFE_WEIGHTS_NAME
        if not state_file.is_file():
            continue
        if name is None:  # the file of the prefix that was active
            active = read_training_state(state_file, (_ACTIVE,)).get(_ACTIVE)
            name = "" if active is None else bytes(active.to(torch.uint8).tolist()).decode(errors="replace")
        key = f"prefixes.{name}.{LEAVE_ONE_OUT}._extra_state"
        state = read_training_state(state_file, (key,)).get(key)
        if state is not None:
            return read_demonstrations(state, num_virtual_tokens)
    return None


def _modules(config: PrefixConfig, file: Path, base: PreTrainedModel) -> tuple[str, ...]:
    """The modules that a prefix has weights for, if the base has them."""
    names = config.modules_to_save or ()
    missing = set(names) - {name for name, _ in base.named_modules()} if names else set()
    if missing:
        raise IncompatibleBaseError(
            f"{file} was trained together with {some_of(sorted(missing))}, which {name_of(base)} does not have. Load "
            "the base with the class that it was trained with, e.g. AutoModelForSequenceClassification."
        )
    if names and set(resolved_modules(base, names)) != set(names):
        raise PrefixFileError(f"{file} names modules inside of each other as modules_to_save. Save it again.")
    return names
