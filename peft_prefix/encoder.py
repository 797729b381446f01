"""How a prefix gets into an encoder: every attention layer reads it beside the text, and nothing is moved.

An encoder's model gives its attention no cache. Where the layers share the decoder's class they take one all the same
(`attention.py`); where attention is written out by hand, its softmax is widened (`written_out.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .arguments import by_name
from .attention import supply
from .cache import KeyValue, PrefixedLayer, RowOrder
from .cache_encoder_decoder import SuppliedCache
from .call import PrefixCall
from .errors import PrefixNotConsumedError
from .masks import WideMasks, leading_padding
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
            encoding.begin(arguments)
            return arguments, None

        def leave(output: Any, arguments: dict[str, Any]) -> Any:
            encoding.finish()
            sign_encoding(output, call.owner(encoding.rows))
            return output

        return [Intervention(encoder, enter, leave), *encoding.layers()]


class _Encoding:
    """The passes of an encoder in one call."""

    def __init__(self, call: PrefixCall, structure: Structure, is_relative: bool) -> None:
        self.call = call
        self.structure = structure
        self.is_relative = is_relative

    def begin(self, arguments: dict[str, Any]) -> None:
        """Start a pass with these arguments."""
        encoder, mask = self.structure.encoder, arguments.get("attention_mask")
        assert encoder is not None
        inputs = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
        self.rows = inputs.shape[0]
        self.call.settle_hidden(self.rows, inputs.device)
        columns, order = self.call.columns("encoder", self.rows, inputs.device), None
        if self.is_relative and mask is not None and mask.dim() == 2:
            order = RowOrder(leading_padding(mask), columns.length)
        self.columns = replace(columns, order=order)
        self.masks = WideMasks(getattr(getattr(encoder, "config", None), "_attn_implementation", None))
        self.read: set[int] = set()
        self.bias = position_bias(encoder, order)

    def layers(self) -> list[Intervention]:
        """What happens to the attention layers."""
        interventions = [
            supply(attention, self._cache_of(index), self._widened)
            for index, attention in enumerate(self.structure.encoder_attention)
        ]
        for index, layout in enumerate(self.structure.written_out):
            interventions += WrittenOut(layout).with_prefix(self._prefix_of(index), self._scores_of)
        return interventions

    def _widened(self, mask: Any, hidden_states: torch.Tensor) -> Any:
        return self.masks.widened(mask, self.columns, hidden_states.shape[1], hidden_states)

    def _scores_of(self, p: int, queries: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores of the virtual tokens: their position bias, and what hides those of others."""
        bias, there = self.bias(p, queries), self.columns.exists()
        if there is None:
            return bias
        hidden = torch.zeros(there.shape, dtype=queries.dtype, device=queries.device)
        hidden = hidden.masked_fill(~there, torch.finfo(queries.dtype).min)[:, None, None, :]
        return hidden if bias is None else hidden + bias.to(hidden)

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
