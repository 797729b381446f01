"""Export: programs that transformers and torch make of a model have its prefix inside."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, random_model, tokens
from test_conformance_ways_to_generate import Logits
from transformers import GenerationConfig

from peft_prefix import PrefixModel

IDS = tokens(2, 9)
OTHER = tokens(3, 17, seed=5)


def padded(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return dict(input_ids=ids, attention_mask=mask)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**padded(ids), use_cache=False).logits[padded(ids)["attention_mask"].bool()]


def model_of(family: str) -> PrefixModel:
    return random_model(FAMILIES[family].build("sdpa"))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_a_saved_program_needs_no_model(strict: bool) -> None:
    model = model_of("llama")
    auto = torch.export.Dim.AUTO
    shapes = (dict.fromkeys((0, 1), auto), dict.fromkeys((0, 1), auto))
    program = torch.export.export(Logits(model), tuple(padded(IDS).values()), dynamic_shapes=shapes, strict=strict)
    file, expected = io.BytesIO(), logits_of(model, OTHER)
    torch.export.save(program, file)
    with torch.no_grad():
        for parameter in model.prefixes.parameters():
            parameter.zero_()
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        actual = loaded(*padded(OTHER).values())[padded(OTHER)["attention_mask"].bool()]
    assert_close(actual, expected)


def test_a_program_keeps_to_the_positions_that_a_prefix_leaves() -> None:
    model = random_model(FAMILIES["gpt2"].build("sdpa"), p=6)
    auto = torch.export.Dim.AUTO
    shapes = (dict.fromkeys((0, 1), auto), dict.fromkeys((0, 1), auto))
    arguments = tuple(padded(IDS).values())
    program = torch.export.export(Logits(model), arguments, dynamic_shapes=shapes, strict=False).module()
    assert program(*padded(tokens(2, 250)).values()).shape == (2, 250, 200)
    with pytest.raises((AssertionError, RuntimeError)):
        program(*padded(tokens(2, 251)).values())


@pytest.mark.filterwarnings("ignore:.*children_specs:FutureWarning")
def test_transformers_exporter_takes_a_model_with_a_prefix() -> None:
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo", reason="needs transformers' exporters")
    model = model_of("gemma3_text")
    program = exporters.DynamoExporter().export(model, padded(IDS), config=exporters.DynamoConfig(dynamic=True))
    run = program.module() if isinstance(program, torch.export.ExportedProgram) else program  # before transformers 5.23
    with torch.no_grad():
        actual = run(**padded(OTHER))["logits"][padded(OTHER)["attention_mask"].bool()]
    assert_close(actual, logits_of(model, OTHER))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_program_with_a_static_cache_generates_the_same(family: str) -> None:
    """As for ExecuTorch: token by token, with a cache inside the program."""
    executorch = pytest.importorskip("transformers.integrations.executorch")
    base = FAMILIES[family].build("sdpa")
    base.config.use_cache = True
    static = dict(batch_size=1, max_cache_len=32)
    base.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", max_length=32, cache_config=static, pad_token_id=0
    )
    model, text = random_model(base), tokens(1, 9)
    first = dict(input_ids=text[:, :1], cache_position=torch.tensor([0]))
    with torch.no_grad():
        module = executorch.TorchExportableModuleForDecoderOnlyLM(model, **static)
        program = module.export(**first, strict=False).module()
    ids = text[0].tolist()
    for place in range(9 + 8):
        logits = program(input_ids=torch.tensor([[ids[place]]]), cache_position=torch.tensor([place]))
        if place >= 8:
            ids.append(int(logits[0, -1].argmax()))
    expected = model.generate(text, max_new_tokens=9, do_sample=False, use_cache=False, cache_implementation=None)
    assert ids == expected[0].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_onnx_has_the_prefix_inside(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model, auto = model_of(family), torch.export.Dim.DYNAMIC
    shapes = (dict.fromkeys((0, 1), auto), dict.fromkeys((0, 1), auto))
    arguments = tuple(padded(IDS).values())
    program = torch.onnx.export(Logits(model).eval(), arguments, dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    actual = session.run(None, {name: value.numpy() for name, value in padded(OTHER).items()})[0]
    assert_close(torch.from_numpy(actual)[padded(OTHER)["attention_mask"].bool()], logits_of(model, OTHER))
