"""Encoder attention that is written out by hand: the second table of structural exceptions.

Long-input encoders compute attention over windows, blocks and global tokens in code of their own, which takes no cache.
They have one thing in common: scores go through a softmax. While such a layer runs, its softmax gets `p` more columns,
the scores of the virtual tokens, which are then taken away again; what these columns carry is added to the result
before the output projection. That is attention to the prefix and the text together, exactly.

What differs is how scores are laid out and what the parts are called. Each layout below says so; a layer is recognized
by its parts, not by the name of its model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .arguments import by_name
from .cache import KeyValue, RowOrder
from .passes import Entered, Intervention

_SOFTMAXES = (nn.functional.softmax, torch.softmax, torch.Tensor.softmax)


class Layout:
    """How one kind of layer lays out its scores.

    Args:
        module: The attention layer.
    """

    parts: tuple[str, ...]
    """Names that only layers of this kind have."""
    query: tuple[str, ...]
    """Query projections, one for each group of queries."""
    key: str
    value: str
    output: str | None
    """Output projection inside the layer; `None` if it comes after."""
    length_first = False
    """Whether projections give `(length, batch, width)`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def heads(self) -> int:
        """Number of heads."""
        for name in ("num_heads", "n_heads"):
            if hasattr(self.module, name):
                return int(cast("int", getattr(self.module, name)))
        raise AttributeError(f"{type(self.module).__name__} does not say how many heads it has")

    @property
    def scale(self) -> float:
        """What queries are multiplied with."""
        return 1.0

    def split(self, states: torch.Tensor) -> torch.Tensor:
        """A projection's output as `(batch, H, length, D)`."""
        if self.length_first:
            states = states.transpose(0, 1)
        split: torch.Tensor = states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split

    def queries_of(self, softmax: int, queries: Sequence[torch.Tensor]) -> torch.Tensor:
        """The queries `(batch, H, length, D)` whose scores go through the softmax of this number."""
        return queries[softmax]

    def lay_out(self, columns: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the prefix `(batch, H, length, p)` beside the layer's own, in their layout `(..., p)`."""
        raise NotImplementedError

    def take_back(self, probabilities: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The inverse of `lay_out`: `(batch, H, length, p)`, of this shape."""
        raise NotImplementedError

    def first(self, excess: int) -> int:
        """Where the text begins in a projection that is longer than the text by this much."""
        return 0

    def result(self, call: int, parts: Sequence[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        """What is added, `(batch, H, length, D)`, from the parts of all softmaxes so far."""
        return parts[call]


class BlockedRows(Layout):
    """LongT5: blocks of queries, each seeing three blocks of keys; scores `(batch, blocks, H, block, keys)`."""

    parts = ("block_len", "q", "k", "v", "o")
    query, key, value, output = ("q",), "k", "v", "o"

    def lay_out(self, columns: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`(batch, blocks, H, block, p)`; the last block is filled up."""
        blocks, block = scores.shape[1], scores.shape[3]
        padded = nn.functional.pad(columns, (0, 0, 0, blocks * block - columns.shape[2]))
        laid_out: torch.Tensor = padded.unflatten(2, (blocks, block)).transpose(1, 2)
        return laid_out

    def take_back(self, probabilities: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Without what filled up the last block."""
        return probabilities.transpose(1, 2).flatten(2, 3)[:, :, : shape[2]]


class BlocksAndGlobals(Layout):
    """Pegasus-X: first global tokens, `(batch, H, globals, keys)`, then blocks, `(batch, H, blocks, block, keys)`."""

    parts = ("block_size", "q_proj", "k_proj", "v_proj", "out_proj")
    query, key, value, output = ("q_proj",), "k_proj", "v_proj", "out_proj"

    @property
    def scale(self) -> float:
        """The layer's own."""
        return float(cast("float", self.module.scaling))

    def first(self, excess: int) -> int:
        """Half a block, or 0."""
        # Every other layer moves its blocks by half a block, with that much padding on both sides.
        block = int(cast("int", self.module.block_size))
        return block // 2 if excess >= block else 0

    def queries_of(self, softmax: int, queries: Sequence[torch.Tensor]) -> torch.Tensor:
        """Those of the global tokens first."""
        return queries[1 - softmax]  # the text is projected first and scored last

    def lay_out(self, columns: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Tokens in blocks, or as they are."""
        return columns.reshape(*scores.shape[:-1], columns.shape[-1])

    def take_back(self, probabilities: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Tokens in a row."""
        return probabilities.reshape(shape)


class WindowAndGlobals(Layout):
    """LED: a window around each token, `(batch, length, H, keys)`; then, if there are global tokens, theirs.

    Those have a query projection of their own, scores `(batch * H, globals, keys)`, and replace the others' result.
    """

    parts = ("one_sided_attn_window_size", "query", "key", "value", "query_global")
    query, key, value, output = ("query", "query_global"), "key", "value", None
    length_first = True

    @property
    def scale(self) -> float:
        """One over the square root of the heads' width."""
        return 1.0 / math.sqrt(cast("int", self.module.head_dim))

    def lay_out(self, columns: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Tokens before heads, or global tokens with batch and heads in one."""
        return columns.transpose(1, 2) if scores.dim() == 4 else columns.flatten(0, 1)

    def take_back(self, probabilities: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Heads before tokens."""
        return probabilities.transpose(1, 2) if probabilities.dim() == 4 else probabilities.reshape(shape)

    def result(self, call: int, parts: Sequence[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        """That of the window, and at the places of global tokens theirs."""
        if len(parts) == 1:
            return parts[0]
        is_global = arguments["is_index_global_attn"]
        place = (is_global.long().cumsum(dim=1) - 1).clamp(min=0)[:, None, :, None]
        of_globals = parts[1].gather(2, place.expand(-1, parts[1].shape[1], -1, parts[1].shape[3]))
        return torch.where(is_global[:, None, :, None], of_globals, parts[0])


LAYOUTS: tuple[type[Layout], ...] = (BlockedRows, BlocksAndGlobals, WindowAndGlobals)
"""Every kind of hand-written attention that a prefix can join, each with its reason in its docstring."""


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of an attention layer that is written out by hand, or `None` for any other module."""
    for layout in LAYOUTS:
        if all(hasattr(module, part) for part in layout.parts):
            return layout(module)
    return None


Bias = Callable[[int, torch.Tensor], torch.Tensor | None]
"""Position bias of `p` virtual tokens before a text, `(1 or batch, H, length, p)`, from `p` and the queries."""


@dataclass
class _Pass:
    """What happens in one pass of one layer."""

    arguments: dict[str, Any]
    queries: list[torch.Tensor] = field(default_factory=list)
    parts: list[torch.Tensor] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    outputs: int = 0


class WrittenOut:
    """One hand-written attention layer, and the interventions that let a prefix in or record its keys and values.

    Args:
        layout: The layer.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.names = tuple(inspect.signature(layout.module.forward).parameters)
        self.current: _Pass | None = None

    def with_prefix(self, prefix: Callable[[int], KeyValue], bias: Bias) -> list[Intervention]:
        """Interventions that let a prefix in.

        Args:
            prefix: Gives keys `(1 or rows, H, p, Dk)` and values for a number of rows.
            bias: Gives the virtual tokens' position bias.
        """
        layout = self.layout

        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
            return self._begin(args, kwargs), _WiderSoftmax(self, prefix, bias)

        def leave(output: Any, arguments: dict[str, Any]) -> Any:
            if layout.output is None:
                output = (output[0] + self._result(self._run(), output[0].shape[1]), *output[1:])
            self.current = None
            return output

        watching = [self._watching(name, lambda run, states: run.queries.append(states)) for name in layout.query]
        if layout.output is not None:
            watching.append(Intervention(getattr(layout.module, layout.output), self._before_output))
        return [Intervention(layout.module, enter, leave), *watching]

    def recording(
        self, record: Callable[[torch.Tensor, torch.Tensor], None], length: Callable[[], int]
    ) -> list[Intervention]:
        """Interventions that only listen.

        Args:
            record: Gets the layer's own keys and values `(batch, H, length, D)`.
            length: Gives the length of the text, without the padding that such encoders add.
        """
        layout = self.layout

        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
            return self._begin(args, kwargs), None

        def leave(output: Any, arguments: dict[str, Any]) -> Any:
            run = self._run()
            first = layout.first(run.keys[0].shape[2] - length())
            part = slice(first, first + length())
            record(run.keys[0][:, :, part], run.values[0][:, :, part])
            self.current = None
            return output

        return [
            Intervention(layout.module, enter, leave),
            self._watching(layout.key, lambda run, states: run.keys.append(states)),
            self._watching(layout.value, lambda run, states: run.values.append(states)),
        ]

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        arguments = by_name(self.names, args, kwargs)
        self.current = _Pass(arguments)
        return arguments

    def _watching(self, name: str, note: Callable[[_Pass, torch.Tensor], None]) -> Intervention:
        def leave(output: Any, arguments: dict[str, Any]) -> Any:
            # A copy: some layers scale the projection in place.
            note(self._run(), self.layout.split(output).clone())
            return output

        def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
            return {"input": args[0]}, None

        return Intervention(getattr(self.layout.module, name), enter, leave)

    def _run(self) -> _Pass:
        assert self.current is not None
        return self.current

    def _before_output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
        run, states = self._run(), args[0]
        return {"input": states + self._result(run, states.shape[1])}, None

    def _result(self, run: _Pass, length: int) -> torch.Tensor:
        """What the prefix adds to a merged result, `(batch, length, H * D)`."""
        states = self.layout.result(run.outputs, run.parts, run.arguments)[:, :, :length]
        run.outputs += 1
        return states.transpose(1, 2).flatten(2)

    def widened_softmax(
        self, scores: torch.Tensor, softmax: Callable[..., torch.Tensor], prefix: Callable[[int], KeyValue], bias: Bias
    ) -> torch.Tensor:
        """The softmax of a layer's scores beside those of the prefix, without the prefix's columns."""
        run = self._run()
        queries = self.layout.queries_of(len(run.parts), run.queries) * self.layout.scale
        keys, values = (states.to(queries) for states in prefix(queries.shape[0]))
        columns = queries @ keys.transpose(-1, -2)
        added = bias(keys.shape[-2], queries)
        if added is not None:
            columns = columns + added.to(columns)
        p = columns.shape[-1]
        wide = softmax(torch.cat([self.layout.lay_out(columns, scores).to(scores), scores], dim=-1))
        own = self.layout.take_back(wide[..., :p], columns.shape).to(values)
        run.parts.append(own @ values)
        return wide[..., p:]


class _WiderSoftmax(TorchFunctionMode):
    """While a layer runs, its softmax has the prefix's columns, too."""

    def __init__(self, layer: WrittenOut, prefix: Callable[[int], KeyValue], bias: Bias) -> None:
        super().__init__()
        self.layer, self.prefix, self.bias = layer, prefix, bias

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _SOFTMAXES:
            return func(*args, **kwargs)

        def softmax(wide: torch.Tensor) -> torch.Tensor:
            states: torch.Tensor = func(wide, *args[1:], **kwargs)
            return states

        return self.layer.widened_softmax(args[0], softmax, self.prefix, self.bias)


def position_bias(encoder: nn.Module, order: RowOrder | None) -> Bias:
    """The bias of T5-like encoders: virtual tokens stand before the text, as far away as tokens there would be.

    Args:
        encoder: The encoder; its first layer holds the table.
        order: Says how much padding stands between a row's start and its text.
    """
    tables = [module for module in encoder.modules() if getattr(module, "has_relative_attention_bias", False)]
    known: dict[tuple[int, int], torch.Tensor] = {}

    def bias(p: int, queries: torch.Tensor) -> torch.Tensor | None:
        if not tables:
            return None
        table, length = cast("Any", tables[0]), queries.shape[2]
        if (p, length) not in known:
            place = torch.arange(length, device=queries.device)[None, :, None]
            if order is not None:
                place = (place - order.left_padding[:, :, None].to(place.device)).clamp(min=0)
            distance = torch.arange(p, device=queries.device) - (p + place)
            buckets = table._relative_position_bucket(
                distance,
                bidirectional=True,
                num_buckets=table.relative_attention_num_buckets,
                max_distance=table.relative_attention_max_distance,
            )
            known[p, length] = table.relative_attention_bias(buckets).permute(0, 3, 1, 2)
        return known[p, length]

    return bias
