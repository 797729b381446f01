"""A teacher for context distillation: the frozen base that has read a long context."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .bank import PrefixBank
from .config import PrefixConfig
from .errors import PrefixConfigError, PrefixInputError
from .fingerprint import weights_fingerprint
from .initializers import tensors_from_states
from .label_logits import labelled_logits
from .labelled_batch import LabelledBatch
from .model import PrefixModel
from .modules_to_save import ModuleWeights
from .passes import Intervention, intervening
from .placement import home
from .prompt_target import IGNORED
from .readers import Readers
from .recording import recording
from .running import RunningModel
from .stopping import PositionsUsedUp
from .structure import evaluation_mode
from .teacher_store import StoredTeacher, write_store
from .teacher_targets import TeacherTargets, require_top_k

_PIECE = 1024
"""Tokens of a context that are read at once."""
_NAME = "context"


class ContextTeacher:
    """The base of a model, which reads a context before each row, and no prefix.

    A causal base reads the context once. Its keys and values are kept here, as a frozen prefix that is in no bank, no
    state and no file of the model, and each row costs its own tokens only. By the oracle that this library rests on,
    that equals reading context and row as one text; sliding windows move over the context as over text.

    Where keys and values do not say all that was read (recurrent layers), or depend on what follows (an encoder,
    positions that are scaled by the length of the text, attention in chunks), context and row are read together each
    time; that is as exact, and costs the context's tokens for each row.

    Args:
        model: Its base is the teacher. The prefixes play no part.
        context: A text, or its token ids: a list, or a tensor `(tokens,)` or `(1, tokens)`. A text is tokenized with
            the special tokens before it and without those behind it, since the rows go on from it.
        tokenizer: Reads the text.
        top_k: How many of the most likely tokens a student is compared with; the rest of the probability is one class
            more. `None` for the whole vocabulary.

    Attributes:
        model: The model.
        context_ids: The context's tokens, `(tokens,)`, on the CPU.
        top_k: As given.

    Raises:
        PrefixConfigError: The model is no `PrefixModel` of a language model that reads text, or a value cannot be.
        PrefixInputError: The context is empty, or too long for the base's positions.

    Example:
        >>> teacher = ContextTeacher(model, "The manual of the dishwasher ...", tokenizer)  # doctest: +SKIP
        >>> answers = teacher.generate(**tokenizer(questions, return_tensors="pt"))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PrefixModel,
        context: str | Sequence[int] | torch.Tensor,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        top_k: int | None = 64,
    ) -> None:
        if not isinstance(model, PrefixModel):
            raise PrefixConfigError("A ContextTeacher teaches with the base of a PrefixModel: see get_prefix_model.")
        if not model.can_generate() or model.base.main_input_name != "input_ids":
            raise PrefixConfigError(
                f"A ContextTeacher is a language model that reads text, which {type(model.base).__name__} is not."
            )
        require_top_k(top_k)
        self.model = model
        self.top_k = top_k
        self.context_ids = context_ids(context, tokenizer)
        self._is_encoder_decoder = bool(model.base.config.is_encoder_decoder)
        self._limit = _position_limit(model)
        if self._limit is not None and len(self.context_ids) >= self._limit:
            raise PrefixInputError(
                f"The context has {len(self.context_ids)} tokens and leaves no room for rows: the base model has "
                f"{self._limit} positions. Shorten the context, or use a base for longer texts."
            )
        self._bank = None if _reads_together(model) else self._read()

    @property
    def base_fingerprint(self) -> str | None:
        """A sample of the base's weights; `None` where they cannot be read."""
        return weights_fingerprint(self.model.base)

    @property
    def context_hash(self) -> str:
        """A sha256 over the context's tokens."""
        return hash_of_context(self.context_ids)

    def targets(self, batch: Mapping[str, Any]) -> TeacherTargets:
        """What the teacher says at labelled positions, row after row.

        Args:
            batch: `input_ids`, `labels` and, where rows are padded, `attention_mask`, without the context. A label at a
                place of a causal model asks for the token at this place, as in its loss.

        Raises:
            PrefixInputError: The batch does not fit, or its rows are too long behind the context.
        """
        labelled = LabelledBatch.of(batch, self._is_encoder_decoder)
        self._require_room(int(labelled.mask.sum(dim=1).max()))
        with torch.no_grad(), evaluation_mode(self.model.base):
            return TeacherTargets.of(self._logits(labelled), self.top_k)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        """Generate behind the context, as the base does when it has read it; for targets to train on.

        Args:
            input_ids: Prompts without the context, `(rows, tokens)`; padded on the left, or sources in any way.
            attention_mask: Which of it is no padding.
            **options: As in the base's `generate`.

        Returns:
            What the base's `generate` returns, without the context: lengths are those of the rows' own tokens.

        Raises:
            PrefixInputError: The rows are too long behind the context, or an option does not go with it.
        """
        options = {
            **options,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        }
        mask = options["attention_mask"].bool()
        self._require_room(int(mask.sum(dim=1).max()))
        base = cast("Any", self.model.base)
        with torch.no_grad(), evaluation_mode(base):
            if self._bank is not None:
                if self._limit is not None:
                    stop = PositionsUsedUp(self._limit, len(self.context_ids), options)
                    options["stopping_criteria"] = [*(options.get("stopping_criteria") or []), stop]
                # In generation masks grow; the library reads them pass by pass.
                with self._after_context({}):
                    return base.generate(input_ids, **options)
            texts = [ids[own] for ids, own in zip(input_ids, mask, strict=True)]
            ids, options["attention_mask"] = self._together(texts, "right" if self._is_encoder_decoder else "left")
            with self.model.disable_prefix():
                if self._is_encoder_decoder:
                    return base.generate(ids, **options)
                _require_new_tokens_only(options)
                result = base.generate(ids, **options)
        copies = len(result) // len(input_ids)
        return torch.cat([input_ids.repeat_interleave(copies, dim=0), result[:, ids.shape[1] :]], dim=1)

    def store(
        self,
        rows: Iterable[Mapping[str, Any]],
        folder: str | Path,
        collator: Any,
        batch_size: int = 8,
        *,
        overwrite: bool = False,
    ) -> StoredTeacher:
        """Write what the teacher says about every row to a folder, so that training needs no teacher.

        Log-probabilities are rounded to float16. Neither rows nor targets pile up in memory, and a folder whose writing
        was interrupted has no store in it, or the one that was there before.

        Args:
            rows: What the collator takes: a data set, a list, or anything that can be gone through.
            folder: Where to write; made if it is missing.
            collator: Makes a batch of a list of rows.
            batch_size: How many rows the teacher reads at once.
            overwrite: Take the place of a store that is there.

        Returns:
            The store, opened.

        Raises:
            PrefixFileError: There is a store already, or the folder cannot be written to.
            PrefixInputError: A row does not fit.
        """
        return write_store(self, rows, Path(folder), collator, batch_size, overwrite=overwrite)

    def __repr__(self) -> str:
        how = "read with each row" if self._bank is None else "read once"
        return f"ContextTeacher({type(self.model.base).__name__}, {len(self.context_ids)} tokens, {how})"

    def _read(self) -> PrefixBank:
        """A bank of its own whose one prefix is what the base keeps of the context."""
        model, length = self.model, len(self.context_ids)
        base, geometry = model.base, model.geometry
        ids = self.context_ids[None].to(home(base))
        # A model around a text model may count positions by itself, from the beginning of a text.
        piece = _PIECE if model._injection.decoder.text_config is base.config else length
        last_logits = {"logits_to_keep": 1} if "logits_to_keep" in model._injection.names else {}
        with (
            evaluation_mode(base),
            torch.no_grad(),
            model.disable_prefix(),
            recording(model._injection.structure) as run,
        ):
            for start in range(0, length, piece):
                tokens = ids[:, start : start + piece]
                base(input_ids=tokens, past_key_values=run.cache, use_cache=True, **last_logits)
        config = PrefixConfig(
            num_virtual_tokens=length, init="cache", sites=("decoder",), sliding_window="plain", modules_to_save=()
        )
        bank = PrefixBank(geometry)
        tensors = tensors_from_states(run.states, geometry, length)
        weights = ModuleWeights(base, ())
        bank.install(_NAME, config, tensors, {}, home(base), weights, is_trainable=False)
        return bank.eval()

    def _after_context(self, arguments: Mapping[str, Any], *more: Intervention) -> AbstractContextManager[None]:
        """While this is open, a causal base runs behind the context."""
        assert self._bank is not None
        self._bank.to(home(self.model.base))  # wherever the model is by now
        readers = Readers(self._bank, [self._bank.entry(_NAME)])
        return RunningModel._acting(self.model, readers, arguments, more=more)

    def _logits(self, labelled: LabelledBatch) -> torch.Tensor:
        """The logits that labels are compared with, `(positions, vocabulary)`."""
        base, only = self.model.base, self.model._label_logits
        arguments: dict[str, Any] = {
            "input_ids": labelled.input_ids,
            "attention_mask": labelled.mask.long(),
            "labels": labelled.labels,
        }
        if self._bank is None:
            arguments["input_ids"], arguments["attention_mask"] = self._together(labelled.texts)
            if labelled.shift:
                nothing = self.context_ids.new_full(self.context_ids.shape, IGNORED).to(labelled.labels.device)
                rows = [torch.cat([nothing, own]) for own in labelled.labels_of_texts()]
                arguments["labels"] = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        if labelled.decoder_input_ids is not None:
            arguments["decoder_input_ids"] = labelled.decoder_input_ids
        arguments = {name: value.to(home(base)) for name, value in arguments.items()}
        if labelled.shift:  # some decoders of encoder-decoder models see what comes later if they store nothing
            arguments["use_cache"] = False
        labels = arguments["labels"]
        if only.applies_to(arguments):
            one = only.pass_with(arguments)
            with self._acting(one.arguments, one.intervention):
                logits = one.finished(base(**one.arguments))["logits"]
        else:
            with self._acting(arguments):
                logits = base(**arguments, return_dict=True)["logits"]
        return labelled_logits(logits, labels, labelled.shift)

    def _acting(self, arguments: Mapping[str, Any], *more: Intervention) -> AbstractContextManager[None]:
        return intervening(more) if self._bank is None else self._after_context(arguments, *more)

    def _together(self, texts: Sequence[torch.Tensor], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
        """Context and rows as texts, and the mask of them."""
        own = self.context_ids.to(texts[0])
        rows = [torch.cat([own, text]) for text in texts]
        padding = self.model.base.config.get_text_config(decoder=True).pad_token_id
        padding = padding if isinstance(padding, int) and padding >= 0 else 0
        ids = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side=side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
        return ids, mask

    def _require_room(self, tokens: int) -> None:
        """Check that rows of this length have positions behind the context.

        Raises:
            PrefixInputError: They do not.
        """
        length = len(self.context_ids)
        if self._limit is not None and length + tokens > self._limit:
            raise PrefixInputError(
                f"A context of {length} tokens and a row of {tokens} need {length + tokens} positions, but the base "
                f"model has {self._limit}. Shorten the context, or the rows to {self._limit - length} tokens."
            )


def context_ids(
    context: str | Sequence[int] | torch.Tensor, tokenizer: PreTrainedTokenizerBase | None = None
) -> torch.Tensor:
    """The tokens of a context, `(tokens,)`.

    Args:
        context: A text, or token ids.
        tokenizer: Reads the text.

    Raises:
        PrefixConfigError: There is a text and no tokenizer.
        PrefixInputError: There are no tokens, or it is something else.
    """
    if isinstance(context, str):
        if tokenizer is None:
            raise PrefixConfigError("The context is a text: pass the tokenizer that reads it, or token ids.")
        context = _without_end(tokenizer, context)
    try:
        ids = torch.as_tensor(context)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PrefixInputError(f"The context must be a text or token ids, not {context!r:.100}.") from error
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise PrefixInputError(
            f"The context must be one row of at least one token id, not {ids.dtype} of shape {tuple(ids.shape)}."
        )
    return ids.detach().to("cpu", torch.long)


def hash_of_context(ids: torch.Tensor) -> str:
    """A sha256 over token ids, in hexadecimal."""
    return hashlib.sha256(ids.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's tokens with the special tokens before it, and without those behind it."""
    whole = list(tokenizer(text)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[: start + len(plain)]
    return whole


def _reads_together(model: PrefixModel) -> bool:
    """Whether keys and values of the context alone are not what context and row as one text would give."""
    injection = model._injection
    decoder, config = injection.decoder, injection.decoder.text_config
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *rope.values()] if isinstance(rope, dict) else []
    by_length = any(isinstance(one, dict) and one.get("rope_type") in ("dynamic", "longrope") for one in kinds)
    in_chunks = getattr(config, "attention_chunk_size", None) is not None
    # Flash attention takes windows as numbers, in which no prefix can stand.
    in_flash = decoder.has_windows and str(config._attn_implementation).startswith("flash")
    has_buffers = bool(injection.local_windows.modules)
    return (
        injection.structure.encoder is not None
        or any(decoder.recurrent)
        or by_length
        or in_chunks
        or in_flash
        or has_buffers
    )


def _position_limit(model: PrefixModel) -> int | None:
    """How many tokens what reads the context can read; `None` for any number."""
    encoder = model._injection.structure.encoder
    if encoder is None:
        return model._injection.decoder.position_limit
    config: Any = getattr(encoder, "config", model.base.config)
    for name in ("max_encoder_position_embeddings", "max_source_positions", "max_position_embeddings"):
        limit = getattr(config, name, None)
        if isinstance(limit, int):
            return limit
    return None


def _require_new_tokens_only(options: Mapping[str, Any]) -> None:
    """Check options of a generation whose texts begin with the context.

    Raises:
        PrefixInputError: Lengths would count the context, or the result would be more than tokens.
    """
    counted = [name for name in ("max_length", "min_length") if options.get(name) is not None]
    if counted or options.get("max_new_tokens") is None or options.get("return_dict_in_generate"):
        raise PrefixInputError(
            "This base reads the context anew with each prompt: give max_new_tokens, not max_length or min_length, and "
            "leave out return_dict_in_generate."
        )
