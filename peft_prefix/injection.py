"""How a prefix gets into a forward pass of the base: cache, mask and positions, and nothing else.

`Injection.enter` takes the arguments of one call as the user (or `generate`) wrote them, in terms of real tokens, and
returns them as the base must receive them; `Injection.leave` checks that the prefix was read and hands the user's own
cache back. Both ways into the base, `forward` and `generate`, come through here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils import ModelOutput
from transformers.utils.generic import TransformersKwargs

from .cache import KeyValue, PrefixedCache, RowOrder
from .errors import PrefixInputError, PrefixNotConsumedError, UnsupportedModelError
from .masks import leading_padding, model_masks, positions_of_real_tokens, with_prefix_columns

_OWNER = "_prefix_owner"
"""Attribute of a user's cache that says which prefix its tokens were read with."""

_ABOUT_REAL_TOKENS_ONLY = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""Keywords that some models take silently and that would be wrong, or without effect, with a prefix."""


class Injection:
    """What has to be known about one base model to run it with a prefix.

    Args:
        base: A causal language model.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.signature = inspect.signature(base.forward)
        parameters = self.signature.parameters
        self.accepted = {name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        if len(self.accepted) < len(parameters):
            # What a `**kwargs` of transformers stands for; anything else would vanish in it.
            self.accepted |= {"return_dict", "use_cache", *TransformersKwargs.__annotations__} - _ABOUT_REAL_TOKENS_ONLY
        self.takes_positions = "position_ids" in parameters
        text_config = base.config.get_text_config(decoder=True)
        self.counts_left_padding = False
        self.checkpointed = [module for module in base.modules() if hasattr(module, "gradient_checkpointing")]
        self.has_windows = any(DynamicCache(config=text_config).is_sliding)
        self.position_limit = _position_limit(text_config)

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call of the base by name.

        Raises:
            PrefixInputError: An argument is given twice, or too many by position.
        """
        named = {**dict(zip(self.signature.parameters, args, strict=False)), **kwargs}
        if len(named) != len(args) + len(kwargs):
            raise PrefixInputError("An argument was given twice, by position and by name, or too many by position.")
        return named

    def understood(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """As `named`, after checking that the base understands each argument.

        Raises:
            PrefixInputError: Also for a keyword that the base would ignore.
        """
        named = self.named(args, kwargs)
        unknown = sorted(name for name in named if name not in self.accepted)
        if unknown:
            raise PrefixInputError(
                f"The base model does not understand {', '.join(unknown)}; it takes {', '.join(sorted(self.accepted))}."
            )
        return named

    def enter(
        self, base: PreTrainedModel, arguments: dict[str, Any], prefix: list[KeyValue], owner: str
    ) -> dict[str, Any]:
        """The arguments of one base call with the prefix put in.

        Args:
            base: The base model.
            arguments: The call's arguments by name, in terms of real tokens.
            prefix: The prefix's keys and values, layer by layer.
            owner: Identity of the prefix, to recognize the caches that were filled with it.

        Returns:
            New arguments, whose `past_key_values` is a `PrefixedCache`.

        Raises:
            PrefixInputError: Mask, positions, cache or length do not fit.
            PrefixNotConsumedError: The base is set up to drop the prefix.
            UnsupportedModelError: The base's attention implementation cannot keep the prefix visible.
        """
        if base.training and any(module.gradient_checkpointing for module in self.checkpointed):
            raise PrefixNotConsumedError(
                "Gradient checkpointing would drop the prefix on its way to attention. Switch it off "
                "(gradient_checkpointing=False in TrainingArguments); to save memory, use a smaller batch with "
                "gradient_accumulation_steps."
            )
        p = prefix[0][0].shape[-2]
        new_tokens = new_tokens_of(arguments)
        past = self._past(base, arguments, owner)
        seen = 0 if past is None else past.get_seq_length()
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            _check_padding_mask(mask, new_tokens, past, seen)
            if self.counts_left_padding and bool((mask[:, 0] == 0).any()):
                raise PrefixInputError(
                    f"{type(base).__name__} counts padding on the left as text, so the results would depend on it. Pad "
                    "on the right, or give the rows one by one."
                )
        if isinstance(mask, torch.Tensor) and mask.dim() not in (2, 4):
            raise PrefixInputError(f"attention_mask must have 2 or 4 dimensions, not {mask.dim()}.")

        order = None
        result = dict(arguments)
        if self.takes_positions:
            result["position_ids"] = self._positions(positions, mask, new_tokens, seen, p)
        elif isinstance(mask, torch.Tensor) and mask.dim() == 2:
            order = RowOrder(leading_padding(mask), p)
        self._check_length(p, past, new_tokens, result.get("position_ids"))

        is_prepared = mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2)
        packed = mask is None and past is None and positions is not None and _is_packed(positions)
        if (self.has_windows or packed) and str(base.config._attn_implementation).startswith("flash"):
            raise UnsupportedModelError(
                "Flash attention knows sliding windows and packed texts as numbers, not as masks, and would hide the "
                'prefix from some tokens. Load the base model with attn_implementation="sdpa".'
            )
        if (self.has_windows or packed) and not is_prepared:
            own = model_masks(base, mask, past, positions, new_tokens)
            result["attention_mask"] = with_prefix_columns(own, p, new_tokens, past)
        elif mask is not None:
            result["attention_mask"] = with_prefix_columns(_readable(mask, base), p, new_tokens, past, order)
        result["past_key_values"] = PrefixedCache(prefix, past, order)
        return result

    def leave(self, base: PreTrainedModel, output: Any, cache: PrefixedCache) -> Any:
        """The base's output, with the user's cache in place of ours.

        Raises:
            PrefixNotConsumedError: The base ran without reading the prefix somewhere.
        """
        unread = cache.unread_layers()
        if unread:
            raise PrefixNotConsumedError(
                f"The prefix was not read by layers {unread} of the base model, so its output would ignore the prefix. "
                f"Something between {type(base).__name__} and its attention drops `past_key_values`; remove hooks and "
                "wrappers around the base, or report the model."
            )
        if isinstance(output, ModelOutput):
            if output.get("past_key_values") is not cache:
                return output
            items = {name: cache.past if value is cache else value for name, value in output.items()}
            # An output names what is there; `generate` asks it by name.
            return type(output)(**{name: value for name, value in items.items() if value is not None})
        if isinstance(output, tuple):
            replaced = (cache.past if item is cache else item for item in output)
            return tuple(item for item in replaced if item is not None)
        return output

    def _past(self, base: PreTrainedModel, arguments: dict[str, Any], owner: str) -> Cache | None:
        past = arguments.get("past_key_values")
        if past is None:
            use_cache = arguments.get("use_cache")
            if use_cache is None:
                # In training a cache would only hold memory; the base makes one because its config says so.
                use_cache = getattr(base.config, "use_cache", False) and not base.training
            if not use_cache:
                return None
            past = DynamicCache(config=base.config.get_text_config(decoder=True))
        elif not isinstance(past, Cache):
            raise PrefixInputError(
                f"past_key_values must be a transformers Cache, not {type(past).__name__}. Start with DynamicCache()."
            )
        claim(past, owner)
        return past

    def _positions(
        self,
        positions: torch.Tensor | None,
        mask: Any,
        new_tokens: torch.Tensor,
        seen: int | torch.Tensor,
        p: int,
    ) -> torch.Tensor:
        if positions is None:
            length = new_tokens.shape[1]
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                positions = positions_of_real_tokens(mask[:, : seen + length], length)
            else:
                positions = (torch.arange(length, device=new_tokens.device) + seen)[None, :]
        return positions + p

    def _check_length(
        self, p: int, past: Cache | None, new_tokens: torch.Tensor, positions: torch.Tensor | None
    ) -> None:
        if self.position_limit is None:
            return
        seen: int | torch.Tensor = 0 if past is None else past.get_seq_length()
        if past is not None and isinstance(seen, torch.Tensor) and p + past.get_max_length() <= self.position_limit:
            return  # a cache of fixed size that cannot get there; reading its length would wait for the device
        length = p + int(seen) + new_tokens.shape[1]
        if length <= self.position_limit:
            return
        if positions is not None:
            length = int(positions.max()) + 1
            if length <= self.position_limit:
                return
        raise PrefixInputError(
            f"{p} virtual tokens and {length - p} real tokens need {length} positions, but the base model has "
            f"{self.position_limit}. Shorten the text (max_length={self.position_limit - p} in the tokenizer) or use "
            "fewer virtual tokens."
        )


def claim(cache: Cache, owner: str | None) -> None:
    """Note that the tokens of a cache are read with this prefix (or with none), after checking that all were.

    Raises:
        PrefixInputError: The cache holds tokens that were read in another way.
    """
    require_owner(cache, owner)
    setattr(cache, _OWNER, owner)


def require_owner(cache: Cache, owner: str | None) -> None:
    """Check that every token of a cache was read with this prefix (or with none, if `owner` is `None`).

    Raises:
        PrefixInputError: The cache holds tokens that were read in another way, so continuing it would be wrong.
    """
    found = getattr(cache, _OWNER, None)
    if found == owner or cache.get_seq_length() == 0:
        return
    read_with = "without a prefix" if found is None else f"with prefix {found}"
    wanted = "without a prefix" if owner is None else f"with prefix {owner}"
    raise PrefixInputError(
        f"This cache holds {int(cache.get_seq_length())} tokens that were read {read_with} and cannot be continued "
        f"{wanted}. Pass an empty cache, or one that was returned under the same prefix."
    )


def new_tokens_of(arguments: Mapping[str, Any]) -> torch.Tensor:
    """The new tokens of a call, as ids `(batch, new)` or as embeddings `(batch, new, hidden)`.

    Raises:
        PrefixInputError: There are none, or both.
    """
    given = [arguments[name] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None]
    if len(given) != 1:
        raise PrefixInputError("Pass either input_ids or inputs_embeds.")
    tokens: torch.Tensor = given[0]
    return tokens


def _readable(mask: Any, base: PreTrainedModel) -> Any:
    """A 4D mask in the form that the attention reads: eager attention adds it to the scores, so not a boolean one."""
    if isinstance(mask, dict):
        return {kind: _readable(part, base) for kind, part in mask.items()}
    eager = base.config._attn_implementation == "eager"
    if eager and isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.dtype == torch.bool:
        hidden = torch.finfo(base.dtype).min
        return torch.zeros(mask.shape, dtype=base.dtype, device=mask.device).masked_fill(~mask, hidden)
    return mask


def _check_padding_mask(
    mask: torch.Tensor, new_tokens: torch.Tensor, past: Cache | None, seen: int | torch.Tensor
) -> None:
    if not isinstance(seen, int) or (past is not None and past.is_compileable):
        return  # a cache of fixed size may come with a mask of its whole capacity
    expected = (new_tokens.shape[0], seen + new_tokens.shape[1])
    if tuple(mask.shape) != expected:
        raise PrefixInputError(
            f"attention_mask has shape {tuple(mask.shape)} where {expected} is needed: one column for each real token, "
            f"{seen} cached and {new_tokens.shape[1]} new. The prefix gets its columns by itself."
        )


def _is_packed(positions: torch.Tensor) -> bool:
    return positions.dim() == 2 and find_packed_sequence_indices(positions) is not None


def _position_limit(text_config: Any) -> int | None:
    """Largest number of positions that the config declares, unless the model stretches its positions while it runs."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") == "dynamic":
        return None
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(text_config, name, None)
        if isinstance(limit, int):
            return limit
    return None
