from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from helpers import cache_of_tokens, tokens

from peft_prefix.example_inputs import example_inputs
from peft_prefix.recording import record
from peft_prefix.structure import evaluation_mode, find_structure


def test_tracing_changes_neither_modes_nor_random_state_nor_weights() -> None:
    base = FAMILIES["gpt2"].build().train()
    base.transformer.h[1].eval()
    modes = {name: module.training for name, module in base.named_modules()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    record(base, find_structure(base), example_inputs(base))
    assert torch.equal(torch.rand(3), expected)
    assert {name: module.training for name, module in base.named_modules()} == modes


def test_modes_are_restored_after_an_error() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())

    def fail() -> None:
        with evaluation_mode(module):
            assert not module[0].training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module[0].training
    assert not module[1].training


def test_windowed_layers_record_all_tokens() -> None:
    cache = cache_of_tokens(FAMILIES["gemma3_text"].build(), tokens(1, 20))
    assert {layer.keys.shape[2] for layer in cache.layers} == {20}


@pytest.mark.parametrize(
    ("family", "decoder"),
    [
        ("gpt2", "GPT2Model"),
        ("opt", "OPTDecoder"),
        ("llava", "LlamaModel"),
        ("qwen2_5_vl", "Qwen2_5_VLTextModel"),
        ("bart", "BartDecoder"),
        ("t5", "T5Stack"),
        ("bert_gpt2", "GPT2Model"),
    ],
)
def test_the_decoder_is_the_innermost_model_that_takes_the_cache(family: str, decoder: str) -> None:
    assert type(find_structure(FAMILIES[family].build()).decoder).__name__ == decoder


def test_attention_modules_of_an_encoder_decoder_model() -> None:
    base = FAMILIES["t5"].build()
    structure = find_structure(base)
    assert structure.encoder is base.encoder
    encoder = [block.layer[0].SelfAttention for block in base.encoder.block]
    cross = [block.layer[1].EncDecAttention for block in base.decoder.block]
    assert [one.module for one in structure.encoder_attention] == encoder
    assert [one.module for one in structure.cross_attention] == cross
    assert {one.mask for one in structure.cross_attention} == {"mask"}
    gpt2 = find_structure(FAMILIES["bert_gpt2"].build())
    assert {one.mask for one in gpt2.cross_attention} == {"encoder_attention_mask"}
    assert {one.mask for one in gpt2.encoder_attention} == {"attention_mask"}


def test_written_out_attention_is_recognized_by_its_parts() -> None:
    found = {name: find_structure(FAMILIES[name].build()).written_out for name in ("led", "longt5_local", "pegasus_x")}
    kinds = {name: {type(layout).__name__ for layout in layouts} for name, layouts in found.items()}
    assert kinds == {"led": {"WindowAndGlobals"}, "longt5_local": {"BlockedRows"}, "pegasus_x": {"BlocksAndGlobals"}}
    assert [len(layouts) for layouts in found.values()] == [3, 3, 2]
