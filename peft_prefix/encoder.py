"""How a prefix gets into an encoder: every attention layer reads it beside the text, and nothing is moved.

An encoder's model gives its attention no cache. Where the layers share the decoder's class they take one all the same
(`attention.py`); where attention is written out by hand, its softmax is widened (`written_out.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .arguments import by_name
from .attention import supply
from .cache import KeyValue, PrefixedLayer, RowOrder
from .cache_encoder_decoder import SuppliedCache
from .call import PrefixCall
from .errors import PrefixNotConsumedError
from .masks import PrefixColumns, WideMasks, leading_padding
from .ownership import sign_encoding
from .passes import Entered, Intervention
from .structure import Structure
from .written_out import WrittenOut, position_bias


class EncoderInjection:
    """What has to be known about an encoder to run it with a prefix.

    Args:
        structure: What the base model consists of.

    Attributes:
        is_relative: Whether the encoder knows positions by counting, so that a row's left padding must not come
            between its prefix and its text.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.is_relative = False
        self.names = () if structure.encoder is None else tuple(inspect.signature(structure.encoder.forward).parameters)

    def interventions(self, call: PrefixCall) -> list[Intervention]:
        """What happens to the encoder's passes in one call; nothing, if the prefix has no such site."""
        encoder = self.structure.encoder
        if encoder is None or "encoder" not in call.sites:
            return []
        encoding = _Encoding(call, self.structure, self.is_relative)

        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
            arguments = by_name(self.names, args, kwargs)
            encoding.begin(arguments.get("attention_mask"))
            return arguments, None

        def leave(output: Any, arguments: dict[str, Any]) -> Any:
            encoding.finish()
            sign_encoding(output, call.owner)
            return output

        return [Intervention(encoder, enter, leave), *encoding.layers()]


class _Encoding:
    """The passes of an encoder in one call."""

    def __init__(self, call: PrefixCall, structure: Structure, is_relative: bool) -> None:
        self.call = call
        self.structure = structure
        self.is_relative = is_relative

    def begin(self, attention_mask: torch.Tensor | None) -> None:
        """Start a pass with this 2D padding mask."""
        order = None
        if self.is_relative and attention_mask is not None and attention_mask.dim() == 2:
            order = RowOrder(leading_padding(attention_mask), self.call.length)
        self.columns = PrefixColumns(self.call.length, order)
        self.masks = WideMasks()
        self.read: set[int] = set()
        assert self.structure.encoder is not None
        self.bias = position_bias(self.structure.encoder, order)

    def layers(self) -> list[Intervention]:
        """What happens to the attention layers."""
        interventions = [
            supply(attention, self._cache_of(index), lambda mask: self.masks.widened(mask, self.columns))
            for index, attention in enumerate(self.structure.encoder_attention)
        ]
        for index, layout in enumerate(self.structure.written_out):
            bias = lambda p, queries: self.bias(p, queries)  # noqa: E731 - each pass has another one
            interventions += WrittenOut(layout).with_prefix(self._prefix_of(index), bias)
        return interventions

    def finish(self) -> None:
        """Note that the prefix was read.

        Raises:
            PrefixNotConsumedError: Some layer has not read it.
        """
        layers = len(self.structure.encoder_attention) + len(self.structure.written_out)
        if len(self.read) < layers:
            raise PrefixNotConsumedError(
                f"Only {len(self.read)} of {layers} encoder layers read their prefix, so the output would ignore it. "
                "Remove hooks and wrappers around the encoder, or report the model."
            )
        self.call.read.add("encoder")

    def _prefix_of(self, index: int) -> Callable[[int], KeyValue]:
        def prefix(rows: int) -> KeyValue:
            self.read.add(index)
            return self.call.prefix("encoder", index, rows)

        return prefix

    def _cache_of(self, index: int) -> Callable[[torch.Tensor], SuppliedCache]:
        """What gives an attention layer its keys and values."""

        def supplied(hidden_states: torch.Tensor) -> SuppliedCache:
            prefix = self.call.prefix("encoder", index, hidden_states.shape[0])
            layer = PrefixedLayer(prefix, None, 0, self.columns.order, on_read=lambda: self.read.add(index))
            return SuppliedCache(layer)

        return supplied
