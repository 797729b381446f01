"""What the labels of a batch ask for, whatever padding the rows have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import PrefixInputError, some_of
from .prefix_names import COLUMN
from .prompt_target import IGNORED

_KNOWN = ("input_ids", "attention_mask", "labels", "decoder_input_ids", COLUMN)


@dataclass(frozen=True)
class LabelledBatch:
    """Rows of text with labels, of which only those count that some real token comes before.

    Args:
        input_ids: What the model reads, `(rows, tokens)`.
        mask: Which of it is no padding, `(rows, tokens)`.
        labels: The labels that count, and -100, `(rows, labels)`.
        decoder_input_ids: What the decoder of an encoder-decoder model reads, `(rows, labels)`, if it was given.
        shift: How many places a label stands behind the logits that it is compared with.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    decoder_input_ids: torch.Tensor | None
    shift: int

    @classmethod
    def of(cls, batch: Mapping[str, Any], is_encoder_decoder: bool) -> LabelledBatch:
        """A batch as a collator makes it.

        Args:
            batch: `input_ids`, `labels` and, where rows are padded, `attention_mask`.
            is_encoder_decoder: Whether `input_ids` is a source and the labels are another text.

        Raises:
            PrefixInputError: Something is missing, has another shape or is not understood.
        """
        unknown = [name for name, value in batch.items() if name not in _KNOWN and value is not None]
        missing = [name for name in ("input_ids", "labels") if not isinstance(batch.get(name), torch.Tensor)]
        if unknown or missing:
            raise PrefixInputError(
                f"Distillation is about rows of text with 'input_ids' and 'labels', padded or not; this batch has "
                f"{some_of(map(repr, unknown)) + ', which is not understood' if unknown else f'no {missing[0]!r}'}. "
                "PromptTargetCollator makes such batches; packed rows and embeddings are not supported."
            )
        ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        same = ids.dim() == 2 and mask.shape == ids.shape and labels.dim() == 2 and len(labels) == len(ids)
        if not same or not (is_encoder_decoder or labels.shape == ids.shape):
            raise PrefixInputError(
                f"input_ids of shape {tuple(ids.shape)}, attention_mask of shape {tuple(mask.shape)} and labels of "
                f"shape {tuple(labels.shape)} do not belong to the same rows of text."
            )
        mask = mask.bool()
        if is_encoder_decoder:
            decoder_ids = batch.get("decoder_input_ids")
            _require_shifted(decoder_ids, labels)
            return cls(ids, mask, labels, decoder_ids, 0)
        if batch.get("decoder_input_ids") is not None:
            raise PrefixInputError("A causal model reads no decoder_input_ids; leave them out.")
        # The first real token of a row has nothing before it that could foretell it, nor has padding.
        before = torch.nn.functional.pad(mask[:, :-1], (1, 0), value=False)
        return cls(ids, mask, labels.masked_fill(~(mask & before), IGNORED), None, 1)

    @property
    def counts(self) -> torch.Tensor:
        """Number of labels in each row, `(rows,)`."""
        return self.labels.ne(IGNORED).sum(dim=1)

    @property
    def targets(self) -> torch.Tensor:
        """The labels that count, row after row, `(positions,)`."""
        return self.labels[self.labels != IGNORED]

    @property
    def texts(self) -> list[torch.Tensor]:
        """The real tokens of each row."""
        return [ids[mask] for ids, mask in zip(self.input_ids, self.mask, strict=True)]

    def labels_of_texts(self) -> list[torch.Tensor]:
        """The labels of a causal model's real tokens, row by row."""
        return [labels[mask] for labels, mask in zip(self.labels, self.mask, strict=True)]

    def keys(self) -> list[bytes]:
        """A hash of each row's real tokens and labels: 16 bytes that padding and other rows do not change."""
        parts: list[tuple[torch.Tensor, ...]]
        if self.shift:
            parts = list(zip(self.texts, self.labels_of_texts(), strict=True))
        else:
            parts = [(text, *self._target(row)) for row, text in enumerate(self.texts)]
        return [_hash(one) for one in parts]

    def _target(self, row: int) -> tuple[torch.Tensor, ...]:
        """A row's labels up to the last one, and what the decoder reads where they do not say it."""
        labels = self.labels[row]
        places = (labels != IGNORED).nonzero()
        length = int(places[-1]) + 1 if len(places) else 0
        labels = labels[:length]
        read = torch.nn.functional.pad(labels[:-1], (1, 0), value=IGNORED)
        if self.decoder_input_ids is not None:
            read = torch.where(read == IGNORED, self.decoder_input_ids[row, :length], read)
            read[:1] = IGNORED  # the start token, which belongs to the model
        return labels, read


def _require_shifted(decoder_ids: torch.Tensor | None, labels: torch.Tensor) -> None:
    if decoder_ids is None:
        return
    known = labels[:, :-1] != IGNORED
    if decoder_ids.shape != labels.shape or bool((decoder_ids[:, 1:] != labels[:, :-1])[known].any()):
        raise PrefixInputError(
            "decoder_input_ids are not the labels moved by one place. Leave them out: the model makes them."
        )


def _hash(parts: tuple[torch.Tensor, ...]) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for part in parts:
        content.update(len(part).to_bytes(8, "little"))
        content.update(part.detach().to("cpu", torch.int64).contiguous().numpy().tobytes())
    return content.digest()
