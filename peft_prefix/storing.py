"""Saving and loading prefixes, and the state of a training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from . import checkpoint
from .adapters import trained_adapters
from .bank import BankEntry
from .config import PrefixConfig
from .errors import (
    IncompatibleBaseError,
    PrefixConfigError,
    PrefixFileError,
    PrefixInputError,
    PrefixWarning,
    some_of,
)
from .fingerprint import difference, weights_fingerprint
from .generating import GeneratingModel
from .hub import Upload, locate_prefix
from .modules_to_save import ModuleWeights
from .parameterization import PrefixTensors
from .placement import home, layer_devices
from .processes import is_sharded, whole

DEFAULT_PREFIX = "default"
_PREFIXES = "prefixes."
"""What the names of all prefixes' parameters begin with."""
_BASE = "base."
"""What those of the base begin with."""


class StoringModel(GeneratingModel):
    """A model whose prefixes can be saved and loaded, by themselves or as the state of a training."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base)
        self._fingerprints: dict[str, str | None] = {}
        self._adapters_at_first = self._adapters_now()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        prefix_name: str | None = None,
        dtype: torch.dtype = torch.float32,
        repo_id: str | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str | None = None,
        save_function: Callable[..., Any] | None = None,
    ) -> None:
        """Save one prefix, the active one if none is named: `prefix.safetensors` and `prefix_config.json`.

        Where none is active, all that are trained are saved, each in a folder of its name.

        In a training checkpoint (a folder named `checkpoint-<step>`, as the `Trainer` makes them) the training state is
        saved as well, as `model.safetensors`: the parameters that are trained, i.e. the prefix or its MLP, and adapters
        of PEFT in the base. Elsewhere those are PEFT's to save (`model.base.save_pretrained`).

        Where FSDP2 or DeepSpeed spreads the prefix over several processes, all of them must call this, unless
        `state_dict` is given.

        Args:
            save_directory: Folder for the files; made if it is missing.
            is_main_process: With several processes, whether this one writes.
            state_dict: The training state, if the caller has gathered it already (`accelerator.get_state_dict(model)`).
            push_to_hub: Upload the folder to `repo_id` afterwards.
            prefix_name: Which prefix.
            dtype: Floating-point dtype of `prefix.safetensors`.
            repo_id: Repository on the Hub; by default named like the folder.
            token: Access token for the Hub.
            max_shard_size: Ignored: a prefix is one small file. (`push_to_hub` of transformers passes it.)
            save_function: Ignored: a prefix is always safetensors. (`accelerator.save` is passed in many scripts.)

        Raises:
            PrefixConfigError: There is no prefix of that name, or none is named and active where one is to be uploaded.
            PrefixFileError: The prefix contains NaN or infinity, or the folder cannot be written. What was there stays.
            PrefixInputError: The prefix is spread over several processes, and `state_dict` lacks it.
        """
        if not is_main_process and state_dict is not None:
            return
        chosen = self._to_be_saved(self.prefixes.entry().name if push_to_hub and prefix_name is None else prefix_name)
        state = self._gathered(state_dict)
        if not is_main_process:
            return
        directory = Path(save_directory)
        numbers = {key.removeprefix(_PREFIXES): state[key] for key in state if key.startswith(_PREFIXES)}
        for folder, entry in chosen.items():
            checkpoint.write_prefix(
                directory / folder,
                self.prefixes.saved(entry, numbers),
                entry.config,
                entry.module.geometry,
                self._fingerprint(entry),
                dtype,
            )
            entry.saved_as = entry.owner(self.prefixes)
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", directory.name):
            checkpoint.write_training_state(directory / SAFE_WEIGHTS_NAME, state)
        else:
            self._warn_of_unsaved()
        if push_to_hub:
            self.push_to_hub(repo_id or directory.name, prefix_name=prefix_name, dtype=dtype, token=token)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        prefix_name: str | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> str:
        """Upload one prefix, the active one if none is named, and nothing else.

        Args:
            repo_id: Repository on the Hub; made if it is missing.
            prefix_name: Which prefix.
            dtype: Floating-point dtype of `prefix.safetensors`.
            **options: As in transformers: `commit_message`, `commit_description`, `private`, `token`, `revision`,
                `create_pr`, `tags`.

        Returns:
            The address of the commit, as transformers gives it.

        Raises:
            PrefixConfigError: There is no prefix of that name, or none is named and none is active.
        """
        name = self.prefixes.entry(prefix_name).name
        upload = Upload(lambda folder: self.save_pretrained(folder, prefix_name=name, dtype=dtype))
        return upload.push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        base: PreTrainedModel,
        prefix_name_or_path: str | Path,
        *,
        name: str = DEFAULT_PREFIX,
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """A base model with a saved prefix.

        Args:
            base: The model that the prefix was trained on, with the adapter of PEFT that acted beside it, if there was
                one; a `PeftModel` is taken as well.
            prefix_name_or_path: A folder that `save_pretrained` wrote, or a repository id on the Hub.
            name: Name of the prefix in the model.
            is_trainable: Whether to train it further; otherwise it is frozen and the model is in evaluation mode.
            revision: Branch, tag or commit on the Hub.
            subfolder: Folder inside `prefix_name_or_path`.
            token: Access token for the Hub.
            cache_dir: Where downloads are kept.
            local_files_only: Never contact the Hub.

        Returns:
            The model, with the prefix active.

        Raises:
            PrefixFileError: The file is missing, damaged, no prefix, or contains NaN.
            IncompatibleBaseError: The base has other layers, heads or widths.
        """
        model = cls(base)
        model.load_prefix(
            prefix_name_or_path,
            name,
            is_trainable=is_trainable,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
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
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load another prefix beside those that are there.

        It is used after `set_prefix(name)` or where `prefix_names` says so, and at once if it is the first. A frozen
        one takes as much memory as its file, in the file's dtype.

        Args:
            prefix_name_or_path: As in `from_pretrained`, like the others.
            name: Name of the prefix in the model.
            is_trainable: Whether to train it further.
            device: Where the numbers of a frozen prefix stay, for example `"cpu"` for many prefixes on a base that
                computes elsewhere: each call copies those that it reads. By default they are where the base is.
            revision: Branch, tag or commit on the Hub.
            subfolder: Folder inside `prefix_name_or_path`.
            token: Access token for the Hub.
            cache_dir: Where downloads are kept.
            local_files_only: Never contact the Hub.

        Raises:
            PrefixConfigError: The name is taken, or a device is given for a prefix that is to be trained.
            PrefixFileError: The file is missing, damaged, no prefix, or contains NaN.
            IncompatibleBaseError: The base has other layers, heads or widths.
        """
        self.prefixes.check_new(name)
        if is_trainable and device is not None:
            raise PrefixConfigError("A prefix that is trained is where its base is: leave device out.")
        file = locate_prefix(
            prefix_name_or_path,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        description = checkpoint.read_description(file)
        # A file says what it holds; one without this entry holds keys and values alone.
        config = description.config.replace(modules_to_save=description.config.modules_to_save or ())
        weights = self._weights_for(config, file)
        geometry = self.geometry.only(config.sites or self.geometry.sites)
        tensors = checkpoint.read_tensors(file, description, geometry, _name_of(self.base), weights.saved())
        weights.load(tensors)
        own = weights_fingerprint(self.base, without=weights.module_names)
        other = difference(description.weights_fingerprint, own)
        if other is not None:
            trained_on = description.config.base_model_name_or_path or "an unnamed model"
            warnings.warn(
                f"The prefix {file} was trained on {trained_on}, but {_name_of(self.base)} {other}. It will probably "
                "work badly; load it onto the model that it was trained on.",
                PrefixWarning,
                stacklevel=2,
            )
        is_first = not self.prefixes.entries
        self._install(name, config, tensors, weights, is_trainable, None if device is None else torch.device(device))
        if is_first:
            self.prefixes.active = name
        self._fingerprints[name] = own

    def prefix_state_dict(self, prefix_name: str | None = None) -> PrefixTensors:
        """What the file of a prefix contains, the active one if none is named; detached and named as there.

        Plain keys `(H, p, Dk)` and values `(H, p, Dv)`, and with `modules_to_save` the weights of those modules, whose
        names begin with `modules_to_save.`. Where FSDP2 or DeepSpeed spreads the prefix over several processes, all of
        them must call this.
        """
        return self.prefixes.saved(self.prefixes.entry(prefix_name))

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The training state: parameters and buffers of the prefixes, and of the base the adapters that are trained."""
        state: dict[str, Any] = {} if destination is None else destination
        self.prefixes.state_dict(destination=state, prefix=f"{prefix}{_PREFIXES}", keep_vars=keep_vars)
        adapters = {f"{prefix}{_BASE}{name}": one for name, one in trained_adapters(self.base).items()}
        state.update((name, one if keep_vars else one.detach()) for name, one in adapters.items())
        if self._is_awaiting_shards:  # accelerate understands nothing else, and nothing else has been sharded
            return {key: tensor for key, tensor in state.items() if is_sharded(tensor)}
        if destination is not None:
            return state
        # Parameters first: accelerate before 1.11 finds the sharded ones by their place.
        parameters = {f"{prefix}{_PREFIXES}{name}" for name, _ in self.prefixes.named_parameters()} | set(adapters)
        return dict(sorted(state.items(), key=lambda item: item[0] not in parameters))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore what `state_dict` gave.

        Raises:
            PrefixFileError: It belongs to other prefixes, another reparameterization or other adapters. Also with
                `strict=False`, since a half restored prefix would train on in silence.
        """
        own_state, is_complete = self.state_dict(), not self._is_awaiting_shards
        self._is_awaiting_shards = False
        if strict or assign:  # torch adds the parameters of the base, as they are, where it loads into shards
            base = dict(self.base.named_parameters(prefix="base", remove_duplicate=False))
            base = {key: tensor for key, tensor in base.items() if key not in own_state}
            state_dict = {key: tensor for key, tensor in state_dict.items() if base.get(key) is not tensor}
        expected, found = (
            {key: None if key.endswith("_extra_state") else tuple(tensor.shape) for key, tensor in state.items()}
            for state in (own_state, state_dict)
        )
        if expected != found:
            different = sorted(
                key for key in expected.keys() | found.keys() if expected.get(key, 0) != found.get(key, 0)
            )
            raise PrefixFileError(
                f"The training state does not fit this model's prefixes: {some_of(different)}. Resume with "
                "the PrefixConfig that the training was started with, and with the same adapters, trained or frozen "
                "as they were."
            )
        adapters = {key.removeprefix(_BASE): state_dict[key] for key in state_dict if key.startswith(_BASE)}
        if adapters:
            self.base.load_state_dict(adapters, strict=False, assign=assign)
        own = {key.removeprefix(_PREFIXES): state_dict[key] for key in state_dict if key.startswith(_PREFIXES)}
        for entry in self.prefixes.entries.values():
            entry.fillings += 1
        return self.prefixes.load_state_dict(own, strict=is_complete, assign=assign)

    def _gathered(self, state: Mapping[str, Any] | None) -> dict[str, Any]:
        """The whole training state, of a given one or of this model's own.

        Raises:
            PrefixInputError: The given one lacks what this process alone cannot know.
        """
        own = self.state_dict(keep_vars=True)
        if state is None:
            return whole(own)
        if any(is_sharded(tensor) and key not in state for key, tensor in own.items()):
            raise PrefixInputError(
                "The given state_dict lacks the prefix, which is spread over several processes. Give all of "
                "accelerator.get_state_dict(model), or none and call save_pretrained in every process."
            )
        return {key: state.get(key, tensor).detach() for key, tensor in own.items()}

    def _install(
        self,
        name: str,
        config: PrefixConfig,
        tensors: PrefixTensors,
        weights: ModuleWeights,
        trainable: bool = True,
        stays_on: torch.device | None = None,
    ) -> None:
        # One that is not trained stays together.
        devices = layer_devices(self.base, self._injection.structure) if trainable else {}
        self.prefixes.install(name, config, tensors, devices, home(self.base), weights, trainable, stays_on)

    def _to_be_saved(self, prefix_name: str | None) -> dict[str, BankEntry]:
        """The prefixes to save, by the folder inside of the given one."""
        trained = {name: entry for name, entry in list(self.prefixes.entries.items()) if entry.is_trained}
        if prefix_name is None and self.prefixes.active is None and trained:
            return trained
        return {"": self.prefixes.entry(prefix_name)}

    def _warn_of_unsaved(self) -> None:
        unsaved = [
            name
            for name, entry in list(self.prefixes.entries.items())
            if entry.is_trained and entry.saved_as != entry.owner(self.prefixes)
        ]
        if unsaved:
            warnings.warn(
                f"The prefixes {some_of(map(repr, unsaved))} have been trained and are not saved here. Save each with "
                "save_pretrained(folder, prefix_name=...), or all at once after set_prefix(None).",
                PrefixWarning,
                stacklevel=3,
            )
        if self._adapters_now() > self._adapters_at_first:
            remedy = "model.base" if getattr(self.base, "_hf_peft_config_loaded", False) else "your PeftModel"
            warnings.warn(
                "The adapter of the base has been trained and is not saved here, only the prefix is. Save it with "
                f"save_pretrained(folder) of {remedy}.",
                PrefixWarning,
                stacklevel=3,
            )

    def _adapters_now(self) -> int:
        """A number that grows when adapters are trained."""
        return sum(0 if one.is_inference() else one._version for one in trained_adapters(self.base).values())

    def _fingerprint(self, entry: BankEntry) -> str | None:
        """What identifies the base's weights; what was known of them, once they are spread over processes.

        Of an adapter that is trained there nothing is known.
        """
        now = weights_fingerprint(self.base, entry.config.modules_to_save or ())
        if now is not None or trained_adapters(self.base):
            self._fingerprints[entry.name] = now
        return self._fingerprints.get(entry.name)

    def _weights_for(self, config: PrefixConfig, file: Path) -> ModuleWeights:
        names = config.modules_to_save or ()
        missing = set(names) - {name for name, _ in self.base.named_modules()} if names else set()
        if missing:
            raise IncompatibleBaseError(
                f"{file} was trained together with {some_of(sorted(missing))}, which {_name_of(self.base)} does not "
                "have. Load the base with the class that it was trained with, e.g. AutoModelForSequenceClassification."
            )
        return ModuleWeights(self.base, names)


def _name_of(base: PreTrainedModel) -> str:
    return base.config.name_or_path or f"this {type(base).__name__}"
