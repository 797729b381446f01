"""The processes that do a run together, and other calls, which must not do it at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout


class BusyError(RuntimeError):
    """Another call works on the same run."""


def processes() -> PartialState:
    """All processes and which of them this is, also on a machine without accelerators, where that must be told."""
    return PartialState(cpu=not torch.accelerator.is_available())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other calls away from a folder, until the block ends or the process dies.

    Raises:
        BusyError: Another call is there.
    """
    lock = FileLock(folder / ".lock", blocking=False)
    is_free = [True]  # a list, to be broadcast: all processes go on, or none
    if processes().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            is_free = [False]
    broadcast_object_list(is_free)
    if not is_free[0]:
        raise BusyError("Another call works on it. Call again when that has ended, to see that all is done.")
    try:
        yield
    finally:
        lock.release()
