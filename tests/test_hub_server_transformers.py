"""The small Hub of the tests, used by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, tokens
from hub_server import HubServer
from huggingface_hub import HfApi
from safetensors.torch import save
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments


def assert_same(first: PreTrainedModel, second: PreTrainedModel) -> None:
    ids = tokens(2, 5)
    with torch.no_grad():
        assert_close(first.eval()(ids).logits, second.eval()(ids).logits)


def test_a_base_and_its_tokenizer_are_pushed_and_loaded(hub: HubServer, ada: str) -> None:
    base = FAMILIES["llama"].build()
    base.push_to_hub("ada/base")
    tiny_tokenizer().push_to_hub("ada/base")
    base.push_to_hub("ada/base", revision="small", private=True)
    assert {"config.json", "model.safetensors", "README.md", "chat_template.jinja"} <= hub.paths("ada/base")
    assert_same(base, AutoModelForCausalLM.from_pretrained("ada/base"))
    assert_same(base, AutoModelForCausalLM.from_pretrained("ada/base", revision="small"))
    assert AutoTokenizer.from_pretrained("ada/base").chat_template == tiny_tokenizer().chat_template
    downloads = hub.downloads.count("ada/base/model.safetensors")
    hub.stop()
    assert_same(base, AutoModelForCausalLM.from_pretrained("ada/base"))
    assert len(AutoTokenizer.from_pretrained("ada/base")) == len(tiny_tokenizer())
    assert downloads == 1, "both revisions have the same weights"


def test_a_private_base_needs_a_token(hub: HubServer, tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    hub.put("ada/base", {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}, private=True)
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained("ada/base")
    AutoModelForCausalLM.from_pretrained("ada/base", token=hub.add_user("ada"))


def test_the_header_of_a_safetensors_file_is_read_alone(hub: HubServer) -> None:
    hub.put("ada/base", {"model.safetensors": save({"weight": torch.zeros(100_000)})})
    metadata = HfApi().get_safetensors_metadata("ada/base")
    assert metadata.parameter_count == {"F32": 100_000}
    assert hub.requests[-1].range == "bytes=0-100000"


def test_a_stock_trainer_pushes(hub: HubServer, ada: str, tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 6)]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "trained"),
        push_to_hub=True,
        hub_strategy="every_save",
        max_steps=2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(base, settings, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    assert {"README.md", "model.safetensors", "config.json", "training_args.bin"} <= hub.paths("ada/trained")
    titles = [commit.title for commit in hub.repositories["ada/trained"].history("main")]
    assert titles[0] == "End of training"
    assert_same(base, AutoModelForCausalLM.from_pretrained("ada/trained"))
