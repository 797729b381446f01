from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import saves
from families import FAMILIES
from helpers import random_model

from peft_prefix.atomic import write_files

needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def run(what: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, saves.__file__, what, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@needs_fork
def test_whatever_moment_a_process_is_killed_at_there_is_a_whole_prefix(tmp_path: Path) -> None:
    found = run("killed", tmp_path)
    assert len(found["found"]) == saves.KILLS
    assert set(found["found"]) == {0.0, 1.0}
    assert found["with_rest"] >= saves.KILLS / 10  # many were killed in the middle
    assert found["rests"] > 0
    for file in tmp_path.glob(".*"):
        os.utime(file, (0, 0))
    random_model(FAMILIES["llama"].build()).save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".*"))  # what they left is cleared away later


@needs_fork
def test_processes_that_save_to_one_place_do_not_mix_their_files(tmp_path: Path) -> None:
    found = run("together", tmp_path)
    assert len(found["found"]) > 1
    description = json.loads((tmp_path / "prefix_config.json").read_text())
    last = saves.make(int(found["last"]))
    last.save_pretrained(tmp_path / "last")
    assert json.loads((tmp_path / "last" / "prefix_config.json").read_text()) == description
    assert not list(tmp_path.glob(".*"))


def test_files_are_written_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "new", {"a": b"1", "b": b"2"})
    calls = []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_files(tmp_path / "new", {"a": b"3", "b": b"4"})
    assert {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()} == {"a": b"1", "b": b"2"}


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".a.x.aside").write_bytes(b"")
    (tmp_path / ".other.x.aside").write_bytes(b"")
    os.utime(tmp_path / ".other.x.aside", (0, 0))
    write_files(tmp_path, {"a": b"1"})
    assert {file.name for file in tmp_path.iterdir()} == {"a", ".a.x.aside", ".other.x.aside"}


@needs_fork
def test_a_lock_that_is_never_freed_does_not_stop_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("peft_prefix.atomic._PATIENCE", 0.2)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    begin = time.monotonic()
    write_files(tmp_path, {"a": b"1"})
    assert 0.2 <= time.monotonic() - begin < 5
    assert (tmp_path / "a").read_bytes() == b"1"
    os.close(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="has no permissions of this kind")
def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_files(tmp_path, {"a": b"1"})
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
