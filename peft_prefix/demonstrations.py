"""From solved examples of a task to the tokens whose activations fill a prefix.

The prefix reads an instruction, if there is one, and then demonstrations one after another, encoded as rows of training
data are. An encoder-decoder model reads the instruction and the sources, and its decoder writes the targets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import PrefixConfig
from .errors import PrefixConfigError, PrefixInputError, PrefixWarning
from .example_inputs import start_token
from .leave_one_out import Demonstration
from .prompt_target import IGNORED, PromptTargetEncoder

Demonstrations = Iterable[Mapping[str, Any]]
"""Rows with `prompt` and `target`, or with `input_ids` and `labels`, as `PromptTargetCollator` takes them."""


@dataclass(frozen=True)
class DemonstrationText:
    """What a prefix of demonstrations is made of.

    Args:
        ids: Token ids that a causal model, or an encoder, reads, `(p,)`.
        decoder_ids: Token ids that the decoder of an encoder-decoder model reads, its start token first, `(p,)`.
        known: The demonstrations that have a place in it, and their places.
    """

    ids: torch.Tensor
    decoder_ids: torch.Tensor | None
    known: tuple[Demonstration, ...]


def demonstration_text(
    base: PreTrainedModel,
    config: PrefixConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    demonstrations: Demonstrations | None,
) -> DemonstrationText | None:
    """The text for `init="demonstrations"`; `None` for other initializers.

    The instruction stays whole. Behind it stand the last tokens of the demonstrations, as many as there is room for; if
    they are too few, demonstrations are repeated from the first one on. A warning says if not all of them are used.

    Args:
        base: The base model.
        config: The prefix's; `init_text` is the instruction.
        tokenizer: Reads texts.
        demonstrations: The rows.

    Raises:
        PrefixConfigError: Demonstrations are missing or not read, the instruction leaves no room for them, there is no
            tokenizer for texts, or the base reads no text.
        PrefixInputError: A row is no demonstration.
    """
    if config.init != "demonstrations":
        if demonstrations is not None:
            raise PrefixConfigError(
                f'demonstrations are given, but init={config.init!r} does not read them: use init="demonstrations".'
            )
        return None
    if base.main_input_name != "input_ids" and base.config.is_encoder_decoder:
        raise PrefixConfigError(
            f'init="demonstrations" is for models that read text, and {type(base).__name__} reads '
            f'{base.main_input_name}. Use init="vocabulary", or sites=("decoder",) with init="cache".'
        )
    rows = _rows(demonstrations)
    encoder = _encoder(base, tokenizer, rows, config)
    front, instruction = ([], []) if encoder is None else encoder.opening(config.init_text or "")
    encoded = [_encoded(row, encoder, base.config.is_encoder_decoder) for row in rows]
    sources = [ids[len(front) :] if front and ids[: len(front)] == front else ids for ids, _ in encoded]
    p, opening = config.num_virtual_tokens, [*front, *instruction]
    if len(opening) >= p:
        raise PrefixConfigError(
            f"The instruction takes {len(opening)} of {p} virtual tokens and leaves no room for demonstrations. Use a "
            f"shorter init_text, or a larger num_virtual_tokens."
        )
    filled = _Filled(opening, sources, p)
    filled.warn()
    if not base.config.is_encoder_decoder:
        alone = zip(sources, filled.slots, strict=True)
        known = [Demonstration(tuple(ids), None, slots) for ids, slots in alone if slots]
        return DemonstrationText(torch.tensor(filled.ids), None, tuple(known))
    targets = [target for _, target in encoded if target is not None]
    written = _Filled(start_token(base).tolist(), targets, p)
    parts = zip(sources, targets, filled.slots, written.slots, strict=True)
    known = [
        Demonstration(tuple(ids), tuple(target), slots, others)
        for ids, target, slots, others in parts
        if slots or others
    ]
    return DemonstrationText(torch.tensor(filled.ids), torch.tensor(written.ids), tuple(known))


class _Filled:
    """Texts one after another behind an opening, cut or repeated to `p` tokens.

    Args:
        opening: What stands in front, whole.
        texts: Token ids of each text.
        p: Number of tokens.

    Attributes:
        ids: The `p` tokens.
        slots: Where each text's tokens are.
    """

    def __init__(self, opening: Sequence[int], texts: Sequence[Sequence[int]], p: int) -> None:
        self.texts, self.room, self.p = texts, p - len(opening), p
        self.total = sum(map(len, texts))
        order: list[tuple[int, int]] = []  # a token, and whose it is
        number = 0
        while number < len(texts) or len(order) < self.room:
            owner = number % len(texts)
            order += [(token, owner) for token in texts[owner]]
            number += 1
        kept = order[len(order) - self.room :]
        self.ids = [*opening, *(token for token, _ in kept)]
        self.slots: list[tuple[int, ...]] = [
            tuple(len(opening) + place for place, (_, owner) in enumerate(kept) if owner == one)
            for one in range(len(texts))
        ]

    def warn(self) -> None:
        """Say which texts are used, if not all of them are."""
        if self.total <= self.room:
            return
        used = sum(bool(slots) for slots in self.slots)
        whole = sum(len(slots) == len(text) for slots, text in zip(self.slots, self.texts, strict=True))
        fits = (
            f"the last {used} are used, {whole} of them whole"
            if whole
            else f"not a single one fits whole, and the end of the last {'one is' if used == 1 else f'{used} are'} used"
        )
        warnings.warn(
            f"The {len(self.texts)} demonstrations have {self.total} tokens, and there is room for {self.room}: "
            f"{fits}. Set num_virtual_tokens={self.total + self.p - self.room} to use them all.",
            PrefixWarning,
            stacklevel=2,
        )


def _rows(demonstrations: Demonstrations | None) -> list[Mapping[str, Any]]:
    if demonstrations is None:
        raise PrefixConfigError(
            'init="demonstrations" needs them: pass demonstrations=[{"prompt": ..., "target": ...}, ...] together with '
            "a tokenizer, or rows with input_ids and labels."
        )
    if isinstance(demonstrations, (str, Mapping)) or not isinstance(demonstrations, Iterable):
        raise PrefixInputError(f"demonstrations is a list of rows, not {demonstrations!r:.200}.")
    rows = list(demonstrations)
    strange = [row for row in rows if not isinstance(row, Mapping)]
    if strange or not rows:
        raise PrefixInputError(
            f"A demonstration is a row with prompt and target, not {strange[0]!r:.100}."
            if strange
            else "demonstrations is empty: one row is needed at least."
        )
    return rows


def _encoder(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: Sequence[Mapping[str, Any]],
    config: PrefixConfig,
) -> PromptTargetEncoder | None:
    """What encodes rows as the collator does; `None` if there are only token ids and nobody to read texts."""
    if tokenizer is not None:
        ends = tokenizer.eos_token_id is not None
        return PromptTargetEncoder(tokenizer, bool(base.config.is_encoder_decoder), append_end=ends)
    if config.init_text is not None or any("input_ids" not in row for row in rows):
        raise PrefixConfigError(
            'init="demonstrations" needs a tokenizer to read texts: pass '
            "tokenizer=AutoTokenizer.from_pretrained(...), or rows with input_ids and labels."
        )
    return None


def _encoded(
    row: Mapping[str, Any], encoder: PromptTargetEncoder | None, is_encoder_decoder: bool
) -> tuple[list[int], list[int] | None]:
    """Token ids of a row's text, or of its source and its target."""
    if "input_ids" not in row:
        assert encoder is not None
        row = encoder(row)
    ids = _real_ids(row["input_ids"], mask=row.get("attention_mask"))
    if not is_encoder_decoder:
        return ids, None
    if "labels" not in row:
        raise PrefixInputError(
            "A demonstration for an encoder-decoder model needs labels beside its input_ids: the target's token ids."
        )
    return ids, _real_ids(row["labels"], name="labels")


def _real_ids(ids: Any, name: str = "input_ids", mask: Any = None) -> list[int]:
    """A row's ids without its padding and without labels that are not learned."""
    row = torch.as_tensor(ids)
    is_row = row.dim() == 1 and not row.is_floating_point() and row.dtype != torch.bool
    if is_row and mask is not None:
        row = row[torch.as_tensor(mask).bool()]
    if not is_row or not (row != IGNORED).any():
        raise PrefixInputError(
            f"The {name} of a demonstration must be one row of at least one real token id, not {row.dtype} of shape "
            f"{tuple(row.shape)}."
        )
    return [int(token) for token in row.tolist() if token != IGNORED]
