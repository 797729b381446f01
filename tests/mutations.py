"""Run by `test_hostile_files.py`: thousands of damaged and forged files, and what loading each of them does.

A file that is damaged must be refused or load as if it were not. One that is forged, with every checksum made to match,
must be refused or load as the prefix that it describes. Nothing may crash, hang or take much memory.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from helpers import prefix_metadata, random_model
from safetensors.torch import load, load_file, save

from peft_prefix import PrefixError, PrefixWarning

MUTATIONS = 2000
KINDS = ("prefix", "config", "peft")
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 10**4000, 0.5, -0.0, 1e308,
    "", "x", "x" * 100_000, "../../etc/passwd", "/dev/zero", "C:\\x", "a\0b", "\ud800", "\x1b[2J", "a\u3000b", "null",
    "mlp", "text", "encoder", "plain", "F16", "I64", "LORA", "PREFIX_TUNING", "CARTRIDGE", "SEQ_2_SEQ_LM", "CAUSAL_LM",
    [], [[]], ["decoder"], ["decoder", "cross"], ["model"], ["lm_head"], ["lm_head"] * 100_000, ["..", "."],
    ["\x1b[2J"], ["\ud800"], [1] * 9, [2**40, 2**40], [0, 2**62], {}, {"a": {}}, {"__import__": "os"},
)  # fmt: skip
"""What somebody might write where something else belongs."""

Bytes = bytes | bytearray
Mutation = Callable[[random.Random, bytes], bytes]


def truncated(choose: random.Random, content: bytes) -> bytes:
    return content[: choose.randrange(len(content))]


def flipped(choose: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(choose.choice((1, 1, 1, 2, 10, 100))):
        changed[_place(choose, content)] ^= 1 << choose.randrange(8)
    return bytes(changed)


def overwritten(choose: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    begin = _place(choose, content)
    length = min(choose.choice((1, 4, 8, 100, 5000)), len(content) - begin)
    changed[begin : begin + length] = choose.choice((bytes(length), b"\xff" * length, choose.randbytes(length)))
    return bytes(changed)


def moved(choose: random.Random, content: bytes) -> bytes:
    begin, end, other = (choose.randrange(len(content)) for _ in range(3))
    begin, end = sorted((begin, end))
    part = content[begin:end]
    rest = content[:begin] + (content[end:] if choose.random() < 0.5 else content[begin:])
    return rest[:other] + part + rest[other:]


def lengthened(choose: random.Random, content: bytes) -> bytes:
    return content + choose.randbytes(choose.choice((1, 8, 10_000)))


def with_another_length(choose: random.Random, content: bytes) -> bytes:
    length = choose.choice((0, 1, len(content) - 8, len(content), 2**31, 2**62, 2**64 - 1, choose.randrange(2**20)))
    return length.to_bytes(8, "little") + content[8:]


def garbage(choose: random.Random, content: bytes) -> bytes:
    return choose.choice((b"", b"{}", b"[" * 200_000, b"PK\3\4" + content, b"\x80\4." + content, choose.randbytes(500)))


def with_another_header(choose: random.Random, content: bytes) -> bytes:
    """A header with lies in it."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = choose.choice(list(header))
    action = choose.randrange(7)
    if action == 0:
        del header[name]
    elif action == 1:
        header[choose.choice(("../x", "decoder.layers.9.key", "", "a\0b", "x" * 50_000))] = header[name]
    elif action == 2:
        header[name] = choose.choice(VALUES)
    elif action == 3 and name != "__metadata__":
        header[name][choose.choice(("dtype", "shape", "data_offsets", "more"))] = choose.choice(VALUES)
    elif action == 4 and name != "__metadata__":
        other = choose.choice([one for one in header if one != "__metadata__"])
        header[name]["data_offsets"], header[other]["data_offsets"] = (
            header[other]["data_offsets"],
            header[name]["data_offsets"],
        )
    elif action == 5 and name != "__metadata__":
        header[name]["shape"] = [choose.choice((0, 1, 2**20, 2**40)) for _ in range(choose.randrange(5))]
    else:
        header["__metadata__"] = {str(number): "x" * 100 for number in range(choose.choice((1, 1000, 100_000)))}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def forged(choose: random.Random, content: bytes) -> bytes:
    """A prefix's file that says of itself what cannot be, or holds it, with all checksums made to match."""
    tensors, description = load(content), _description(content)
    action = choose.randrange(5)
    if action <= 2:
        description[choose.choice([*description, "more"])] = choose.choice(VALUES)
    elif action == 3:
        tensor = tensors[choose.choice(list(tensors))]
        tensor.view(-1)[choose.randrange(tensor.numel())] = choose.choice((float("nan"), float("inf"), -float("inf")))
    else:
        name = choose.choice(list(tensors))
        tensors[name] = choose.choice(
            (tensors[name].half(), tensors[name].double(), tensors[name].int(), torch.ones(3))
        )
    if action >= 3:
        description["sha256"] = _identity(tensors)
    return save(tensors, metadata=prefix_metadata(json.dumps(description)))


