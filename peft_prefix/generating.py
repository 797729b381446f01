"""Generation with the active prefix."""

from __future__ import annotations

from typing import Any, cast

from .continuous_batching import RequestModel
from .errors import PrefixInputError
from .modules_to_save import base_weights
from .ownership import Owner
from .passes import outside_of_calls
from .readers import PrefixNames, Readers
from .running import RunningModel, require_no_prefix
from .stopping import PositionsUsedUp


class GeneratingModel(RunningModel):
    """A model that generates in every way that its base does."""

    _request_model: RequestModel | None = None

    def generate(self, *args: Any, prefix_names: PrefixNames | None = None, **kwargs: Any) -> Any:
        """Generate with the active prefix, or with one for each row; the rest is as in the base's `generate`.

        The prefix counts neither as prompt nor as generated text: `max_new_tokens`, `max_length`, stopping criteria
        and returned sequences are about real tokens.

        Args:
            *args: The base's arguments.
            prefix_names: The name of each prompt's prefix, `None` for prompts that run without one. Beams and
                `num_return_sequences` of a prompt all have its prefix.
            **kwargs: The base's arguments.
        """
        self._require_head()
        if _wants_pages(*args, **kwargs):
            raise PrefixInputError('Not cache_implementation="paged" but generate_batch runs requests in pages.')
        readers = self._readers(prefix_names, dict(zip(("inputs",), args, strict=False)) | kwargs, 1)
        if readers is None:
            require_no_prefix(kwargs)
            with outside_of_calls(), base_weights():
                return self._base_generate(*args, **kwargs)
        with self._acting(readers, kwargs, padding_mask=False):
            return self._base_generate(*args, **self._stopping_in_time(readers, kwargs))

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Generate for many requests by continuous batching; arguments and results are those of the base's method.

        Raises:
            PrefixInputError: The base cannot serve requests with a prefix, or requests name prefixes of their own.
        """
        if "prefix_names" in kwargs:
            raise PrefixInputError(
                "Continuous batching has one prefix for all requests, the active one. Use generate(prefix_names=[...]) "
                "for a batch with a prefix for each row, or one generate_batch for the requests of each prefix."
            )
        return self._requests().generate_batch(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """A manager of continuous batching, as the base's, for requests with the prefix that is active now.

        It stays with this prefix: once another one is active, or this one is trained on or disabled, it takes no more
        requests.

        Raises:
            PrefixInputError: The base cannot serve requests with a prefix.
        """
        return self._requests().init_continuous_batching(*args, **kwargs)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's; see `init_continuous_batching`."""
        return self._requests().continuous_batching_context_manager(*args, **kwargs)

    def destroy_cached_continuous_batching_manager(self) -> None:
        """Give back what `persistent_manager=True` has kept."""
        for model in (self._request_model, self.base):
            if model is not None:
                cast("Any", model).destroy_cached_continuous_batching_manager()

    def _require_head(self) -> None:
        if not self.can_generate():
            raise PrefixInputError(
                f"{type(self.base).__name__} has no language model's head and cannot generate. Load the base with "
                "AutoModelForCausalLM or AutoModelForSeq2SeqLM."
            )

    def _base_generate(self, *args: Any, **kwargs: Any) -> Any:
        return cast("Any", self.base).generate(*args, **kwargs)

    def _stopping_in_time(self, readers: Readers, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` that end it when the base's positions are used up."""
        limit, p = self._injection.decoder.position_limit, max(prefix.at("decoder") for prefix in readers.prefixes)
        if limit is None or not p:
            return arguments
        is_causal = self._injection.structure.encoder is None
        criterion = PositionsUsedUp(limit, p, arguments if is_causal else {})
        return {**arguments, "stopping_criteria": [*(arguments.get("stopping_criteria") or []), criterion]}

    def _requests(self) -> Any:
        """What serves batches of requests: the base, with the active prefix if it is not disabled."""
        self._require_head()
        if self._disabled:
            return self.base
        entry, known = self.prefixes.entry(), self._request_model
        owner = entry.owner(self.prefixes)
        if known is not None and known.owner == owner:
            return known
        if known is not None and known._cached_continuous_batching_manager is not None:
            raise PrefixInputError(
                f"A manager that was kept (persistent_manager=True) generates with prefix {known.owner.label}, but "
                f"active is prefix {owner.label}. Call model.destroy_cached_continuous_batching_manager() first."
            )
        self.eval()
        call = self._call(Readers(self.prefixes, [entry]), {})
        self._request_model = RequestModel(self.base, self._injection, call, entry.weights, owner, self._acting_owner)
        return self._request_model

    def _acting_owner(self) -> Owner | None:
        """Identity of the prefix that acts at the moment."""
        if self._disabled or self.prefixes.active is None:
            return None
        return self.prefixes.entry().owner(self.prefixes)

    def _encoded_for_generation(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What `generate` asks of an assistant: its inputs with the encoder's outputs, made with its own prefix."""
        method, readers = getattr(self.base, name), self._readers(None, {})
        if readers is None:
            return method(*args, **kwargs)
        with self._injection.encoding(self._call(readers, {})):
            return method(*args, **kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self._encoded_for_generation("_maybe_prepare_encoder_kwargs_for_generation", *args, **kwargs)

    def _prepare_encoder_decoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # its name before transformers 5.20 or so
        return self._encoded_for_generation("_prepare_encoder_decoder_kwargs_for_generation", *args, **kwargs)


def _wants_pages(
    inputs: object = None, generation_config: Any = None, *_: Any, cache_implementation: str | None = None, **__: Any
) -> bool:
    """Whether these arguments of `generate` ask for a thread of its own, where no prefix would act."""
    return "paged" in (cache_implementation, getattr(generation_config, "cache_implementation", None))
