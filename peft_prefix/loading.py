"""Loading prefixes, from here and from the Hub."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel

from .base_loading import load_base, named_base
from .config import PrefixConfig
from .errors import PrefixConfigError, PrefixWarning, name_of, some_of
from .fingerprint import weights_fingerprint
from .hub import HubOptions, locate_prefix
from .modules_to_save import ModuleWeights
from .original_format import read_original
from .parameterization import PrefixTensors
from .placement import home, layer_devices
from .reading import LoadedPrefix, demonstrations_beside, read_prefix, require_modest_network
from .saving import SavingModel

DEFAULT_PREFIX = "default"


class LoadingModel(SavingModel):
    """A model that loads saved prefixes."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        base: PreTrainedModel | str | Path,
        prefix_name_or_path: str | Path | None = None,
        *,
        name: str = DEFAULT_PREFIX,
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        **base_options: Any,
    ) -> Self:
        """A base model with a saved prefix.

        Without a base, `PrefixModel.from_pretrained("user/repo")`, the base that the prefix names is loaded, at the
        revision that it names, with the class that it was trained with.

        Args:
            base: The model that the prefix was trained on, with the adapter of PEFT that acted beside it, if there was
                one; a `PeftModel` is taken as well. Left out, the prefix stands in its place.
            prefix_name_or_path: A folder that `save_pretrained` wrote, or a repository on the Hub, `user/repo` or
                `user/repo/subfolder`. PEFT's prefix-tuning and Cartridge adapters are read as well.
            name: Name of the prefix in the model.
            is_trainable: Whether to train it further; otherwise it is frozen and the model is in evaluation mode.
            revision: Branch, tag or commit of the prefix on the Hub.
            subfolder: Folder inside `prefix_name_or_path`.
            token: Access token for the Hub.
            cache_dir: Where downloads are kept.
            local_files_only: Never contact the Hub.
            trust_remote_code: Whether code from the base's repository may run. For a base that is loaded here.
            **base_options: For a base that is loaded here: what `from_pretrained` of transformers takes, such as
                `dtype`, `device_map` and `quantization_config`.

        Returns:
            The model, with the prefix active.

        Raises:
            PrefixFileError: The file is missing, damaged, no prefix, or contains NaN; or it names no base that could be
                loaded.
            IncompatibleBaseError: The base has other layers, heads or widths.
            PrefixConfigError: Options for loading a base are given together with a base.
        """
        options = HubOptions(
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if not isinstance(base, (str, Path, nn.Module)):
            raise PrefixConfigError(f"Give a model and the name of a prefix, or the name alone, not {base!r:.100}.")
        if isinstance(base, (str, Path)):
            if prefix_name_or_path is not None:
                raise PrefixConfigError(
                    f"from_pretrained takes a model and the name of a prefix, or the name of a prefix alone; "
                    f"{str(base)!r} is a name. Load the model first: AutoModelForCausalLM.from_pretrained(...)."
                )
            files = locate_prefix(base, **options)
            base_options = {
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                **base_options,
            }
            base = load_base(named_base(files), trust_remote_code=trust_remote_code, **base_options)
        else:
            given = [*base_options, *(["trust_remote_code"] if trust_remote_code else [])]
            if given:
                raise PrefixConfigError(
                    f"{some_of(given)} would be for loading a base model, but one is given. Leave out the one or the "
                    "other."
                )
            if prefix_name_or_path is None:
                raise PrefixConfigError("Give the folder or the repository of the prefix after the base model.")
            files = locate_prefix(prefix_name_or_path, **options)
        model = cls(base)
        model._add_loaded(read_prefix(files, model.base, model.geometry), name, is_trainable)
        if not is_trainable:
            model.eval()
        return model

    def load_prefix(
        self,
        prefix_name_or_path: str | Path,
        name: str = DEFAULT_PREFIX,
        *,
        is_trainable: bool = False,
        device: torch.device | str | None = None,
        **hub: Unpack[HubOptions],
    ) -> None:
        """Load another prefix beside those that are there.

        It is used after `set_prefix(name)` or where `prefix_names` says so, and at once if it is the first. A frozen
        one takes as much memory as its file, in the file's dtype.

        Args:
            prefix_name_or_path: As in `from_pretrained`.
            name: Name of the prefix in the model.
            is_trainable: Whether to train it further.
            device: Where the numbers of a frozen prefix stay, for example `"cpu"` for many prefixes on a base that
                computes elsewhere: each call copies those that it reads. By default they are where the base is.
            **hub: `revision`, `subfolder`, `token`, `cache_dir` and `local_files_only`, as in `from_pretrained`.

        Raises:
            PrefixConfigError: The name is taken, or a device is given for a prefix that is to be trained.
            PrefixFileError: The file is missing, damaged, no prefix, or contains NaN.
            IncompatibleBaseError: The base has other layers, heads or widths.
        """
        self.prefixes.check_new(name)
        if is_trainable and device is not None:
            raise PrefixConfigError("A prefix that is trained is where its base is: leave device out.")
        loaded = read_prefix(locate_prefix(prefix_name_or_path, **hub), self.base, self.geometry)
        self._add_loaded(loaded, name, is_trainable, device)

    def load_original_prefix(self, state_dict: Mapping[str, torch.Tensor], name: str = DEFAULT_PREFIX) -> None:
        """Load a prefix that was trained with the paper's own code for GPT-2, frozen.

        It is used as one of `load_prefix` is. The checkpoints of that code are pickles, which this library does not
        open: bring what `torch.load(file, weights_only=True)` gives.

        Args:
            state_dict: The prefix's embedding and network (`wte`, `control_trans`), and whatever else was saved.
            name: Name of the prefix in the model.

        Raises:
            PrefixConfigError: The name is taken.
            PrefixInputError: The state dict is of a variant of the code that cannot be expressed, or contains NaN.
            IncompatibleBaseError: The base has other layers, heads or widths.
        """
        self.prefixes.check_new(name)
        self._add_loaded(LoadedPrefix("The state dict", *read_original(state_dict, self.geometry)), name, False)

    def _add_loaded(
        self, loaded: LoadedPrefix, name: str, is_trainable: bool, device: torch.device | str | None = None
    ) -> None:
        config = loaded.config
        self._require_room(config.num_virtual_tokens)
        if is_trainable:
            require_modest_network(loaded, self.base, self.geometry)
        weights = ModuleWeights(self.base, config.modules_to_save or ())
        weights.load(loaded.tensors)
        own = weights_fingerprint(self.base, without=weights.module_names)
        other = loaded.another_base(self.base.config.name_or_path, own)
        if other is not None:
            warnings.warn(
                f"{loaded.source} was trained on {config.base_model_name_or_path or 'an unnamed model'}, but "
                f"{name_of(self.base)} {other}. It will probably work badly; load it onto the model that it was "
                "trained on.",
                PrefixWarning,
                stacklevel=4,
            )
        is_first = not self.prefixes.entries
        stays_on = None if device is None else torch.device(device)
        self._install(name, config, loaded.tensors, weights, is_trainable, stays_on)
        entry = self.prefixes.entry(name)
        if loaded.description is not None:
            entry.training = loaded.description.training
        if is_trainable and entry.hiding.demonstrations is not None:
            known = demonstrations_beside(loaded.source, config.num_virtual_tokens)
            if known is None:
                warnings.warn(
                    f"{loaded.source} does not say which demonstrations it was made of, so rows that are among them "
                    "will see themselves in the prefix. Load it from a training checkpoint, fill it anew with "
                    "initialize_prefix(demonstrations=...), or leave those rows out.",
                    PrefixWarning,
                    stacklevel=4,
                )
            entry.remember(known or ())
        if is_first:
            self.prefixes.active = name
        self._fingerprints[name] = own

    def _require_room(self, num_virtual_tokens: int) -> None:
        """Check that a prefix of this length leaves positions for text.

        Raises:
            PrefixConfigError: It does not.
        """
        limit = self._injection.decoder.position_limit
        if limit is not None and num_virtual_tokens >= limit:
            raise PrefixConfigError(
                f"{num_virtual_tokens} virtual tokens leave no room for text: the base model has {limit} positions."
            )

    def _install(
        self,
        name: str,
        config: PrefixConfig,
        tensors: PrefixTensors,
        weights: ModuleWeights,
        trainable: bool = True,
        stays_on: torch.device | None = None,
    ) -> None:
        if trainable:
            self._learn_to_hide(config)
        # One that is not trained stays together.
        devices = layer_devices(self.base, self._injection.structure) if trainable else {}
        self.prefixes.install(name, config, tensors, devices, home(self.base), weights, trainable, stays_on)
