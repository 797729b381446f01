"""One call of the base model with a prefix, or with one for each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Cache, EncoderDecoderCache

from .cache import KeyValue, PrefixedLayer
from .config import Sliding
from .errors import PrefixInputError
from .hidden_tokens import HiddenTokens
from .masks import PrefixColumns
from .ownership import Owner, owner_of_rows

SiteStates = Mapping[str, Sequence[KeyValue | None]]
"""The prefix's keys and values by site and layer."""


@dataclass(frozen=True)
class RowPrefix:
    """What is known about the prefix of a row, beside its numbers.

    Args:
        length: Its length `p`.
        sites: Where it acts.
        owner: Its identity, to recognize caches and encodings that were made with it; `None` for no prefix.
        sliding: What happens to it in decoder layers with a sliding window.
    """

    length: int
    sites: tuple[str, ...]
    owner: Owner | None
    sliding: Sliding = "pinned"

    def at(self, site: str) -> int:
        """Its length at one site."""
        return self.length if site in self.sites else 0


NO_PREFIX = RowPrefix(length=0, sites=(), owner=None)
"""A row that runs as in the base model."""


@dataclass
class PrefixCall:
    """One call of the base with a prefix.

    A pass of the call may have several times as many rows, as for beams: `generate` repeats each row in its place.

    Args:
        states: The prefixes' keys and values by site and layer, for a number of rows; where rows have prefixes of
            different lengths, they end together, and zeros stand before them.
        prefixes: One for all rows, or one for each row.
        padding_mask: The call's 2D mask of real tokens, if it has one.
        hidden: Which virtual tokens rows do not see, in training.
        checkpointed: Whether layers will run again in the backward pass.
        read: Sites whose prefix was read by the time that the call ends.
        cache: What the text decoder was given in its last pass.
        source_length: Length of the encoding that the decoder was given in its last pass.
        rows_of_pass: How many rows that pass had.
        replayed: Keys and values that a layer reads instead of those of `states` while it runs as a checkpoint.
    """

    states: Callable[[int], SiteStates]
    prefixes: Sequence[RowPrefix]
    padding_mask: torch.Tensor | None = None
    hidden: HiddenTokens | None = None
    checkpointed: bool = False
    read: set[str] = field(default_factory=set)
    cache: Cache | None = None
    source_length: int = 0
    rows_of_pass: int = 0
    replayed: dict[tuple[str, int], KeyValue] = field(default_factory=dict)
    _columns: list[tuple[str, int, PrefixColumns]] = field(default_factory=list)

    def begin_pass(self, rows: int) -> None:
        """Note how many rows the decoder runs.

        Raises:
            PrefixInputError: They have become other rows in the middle of a call.
        """
        if len(self.prefixes) > 1 and self.rows_of_pass not in (0, rows):
            raise PrefixInputError(
                f"The base goes on with {rows} rows where it began with {self.rows_of_pass}, and which prefix each of "
                "them has cannot be told. Generate such inputs (long recordings, for example) one by one."
            )
        self.rows_of_pass = rows

    def settle_hidden(self, rows: int, device: torch.device) -> None:
        """Decide which virtual tokens rows do not see, if it is still open: before a checkpointed layer runs.

        A layer that runs again gets back the random state that it had, and must not find the decision made meanwhile.
        """
        if self.hidden is not None:
            self.hidden.settle(rows, device)

    @property
    def sites(self) -> tuple[str, ...]:
        """Where a prefix acts in some row."""
        return tuple(dict.fromkeys(site for prefix in self.prefixes for site in prefix.sites))

    def length(self, site: str) -> int:
        """Length `p` of the prefix at a site, the longest one of all rows; 0 if there is none."""
        return max(prefix.at(site) for prefix in self.prefixes)

    def varies(self, site: str) -> bool:
        """Whether rows have prefixes of different lengths at a site."""
        return len({prefix.at(site) for prefix in self.prefixes}) > 1

    def hides(self, site: str) -> bool:
        """Whether some row may not see all columns of a site."""
        return self.hidden is not None or self.varies(site)

    def owner(self, rows: int) -> Owner | None:
        """Whose prefix acts in a pass with this many rows."""
        return owner_of_rows([prefix.owner for prefix in self._of(rows)])

    def columns(self, site: str, rows: int, device: torch.device) -> PrefixColumns:
        """The columns of the prefix at a site in the masks of a pass with this many rows."""
        for known_site, known_rows, columns in self._columns:
            if (known_site, known_rows) == (site, rows):
                return columns
        lengths = None
        if self.varies(site):
            lengths = torch.tensor([prefix.at(site) for prefix in self._of(rows)], device=device)
        length = self.length(site)
        hidden = None if self.hidden is None else self.hidden.at(site, length, rows, device)
        columns = PrefixColumns(length, lengths=lengths, hidden=hidden)
        self._columns.append((site, rows, columns))
        return columns

    def shift(self, rows: int, device: torch.device) -> int | torch.Tensor:
        """How many positions the decoder's prefix takes in a pass with this many rows: a number, or `(rows, 1)`."""
        columns = self.columns("decoder", rows, device)
        return columns.length if columns.lengths is None else columns.lengths[:, None]

    def in_windows(self, columns: PrefixColumns, places: torch.Tensor, rows: int, text_config: object) -> PrefixColumns:
        """The decoder's columns with windows as each row's prefix wants them.

        Args:
            columns: The same without windows.
            places: Which real token of its row each new one is, `(1 or batch, new)`.
            rows: Number of rows.
            text_config: Config that says how wide windows are.
        """
        kinds = {prefix.sliding for prefix in self.prefixes}
        if kinds == {"pinned"}:
            return columns
        pinned = None
        if len(kinds) > 1:
            pinned = torch.tensor([prefix.sliding == "pinned" for prefix in self._of(rows)], device=places.device)
        positions = places + self.shift(rows, places.device)
        return dataclasses.replace(columns, positions=positions, text_config=text_config, pinned=pinned)

    def prefix(self, site: str, index: int, rows: int) -> KeyValue:
        """Keys and values of one layer of a site."""
        states = self.replayed.get((site, index)) or self.states(rows)[site][index]
        assert states is not None
        return states

    def cache_for(self, takes_pair: bool, site: str) -> Callable[[torch.Tensor], Cache]:
        """What gives an attention layer the decoder's cache, as its model would hand it on."""

        def given(_: torch.Tensor) -> Cache:
            assert self.cache is not None
            if takes_pair or not isinstance(self.cache, EncoderDecoderCache):
                return self.cache
            return self.cache.self_attention_cache if site == "decoder" else self.cache.cross_attention_cache

        return given

    def replay(self, slot: tuple[str, int], states: KeyValue) -> None:
        """Let a layer read these keys and values from now on."""
        self.replayed[slot] = states
        site, index = slot
        cache = self.cache
        if site == "encoder" or cache is None:
            return
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache if site == "decoder" else cache.cross_attention_cache
        layer = cache.layers[index]
        assert isinstance(layer, PrefixedLayer)
        layer.prefix = states

    def _of(self, rows: int) -> Sequence[RowPrefix]:
        """The prefix of each row of a pass, or one for all.

        Raises:
            PrefixInputError: There are not as many rows as prefixes, nor a multiple.
        """
        if len(self.prefixes) == 1:
            return self.prefixes
        copies, rest = divmod(rows, len(self.prefixes))
        if rest:
            raise PrefixInputError(
                f"prefix_names has {len(self.prefixes)} names for {rows} rows: one for each row is needed."
            )
        return [prefix for prefix in self.prefixes for _ in range(copies)]
