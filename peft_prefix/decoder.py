"""How a prefix gets into one forward pass of the text decoder: cache, mask and positions, and nothing else.

`DecoderInjection.enter` takes the arguments of one pass of the decoder as the rest of the model wrote them, in terms of
real tokens, and returns them as the decoder must receive them; `leave` checks that the prefix was read and hands the
user's own cache back.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.utils import ModelOutput

from .arguments import by_name, new_tokens_of
from .cache import PrefixedCache, PrefixedLayer, RowOrder
from .cache_encoder_decoder import PrefixedCrossLayer, PrefixedEncoderDecoderCache
from .call import PrefixCall, SiteStates
from .errors import PrefixInputError, PrefixNotConsumedError, UnsupportedModelError
from .masks import (
    PrefixColumns,
    leading_padding,
    model_masks,
    positions_of_real_tokens,
    window_kind,
    with_prefix_columns,
)
from .ownership import Owner, claim
from .packing import is_packed
from .slots import SlotLayer, with_slots, without_slots
from .structure import Structure


class DecoderInjection:
    """What has to be known about a text decoder to run it with a prefix.

    Args:
        base: The base model.
        structure: What it consists of.
    """

    def __init__(self, base: PreTrainedModel, structure: Structure) -> None:
        self.name = type(base).__name__
        self.base = base
        self.decoder = structure.decoder
        self.text_config = structure.text_config
        self.is_encoder_decoder = structure.encoder is not None
        self.names = tuple(inspect.signature(self.decoder.forward).parameters)
        self.takes_positions = "position_ids" in self.names
        self.counts_left_padding = False
        self.first_position = 0
        self.needs_slots = False
        self.counts_mask: bool | None = None  # until somebody needs to know
        self.blank = DynamicCache(config=self.text_config).layers
        self.has_windows = any(getattr(layer, "is_sliding", False) for layer in self.blank)
        self.recurrent = [isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self.blank]
        self.position_limit = _position_limit(self.text_config)
        self.depth = getattr(self.text_config, "num_hidden_layers", None)

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of one pass of the decoder by name."""
        return by_name(self.names, args, kwargs)

    def enter(self, arguments: dict[str, Any], call: PrefixCall) -> dict[str, Any]:
        """The arguments of one pass with the prefix put in.

        Args:
            arguments: The pass's arguments by name, in terms of real tokens.
            call: The call that the pass belongs to.

        Returns:
            New arguments, whose `past_key_values` stands before the user's cache.

        Raises:
            PrefixInputError: Mask, positions, cache or length do not fit.
            UnsupportedModelError: The base's attention implementation cannot keep the prefix visible.
        """
        p, new_tokens = call.length("decoder"), new_tokens_of(arguments)
        rows = new_tokens.shape[0]
        call.settle_hidden(rows, new_tokens.device)
        prefix, owner = call.states(rows), call.owner(rows)
        if p and self._is_packed(arguments):
            self._require_separate_texts(arguments)
            arguments = {**arguments, "use_cache": False}  # with one, also the base itself would mix the texts
        if call.checkpointed:
            self._require_no_cache(arguments)
        past = None if call.checkpointed else self._past(arguments, owner)
        past_self = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
        seen = 0 if past is None else past.get_seq_length()
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if isinstance(mask, torch.Tensor):
            self._check_mask(mask, new_tokens, past, seen)
        if p and self.counts_left_padding:
            self._check_left_padding(mask)
            self._check_left_padding(call.padding_mask)

        if p and self.needs_slots and not seen:
            self._check_length(p, past, new_tokens, None)
            cache = self._prefixed(prefix, past, None, SlotLayer)
            there = call.columns("decoder", rows, new_tokens.device).exists()
            return {**with_slots(arguments, p, there), "past_key_values": cache, "use_cache": not call.checkpointed}
        order = None
        result = dict(arguments)
        known = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else call.padding_mask
        if self.takes_positions:
            shift = call.shift(rows, new_tokens.device)
            result["position_ids"] = self._positions(positions, known, new_tokens, seen, shift)
        elif p and isinstance(mask, torch.Tensor):
            order = RowOrder(leading_padding(mask), p)
        self._check_length(p, past, new_tokens, result.get("position_ids"))
        if p:
            columns = replace(call.columns("decoder", rows, new_tokens.device), order=order)
            if self.counts_mask:  # a zero would move the tokens before it; layers hide them (`HidingMasks`)
                columns = replace(columns, hidden=None)
            if self.has_windows:
                places = self._places(positions, known, new_tokens, seen)
                columns = call.in_windows(columns, places, rows, self.text_config)
            result["attention_mask"] = self._mask(mask, columns, positions, new_tokens, past_self)
        result["past_key_values"] = self._prefixed(prefix, past, order)
        # Some decoders hand their layers no cache unless one is wanted.
        result["use_cache"] = not call.checkpointed
        return result

    def leave(self, output: Any, arguments: Mapping[str, Any]) -> Any:
        """The decoder's output, with the user's cache in place of ours.

        Args:
            output: What the decoder returned.
            arguments: What `enter` gave it.

        Raises:
            PrefixNotConsumedError: The decoder ran without reading the prefix somewhere.
        """
        cache = arguments["past_key_values"]
        prefixed = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if isinstance(prefixed.layers[0], SlotLayer):
            p = prefixed.layers[0].length
            output = without_slots(output, p, new_tokens_of(arguments).shape[1] - p)
        unread = cache.unread_layers()
        depth = getattr(self.text_config, "num_hidden_layers", None)
        if depth != self.depth:  # an assistant that leaves early (`assistant_early_exit`) is the base with fewer layers
            unread = [layer for layer in unread if depth is None or layer < depth]
        if unread:
            raise PrefixNotConsumedError(
                f"The prefix was not read by layers {unread} of the base model, so its output would ignore the prefix. "
                f"Something between {self.name} and its attention drops `past_key_values`; remove hooks and "
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

    def _mask(
        self,
        mask: Any,
        columns: PrefixColumns,
        positions: torch.Tensor | None,
        new_tokens: torch.Tensor,
        past: Cache | None,
    ) -> Any:
        """The mask with the prefix's columns, made here where the model's own would hide the prefix."""
        kind = window_kind(self.text_config)
        is_prepared = mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2)
        text_positions = self._text_positions(positions)
        packed = mask is None and past is None and text_positions is not None and is_packed(text_positions)
        # Windows would hide the prefix, and recurrent layers take a mask of real tokens beside attention's with it.
        special = self.has_windows or packed or any(self.recurrent)
        if (self.has_windows or packed) and str(self.text_config._attn_implementation).startswith("flash"):
            raise UnsupportedModelError(
                "Flash attention knows sliding windows and packed texts as numbers, not as masks, and would hide the "
                'prefix from some tokens. Load the base model with attn_implementation="sdpa".'
            )
        if special and not is_prepared:
            mask = model_masks(self.base, self.text_config, mask, past, text_positions, new_tokens)
            return with_prefix_columns(mask, columns, new_tokens, past, kind)
        if mask is None and columns.all_exist:
            return None
        if mask is None:
            mask = _open_mask(new_tokens, past)
        return with_prefix_columns(self._readable(mask), columns, new_tokens, past, kind)

    def _readable(self, mask: Any) -> Any:
        """A 4D mask in the form that attention reads: eager attention adds it to the scores, so not a boolean one."""
        if isinstance(mask, dict):
            return {kind: self._readable(part) for kind, part in mask.items()}
        eager = self.text_config._attn_implementation == "eager"
        if eager and isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.dtype == torch.bool:
            hidden = torch.finfo(self.decoder.dtype).min
            return torch.zeros(mask.shape, dtype=self.decoder.dtype, device=mask.device).masked_fill(~mask, hidden)
        return mask

    def _prefixed(
        self,
        prefix: SiteStates,
        past: Cache | None,
        order: RowOrder | None,
        layer_type: type[PrefixedLayer] = PrefixedLayer,
    ) -> Cache:
        decoder = prefix.get("decoder")
        if not self.is_encoder_decoder:
            assert decoder is not None
            return PrefixedCache(decoder, past, self.blank, order, layer_type)
        assert past is None or isinstance(past, EncoderDecoderCache)
        layers = len(next(iter(states for site, states in prefix.items() if site != "encoder"), ()))
        past_self = past.self_attention_cache if past is not None else None
        # Without a cache to store in, the stand-in for cross-attention stores nothing either.
        past_cross = past.cross_attention_cache if past is not None else None
        return PrefixedEncoderDecoderCache(
            PrefixedCache(decoder or [None] * layers, past_self, order=order, layer_type=layer_type),
            PrefixedCache(prefix.get("cross") or [None] * layers, past_cross, layer_type=PrefixedCrossLayer),
            past,
        )

    def _is_packed(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the new tokens are several texts, which the model tells by their positions if it gets no mask."""
        positions = self._text_positions(arguments.get("position_ids"))
        if positions is None or positions.shape[-1] == 1 or arguments.get("attention_mask") is not None:
            return False
        if torch.compiler.is_compiling():  # numbers are not seen there, so it may be
            return arguments.get("past_key_values") is None and not arguments.get("use_cache")
        return is_packed(positions)

    def _require_separate_texts(self, arguments: Mapping[str, Any]) -> None:
        if any(self.recurrent):
            raise PrefixInputError(
                f"{self.name} has recurrent layers, which would carry what they know from one packed text into the "
                "next. Give the texts as rows of a padded batch, without position_ids. (In compiled code positions "
                "count as packed where no attention_mask is given.)"
            )
        if arguments.get("past_key_values") is not None:
            raise PrefixInputError(
                "position_ids start again, as in packed texts, and a cache cannot keep those apart. Leave "
                "past_key_values out, or give the texts as rows of a padded batch."
            )

    def _require_no_cache(self, arguments: Mapping[str, Any]) -> None:
        past = arguments.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise PrefixInputError(
                "With gradient checkpointing layers run twice, so a cache cannot be continued. Pass the whole text, or "
                "call model.gradient_checkpointing_disable() or model.eval()."
            )

    def _past(self, arguments: dict[str, Any], owner: Owner | None) -> Cache | None:
        past = arguments.get("past_key_values")
        if past is None:
            use_cache = arguments.get("use_cache")
            if use_cache is None:
                # In training a cache would only hold memory; the base makes one because its config says so.
                use_cache = getattr(self.text_config, "use_cache", False) and not self.decoder.training
            if not use_cache:
                return None
            past = DynamicCache(config=self.text_config)
            if self.is_encoder_decoder:
                past = EncoderDecoderCache(past, DynamicCache())
        elif not isinstance(past, Cache) or self.is_encoder_decoder != isinstance(past, EncoderDecoderCache):
            start = (
                "EncoderDecoderCache(DynamicCache(), DynamicCache())" if self.is_encoder_decoder else "DynamicCache()"
            )
            raise PrefixInputError(
                f"past_key_values must be a cache such as {start} makes, not {type(past).__name__}: "
                + (
                    "this model needs room for self-attention and cross-attention."
                    if self.is_encoder_decoder
                    else "give a Cache of transformers."
                )
            )
        claim(past, owner)
        return past

    def _text_positions(self, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Positions in the text, `(batch, new)`, if they are known.

        Models that count place and time of images give three rows of positions, in which the text's own cannot be
        told, or four, of which the first is the text's.
        """
        if positions is None or positions.dim() == 2:
            return positions
        return positions[0] if positions.shape[0] == 4 else None

    def _places(
        self, positions: torch.Tensor | None, mask: Any, new_tokens: torch.Tensor, seen: int | torch.Tensor
    ) -> torch.Tensor:
        """Which real token of its row each new one is, counted from 0, `(1 or batch, new)`."""
        length = new_tokens.shape[1]
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            return positions_of_real_tokens(mask[:, : seen + length], length)
        known = self._text_positions(positions)
        if known is not None:
            return known - self.first_position
        return (torch.arange(length, device=new_tokens.device) + seen)[None, :]

    def _positions(
        self,
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        new_tokens: torch.Tensor,
        seen: int | torch.Tensor,
        shift: int | torch.Tensor,
    ) -> torch.Tensor:
        if positions is None:
            positions = self._places(None, mask, new_tokens, seen)
        return positions + shift

    def _check_mask(
        self, mask: torch.Tensor, new_tokens: torch.Tensor, past: Cache | None, seen: int | torch.Tensor
    ) -> None:
        if mask.dim() not in (2, 4):
            raise PrefixInputError(f"attention_mask must have 2 or 4 dimensions, not {mask.dim()}.")
        if mask.dim() == 4:
            return
        if not isinstance(seen, int) or (past is not None and past.is_compileable):
            return  # a cache of fixed size may come with a mask of its whole capacity
        expected = (new_tokens.shape[0], seen + new_tokens.shape[1])
        if tuple(mask.shape) != expected:
            raise PrefixInputError(
                f"attention_mask has shape {tuple(mask.shape)} where {expected} is needed: one column for each real "
                f"token, {seen} cached and {new_tokens.shape[1]} new. The prefix gets its columns by itself."
            )

    def _check_left_padding(self, mask: Any) -> None:
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool((mask[:, 0] == 0).any()):
            raise PrefixInputError(
                f"{self.name} counts padding on the left as text, so the results would depend on it. Pad on the right, "
                "give the rows one by one, or give position_ids that count real tokens if the model takes them (in an "
                "encoder-decoder model this is about decoder_attention_mask)."
            )

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


def _open_mask(new_tokens: torch.Tensor, past: Cache | None) -> torch.Tensor:
    """The 2D mask of a text without padding; a cache of fixed size may be wider than the text, which changes nothing.

    (What has not been written yet is hidden by causality.)
    """
    rows, columns = new_tokens.shape[:2]
    if past is not None:
        columns = past.get_max_length() if past.is_compileable else int(past.get_seq_length()) + columns
    return torch.ones(rows, columns, dtype=torch.long, device=new_tokens.device)


def _position_limit(text_config: Any) -> int | None:
    """Largest number of positions that the config declares, unless the model stretches its positions while it runs."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") == "dynamic":
        return None
    for name in ("max_decoder_position_embeddings", "max_target_positions", "max_position_embeddings", "max_seq_len"):
        limit = getattr(text_config, name, None)
        if isinstance(limit, int):
            return limit
    return None