def with_another_value(choose: random.Random, content: bytes) -> bytes:
    """A JSON file with another value somewhere."""
    fields = json.loads(content)
    name = choose.choice([*fields, "more"])
    if choose.random() < 0.1:
        fields.pop(name, None)
    else:
        fields[name] = choose.choice(VALUES)
    return json.dumps(fields).encode()


ON_TENSORS: tuple[Mutation, ...] = (
    truncated, flipped, flipped, overwritten, moved, lengthened, with_another_length, garbage, with_another_header,
    with_another_header,
)  # fmt: skip
ON_TEXTS: tuple[Mutation, ...] = (
    truncated, flipped, overwritten, moved, lengthened, garbage, with_another_value, with_another_value,
)  # fmt: skip


class Fuzz:
    """Damaged copies of good folders, and what comes of loading them.

    Args:
        folder: For everything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = random_model(FAMILIES["llama"].build(), reparameterization="mlp", mlp_hidden_size=16)
        self.model.base.config.name_or_path = "someone/base"
        self.model.save_pretrained(folder / "prefix")
        self.model.save_as_peft(folder / "peft")
        self.good = {kind: self.load(folder / kind, False) for kind in ("prefix", "peft")}
        self.outcomes: dict[str, int] = {}

    def load(self, folder: Path, is_trainable: bool) -> dict[str, Any]:
        self.model.load_prefix(folder, "loaded", is_trainable=is_trainable)
        config = self.model.prefixes.entry("loaded").config
        found = {**self.model.prefix_state_dict("loaded"), "config": config.to_dict()}
        self.model.remove_prefix("loaded")
        return found

    def one(self, seed: int) -> str | None:
        """What is wrong with how one damaged folder is loaded, if anything."""
        choose = random.Random(seed)
        kind = KINDS[seed % len(KINDS)]
        source = self.folder / ("peft" if kind == "peft" else "prefix")
        files = {file.name: file.read_bytes() for file in source.iterdir()}
        if kind == "prefix":
            name, mutations = "prefix.safetensors", (*ON_TENSORS, forged, forged)
        elif kind == "config":
            name, mutations = "prefix_config.json", ON_TEXTS
        else:
            name = choose.choice(("adapter_config.json", "adapter_model.safetensors"))
            mutations = ON_TEXTS if name.endswith("json") else ON_TENSORS
        mutation = choose.choice(mutations)
        files[name] = mutation(choose, files[name])
        damaged = self.folder / "damaged"
        damaged.mkdir(exist_ok=True)
        for file in damaged.iterdir():
            file.unlink()
        for file_name, content in files.items():
            (damaged / file_name).write_bytes(content)
        label = f"{kind} {mutation.__name__}"
        loaded = self._attempt(label, damaged, is_trainable=bool(choose.randrange(2)))
        if loaded is None or isinstance(loaded, str):
            return loaded
        return self._difference(label, kind, loaded, damaged, is_forged=mutation is forged)

    def every_value(self) -> list[str]:
        """What is wrong with how files are loaded that say something impossible, each field and value in turn."""
        content = (self.folder / "prefix" / "prefix.safetensors").read_bytes()
        description, tensors = _description(content), load(content)
        damaged = self.folder / "forged"
        damaged.mkdir()
        problems = []
        for name in [*description, "more"]:
            for value in VALUES:
                text = json.dumps({**description, name: value})
                (damaged / "prefix.safetensors").write_bytes(save(tensors, metadata=prefix_metadata(text)))
                label = f"{name}={str(value)[:50]!r}"
                loaded = self._attempt(label, damaged, is_trainable=True)
                if isinstance(loaded, str):
                    problems.append(loaded)
                elif loaded is not None:
                    problem = self._difference(label, "prefix", loaded, damaged, is_forged=True)
                    problems += [problem] if problem else []
        return problems

    def _attempt(self, label: str, folder: Path, is_trainable: bool) -> dict[str, Any] | str | None:
        """What loading gives; nothing if it is refused, or what is wrong with how it fails."""
        try:
            loaded = self.load(folder, is_trainable)
        except PrefixError as error:
            text = str(error).replace("\n", " ")
            if not text or len(text) > 2_000 or not text.isprintable():
                return f"{label}: message {text[:300]!r} of {len(text)} characters"
            self._count(f"{label}: refused")
            return None
        except BaseException:  # noqa: BLE001 - whatever it is, it is a finding
            return f"{label}: {traceback.format_exc(limit=-3)}"
        self._count(f"{label}: loaded")
        return loaded

    def _difference(self, label: str, kind: str, loaded: dict[str, Any], damaged: Path, is_forged: bool) -> str | None:
        good = dict(self.good["peft" if kind == "peft" else "prefix"])
        if kind == "peft":  # PEFT's files have no checksum: they load as what they hold
            good.update(_peft_tensors(damaged / "adapter_model.safetensors", self.good["peft"]))
            for known in (good, loaded):
                known["config"] = {**known["config"], "base_model_name_or_path": None, "base_model_revision": None}
        if is_forged:
            good["config"] = loaded["config"]
        if good.keys() != loaded.keys():
            return f"{label}: other tensors"
        for name, value in good.items():
            same = torch.equal(value, loaded[name]) if isinstance(value, torch.Tensor) else value == loaded[name]
            if not same:
                return f"{label}: {name} is another one: {loaded[name]}"[:500]
        return None

    def _count(self, label: str) -> None:
        self.outcomes[label] = self.outcomes.get(label, 0) + 1


def _description(content: bytes) -> dict[str, Any]:
    """The description inside a prefix's file."""
    length = int.from_bytes(content[:8], "little")
    found: dict[str, Any] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["peft_prefix"])
    return found


