"""Reading a safetensors file that may come from a stranger.

What a file says about itself is checked before anything of its size is allocated: the header's length, that it is plain
JSON, that every tensor has a known dtype and a shape of as many bytes as it takes, and that the tensors fill the file.
The caller compares names, shapes and dtypes with what it needs, and only then asks for the numbers. All is read through
one open file, so a prefix that is saved anew meanwhile is seen as it was, and not half of each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from . import strict_json
from .errors import PrefixFileError
from .plain_file import opened_file

MAX_HEADER_BYTES = 2 * 2**20
"""Larger than any prefix needs, and small enough to be parsed without harm."""
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those that a prefix may have, by their names in a header."""


class TensorFile:
    """An open safetensors file whose header has been checked.

    Args:
        path: What to call it in errors.
        stream: The open file.

    Attributes:
        metadata: The header's texts by name.
        shapes: Shape of each tensor by name.
        dtypes: Dtype of each tensor by name.

    Raises:
        PrefixFileError: The header is damaged, too long, or describes what is not in the file.
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self._stream = stream
        self._size = os.fstat(stream.fileno()).st_size
        header, data_bytes = self._header()
        self.metadata = self._texts(header.pop(_METADATA, {}))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        spans = [self._tensor(name, entry) for name, entry in header.items()]
        end = 0
        for begin, following in sorted(spans):
            if begin != end:
                raise self._damaged("its tensors overlap or leave gaps")
            end = following
        if end != data_bytes:
            raise self._damaged(f"its tensors take {end} bytes, and it holds {data_bytes}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """All numbers, on the CPU. Compare `shapes` and `dtypes` with what is needed before.

        Raises:
            PrefixFileError: The file cannot be read.
        """
        try:
            self._stream.seek(0)
            return load(self._stream.read(self._size))
        except (OSError, SafetensorError, ValueError) as error:
            raise self._damaged(str(error)) from error

    def _header(self) -> tuple[dict[str, Any], int]:
        """The header as JSON and the number of bytes behind it."""
        length = int.from_bytes(self._stream.read(_LENGTH_BYTES), "little")
        if self._size < _LENGTH_BYTES or length > self._size - _LENGTH_BYTES:
            raise self._damaged("it is shorter than it says")
        if length > MAX_HEADER_BYTES:
            raise self._damaged(f"its header takes {length} bytes, where a prefix needs less than {MAX_HEADER_BYTES}")
        try:
            header = strict_json.parse(self._stream.read(length).decode())
        except ValueError as error:
            raise self._damaged(f"its header is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        return header, self._size - _LENGTH_BYTES - length

    def _texts(self, metadata: object) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise self._damaged("its metadata are not texts")
        return metadata

    def _tensor(self, name: str, entry: object) -> tuple[int, int]:
        """Where the bytes of a tensor begin and end."""
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"its entry {name[:80]!r} describes no tensor")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise self._damaged(f"its tensor {name[:80]!r} has dtype {str(dtype)[:20]!r}, and a prefix has {known}")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise self._damaged(f"its tensor {name[:80]!r} has no shape or place")
        begin, end = offsets
        if math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
            raise self._damaged(f"its tensor {name[:80]!r} takes another number of bytes than its shape")
        self.shapes[name] = tuple(shape)
        self.dtypes[name] = _DTYPES[dtype]
        return begin, end

    def _damaged(self, reason: str) -> PrefixFileError:
        return PrefixFileError(f"{self.path} is damaged or no safetensors file ({reason}). Save or download it again.")


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file and check its header.

    Args:
        path: A file.

    Raises:
        PrefixFileError: It is missing, cannot be read, or is damaged.
    """
    with opened_file(path) as stream:
        yield TensorFile(path, stream)


def _are_sizes(value: object) -> bool:
    """Whether it is a list of a few numbers that a shape may have."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(number) is int and 0 <= number < 2**48 for number in value)
    )
