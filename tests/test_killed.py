"""A run that is killed while it saves can go on from its last finished checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_distributed import launch, train
from transformers.trainer_utils import get_last_checkpoint

from peft_prefix import PrefixModel, last_checkpoint


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    arguments = dict(max_steps=train.KILLED_STEPS, save_strategy="steps", save_steps=1)

    def make() -> PrefixModel:
        return train.make(dropout=0.1, reparameterization="mlp")

    whole = make()
    train.train(whole, tmp_path / "whole", **arguments)
    found = launch("killed", tmp_path / "runs")
    half_written = 0
    for run, state in found["states"].items():
        folder = tmp_path / "runs" / run
        assert state == 9 or run.startswith("time"), run  # killed, unless it was done by then
        checkpoint = last_checkpoint(folder)
        assert checkpoint is not None
        newest = get_last_checkpoint(str(folder))
        half_written += newest != checkpoint
        # Whatever was written of a prefix is whole: that of the killed save, too.
        for file in folder.glob("checkpoint-*/prefix.safetensors"):
            loaded = PrefixModel.from_pretrained(make().base, file.parent)
            reference = PrefixModel.from_pretrained(make().base, tmp_path / "whole" / file.parent.name)
            for name, tensor in reference.prefix_state_dict().items():
                assert torch.equal(loaded.prefix_state_dict()[name], tensor), (run, file, name)
        resumed = make()
        train.train(resumed, folder, resume=Path(checkpoint), **arguments)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), (run, name)
        assert last_checkpoint(folder) == str(folder / f"checkpoint-{train.KILLED_STEPS}")
    assert half_written >= train.FILE_OPERATIONS  # the test has tried what it is about


def test_the_last_checkpoint_is_the_last_finished_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nothing") is None
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10, 12, 14):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