def _place(choose: random.Random, content: bytes) -> int:
    """A place in a file; often in its first part, where the header is."""
    return choose.randrange(min(len(content), 2000) if choose.random() < 0.6 else len(content))


def _identity(tensors: dict[str, torch.Tensor]) -> str:
    """The hash of a prefix's numbers, written down once more from its definition."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _peft_tensors(file: Path, like: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Keys and values of a PEFT file, by its layout: tokens × (layers × (key, value)) × heads × width."""
    rows = load_file(file)["prompt_embeddings"]
    names = [f"decoder.layers.{layer}.{role}" for layer in range(100) for role in ("key", "value")]
    names = [name for name in names if name in like]
    heads, _, width = like[names[0]].shape
    parts = rows.view(len(rows), len(names), heads, width)
    return {name: parts[:, index].transpose(0, 1).to(like[name].dtype) for index, name in enumerate(names)}


def main(folder: Path, begin: int, end: int) -> dict[str, Any]:
    warnings.simplefilter("ignore", PrefixWarning)
    fuzz = Fuzz(folder)
    for seed in range(20):  # whatever is imported or allocated once
        fuzz.one(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest, failures = 0.0, fuzz.every_value() if begin == 0 else []
    for seed in range(begin, end):
        start = time.perf_counter()
        problem = fuzz.one(seed)
        slowest = max(slowest, time.perf_counter() - start)
        if problem is not None:
            failures.append(f"{seed}: {problem}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"failures": failures, "grown": grown, "slowest": slowest, "outcomes": fuzz.outcomes}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
