"""Which of PEFT's files are refused, and which prefixes cannot be written as such. PEFT is not needed here."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import random_model, tokens
from peft_files import P
from safetensors.torch import load_file, save_file

from peft_prefix import (
    IncompatibleBaseError,
    PrefixConfig,
    PrefixConfigError,
    PrefixFileError,
    PrefixInputError,
    PrefixModel,
    get_prefix_model,
)
from peft_prefix.peft_config import MAX_BYTES, read_config
from peft_prefix.peft_format import CONFIG_FILE, TENSOR_FILE

ROW = 3 * 2 * 2 * 16
"""Numbers of a virtual token of the tiny Llama."""
OLD = {
    "base_model_name_or_path": "somebody/llama",
    "encoder_hidden_size": 32,
    "inference_mode": True,
    "num_attention_heads": 2,
    "num_layers": 3,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": P,
    "peft_type": "PREFIX_TUNING",
    "prefix_projection": False,
    "task_type": "CAUSAL_LM",
    "token_dim": 32,
}
"""What PEFT 0.3 wrote."""


def write(folder: Path, config: Any = OLD, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A folder with an adapter."""
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, (str, bytes)) else json.dumps(config)
    (folder / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    numbers = torch.randn(P, ROW, generator=torch.Generator().manual_seed(0))
    save_file({"prompt_embeddings": numbers} if tensors is None else tensors, folder / TENSOR_FILE)
    return folder


def llama(**changes: Any) -> Any:
    """A tiny Llama."""
    family = FAMILIES["llama"]
    return replace(family, kwargs={**family.kwargs, **changes}).build()


def test_a_file_of_an_old_version_is_read(tmp_path: Path) -> None:
    model = PrefixModel.from_pretrained(llama(), write(tmp_path))
    config = model.prefixes.entry().config
    assert config == PrefixConfig(
        num_virtual_tokens=P,
        init="normal",
        init_std=1.0,
        sites=("decoder",),
        modules_to_save=(),
        base_model_name_or_path="somebody/llama",
    )
    rows = load_file(tmp_path / TENSOR_FILE)["prompt_embeddings"]
    state = model.prefix_state_dict()
    assert torch.equal(state["decoder.layers.1.value"][1, 2], rows[2, 3 * 32 + 16 : 4 * 32])
    assert model(input_ids=tokens(1, 5)).logits.isfinite().all()


def test_what_is_missing_in_a_configuration_is_told_by_the_numbers(tmp_path: Path) -> None:
    known = ("peft_type", "num_virtual_tokens", "task_type")
    full = PrefixModel.from_pretrained(
        llama(), write(tmp_path / "full", {**OLD, "revision": "main", "unknown": {"to": ["us"]}})
    )
    assert full.prefixes.entry().config.base_model_revision == "main"
    short = PrefixModel.from_pretrained(llama(), write(tmp_path / "short", {key: OLD[key] for key in known}))
    for name, tensor in full.prefix_state_dict().items():
        assert torch.equal(short.prefix_state_dict()[name], tensor)


def test_zeros_at_the_start_are_remembered(tmp_path: Path) -> None:
    assert (
        PrefixModel.from_pretrained(llama(), write(tmp_path, {**OLD, "init_weights": "zero"}))
        .prefixes.entry()
        .config.init
        == "zeros"
    )


WRONG_FIELDS = [
    {"num_virtual_tokens": None},
    {"num_virtual_tokens": 0},
    {"num_virtual_tokens": -4},
    {"num_virtual_tokens": 4.0},
    {"num_virtual_tokens": "4"},
    {"num_virtual_tokens": True},
    {"num_virtual_tokens": 2**62},
    {"num_virtual_tokens": [4]},
    {"num_layers": "3"},
    {"num_layers": 0},
    {"token_dim": 32.5},
    {"num_attention_heads": -2},
    {"num_transformer_submodules": {}},
    {"task_type": 1},
    {"task_type": ["CAUSAL_LM"]},
    {"prefix_projection": "no"},
    {"modules_to_save": "score"},
    {"modules_to_save": ["score", 1]},
    {"modules_to_save": [""]},
    {"modules_to_save": ["a"] * 1001},
    {"base_model_name_or_path": 1},
    {"base_model_name_or_path": "\ud800"},
    {"revision": "a\nb"},
    {"init_weights": 0},
]


@pytest.mark.parametrize("fields", WRONG_FIELDS, ids=lambda fields: str(fields)[:60])
def test_a_field_that_cannot_be(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PrefixFileError, match=f"is damaged: {next(iter(fields))} "):
        PrefixModel.from_pretrained(llama(), write(tmp_path, {**OLD, **fields}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000, "no JSON"),
        ('{"a":' * 100_000, "no JSON"),
        ("", "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        ("[]", "no JSON object"),
        ("9" * 5000, "no JSON"),
        (" " * (MAX_BYTES + 1), "longer than"),
        ("{}", "without a peft_type"),
        ('{"peft_type": ["PREFIX_TUNING"]}', "without a peft_type"),
        ('{"peft_type": "LORA", "r": 8}', "kind 'LORA'.*PeftModel.from_pretrained.*base.load_adapter"),
        ('{"peft_type": "PROMPT_TUNING"}', "kind 'PROMPT_TUNING'"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_a_configuration_that_is_none(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(PrefixFileError, match=message):
        PrefixModel.from_pretrained(llama(), write(tmp_path, content))


def test_a_configuration_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("folder", "cannot be read|is not a file"), ("pipe", "is not a file"), ("no\0", "cannot")):
        with pytest.raises(PrefixFileError, match=message):
            read_config(tmp_path / name)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / TENSOR_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(PrefixFileError, match=r"is a pickle.*never opens one.*safe_serialization=True"):
        PrefixModel.from_pretrained(llama(), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(PrefixFileError, match="cannot be read"):
        PrefixModel.from_pretrained(llama(), tmp_path)


def one(tensor: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"prompt_embeddings": tensor, **more}


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (one(torch.zeros(P, ROW + 1)), IncompatibleBaseError, "does not fit"),
        (one(torch.zeros(P + 1, ROW)), IncompatibleBaseError, "does not fit"),
        (one(torch.zeros(P, 4 * 64)), IncompatibleBaseError, "decoder has 3 layers with 2 key/value heads of width 16"),
        (one(torch.zeros(P * ROW)), IncompatibleBaseError, "does not fit"),
        (one(torch.zeros(P, 0)), IncompatibleBaseError, "does not fit"),
        (one(torch.tensor(0.0)), IncompatibleBaseError, "does not fit"),
        (one(torch.full((P, ROW), torch.nan)), PrefixFileError, "NaN or infinity"),
        (one(torch.full((P, ROW), torch.inf)), PrefixFileError, "NaN or infinity"),
        (one(torch.zeros(P, ROW, dtype=torch.float64)), PrefixFileError, "dtype 'F64'"),
        (one(torch.zeros(P, ROW, dtype=torch.int32)), PrefixFileError, "dtype 'I32'"),
        (one(torch.zeros(P, ROW), more=torch.zeros(1)), IncompatibleBaseError, "brings 'more' along"),
        ({"base_model.model.norm.weight": torch.zeros(64)}, PrefixFileError, "has no prompt_embeddings"),
        ({}, PrefixFileError, "has no prompt_embeddings.*nothing"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit(
    tensors: dict[str, torch.Tensor], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        PrefixModel.from_pretrained(llama(), write(tmp_path, OLD, tensors))


@pytest.mark.parametrize("fields", [{"num_layers": 4}, {"token_dim": 64}, {"num_attention_heads": 4}], ids=str)
def test_a_configuration_of_another_base(fields: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(IncompatibleBaseError, match="somebody/llama and does not fit this LlamaForCausalLM"):
        PrefixModel.from_pretrained(llama(), write(tmp_path, {**OLD, **fields}))


def test_a_configuration_that_promises_much_costs_nothing(tmp_path: Path) -> None:
    promise = {"num_virtual_tokens": 2**31 - 1, "num_layers": 2**31 - 1}
    with pytest.raises(IncompatibleBaseError):  # and not that there is no memory for 2**62 numbers
        PrefixModel.from_pretrained(llama(), write(tmp_path, {**OLD, **promise}))


def test_the_wrong_kind_of_base(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleBaseError, match="is a decoder alone, and the adapter was made for something else"):
        PrefixModel.from_pretrained(llama(), write(tmp_path, {**OLD, "num_transformer_submodules": 2}))
    config = {key: value for key, value in OLD.items() if key != "num_transformer_submodules"}
    with pytest.raises(IncompatibleBaseError, match="is a decoder alone"):
        PrefixModel.from_pretrained(llama(), write(tmp_path, {**config, "task_type": "SEQ_2_SEQ_LM"}))
    with pytest.raises(IncompatibleBaseError, match="is an encoder-decoder language model"):
        PrefixModel.from_pretrained(FAMILIES["t5"].build(), write(tmp_path, config))


def test_modules_that_do_not_fit(tmp_path: Path) -> None:
    numbers = torch.zeros(P, ROW)
    lm_head = {"base_model.lm_head.weight": torch.zeros(200, 64)}
    with pytest.raises(IncompatibleBaseError, match="modules_to_save of its configuration names"):
        PrefixModel.from_pretrained(llama(), write(tmp_path, OLD, one(numbers, **lm_head)))
    with pytest.raises(IncompatibleBaseError, match=r"lm_head.weight has shape None in the file, \(200, 64\)"):
        PrefixModel.from_pretrained(llama(), write(tmp_path, {**OLD, "modules_to_save": ["lm_head"]}))
    wrong = {"base_model.lm_head.weight": torch.zeros(100, 64)}
    with pytest.raises(IncompatibleBaseError, match=r"has shape \(100, 64\) in the file"):
        PrefixModel.from_pretrained(
            llama(), write(tmp_path, {**OLD, "modules_to_save": ["lm_head"]}, one(numbers, **wrong))
        )
    with pytest.raises(IncompatibleBaseError, match="has shape None in the file"):
        PrefixModel.from_pretrained(llama(), write(tmp_path, {**OLD, "modules_to_save": ["model", "0", "s"]}))
    assert PrefixModel.from_pretrained(
        llama(), write(tmp_path, {**OLD, "modules_to_save": ["score"]})
    )  # PEFT passes over what is not there


def test_a_container_cannot_be_trained(tmp_path: Path) -> None:
    base = llama()
    layers = {f"base_model.model.layers.{name}": one for name, one in base.model.layers.state_dict().items()}
    write(tmp_path, {**OLD, "modules_to_save": ["layers"]}, one(torch.zeros(P, ROW), **layers))
    with pytest.raises(IncompatibleBaseError, match="is only a container"):
        PrefixModel.from_pretrained(base, tmp_path)


def test_two_weights_for_one(tmp_path: Path) -> None:
    names = ["lm_head", "embed_tokens"]
    weights = {f"base_model.{name}.weight": torch.randn(200, 64) for name in ("lm_head", "model.embed_tokens")}
    write(tmp_path, {**OLD, "modules_to_save": names}, one(torch.zeros(P, ROW), **weights))
    assert PrefixModel.from_pretrained(llama(), tmp_path).prefixes.entry().config.modules_to_save == (
        "model.embed_tokens",
        "lm_head",
    )
    with pytest.raises(IncompatibleBaseError, match=r"different weights for .* which are one"):
        PrefixModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    same = {name: weights["base_model.lm_head.weight"].clone() for name in weights}
    write(tmp_path, {**OLD, "modules_to_save": names}, one(torch.zeros(P, ROW), **same))
    model = PrefixModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    model.save_as_peft(tmp_path / "again")
    again = load_file(tmp_path / "again" / TENSOR_FILE)
    assert all(torch.equal(again[name], one) for name, one in same.items())


def decoder_only(family: str, **config: Any) -> PrefixModel:
    settings = dict(num_virtual_tokens=P, init="normal", sites=("decoder",))
    return get_prefix_model(FAMILIES[family].build(), PrefixConfig(**{**settings, **config}))


CANNOT = {
    "qwen3_next": "recurrent layers",
    "falcon_h1": "recurrent layers",
    "lfm2": "recurrent layers",
    "llama4_text": "attends in chunks",
    "gpt_neo": "sliding windows in buffers",
    "deepseek_v3": "differ in width",
    "prophetnet": "single tokens only",
    "mistral": r"stays visible in sliding windows.*sliding_window=\"plain\"",
    "t5gemma": "stays visible in sliding windows",
}


@pytest.mark.parametrize("family", list(CANNOT))
def test_what_peft_cannot_do_is_not_written(family: str, tmp_path: Path) -> None:
    with pytest.raises(PrefixConfigError, match=f"cannot be saved for PEFT.*{CANNOT[family]}.*own format"):
        decoder_only(family).save_as_peft(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("family", ["qwen3_next", "llama4_text", "gpt_neo", "deepseek_v3", "prophetnet"])
def test_and_not_read(family: str, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleBaseError, match=f"cannot be loaded onto.*{CANNOT[family]}"):
        PrefixModel.from_pretrained(FAMILIES[family].build(), write(tmp_path))


def test_other_sites_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(PrefixConfigError, match=r"acts at 'encoder', 'cross'.*sites=\[\"decoder\"\]"):
        random_model(FAMILIES["t5"].build()).save_as_peft(tmp_path)


def test_a_head_that_peft_has_no_task_for(tmp_path: Path) -> None:
    family = replace(FAMILIES["bart"], model="BartForSequenceClassification")
    model = get_prefix_model(family.build(), PrefixConfig(num_virtual_tokens=P, init="zeros", sites=["decoder"]))
    with pytest.raises(PrefixConfigError, match="no task for BartForSequenceClassification"):
        model.save_as_peft(tmp_path)


def test_layers_of_different_shapes(tmp_path: Path) -> None:
    family = FAMILIES["gemma4_text"]
    fewer = dict(num_global_key_value_heads=1, attention_k_eq_v=True)
    base = replace(family, kwargs={**family.kwargs, **fewer}).build()
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P, init="normal", sliding_window="plain"))
    assert {layer.kv_heads for _, _, layer in model.geometry.layers()} == {1, 2}
    with pytest.raises(PrefixConfigError, match="the widest heads have fewer than others"):
        model.save_as_peft(tmp_path)


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, 1e6])
def test_numbers_that_cannot_be_written(spoil: float, tmp_path: Path) -> None:
    model = decoder_only("llama")
    model.save_as_peft(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model.prefixes.entry().module.decoder.layers["0"].key.data[0, 0, 0] = spoil
    with pytest.raises(PrefixFileError, match=r"left as it was.*NaN or infinity"):
        model.save_as_peft(tmp_path, dtype=torch.float16)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_dtypes_that_are_none(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.int8, "float32"):
        with pytest.raises(PrefixInputError, match=r"float32, torch.float16 or torch.bfloat16"):
            decoder_only("llama").save_as_peft(tmp_path, dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ['{"peft_type": "LORA"}', "not JSON"])
def test_another_adapter_is_not_destroyed(content: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(PrefixFileError, match=r"holds another adapter.*folder of its own"):
        decoder_only("llama").save_as_peft(tmp_path)
    assert [file.read_text() for file in tmp_path.iterdir()] == [content]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PrefixFileError, match="is a file"):
        decoder_only("llama").save_as_peft(tmp_path / "file")


def test_a_quantized_head_of_the_base_cannot_be_taken_along(tmp_path: Path) -> None:
    family = replace(FAMILIES["llama"], model="LlamaForSequenceClassification")
    model = get_prefix_model(family.build(), PrefixConfig(num_virtual_tokens=P, init="zeros", modules_to_save=[]))
    model.base.score.register_buffer("scale", torch.zeros(1, dtype=torch.int8))
    with pytest.raises(PrefixConfigError, match=r"wants score.scale in the file"):
        model.save_as_peft(tmp_path)
