from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_prefix import PrefixFileError
from peft_prefix.tensor_file import MAX_HEADER_BYTES, opened

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(5, dtype=torch.bfloat16)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "good", metadata={"format": "pt", "name": "ö"})
    return tmp_path / "good"


def rewrite(file: Path, change: Callable[[dict[str, object]], object], behind: bytes | None = None) -> None:
    """Change the header of a file, and the bytes behind it if they are given."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + (content[8 + length :] if behind is None else behind))


def test_a_good_file_is_read(file: Path) -> None:
    with opened(file) as content:
        assert content.metadata == {"format": "pt", "name": "ö"}
        assert content.shapes == {"a": (5,), "b": (2, 3)}
        assert content.dtypes == {"a": torch.bfloat16, "b": torch.float32}
        tensors = content.tensors()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_a_file_that_is_replaced_meanwhile_is_seen_as_it_was(file: Path, tmp_path: Path) -> None:
    with opened(file) as content:
        save_file({"c": torch.zeros(1000)}, tmp_path / "other")
        (tmp_path / "other").replace(file)
        assert content.shapes.keys() == content.tensors().keys() == {"a", "b"}


def set_entry(**fields: object) -> Callable[[dict[str, object]], None]:
    return lambda header: header["b"].update(fields)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: "[" * 100_000, "no JSON"),
        (lambda h: "{" * 100_000, "no JSON"),
        (lambda h: "[]", "no JSON object"),
        (lambda h: "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "no JSON"),
        (lambda h: '{"a": 1, "a": 1}', "twice"),
        (lambda h: "9" * 5000, "no JSON"),
        (lambda h: h.update(__metadata__={"format": 1}), "not texts"),
        (lambda h: h.update(__metadata__=[]), "not texts"),
        (lambda h: h.update(b=None), "describes no tensor"),
        (set_entry(more=1), "describes no tensor"),
        (set_entry(dtype="I64"), "has dtype 'I64'"),
        (set_entry(dtype=["F32"]), "has dtype"),
        (set_entry(dtype="F16"), "another number of bytes"),
        (set_entry(shape=[2, 4]), "another number of bytes"),
        (set_entry(shape=[2**40, 2**40]), "another number of bytes"),
        (set_entry(shape=[-2, -3]), "no shape or place"),
        (set_entry(shape=[2.0, 3.0]), "no shape or place"),
        (set_entry(shape=[True, 6]), "no shape or place"),
        (set_entry(shape=[1] * 9), "no shape or place"),
        (set_entry(shape="23"), "no shape or place"),
        (set_entry(data_offsets=[0]), "no shape or place"),
        (set_entry(data_offsets=[2**60, 2**60 + 24]), "no shape or place"),
        (set_entry(data_offsets=[100, 124]), "overlap or leave gaps"),
        (lambda h: h.pop("b"), "take 34 bytes|overlap or leave gaps|take 10 bytes"),
        (lambda h: h.clear(), "take 0 bytes"),
    ],
)
def test_a_header_that_lies_is_refused(file: Path, change: Callable[[dict[str, object]], object], message: str) -> None:
    rewrite(file, change)
    with pytest.raises(PrefixFileError, match=message), opened(file):
        pass


def test_a_header_that_is_too_long_is_not_read(file: Path) -> None:
    rewrite(file, lambda header: '{"__metadata__": {}}'.ljust(MAX_HEADER_BYTES), behind=b"")
    with opened(file) as content:
        assert content.shapes == {}
    rewrite(file, lambda header: '{"__metadata__": {}}'.ljust(MAX_HEADER_BYTES + 1), behind=b"")
    with pytest.raises(PrefixFileError, match="its header takes"), opened(file):
        pass
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(PrefixFileError, match="shorter than it says"), opened(file):
        pass


@pytest.mark.parametrize("keep", [0, 3, 8, 50, -1])
def test_a_truncated_file_is_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(PrefixFileError, match="damaged or no safetensors file"), opened(file):
        pass


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / "null\0"):
        with pytest.raises(PrefixFileError), opened(path):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes in folders")
def test_a_pipe_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PrefixFileError, match="is not a file"), opened(tmp_path / "pipe"):
        pass
