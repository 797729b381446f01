"""The state of a training: what a checkpoint of it holds beside the prefixes themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adapters import trained_adapters
from .errors import PrefixFileError, PrefixInputError, some_of
from .generating import GeneratingModel
from .processes import is_sharded, whole

_PREFIXES = "prefixes."
"""What the names of all prefixes' parameters begin with."""
_BASE = "base."
"""What those of the base begin with."""


class TrainingStateModel(GeneratingModel):
    """A model that gives what is trained in it, and takes it back."""

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
        own = own_part(state_dict)
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


def own_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a training state has of the prefixes, without that of the base's adapters."""
    return {key.removeprefix(_PREFIXES): state[key] for key in state if key.startswith(_PREFIXES)}
