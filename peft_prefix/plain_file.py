"""Files and folders whose names may come from a stranger: nothing that makes one wait, or that cannot be."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import PrefixFileError


@contextmanager
def opened_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading.

    Raises:
        PrefixFileError: It is missing, cannot be read, or is a folder, a device or a pipe.
    """
    try:
        # A pipe would wait for a writer, were it opened as a file.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        stream = os.fdopen(os.open(path, flags), "rb")
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise PrefixFileError(f"{path} cannot be read ({error}). Save or download it again.") from error
    with stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise PrefixFileError(f"{path} is not a file. Give the folder that save_pretrained wrote.")
        yield stream


def folder_here(name: str | Path) -> Path | None:
    """The folder on this machine that has a name, if there is one."""
    try:
        return Path(name) if Path(name).is_dir() else None
    except (OSError, ValueError, TypeError):  # too long a name, one with a null character, or none at all
        return None
