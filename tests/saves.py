"""Run by `test_atomic.py`: processes that save prefixes to one place, some of which are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from families import FAMILIES
from helpers import random_model

from peft_prefix import PrefixModel

KILLS = 200
WRITERS = 3
SAVES = 25


def make(number: int) -> PrefixModel:
    """A prefix that is told apart by its numbers, large enough for a write to take a while."""
    model = random_model(FAMILIES["llama"].build(), p=50)
    for parameter in model.prefixes.parameters():
        torch.nn.init.constant_(parameter, float(number))
    return model


def fork(work: object) -> int:
    """A child process that does some work and ends."""
    child = os.fork()
    if child == 0:
        try:
            work()  # type: ignore[operator]
        finally:
            os._exit(0)
    return child


def number_in(folder: Path, reader: PrefixModel) -> float:
    """Which prefix is there; it must be a whole one."""
    reader.load_prefix(folder, "found")
    tensors = reader.prefix_state_dict("found")
    reader.remove_prefix("found")
    numbers = {number for tensor in tensors.values() for number in tensor.unique().tolist()}
    assert len(numbers) == 1, numbers
    return numbers.pop()


def killed(folder: Path) -> dict[str, object]:
    """Kill processes that save two prefixes in turn, and load after each."""
    reader, models, choose = make(2), [make(0), make(1)], random.Random(0)

    def save_for_ever() -> None:
        turn = 0
        while True:
            models[turn % 2].save_pretrained(folder)
            turn += 1

    models[0].save_pretrained(folder)
    begin = time.perf_counter()
    models[0].save_pretrained(folder)
    duration = time.perf_counter() - begin
    found, with_rest = [], 0
    for _ in range(KILLS):
        before = set(folder.glob(".*"))
        child = fork(save_for_ever)
        time.sleep(choose.uniform(0, 4 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with_rest += set(folder.glob(".*")) != before
        found.append(number_in(folder, reader))
    return {"found": found, "with_rest": with_rest, "rests": len(list(folder.glob(".*")))}


def together(folder: Path) -> dict[str, object]:
    """Several processes save to one folder while another one loads."""
    reader, models = make(WRITERS), [make(number) for number in range(WRITERS)]
    models[0].save_pretrained(folder)

    def save_often(model: PrefixModel) -> None:
        for _ in range(SAVES):
            model.save_pretrained(folder)

    children = {fork(lambda model=model: save_often(model)) for model in models}
    found = set()
    while children:
        found.add(number_in(folder, reader))
        done, state = os.waitpid(-1, os.WNOHANG)
        assert state == 0
        children.discard(done)
    return {"found": sorted(found), "last": number_in(folder, reader)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"killed": killed, "together": together}[sys.argv[1]](Path(sys.argv[2]))))
