from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from helpers import random_model, tokens
from hub_server import HubServer
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from peft_prefix import PrefixConfig, PrefixConfigError, PrefixFileError, PrefixModel, get_prefix_model
from peft_prefix.base_loading import NamedBase, auto_class

OTHER_CLASS = """
from transformers import LlamaConfig, LlamaForCausalLM

open({mark!r}, "w").close()

class OtherConfig(LlamaConfig):
    model_type = "other"

class OtherForCausalLM(LlamaForCausalLM):
    config_class = OtherConfig
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def published(hub: HubServer, base: PreTrainedModel, folder: Path, name: str = "ada/base") -> PreTrainedModel:
    """The base as somebody who loaded it from the Hub has it."""
    base.save_pretrained(folder / "base")
    commit = hub.put(name, files_of(folder / "base"))
    base.config.name_or_path, base.config._commit_hash = name, commit
    return base.eval()


def with_prefix(hub: HubServer, base: PreTrainedModel, folder: Path, **options: Any) -> PrefixModel:
    model = random_model(base, **options).eval()
    model.save_pretrained(folder / "prefix")
    hub.put("ada/prefix", files_of(folder / "prefix"))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_a_prefix_brings_its_base_at_its_revision(family: str, hub: HubServer, tmp_path: Path) -> None:
    base = published(hub, FAMILIES[family].build(), tmp_path)
    model = with_prefix(hub, base, tmp_path)
    FAMILIES[family].build(seed=1).save_pretrained(tmp_path / "later")
    hub.put("ada/base", files_of(tmp_path / "later"))
    for name in ("ada/prefix", tmp_path / "prefix"):
        loaded = PrefixModel.from_pretrained(name, attn_implementation="eager")
        assert type(loaded.base) is type(base)
        assert not loaded.training
        inputs = {"input_ids": tokens(2, 6)}
        if base.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens(2, 4)
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_classifier_comes_with_its_head_and_labels(hub: HubServer, tmp_path: Path) -> None:
    published(hub, FAMILIES["llama"].build(), tmp_path)
    labels = {0: "bad", 1: "so so", 2: "good"}
    base = LlamaForSequenceClassification.from_pretrained("ada/base", num_labels=3, id2label=labels)
    model = get_prefix_model(base.eval(), PrefixConfig(num_virtual_tokens=4))
    model.eval().save_pretrained(tmp_path / "prefix")
    loaded = PrefixModel.from_pretrained(tmp_path / "prefix")
    assert loaded.config.id2label == labels
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens(2, 6)).logits, model(input_ids=tokens(2, 6)).logits)


def test_options_go_to_the_base(hub: HubServer, tmp_path: Path) -> None:
    with_prefix(hub, published(hub, FAMILIES["llama"].build(), tmp_path), tmp_path)
    loaded = PrefixModel.from_pretrained("ada/prefix", dtype=torch.bfloat16, is_trainable=True, name="mine")
    assert loaded.base.dtype == torch.bfloat16
    assert loaded.active_prefix == "mine"
    with pytest.raises(PrefixFileError, match="no_such_option"):
        PrefixModel.from_pretrained("ada/prefix", no_such_option=True)
    with pytest.raises(PrefixConfigError, match="config, output_loading_info cannot be given"):
        PrefixModel.from_pretrained("ada/prefix", config=None, output_loading_info=True)


def test_private_bases_are_loaded_with_the_token(hub: HubServer, tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.save_pretrained(tmp_path / "base")
    hub.put("ada/base", files_of(tmp_path / "base"), private=True)
    base.config.name_or_path = "ada/base"
    with_prefix(hub, base, tmp_path)
    with pytest.raises(PrefixFileError, match="could not be loaded"):
        PrefixModel.from_pretrained("ada/prefix")
    PrefixModel.from_pretrained("ada/prefix", token=hub.add_user("ada"))


def test_what_was_loaded_before_needs_no_connection(hub: HubServer, tmp_path: Path) -> None:
    with_prefix(hub, published(hub, FAMILIES["llama"].build(), tmp_path), tmp_path)
    PrefixModel.from_pretrained("ada/prefix")
    hub.stop()
    PrefixModel.from_pretrained("ada/prefix", local_files_only=True)


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    with pytest.raises(PrefixConfigError, match=r"'gpt2' is a name\. Load the model first"):
        PrefixModel.from_pretrained("gpt2", tmp_path)
    with pytest.raises(PrefixConfigError, match="dtype would be for loading a base model, but one is given"):
        PrefixModel.from_pretrained(base, tmp_path, dtype=torch.float32)
    with pytest.raises(PrefixConfigError, match="trust_remote_code would be for"):
        PrefixModel.from_pretrained(base, tmp_path, trust_remote_code=True)
    with pytest.raises(PrefixConfigError, match="Give the folder or the repository of the prefix"):
        PrefixModel.from_pretrained(base)


def test_a_prefix_without_a_base_says_so(tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.config.name_or_path = ""
    random_model(base).save_pretrained(tmp_path)
    with pytest.raises(PrefixFileError, match=r"names no base model. Load it yourself"):
        PrefixModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["/etc", "../base", "~/base", "C:\\base", "http://127.0.0.1/x", "a/b/c", "\\\\host\\base"]
)
def test_a_prefix_from_the_hub_names_no_folder_here(name: str, hub: HubServer, tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.config.name_or_path = name
    with_prefix(hub, base, tmp_path)
    with pytest.raises(PrefixFileError, match=r"is from the Hub and names a base model .* that is not"):
        PrefixModel.from_pretrained("ada/prefix")
    assert hub.downloads == ["ada/prefix/prefix.safetensors"]


def test_a_folder_here_may_name_another_one(tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.save_pretrained(tmp_path / "base")
    base.config.name_or_path = str(tmp_path / "base")
    random_model(base).save_pretrained(tmp_path / "prefix")
    PrefixModel.from_pretrained(tmp_path / "prefix")


def test_code_runs_only_if_the_user_says_so(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    mark = tmp_path / "the code has run"
    base = FAMILIES["llama"].build()
    base.save_pretrained(tmp_path / "base")
    files = files_of(tmp_path / "base")
    config = json.loads(files["config.json"]) | {
        "model_type": "other",
        "architectures": ["OtherForCausalLM"],
        "auto_map": {"AutoConfig": "other.OtherConfig", "AutoModelForCausalLM": "other.OtherForCausalLM"},
    }
    code = OTHER_CLASS.format(mark=str(mark)).encode()
    hub.put("ada/base", {**files, "config.json": json.dumps(config).encode(), "other.py": code})
    remote = AutoModelForCausalLM.from_pretrained("ada/base", trust_remote_code=True)
    mark.unlink()
    model = with_prefix(hub, remote, tmp_path)
    for name in ("ada/prefix", tmp_path / "prefix"):
        with pytest.raises(PrefixFileError, match="trust_remote_code"):
            PrefixModel.from_pretrained(name)
        assert not mark.exists()
    loaded = PrefixModel.from_pretrained("ada/prefix", trust_remote_code=True)
    assert type(loaded.base).__name__ == "OtherForCausalLM"
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens(2, 6)).logits, model(input_ids=tokens(2, 6)).logits)


def test_pickles_of_a_base_are_not_opened(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask a service on the Hub for it
    base = published(hub, FAMILIES["llama"].build(), tmp_path)
    files = files_of(tmp_path / "base")
    torch.save(base.state_dict(), tmp_path / "weights")
    hub.put("ada/old", {"config.json": files["config.json"], "pytorch_model.bin": (tmp_path / "weights").read_bytes()})
    base.config.name_or_path, base.config._commit_hash = "ada/old", None
    with_prefix(hub, base, tmp_path)
    with pytest.raises(PrefixFileError, match=r"model\.safetensors.*Load it yourself"):
        PrefixModel.from_pretrained("ada/prefix")
    assert "ada/old/pytorch_model.bin" not in hub.downloads


def test_adapters_of_peft_name_their_base_too(hub: HubServer, tmp_path: Path) -> None:
    base = published(hub, FAMILIES["llama"].build(), tmp_path)
    model = random_model(base).eval()
    model.save_as_peft(tmp_path / "peft")
    hub.put("ada/adapter", files_of(tmp_path / "peft"))
    loaded = PrefixModel.from_pretrained("ada/adapter", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens(2, 6)).logits, model(input_ids=tokens(2, 6)).logits)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_class_of_every_family_is_found(family: str) -> None:
    config = getattr(transformers, FAMILIES[family].config)(**deepcopy(FAMILIES[family].kwargs))
    named = NamedBase("someone/base", None, FAMILIES[family].model, None, None, Path("prefix"), is_from_hub=True)
    mapping: Any = auto_class(named, config)._model_mapping
    found = mapping[type(config)]
    assert FAMILIES[family].model in [one.__name__ for one in (found if isinstance(found, (list, tuple)) else [found])]


def test_a_folder_here_does_not_stand_for_a_base_of_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_prefix(hub, published(hub, FAMILIES["llama"].build(), tmp_path), tmp_path)
    monkeypatch.chdir(tmp_path)
    FAMILIES["llama"].build(seed=1).save_pretrained("ada/base")
    with pytest.raises(PrefixFileError, match="there is a folder of that name here"):
        PrefixModel.from_pretrained("ada/prefix")


def test_labels_that_cannot_be_written_down_and_kinds_of_labels(hub: HubServer, tmp_path: Path) -> None:
    published(hub, FAMILIES["llama"].build(), tmp_path)
    labels = {0: "a", 1: "", 2: "so\u3000so", 3: "x\ny"}
    kind = "multi_label_classification"
    base = LlamaForSequenceClassification.from_pretrained("ada/base", num_labels=4, id2label=labels, problem_type=kind)
    get_prefix_model(base, PrefixConfig(num_virtual_tokens=4)).save_pretrained(tmp_path / "prefix")
    loaded = PrefixModel.from_pretrained(tmp_path / "prefix")
    assert loaded.config.id2label == {0: "a", 1: "LABEL_1", 2: "so\u3000so", 3: "LABEL_3"}
    assert loaded.config.problem_type == kind


@pytest.mark.parametrize("base", [None, 5, b"user/repo", ["user/repo"]])
def test_what_is_no_name_and_no_model_is_refused(base: Any, tmp_path: Path) -> None:
    with pytest.raises(PrefixConfigError, match="Give a model and the name of a prefix"):
        PrefixModel.from_pretrained(base, tmp_path)
    with pytest.raises(PrefixConfigError, match="A prefix is named by a text such as"):
        PrefixModel.from_pretrained(FAMILIES["llama"].build(), base or 0)
