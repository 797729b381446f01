"""Training in two processes on the CPU (DDP, FSDP2, ZeRO-3) equals training in one with the same batches."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import tokens
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from peft_prefix import PrefixConfig, PrefixModel, PrefixWarning, get_prefix_model

SCRIPTS = Path(__file__).parent / "distributed"
CONFIGS = Path(__file__).parents[1] / "examples" / "accelerate"
sys.path.insert(0, str(SCRIPTS))
ACCELERATE = ("accelerate.commands.launch", "--config_file")
import train  # noqa: E402  # the script that the processes run

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]


def launch(job: str, folder: Path, *launcher: str, **environment: str) -> dict[str, Any]:
    """Let other processes do a job, and return what they found.

    Args:
        job: Name of a function of `train.py`.
        folder: Where it writes.
        launcher: Module and options that start it in two processes.
        environment: Variables for it.
    """
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    starting = []
    if launcher:
        option = "--main_process_port" if launcher[0].startswith("accelerate") else "--master_port"
        starting = ["-m", *launcher, option, port]
    result = subprocess.run(
        [sys.executable, *starting, str(SCRIPTS / "train.py"), job, str(folder)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def assert_same_prefix(folder: Path, expected: Path) -> None:
    """Saved prefixes agree up to rounding."""
    files = sorted((expected / "final").rglob("prefix.safetensors"))
    assert files
    for file in files:
        actual, reference = load_file(folder / file.relative_to(expected)), load_file(file)
        assert actual.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(
                actual[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
            )


def assert_runs_equal_one_process(found: dict[str, list[float]], folder: Path, reference: Path) -> None:
    assert found
    for name, losses in found.items():
        make, arguments = train.RUNS[name]
        _, expected = train.train(make(), reference / name, **arguments)
        assert losses == pytest.approx(expected, rel=1e-5), name
        assert len(set(losses)) == len(losses)
        assert_same_prefix(folder / name, reference / name)


def assert_file_holds_what_was_in_memory(saved: Path, base: PreTrainedModel, found: dict[str, Any]) -> PrefixModel:
    """A saved prefix gives in one process what several computed with it."""
    loaded = PrefixModel.from_pretrained(base, saved)
    for name, tensor in loaded.prefix_state_dict().items():
        torch.testing.assert_close(tensor, torch.tensor(found["prefix in memory"][name]), rtol=0, atol=0)
    ids = tokens(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, torch.tensor(found["logits"]), rtol=0, atol=1e-5)
    assert loaded.generate(input_ids=ids, max_new_tokens=5, do_sample=False).tolist() == found["texts"]
    return loaded


def test_ddp(tmp_path: Path) -> None:
    folder, reference = tmp_path / "two", tmp_path / "one"
    found = launch("ddp", folder, *ACCELERATE, str(CONFIGS / "ddp.yaml"), ACCELERATE_USE_CPU="true")
    assert_runs_equal_one_process(found["losses"], folder, reference)

    assert len(found["whole"]) == train.STEPS
    if train.RESUMES:
        assert found["resumed"] == found["whole"]
        whole, resumed = (load_file(folder / run / "final" / "prefix.safetensors") for run in ("whole", "resumed"))
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

    assert found["bank"] == pytest.approx(found["losses"]["direct"], rel=1e-5)
    assert found["idle is unchanged"]
    assert "requires_grad_(False)" in found["refusal"]
    assert found["frozen"] == pytest.approx(found["bank"], rel=1e-5)
    assert_same_prefix(folder / "frozen", folder / "bank")


def test_fsdp(tmp_path: Path) -> None:
    folder, reference = tmp_path / "two", tmp_path / "one"
    found = launch("fsdp", folder, *ACCELERATE, str(CONFIGS / "fsdp2.yaml"), ACCELERATE_USE_CPU="true")
    assert found["types"] == ["DTensor"]  # all parameters are in shards
    assert_runs_equal_one_process(found["losses"], folder, reference)

    assert "every process needs a row of each prefix" in found["mixed"]

    # Saving puts the prefix together and nothing else.
    model = train.make(reparameterization="mlp")
    trained = sum(p.numel() for p in model.prefixes.parameters())
    assert 0 < found["gathered numbers"] <= trained + sum(b.numel() for b in model.prefixes.buffers())
    assert found["gathered numbers"] < 0.1 * model.base.num_parameters()
    for checkpoint in folder.glob("FULL_STATE_DICT/whole/*/checkpoint-*"):
        files = {file.name for file in checkpoint.iterdir()}
        assert {"prefix.safetensors", "model.safetensors", "optimizer.bin", "scheduler.pt"} <= files
        assert not any(name.startswith("base.") for name in load_file(checkpoint / "model.safetensors"))
        state = torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)
        assert set(state) == set(load_file(checkpoint / "model.safetensors"))
    sharded = next(folder.glob("SHARDED_STATE_DICT/whole/none/checkpoint-2"))
    size = sum(file.stat().st_size for file in sharded.glob("pytorch_model_fsdp_0/*"))
    assert 0 < size < 4 * model.base.num_parameters() / 4
    assert not list(sharded.glob("prefix*"))  # as docs/distributed.md says

    assert found["uploads"] == [2, 0]
    assert "in every process" in found["refusals"][0]
    assert "only a part of the prefix" in found["refusals"][1]
    assert not (folder / "saved" / "refused").exists()

    # What the processes had in memory, and what the file gives in one.
    for saved in ("final", "again", "by all"):
        base = FAMILIES["gpt2"].build()
        loaded = assert_file_holds_what_was_in_memory(folder / "saved" / saved, base, found)
    ids = tokens(2, 7)
    assert loaded.generate(input_ids=ids, max_new_tokens=5, num_beams=3, do_sample=False).tolist() == found["beams"]
    metadata = json.loads((folder / "saved" / "final" / "prefix_config.json").read_text())
    loaded.save_pretrained(folder / "fingerprint")
    again = json.loads((folder / "fingerprint" / "prefix_config.json").read_text())
    assert metadata["base_model_class"] == again["base_model_class"] == "GPT2LMHeadModel"
    assert metadata["weights_fingerprint"] == again["weights_fingerprint"] is not None

    # Older versions do not restore the optimizer from sharded states.
    for kind in ("FULL_STATE_DICT", *(["SHARDED_STATE_DICT"] if train.RESUMES else [])):
        for form in ("none", "mlp"):
            assert found[f"{kind} {form} resumed"] == found[f"{kind} {form} whole"]
            assert found[f"{kind} {form} same"]

    assert found["bank"] == pytest.approx(found["losses"]["direct"], rel=1e-5)
    assert found["loop"] == pytest.approx(train.loop(reference / "loop"), rel=1e-5)
    assert_same_prefix(folder / "loop", reference / "loop")

    assert found["read by main only"]
    for form in ("none", "mlp"):
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, reparameterization=form, mlp_hidden_size=16))
        _, expected = train.train(model, reference / "efficient" / form)
        assert found[f"efficient {form}"] == pytest.approx(expected, rel=1e-5)
        assert_same_prefix(folder / "efficient" / form, reference / "efficient" / form)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_adapter_beside_a_prefix(kind: str, tmp_path: Path) -> None:
    config = str(CONFIGS / f"{kind}.yaml")
    found = launch("adapter", tmp_path / "two", *ACCELERATE, config, ACCELERATE_USE_CPU="true")
    with pytest.warns(PrefixWarning, match="adapter of the base has been trained and is not saved here"):
        expected = train.adapter(tmp_path / "one")
    for run in ("losses", "checkpointed"):
        assert found[run] == pytest.approx(expected[run], rel=1e-5)
    assert found["adapter"].keys() == expected["adapter"].keys() != set()
    for name, numbers in expected["adapter"].items():
        actual = torch.tensor(found["adapter"][name])
        torch.testing.assert_close(actual, torch.tensor(numbers), rtol=1e-3, atol=2e-4)
    assert_same_prefix(tmp_path / "two" / "plain", tmp_path / "one" / "plain")
    if train.RESUMES:
        assert found["resumed"] == found["whole"]
        assert found["same"]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero3(tmp_path: Path) -> None:
    folder, reference = tmp_path / "two", tmp_path / "one"
    found = launch("zero3", folder, "torch.distributed.run", "--nproc_per_node", "2", DS_ACCELERATOR="cpu")
    assert_runs_equal_one_process(found["losses"], folder, reference)
    for name in found["losses"]:
        assert found[f"parts {name}"] == [1]  # between two passes no process has any parameter
    assert len(found["whole"]) == train.STEPS
    assert found["resumed"] == found["whole"]
    checkpoint = folder / "whole" / "checkpoint-2"
    assert {"prefix.safetensors", "model.safetensors", "scheduler.pt"} <= {file.name for file in checkpoint.iterdir()}
    assert all(name.startswith("prefixes.") for name in load_file(checkpoint / "model.safetensors"))
    PrefixModel.from_pretrained(FAMILIES["gpt2"].build(), checkpoint)

    assert found["read in parts"]
    for form in ("none", "mlp"):
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, reparameterization=form, mlp_hidden_size=16))
        _, expected = train.train(model, reference / "loaded" / form)
        assert found[f"loaded {form}"] == pytest.approx(expected, rel=1e-5)
        assert_same_prefix(folder / "loaded" / form, reference / "loaded" / form)
    for saved in ("by all", "loaded/mlp/final"):
        assert_file_holds_what_was_in_memory(folder / saved, LlamaForCausalLM.from_pretrained(folder / "base"), found)
    classifier = LlamaForSequenceClassification.from_pretrained(folder / "classifier")
    model = get_prefix_model(classifier, PrefixConfig(num_virtual_tokens=4))
    _, expected = train.train(model, reference / "loaded" / "head")
    assert found["loaded head"] == pytest.approx(expected, rel=1e-5)
    assert_same_prefix(folder / "loaded" / "head", reference / "loaded" / "head")
