"""From a prompt and a target to token ids and labels, one row at a time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from transformers import PreTrainedTokenizerBase

from .errors import PrefixConfigError, PrefixInputError, PrefixWarning, some_of

IGNORED = -100
"""Label of a token that is not learned."""


@dataclass(frozen=True)
class PromptTargetEncoder:
    """Makes `input_ids` and `labels` of a row; what the fields mean is told in `PromptTargetCollator`."""

    tokenizer: PreTrainedTokenizerBase
    is_encoder_decoder: bool
    prompt_field: str = "prompt"
    target_field: str = "target"
    max_length: int | None = None
    truncation_side: Literal["left", "right"] = "left"
    append_end: bool = True
    _warned: list[bool] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.truncation_side not in ("left", "right"):
            raise PrefixConfigError(f'truncation_side is "left" or "right", not {self.truncation_side!r}.')
        if self.max_length is not None and self.max_length < 2:
            raise PrefixConfigError(f"max_length must leave room for a prompt and a target, unlike {self.max_length}.")
        if self.append_end and self.tokenizer.eos_token_id is None:
            raise PrefixConfigError(
                "The tokenizer has no end token, so the model could not learn where a target ends. Set "
                "tokenizer.eos_token, or append_end=False if the targets end with a token of their own."
            )

    def __call__(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """Token ids and labels of one row.

        Raises:
            PrefixInputError: A field is missing or holds something that is no prompt or target.
        """
        for name in (self.prompt_field, self.target_field):
            if name not in row:
                raise PrefixInputError(missing_fields(row, self.prompt_field, self.target_field))
        front, prompt, back = self._prompt(_plain_list(row[self.prompt_field]))
        target = self._target(_plain_list(row[self.target_field]))
        if self.is_encoder_decoder:
            target = self._shortened(target, self.max_length)
            room = None if self.max_length is None else self.max_length - len(front) - len(back)
            return {"input_ids": front + self._cut(prompt, room) + back, "labels": target}
        if not front and not prompt and self.tokenizer.bos_token_id is not None:
            front = [self.tokenizer.bos_token_id]  # where generation without a prompt starts
        limit = None if self.max_length is None else self.max_length - len(front)
        target = self._shortened(target, limit)
        prompt = front + self._cut(prompt, None if limit is None else limit - len(target))
        return {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target}

    def opening(self, instruction: str) -> tuple[list[int], list[int]]:
        """What stands before demonstrations: the special tokens that begin a prompt, and an instruction's own ids."""
        front, ids = self._special_tokens()[0], self._plain(instruction) if instruction else []
        return front, ids[len(front) :] if ids[: len(front)] == front else ids

    def _prompt(self, prompt: Any) -> tuple[list[int], list[int], list[int]]:
        """A prompt's own ids, and the special tokens that the tokenizer puts before and behind it."""
        if isinstance(prompt, str):
            ids = self._plain(prompt)
            front, back = self._special_tokens()
            if ids[: len(front)] == front:  # the text has them itself
                front = []
            if not self.is_encoder_decoder or ids[len(ids) - len(back) :] == back:  # a causal model's text goes on
                back = []
            return front, ids, back
        if _are_ids(prompt):
            return self._with_start(list(prompt))
        if _are_messages(prompt):
            if not self.tokenizer.chat_template:
                raise PrefixInputError(
                    f"The field {self.prompt_field!r} holds messages, but the tokenizer has no chat template. Set "
                    "tokenizer.chat_template, or give the prompt as a text."
                )
            encoded: Any = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            return self._with_start(list(encoded["input_ids"]))
        raise PrefixInputError(
            f"The field {self.prompt_field!r} must hold a text, a list of messages with role and content, or a list "
            f"of token ids, not {prompt!r:.100}."
        )

    def _with_start(self, ids: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Ids whose start token stays where the rest of them is cut."""
        if ids[:1] == [self.tokenizer.bos_token_id]:
            return ids[:1], ids[1:], []
        return [], ids, []

    def _target(self, target: Any) -> list[int]:
        if isinstance(target, str):
            if self.is_encoder_decoder:  # with the target language's own special tokens
                ids = list(self.tokenizer(text_target=target)["input_ids"])
            else:
                ids = self._plain(target)
        elif _are_ids(target):
            ids = list(target)
        else:
            raise PrefixInputError(
                f"The field {self.target_field!r} must hold a text or a list of token ids, not {target!r:.100}."
            )
        end = self.tokenizer.eos_token_id
        return [*ids, end] if self.append_end and ids[-1:] != [end] else ids

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text; it changes, for example, with the source language."""
        whole, plain = list(self.tokenizer("a")["input_ids"]), self._plain("a")
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    def _cut(self, ids: list[int], room: int | None) -> list[int]:
        """As many of a prompt's tokens as there is room for."""
        if room is None or len(ids) <= room:
            return ids
        return ids[len(ids) - max(room, 0) :] if self.truncation_side == "left" else ids[: max(room, 0)]

    def _shortened(self, target: list[int], limit: int | None) -> list[int]:
        if limit is None or len(target) <= limit:
            return target
        if not self._warned:
            self._warned.append(True)
            warnings.warn(
                f"A target has {len(target)} tokens, more than max_length={self.max_length} leaves room for. The rest "
                "of it is not learned, nor where it ends, and its prompt is left out; the same happens, without "
                "another warning, to all targets that are too long. Raise max_length or leave such rows out.",
                PrefixWarning,
                stacklevel=3,
            )
        return target[: max(limit, 0)]


def missing_fields(row: Mapping[str, Any], prompt_field: str, target_field: str) -> str:
    """What to say about a row that is no example."""
    found = some_of(map(repr, row)) if row else "nothing"
    return (
        f"A row must have {prompt_field!r} and {target_field!r} (or 'input_ids' and 'labels'); this one has {found}. "
        "If your data has other names, set prompt_field and target_field. The Trainer takes away columns that the "
        "model's forward does not know: encode the data first (dataset.map(collator.encode)), or set "
        "TrainingArguments(remove_unused_columns=False)."
    )


def _plain_list(value: Any) -> Any:
    """Token ids in an array or a tensor as a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def _are_ids(value: Any) -> TypeGuard[Sequence[int]]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _are_messages(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(item, Mapping) and "role" in item for item in value)
