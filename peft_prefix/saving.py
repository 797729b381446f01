"""Saving prefixes, here and on the Hub."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from . import checkpoint
from .adapters import trained_adapters
from .atomic import alone_in
from .bank import BankEntry
from .card_facts import PICTURE, entry_facts, local_card, with_tags, write_card
from .description import PROBLEM_TYPES, PrefixDescription, are_labels, is_name
from .errors import PrefixConfigError, PrefixError, PrefixWarning, some_of
from .fingerprint import weights_fingerprint
from .hub import checked_subfolder, split_name
from .model_card import card_text, loss_curve_png
from .optimizer_groups import OptimizableModel
from .parameterization import PrefixTensors
from .peft_format import write_peft
from .processes import own_class
from .steps import changes
from .training_state import own_part
from .upload import upload


class SavingModel(OptimizableModel):
    """A model whose prefixes can be saved."""

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
        """Save one prefix, the active one if none is named: `prefix.safetensors`, `prefix_config.json` and a card.

        Where none is active, all that are trained are saved, each in a folder of its name. In a README.md that is there
        already, only the section about this prefix changes.

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
        for folder, entry in chosen.items():
            self._write(directory / folder, entry, own_part(state), dtype)
            entry.saved_as = entry.owner(self.prefixes)
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", directory.name):
            checkpoint.write_training_state(directory / SAFE_WEIGHTS_NAME, state)
        else:
            self._write_card(directory, chosen)
            self._warn_of_unsaved()
        if push_to_hub:
            name = repo_id or directory.resolve().name
            self.push_to_hub(name, prefix_name=prefix_name, dtype=dtype, token=token, state_dict=state)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        prefix_name: str | None = None,
        subfolder: str | None = None,
        dtype: torch.dtype = torch.float32,
        commit_message: str = "Upload prefix",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Iterable[str] | str | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> CommitInfo | None:
        """Upload one prefix, the active one if none is named, and nothing else of the model.

        One repository may hold the prefixes of many tasks, each in a subfolder of its own. Its card has a section for
        each; what you write there yourself stays.

        Where FSDP2 or DeepSpeed spreads the prefix over several processes, all of them must call this, unless
        `state_dict` is given; one of them uploads.

        Args:
            repo_id: Repository on the Hub, `name`, `user/name` or `user/name/subfolder`; made if it is missing.
            prefix_name: Which prefix.
            subfolder: Folder inside the repository.
            dtype: Floating-point dtype of `prefix.safetensors`.
            commit_message: First line of the commit.
            commit_description: The rest of it.
            private: Whether a new repository is private; as the owner's account says, if left out.
            token: Access token for the Hub.
            revision: Branch, made if it is missing.
            create_pr: Whether to open a pull request instead.
            tags: More tags for the card.
            is_main_process: With several processes, whether this one uploads.
            state_dict: The training state, if the caller has gathered it already (`accelerator.get_state_dict(model)`).

        Returns:
            The commit, which is the text of its address too; `None` in processes that do not upload.

        Raises:
            PrefixConfigError: There is no prefix of that name, none is named and none is active, or the subfolder leads
                out of the repository, or a tag is no text.
            PrefixFileError: The prefix contains NaN or infinity, or the Hub did not take it. It stays in the model.
        """
        entry, owner = self.prefixes.entry(prefix_name), self.prefixes.entry(prefix_name).owner(self.prefixes)
        repository, within = split_name(repo_id)
        inside = checked_subfolder("/".join(filter(None, (within, subfolder))))
        more_tags = _tags(tags)
        if not is_main_process and state_dict is not None:
            return None
        state = own_part(self._gathered(state_dict))
        if not is_main_process:
            return None
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self._write(folder, entry, state, dtype)
            known = dataclasses.replace(entry_facts(entry, self.base, folder), folder=inside)
            picture = None if entry.training is None else loss_curve_png(entry.training)
            if picture is not None:
                (folder / PICTURE).write_bytes(picture)
                known = dataclasses.replace(known, picture="/".join(filter(None, (inside, PICTURE))))

            def card(full_name: str, existing: str | None) -> str:
                return with_tags(card_text(existing, dataclasses.replace(known, repo_id=full_name)), more_tags)

            commit = upload(
                repository,
                {"/".join(filter(None, (inside, file.name))): file for file in folder.iterdir()},
                card,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )
        entry.saved_as = owner
        self._warn_of_unsaved()
        return commit

    def save_as_peft(
        self, save_directory: str | Path, *, prefix_name: str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Save one prefix, the active one if none is named, for `PeftModel.from_pretrained` of PEFT.

        Args:
            save_directory: Folder for `adapter_config.json` and `adapter_model.safetensors`; made if it is missing.
            prefix_name: Which prefix.
            dtype: Floating-point dtype of the file.

        Raises:
            PrefixConfigError: PEFT cannot express this prefix. What it cannot is in `docs/interoperability.md`.
            PrefixFileError: The prefix contains NaN or infinity, or the folder cannot be written. What was there stays.
        """
        entry = self.prefixes.entry(prefix_name)
        write_peft(Path(save_directory), entry.config, self.prefixes.saved(entry), self.base, self.geometry, dtype)

    def prefix_state_dict(self, prefix_name: str | None = None) -> PrefixTensors:
        """What the file of a prefix contains, the active one if none is named; detached and named as there.

        Plain keys `(H, p, Dk)` and values `(H, p, Dv)`, and with `modules_to_save` the weights of those modules, whose
        names begin with `modules_to_save.`. Where FSDP2 or DeepSpeed spreads the prefix over several processes, all of
        them must call this.
        """
        return self.prefixes.saved(self.prefixes.entry(prefix_name))

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
        return changes(trained_adapters(self.base).values())

    def _fingerprint(self, entry: BankEntry) -> str | None:
        """What identifies the base's weights; what was known of them, once they are spread over processes.

        Of an adapter that is trained there nothing is known.
        """
        now = weights_fingerprint(self.base, entry.config.modules_to_save or ())
        if now is not None or trained_adapters(self.base):
            self._fingerprints[entry.name] = now
        return self._fingerprints.get(entry.name)

    def _write(self, directory: Path, entry: BankEntry, state: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Write the files of a prefix, whose training state is given."""
        tensors = checkpoint.stored(self.prefixes.saved(entry, state), dtype)
        checkpoint.write_prefix(directory, tensors, self._describe(entry, tensors, dtype))

    def _write_card(self, directory: Path, chosen: Mapping[str, BankEntry]) -> None:
        """Write README.md. What is wrong with one that is there is no reason not to have saved a prefix."""
        try:
            with alone_in(directory):
                facts = [entry_facts(entry, self.base, directory, folder) for folder, entry in chosen.items()]
                write_card(directory, facts, local_card(directory))
        except PrefixError as error:
            warnings.warn(f"The prefix is saved in {directory}, but not its card: {error}", PrefixWarning, stacklevel=3)

    def _describe(self, entry: BankEntry, tensors: PrefixTensors, dtype: torch.dtype) -> PrefixDescription:
        """What the file of a prefix says about it."""
        return PrefixDescription(
            config=entry.config.replace(
                base_model_name_or_path=_name_or_none(entry.config.base_model_name_or_path),
                base_model_revision=_name_or_none(entry.config.base_model_revision),
            ),
            geometry_fingerprint=entry.module.geometry.fingerprint,
            weights_fingerprint=self._fingerprint(entry),
            dtype=str(dtype).removeprefix("torch."),
            sha256=checkpoint.identity(tensors),
            base_model_class=own_class(self.base).__name__,
            labels=self._labels() if entry.config.modules_to_save else None,
            problem_type=self._problem_type() if entry.config.modules_to_save else None,
            training=entry.training,
        )

    def _labels(self) -> tuple[str, ...] | None:
        """Names of the labels that the base tells apart, in order; one that cannot be written down gets another."""
        names = getattr(self.base.config, "id2label", None) or {}
        found = (names.get(index) for index in range(len(names)))
        labels = tuple(str(name) if is_name(name) else f"LABEL_{index}" for index, name in enumerate(found))
        return labels if are_labels(labels) else None

    def _problem_type(self) -> str | None:
        kind = getattr(self.base.config, "problem_type", None)
        return kind if kind in PROBLEM_TYPES else None


def _tags(tags: Iterable[str] | str | None) -> list[str]:
    found = [tags] if isinstance(tags, str) else list(tags or ())
    if not all(isinstance(tag, str) for tag in found):
        raise PrefixConfigError(f"tags must be texts, e.g. ['summarization'], not {found!r:.200}.")
    return found


def _name_or_none(name: str | None) -> str | None:
    return name if is_name(name) else None
