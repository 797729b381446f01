"""Writing files so that a crash leaves the old ones or the new ones, and two processes do not mix theirs."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import PrefixFileError, some_of

if sys.platform != "win32":  # where no folder can be locked; a rename is atomic there, too
    import fcntl

_ASIDE = ".aside"
"""What the names of files end with while they are being written."""
_PATIENCE = 10.0
"""Seconds to wait for another process that is writing to the same folder."""
_ABANDONED = 600.0
"""Seconds after which nobody goes on writing a file aside."""


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files aside, flush them to disk, then rename them over those that are there.

    A process that dies in between, whatever kills it, leaves each file as it was or as it is to be; what it wrote
    aside is cleared away by a later one. Of two that write to the same folder at the same time, one waits for the
    other.

    Args:
        directory: Folder; made if it is missing.
        files: Contents by name, in the order in which they are renamed.

    Raises:
        PrefixFileError: They cannot be written. What was there stays.
    """
    try:
        with alone_in(directory):
            _clear(directory, files)
            written: list[Path] = []
            try:
                for name, content in files.items():
                    written.append(_write_aside(directory / name, content))
                for aside, name in zip(written, files, strict=True):
                    aside.replace(directory / name)
            finally:
                for aside in written:
                    aside.unlink(missing_ok=True)
            _flush(directory)
    except FileExistsError as error:
        raise PrefixFileError(f"{directory} is a file; give the folder in which to save.") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise PrefixFileError(
            f"{some_of(files)} cannot be written to {directory} ({error}). What was there is as it was. Give a folder "
            "that can be written to and has room."
        ) from error


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keep other processes and threads from writing to a folder with these functions, where the system can.

    The lock is on the folder itself, so nothing is left behind, and the system frees it when the process dies. It is
    not waited for without end: each file by itself is whole without it, too. Inside of it, it may be asked for again.

    Args:
        directory: Folder; made if it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    place = directory.resolve()
    if sys.platform == "win32" or place in _held.folders:
        yield
        return
    folder = os.open(directory, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        _held.folders.add(place)
        yield
    finally:
        _held.folders.discard(place)
        os.close(folder)


class _Held(threading.local):
    """The folders in which this thread is alone."""

    def __init__(self) -> None:
        self.folders: set[Path] = set()


_held = _Held()


def _write_aside(file: Path, content: bytes) -> Path:
    aside = file.with_name(f".{file.name}.{secrets.token_hex(8)}{_ASIDE}")
    # As readable as any other new file, or as the one that it replaces.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    handle = os.open(aside, flags, 0o666)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if file.is_file():
            aside.chmod(stat.S_IMODE(file.stat().st_mode))
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside


def _clear(directory: Path, names: Mapping[str, bytes]) -> None:
    """Remove what processes that died have left aside."""
    for name in names:
        for aside in directory.glob(f".{name}.*{_ASIDE}"):
            with contextlib.suppress(FileNotFoundError):  # another one has been quicker
                if time.time() - aside.stat().st_mtime > _ABANDONED:
                    aside.unlink()


def _flush(directory: Path) -> None:
    """Flush the names in a folder to disk, where the system can."""
    with contextlib.suppress(OSError):
        folder = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
