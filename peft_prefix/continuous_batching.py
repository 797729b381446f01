"""A prefix before every request of continuous batching (`generate_batch`).

transformers packs the tokens of many requests into one row, keeps their keys and values in pages, and tells them apart
by masks and positions alone. One prefix is enough for all of them: `p` columns that every token sees, before the keys
that the pages give, and positions that start at `p`. The pages hold real tokens only, so what requests share of them
(equal beginnings) is right as long as one manager stays with one prefix, which is what this module takes care of.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import (
    ContinuousBatchingManager,
    ContinuousMixin,
    PagedAttentionCache,
)

from .cache import KeyValue
from .call import PrefixCall
from .errors import PrefixInputError, PrefixNotConsumedError, PrefixWarning, UnsupportedModelError, some_of
from .injection import Injection
from .masks import PrefixColumns, window_kind, with_prefix_columns
from .modules_to_save import ModuleWeights, require_called
from .ownership import Owner
from .passes import outside_of_calls
from .placement import home

_PAGED = {"full_attention", "sliding_attention"}
"""Types of layers that transformers has pages for."""


class RequestModel(ContinuousMixin):
    """What a manager of continuous batching takes for its model: the base with the prefix that was active then.

    Args:
        base: The base model.
        injection: What is known about it.
        call: The prefix; its keys and values are copied, so that training does not change running requests.
        weights: The prefix's weights for modules of the base.
        owner: The identity of the prefix.
        owner_now: Gives the identity of the prefix that is active at the moment, or `None` if it is disabled.

    Raises:
        PrefixInputError: The base cannot serve requests with a prefix.
    """

    _cached_continuous_batching_manager: ContinuousBatchingManager | None = None

    def __init__(
        self,
        base: PreTrainedModel,
        injection: Injection,
        call: PrefixCall,
        weights: ModuleWeights,
        owner: Owner,
        owner_now: Callable[[], Owner | None],
    ) -> None:
        self.base = base
        decoder = injection.decoder
        if injection.structure.encoder is not None or not decoder.takes_positions or not base.can_generate():
            raise PrefixInputError(
                f"{type(base).__name__} cannot serve batches of requests with a prefix: that takes a causal language "
                "model whose forward has position_ids. Use generate."
            )
        kinds = set(getattr(decoder.text_config, "layer_types", None) or ()) - _PAGED
        if kinds or any(decoder.recurrent):
            raise PrefixInputError(
                f"{type(base).__name__} cannot serve batches of requests: transformers has no pages for layers of type "
                f"{some_of(sorted(kinds or {'linear_attention'}))}. Use generate."
            )
        with torch.no_grad():
            self._states: Sequence[KeyValue | None] = [
                None if states is None else (states[0].detach().clone(), states[1].detach().clone())
                for states in call.states(1)["decoder"]
            ]
        self.owner = owner
        self._owner_now = owner_now
        self._weights = copy.deepcopy(weights).requires_grad_(False)
        self._length = call.length("decoder")
        self._limit = decoder.position_limit
        self._is_plain = call.prefixes[0].sliding == "plain" and decoder.has_windows
        self._text_config = decoder.text_config

    def __getattr__(self, name: str) -> Any:
        # Whatever else a manager asks of its model (config, device, logits processors) is the base's.
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def eval(self) -> RequestModel:
        """Switch the base to evaluation mode, as managers do."""
        self.base.eval()
        return self

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> ContinuousBatchingManager:
        """As the base's, for requests with the prefix; the arguments are the base's.

        Raises:
            PrefixInputError: Flash attention, recorded graphs or compiled passes are asked for, or the base's attention
                does not read pages.
        """
        self._require_masks()
        before = self.base.config._attn_implementation
        method = super().init_continuous_batching
        arguments = inspect.signature(method).bind(*args, **kwargs).arguments
        settings = copy.copy(arguments.get("continuous_batching_config")) or ContinuousBatchingConfig()
        settings.auto_switch_to_flash = False
        manager: ContinuousBatchingManager = method(**{**arguments, "continuous_batching_config": settings})
        if manager is self._cached_continuous_batching_manager:
            return manager
        try:
            self._check(manager.continuous_batching_config)
        except Exception:
            if self.base.config._attn_implementation != before:
                self.base.set_attn_implementation(before)
            raise
        manager.add_request = self._checked(manager)  # type: ignore[method-assign]
        return manager

    def __call__(self, **arguments: Any) -> Any:
        """One pass of the base over the packed tokens of several requests.

        Args:
            **arguments: What transformers gives, among it `cache` (the pages), `position_ids` `(1, tokens)` and
                `attention_mask` `(1, 1, tokens, keys)`, one or by type of layer.

        Returns:
            The base's output.

        Raises:
            PrefixNotConsumedError: Some layer has not read the prefix.
        """
        pages, places = PrefixedPages(arguments["cache"], self._states), arguments["position_ids"] + self._length
        columns = PrefixColumns(self._length)
        if self._is_plain:
            columns = PrefixColumns(self._length, positions=places, text_config=self._text_config)
        kind = window_kind(self._text_config)
        mask = with_prefix_columns(arguments["attention_mask"], columns, arguments["input_ids"], None, kind)
        with outside_of_calls(), self._weights.in_place(self.base):
            output = self.base(**{**arguments, "cache": pages, "position_ids": places, "attention_mask": mask})
            require_called()
        unread = [index for index, states in enumerate(self._states) if states is not None and index not in pages.read]
        if unread:
            raise PrefixNotConsumedError(
                f"Layers {unread} of {type(self.base).__name__} ran without reading pages, so requests would see "
                "neither the prefix nor their own past. Use generate."
            )
        return output

    def _require_masks(self) -> None:
        if "flash" in str(self.base.config._attn_implementation):
            raise UnsupportedModelError(
                "Flash attention tells requests apart by lengths, not by masks, and would show the prefix to the first "
                'one only. Load the base model with attn_implementation="sdpa".'
            )

    def _check(self, settings: ContinuousBatchingConfig) -> None:
        """Try one token, before any request waits for an answer."""
        self._require_masks()
        graphs = settings.use_cuda_graph
        if any(graphs) if isinstance(graphs, tuple) else graphs:
            raise PrefixInputError("CUDA graphs of requests with a prefix are not supported: use_cuda_graph=False.")
        if settings.varlen_compile_config is not None or settings.decode_compile_config is not None:
            raise PrefixInputError(
                "Compiled passes of requests with a prefix are not supported: leave the compile configs of "
                "ContinuousBatchingConfig (and compile_config) out."
            )
        device = home(self.base)
        ids = torch.ones(1, 1, dtype=torch.int32, device=device)
        mask = torch.zeros(1, 1, 1, 1, dtype=self.base.dtype, device=device)
        kinds = set(getattr(self._text_config, "layer_types", None) or ())
        try:
            with torch.no_grad():
                self(
                    input_ids=ids,
                    position_ids=torch.zeros_like(ids),
                    attention_mask=dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask,
                    cache=NoPages(),
                    read_index=[],
                    write_index=[],
                    cu_seq_lens_k={},
                    max_length_k={},
                    use_cache=False,
                )
        except (TypeError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            raise PrefixInputError(
                f"{type(self.base).__name__} cannot serve batches of requests with a prefix: its attention does not "
                f"read transformers' pages ({error}). Use generate."
            ) from error

    def _checked(self, manager: ContinuousBatchingManager) -> Callable[..., Any]:
        """`add_request` of a manager, for requests that can be served to the end with this prefix."""
        add_request: Callable[..., Any] = manager.add_request
        signature = inspect.signature(add_request)

        def checked(*args: Any, **kwargs: Any) -> Any:
            now = self._owner_now()
            if now != self.owner:
                raise PrefixInputError(
                    f"This manager generates with prefix {self.owner.label}, but active is "
                    f"{'none' if now is None else f'prefix {now.label}'}. Make a manager for each prefix."
                )
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            # Too long a request would fail in the manager's thread, and all the others with it.
            if self._limit is not None:
                length, wanted = len(given["input_ids"]), given.get("max_new_tokens")
                room = self._limit - self._length - length
                if room <= 0:
                    raise PrefixInputError(
                        f"{self._length} virtual tokens and a request of {length} tokens leave no room in the base "
                        f"model's {self._limit} positions. Shorten the request or use fewer virtual tokens."
                    )
                if wanted is None:
                    wanted = manager.generation_config.max_new_tokens
                if wanted is not None and wanted > room:
                    warnings.warn(
                        f"A request ends after {room} new tokens: the base model has {self._limit} positions, and the "
                        f"prefix takes {self._length} of them.",
                        PrefixWarning,
                        stacklevel=3,
                    )
                given["max_new_tokens"] = room if wanted is None else min(wanted, room)
            return add_request(*bound.args, **bound.kwargs)

        return checked


class PrefixedPages(PagedAttentionCache):
    """A prefix before the pages of all requests, for one pass.

    Args:
        pages: The pages of real tokens.
        prefix: The prefix's keys and values `(1, H, p, D)` by layer.
    """

    def __init__(self, pages: PagedAttentionCache, prefix: Sequence[KeyValue | None]) -> None:
        self.pages = pages
        self.prefix = prefix
        self.read: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        if name == "pages":
            raise AttributeError(name)
        return getattr(self.pages, name)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values `(1, H, tokens, D)` in the pages, and give the prefix and what they hold together.

        Returns:
            Keys and values in the form that the pages give, `p` entries longer: `(1, H, p + keys, D)`, in some versions
            of transformers `(p + keys, H, D)`.
        """
        keys, values = self.pages.update(key_states, value_states, layer_idx, *args, **kwargs)
        self.read.add(layer_idx)
        own = self.prefix[layer_idx]
        if own is None:
            return keys, values
        return _before(own[0], keys), _before(own[1], values)


class NoPages(PagedAttentionCache):
    """Stands for pages that hold nothing yet and keep nothing."""

    def __init__(self) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values `(1, H, tokens, D)` themselves, in the form of `PagedAttentionCache.update`."""
        if "kwargs" in inspect.signature(PagedAttentionCache.update).parameters:
            return key_states, value_states
        return key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)  # up to transformers 5.17 or so


def _before(own: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    own = own.to(states)
    if states.dim() == 3:
        return torch.cat([own[0].transpose(0, 1), states])
    return torch.cat([own, states], dim=2)
