"""What a teacher says about the rows of a data set, on disk.

A store is a folder of safetensors files, each with the targets of some rows, and `teacher.json`, which names them and
is written last. A row is found by a hash of its real tokens and labels, so no column has to say which row it is. In
memory there is that index alone; targets are read when a batch asks for them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import strict_json
from .atomic import write_files
from .errors import IncompatibleBaseError, PrefixConfigError, PrefixFileError, PrefixInputError, name_of, plain
from .fingerprint import difference, weights_fingerprint
from .labelled_batch import LabelledBatch
from .plain_file import opened_file
from .teacher_targets import TeacherTargets
from .version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .context_teacher import ContextTeacher

STORE_FILE = "teacher.json"
_FORMAT = 1
_SHARD_BYTES = 64 * 2**20
"""Targets of about this size go into one file, and are in memory while it is written."""
_LARGEST_DESCRIPTION = 8 * 2**20
_KEY_BYTES = 16
_NAMES = {"keys": "U8", "ends": "I64", "log_probs": "F16", "ids": "I32"}
"""The tensors of a shard and their dtypes."""


class _Place(NamedTuple):
    """Where a row's targets are: the shard, and the first position and the one behind the last."""

    shard: int
    start: int
    end: int


class StoredTeacher:
    """A teacher whose targets were written by `ContextTeacher.store`.

    Args:
        folder: Where they are.
        context: The context that they should be about, to be sure: a text or token ids. Not compared if left out.
        tokenizer: Reads the text.

    Attributes:
        folder: As given.
        top_k: How many tokens are classes of their own; `None` for all.
        base_fingerprint: A sample of the weights of the base that was the teacher, if they could be read.
        base_name: Its name.
        context_hash: A sha256 over the context's tokens.
        context_tokens: How many there are.

    Raises:
        PrefixFileError: There is no store, it was not finished, or it is damaged.
        PrefixInputError: It is about another context.
    """

    def __init__(self, folder: str | Path, context: Any = None, tokenizer: Any = None) -> None:
        self.folder = Path(folder)
        facts = self._described()
        self.top_k: int | None = facts["top_k"]
        self.base_fingerprint: str | None = facts["base_fingerprint"]
        self.base_name: str = facts["base"]
        self.context_hash: str = facts["context_sha256"]
        self.context_tokens: int = facts["context_tokens"]
        self._vocabulary: int = facts["vocabulary_size"]
        self._is_encoder_decoder: bool = facts["is_encoder_decoder"]
        self._shards: list[str] = facts["shards"]
        if context is not None:
            self._require_context(context, tokenizer)
        self._places: dict[bytes, _Place] = {}
        for number in range(len(self._shards)):
            self._places |= self._index(number)

    def __len__(self) -> int:
        """Number of different rows."""
        return len(self._places)

    def __repr__(self) -> str:
        return f"StoredTeacher({str(self.folder)!r}, {len(self)} rows, a context of {self.context_tokens} tokens)"

    def require_base(self, base: PreTrainedModel) -> None:
        """Check that a base is the one that was the teacher, as far as that can be told.

        Raises:
            IncompatibleBaseError: It is another one.
        """
        config = base.config
        other = difference(self.base_fingerprint, weights_fingerprint(base))
        if bool(config.is_encoder_decoder) is not self._is_encoder_decoder:
            other = "is of another kind"
        if other is not None:
            raise IncompatibleBaseError(
                f"The targets in {self.folder} were made with {plain(self.base_name)}, but {name_of(base)} {other}. "
                "Train with the base that made them, or store the targets of this one: ContextTeacher(...).store(...)."
            )

    def targets(self, batch: Mapping[str, Any]) -> TeacherTargets:
        """What the teacher said at labelled positions, row after row, as `ContextTeacher.targets`.

        Raises:
            PrefixInputError: A row is not in the store.
            PrefixFileError: A file is gone or damaged.
        """
        labelled = LabelledBatch.of(batch, self._is_encoder_decoder)
        keys = labelled.keys()
        places = []
        for row, (key, count) in enumerate(zip(keys, labelled.counts.tolist(), strict=True)):
            place = self._places.get(key)
            if place is None:
                raise PrefixInputError(
                    f"Row {row} of this batch is not in {self.folder}: its tokens and labels are none of those that "
                    f"{len(self)} rows were stored with. Store the targets of all rows, also those for evaluation, "
                    "with the tokenizer, the truncation and the labels that the training has."
                )
            if place.end - place.start != count:
                raise self._damaged(self._shards[place.shard], "a row has another number of targets than labels")
            places.append(place)
        parts: list[tuple[torch.Tensor, ...]] = [() for _ in places]
        for shard in sorted({place.shard for place in places}):
            with self._opened(shard) as file:
                for row, place in enumerate(places):
                    if place.shard == shard:
                        parts[row] = self._read(file, shard, place)
        device = labelled.labels.device
        log_probs, *ids = (torch.cat(columns).to(device) for columns in zip(*parts, strict=True))
        # Rounding has moved the sum of the probabilities.
        return TeacherTargets(log_probs.float().log_softmax(dim=-1), ids[0].long() if ids else None)

    def _read(self, file: Any, shard: int, place: _Place) -> tuple[torch.Tensor, ...]:
        names = ["log_probs"] if self.top_k is None else ["log_probs", "ids"]
        parts = tuple(file.get_slice(name)[place.start : place.end] for name in names)
        if bool(parts[0].isnan().any()) or bool((parts[0] > 0.01).any()):
            raise self._damaged(self._shards[shard], "it has log-probabilities that are none")
        if (
            len(parts) > 1
            and parts[1].numel()
            and not 0 <= int(parts[1].min()) <= int(parts[1].max()) < self._vocabulary
        ):
            raise self._damaged(self._shards[shard], "it has tokens that are none")
        return parts

    def _described(self) -> dict[str, Any]:
        """What the store says about itself.

        Raises:
            PrefixFileError: It is not there, or not as it must be.
        """
        path = self.folder / STORE_FILE
        if not path.is_file():
            raise PrefixFileError(
                f"{self.folder} holds no finished store of a teacher's targets ({STORE_FILE} is missing, which is "
                "written last). Write it with ContextTeacher(...).store(rows, folder, collator)."
            )
        with opened_file(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            text = stream.read(size) if size <= _LARGEST_DESCRIPTION else b""
        try:
            facts = strict_json.parse(text)
        except ValueError as error:
            raise self._damaged(STORE_FILE, str(error)) from error
        if not isinstance(facts, dict) or any(not check(facts.get(name)) for name, check in _FACTS.items()):
            raise self._damaged(STORE_FILE, "it does not say what a store says")
        if facts["format"] != _FORMAT:
            raise PrefixFileError(
                f"{path} has format {facts['format']}, and this version of peft_prefix reads {_FORMAT}. Store the "
                "targets anew, or use the version that wrote them."
            )
        return facts

    def _require_context(self, context: Any, tokenizer: Any) -> None:
        from .context_teacher import context_ids, hash_of_context

        ids = context_ids(context, tokenizer)
        if hash_of_context(ids) != self.context_hash:
            raise PrefixInputError(
                f"The targets in {self.folder} are about another context, of {self.context_tokens} tokens, than this "
                f"one of {len(ids)}. Store the targets of this one: ContextTeacher(...).store(...)."
            )

    def _index(self, number: int) -> dict[bytes, _Place]:
        """The places of a shard's rows, after checking its shapes."""
        name = self._shards[number]
        with self._opened(number) as file:
            wanted = {one: kind for one, kind in _NAMES.items() if one != "ids" or self.top_k is not None}
            shapes: dict[str, list[int]] = {}
            if set(file.keys()) != set(wanted):
                raise self._damaged(name, "it has other tensors")
            for one, kind in wanted.items():
                part = file.get_slice(one)
                shapes[one] = part.get_shape()
                if part.get_dtype() != kind:
                    raise self._damaged(name, f"{one} has another dtype")
            rows, positions = shapes["ends"][:1], shapes["log_probs"][:1]
            classes = self._vocabulary if self.top_k is None else self.top_k + 1
            expected = {"keys": [*rows, _KEY_BYTES], "ends": rows, "log_probs": [*positions, classes]}
            expected |= {} if self.top_k is None else {"ids": [*positions, self.top_k]}
            if shapes != expected:
                raise self._damaged(name, "its tensors have other shapes")
            keys, ends = file.get_tensor("keys").numpy(), file.get_tensor("ends").tolist()
        starts = [0, *ends[:-1]]
        if ends[-1:] != positions or any(start > end for start, end in zip(starts, ends, strict=True)):
            raise self._damaged(name, "its rows do not fill it")
        return {key.tobytes(): _Place(number, start, end) for key, start, end in zip(keys, starts, ends, strict=True)}

    @contextmanager
    def _opened(self, number: int) -> Iterator[Any]:
        name = self._shards[number]
        path = self.folder / name
        if not path.is_file():
            raise PrefixFileError(f"{path} is missing, which {STORE_FILE} names. Store the targets anew.")
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise error if isinstance(error, PrefixFileError) else self._damaged(name, str(error)) from error

    def _damaged(self, name: str, reason: str) -> PrefixFileError:
        return PrefixFileError(f"{self.folder / name} is damaged ({reason[:200]}). Store the targets anew.")


def write_store(
    teacher: ContextTeacher,
    rows: Iterable[Mapping[str, Any]],
    folder: Path,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int,
    *,
    overwrite: bool,
) -> StoredTeacher:
    """Write a teacher's targets about rows, as `ContextTeacher.store` says.

    Raises:
        PrefixFileError: There is a store already, or the folder cannot be written to.
        PrefixConfigError: `batch_size` is no number of rows.
        PrefixInputError: There are no rows.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise PrefixConfigError(f"batch_size must be a number of rows, at least 1, not {batch_size!r}.")
    if (folder / STORE_FILE).exists() and not overwrite:
        raise PrefixFileError(
            f"{folder} holds the targets of a teacher already. Read them with StoredTeacher({str(folder)!r}), write to "
            "another folder, or say overwrite=True."
        )
    mark, shards, known = secrets.token_hex(4), list[str](), set[bytes]()
    shard = _Shard()
    base, vocabulary, is_finished = teacher.model.base, 0, False
    is_encoder_decoder = bool(base.config.is_encoder_decoder)

    def flush() -> None:
        shards.append(f"targets-{mark}-{len(shards):05d}.safetensors")
        write_files(folder, {shards[-1]: shard.taken()})

    remaining = iter(rows)
    try:
        while some := list(islice(remaining, batch_size)):
            batch = collator(some)
            labelled = LabelledBatch.of(batch, is_encoder_decoder)
            targets = teacher.targets(batch)
            vocabulary = vocabulary or _vocabulary_size(base, targets)
            start = 0
            for key, count in zip(labelled.keys(), labelled.counts.tolist(), strict=True):
                if key not in known:
                    shard.add(key, targets, slice(start, start + count))
                    known.add(key)
                start += count
            if shard.bytes >= _SHARD_BYTES:
                flush()
        if shard.keys:
            flush()
        if not shards:
            raise PrefixInputError("There are no rows to store the targets of.")
        kept = None if targets.ids is None else targets.ids.shape[1]
        facts = {
            "format": _FORMAT,
            "peft_prefix": __version__,
            "base": name_of(base),
            "base_fingerprint": teacher.base_fingerprint,
            "context_sha256": teacher.context_hash,
            "context_tokens": len(teacher.context_ids),
            "top_k": kept,
            "vocabulary_size": vocabulary,
            "is_encoder_decoder": is_encoder_decoder,
            "rows": len(known),
            "shards": shards,
        }
        write_files(folder, {STORE_FILE: (json.dumps(facts, indent=2) + "\n").encode()})
        is_finished = True
    finally:
        _clear(folder, mark, keep=is_finished)
    return StoredTeacher(folder)


class _Shard:
    """Targets that wait to be written."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.bytes = 0
        self._log_probs: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []

    def add(self, key: bytes, targets: TeacherTargets, positions: slice) -> None:
        """A row's targets, which are some positions of a batch's."""
        self.keys.append(key)
        self._log_probs.append(targets.log_probs[positions].to("cpu", torch.float16, copy=True))
        self.bytes += self._log_probs[-1].nbytes
        if targets.ids is not None:
            self._ids.append(targets.ids[positions].to("cpu", torch.int32, copy=True))
            self.bytes += self._ids[-1].nbytes

    def taken(self) -> bytes:
        """All of it as a file; it begins anew."""
        lengths = torch.tensor([len(one) for one in self._log_probs])
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(self.keys)), dtype=torch.uint8).view(-1, _KEY_BYTES),
            "ends": lengths.cumsum(dim=0),
            "log_probs": torch.cat(self._log_probs),
        }
        if self._ids:
            tensors["ids"] = torch.cat(self._ids)
        self.__init__()  # type: ignore[misc]
        return save(tensors)


def _vocabulary_size(base: Any, targets: TeacherTargets) -> int:
    if targets.ids is None:
        return targets.log_probs.shape[1]
    return int(base.config.get_text_config(decoder=True).vocab_size)


def _clear(folder: Path, mark: str, keep: bool) -> None:
    """Remove the shards of a store that was not finished, or those of all others."""
    for file in folder.glob("targets-*.safetensors"):
        if file.name.startswith(f"targets-{mark}-") is not keep:
            with suppress(OSError):
                file.unlink()


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**48


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) < 2**20


_FACTS: dict[str, Callable[[Any], bool]] = {
    "format": _is_count,
    "base": _is_text,
    "base_fingerprint": lambda value: value is None or _is_text(value),
    "context_sha256": _is_text,
    "context_tokens": _is_count,
    "top_k": lambda value: value is None or _is_count(value),
    "vocabulary_size": _is_count,
    "is_encoder_decoder": lambda value: isinstance(value, bool),
    "shards": lambda value: (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(one, str) and re.fullmatch(r"targets-[0-9a-f]{8}-\d{5,9}\.safetensors", one) for one in value
        )
    ),
}
"""What the description must say."""
