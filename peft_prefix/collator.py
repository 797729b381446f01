"""Batches of prompts and targets, for the trainers of transformers and for plain loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import PrefixInputError
from .prefix_names import names_of
from .prompt_target import IGNORED, PromptTargetEncoder, missing_fields


class PromptTargetCollator:
    """Makes batches of rows with a prompt, which is read, and a target, which is learned.

    A causal model gets prompt and target as one text, and the labels of the prompt are -100. An encoder-decoder model
    gets the prompt as its source and the target as labels. Prompt and target are tokenized apart, so a target's tokens
    are the same behind every prompt, and a prompt's are those that it has when the model is to go on from it. A space
    or newline between the two is yours to write: best at the end of the prompt.

    The tokenizer's special tokens before a text (`<s>`) stand before the prompt, once; those behind a text belong to
    sources and to targets of encoder-decoder models only. Rows are padded on the right to the longest of the batch.
    A tokenizer without a padding token pads with its end token: padding is hidden by `attention_mask` and has no
    labels, so which token it is does not matter, and the end of a target keeps its label.

    Args:
        tokenizer: Reads the texts.
        model: The model to be trained, or its base. It says which of the two forms its batches have.
        prompt_field: Name of the prompt in a row: a text, a list of messages (for the tokenizer's chat template, which
            opens the assistant's turn), or a list of token ids, which are taken as they are.
        target_field: Name of the target: a text or a list of token ids.
        max_length: Most tokens of a row that is encoded here (in an encoder-decoder model: of a source, and of a
            target); rows that come with `input_ids` are taken as they are. A longer row loses
            tokens of its prompt. Where the target alone is too long, its end is lost; the first such row draws a
            warning.
        truncation_side: Which end of the prompt is lost; by default the beginning.
        append_end: Put the end token behind each target that does not have it, so that the model learns to stop.
        pad_to_multiple_of: Pad to lengths that are multiples of this.

    Raises:
        PrefixConfigError: There is no end token to append, or a value cannot be.

    Example:
        >>> from transformers import AutoTokenizer, Trainer
        >>> collator = PromptTargetCollator(tokenizer, model)  # doctest: +SKIP
        >>> Trainer(model, train_dataset=data.map(collator.encode), data_collator=collator)  # doctest: +SKIP
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        *,
        prompt_field: str = "prompt",
        target_field: str = "target",
        max_length: int | None = None,
        truncation_side: Literal["left", "right"] = "left",
        append_end: bool = True,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of
        is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._encoder = PromptTargetEncoder(
            tokenizer, is_encoder_decoder, prompt_field, target_field, max_length, truncation_side, append_end
        )
        # With label smoothing the Trainer keeps the labels to itself, and the model must be given what it reads.
        self._shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None) if is_encoder_decoder else None

    @property
    def encode(self) -> Callable[[Mapping[str, Any]], dict[str, list[int]]]:
        """Makes `input_ids` and `labels` of one row, unpadded: `dataset.map(collator.encode)`.

        The `Trainer` takes away columns that the model's forward does not know, the texts among them; these two stay.
        """
        return self._encoder

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch.

        Args:
            rows: Rows with a prompt and a target, or with `input_ids` and `labels` (and, if wanted, `attention_mask`).
                Where several prefixes are trained, a column `prefix_names` holds the name of each row's.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each `(batch, tokens)`, and for an encoder-decoder model
            `decoder_input_ids`. The rows' `prefix_names` as a list, if they have any.

        Raises:
            PrefixInputError: A row has neither, or only some rows name their prefix.
        """
        encoded = [row if "input_ids" in row else self._encoder(row) for row in rows]
        for row in encoded:
            self._check(row)
        masks = [row.get("attention_mask", [1] * len(row["input_ids"])) for row in encoded]
        labels = self._padded([row["labels"] for row in encoded], IGNORED)
        batch: dict[str, Any] = {
            "input_ids": self._padded([row["input_ids"] for row in encoded], self._padding),
            "attention_mask": self._padded(masks, 0),
            "labels": labels,
        }
        if self._shifted is not None:
            batch["decoder_input_ids"] = self._shifted(labels=labels)
        return {**batch, **names_of(rows)}

    @property
    def _padding(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None), 0)

    def _check(self, row: Mapping[str, Any]) -> None:
        if "labels" not in row:
            raise PrefixInputError(missing_fields(row, self._encoder.prompt_field, self._encoder.target_field))
        if not self._encoder.is_encoder_decoder and len(row["labels"]) != len(row["input_ids"]):
            raise PrefixInputError(
                f"A row has {len(row['input_ids'])} input_ids and {len(row['labels'])} labels; in a causal model each "
                f"token has a label, {IGNORED} if it is not learned."
            )

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
        step = self.pad_to_multiple_of or 1
        length = -(-max(len(row) for row in tensors) // step) * step
        return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in tensors])
