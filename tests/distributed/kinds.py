"""One training step of every kind of family in two processes; how far gradients are from those of one process.

Run by torchrun as `kinds.py FILE`; writes `{family: {way: largest relative difference, or the error}}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import ENCODER_DECODERS, KINDS
from helpers import random_model, source_of, tokens

from peft_prefix import PrefixModel

Gradients = dict[str, torch.Tensor]


def model_and_batch(family: str) -> tuple[PrefixModel, dict[str, Any]]:
    """The same in every process."""
    model = random_model(KINDS[family].build()).train()
    ids = tokens(4, 12)
    if family in ENCODER_DECODERS:
        return model, {**source_of(model.base, 4), "labels": ids}
    return model, {"input_ids": ids, "labels": ids}


def gradients(model: PrefixModel, run: nn.Module, batch: dict[str, Any]) -> Gradients:
    """The prefix's gradients of one pass, put together."""
    run(**batch).loss.backward()
    found = {}
    for name, parameter in model.prefixes.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    return found


def in_one_process(family: str, batch: dict[str, Any]) -> Gradients:
    model, whole = model_and_batch(family)
    return gradients(model, model, whole)


def with_ddp(family: str, batch: dict[str, Any]) -> Gradients:
    model, _ = model_and_batch(family)
    return gradients(model, DistributedDataParallel(model), batch)


def with_fsdp(family: str, batch: dict[str, Any]) -> Gradients:
    model, _ = model_and_batch(family)
    kinds = set(model.base._no_split_modules or ())
    layers = [module for module in model.base.modules() if type(module).__name__ in kinds]
    assert layers
    for layer in layers:
        fully_shard(layer)
    return gradients(model, fully_shard(model), batch)


def main(file: str) -> None:
    distributed.init_process_group("gloo")
    rank, results = distributed.get_rank(), {}
    for family in KINDS:
        _, batch = model_and_batch(family)
        part = {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}
        expected = in_one_process(family, batch)
        results[family] = {
            way: _difference(run(family, part), expected) for way, run in (("DDP", with_ddp), ("FSDP2", with_fsdp))
        }
    if rank == 0:
        Path(file).write_text(json.dumps(results))
    distributed.destroy_process_group()


def _difference(actual: Gradients, expected: Gradients) -> float:
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - one).abs().max() / one.abs().max()) for name, one in expected.items())


if __name__ == "__main__":
    main(sys.argv[1])
