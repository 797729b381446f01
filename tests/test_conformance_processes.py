"""Gradients in two processes, over families that differ in kind, against those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import KINDS
from filelock import FileLock

SCRIPT = Path(__file__).parent / "distributed" / "kinds.py"
Results = dict[str, dict[str, float]]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What two processes found; they are started once, whichever worker of pytest asks first."""
    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "kinds.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            result = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, file],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")]),
                },
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert result.returncode == 0, result.stderr[-6000:]
    found: Results = json.loads(file.read_text())
    return found


@pytest.mark.ways("DDP")
@pytest.mark.parametrize("family", KINDS)
def test_ddp_averages_to_the_gradients_of_one_process(family: str, differences: Results) -> None:
    assert differences[family]["DDP"] < 1e-5


@pytest.mark.ways("FSDP2")
@pytest.mark.parametrize("family", KINDS)
def test_fsdp_gathers_to_the_gradients_of_one_process(family: str, differences: Results) -> None:
    assert differences[family]["FSDP2"] < 1e-5
