from __future__ import annotations

import copy
import doctest
import inspect
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from helpers import random_model, tokens
from test_initializers import tokenizer
from transformers import PreTrainedModel, pipeline

import peft_prefix.model
from peft_prefix import (
    PrefixConfig,
    PrefixConfigError,
    PrefixFileError,
    PrefixInputError,
    PrefixModel,
    PrefixNotConsumedError,
    get_prefix_model,
)


def test_the_docstrings_examples_run() -> None:
    for module in (peft_prefix.model, peft_prefix.config, peft_prefix.optimizer_groups):
        results = doctest.testmod(module)
        assert results.attempted > 0
        assert results.failed == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_the_base_model_of_transformers_is_the_base_without_its_head_and_with_the_prefix(family: str) -> None:
    """Trainers with a loss of their own, such as TRL's, run it instead of the model."""
    model = random_model(FAMILIES[family].build())
    arguments = dict(input_ids=tokens(2, 6), attention_mask=torch.ones(2, 6, dtype=torch.long))
    if family == "bart":
        arguments["decoder_input_ids"] = tokens(2, 6)
    with torch.no_grad():
        hidden = model.base_model(**arguments).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**arguments).logits)
        with model.disable_prefix():
            plain = model.base_model(**arguments).last_hidden_state
        assert torch.equal(plain, model.base.base_model(**arguments).last_hidden_state)
        assert (plain - hidden).abs().max() > 1e-2
    model.base_model(**arguments).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.prefixes.parameters())
    with pytest.raises(PrefixInputError, match="does not understand labels"):
        model.base_model(**arguments, labels=tokens(2, 6))
    assert model.base_model.get_input_embeddings() is model.base.get_input_embeddings()
    model.base_model.note = "for the base"
    assert model.base.base_model.note == "for the base"
    assert type(copy.deepcopy(model.base_model)) is type(model.base_model)
    with pytest.raises(PrefixInputError, match="without the prefix"):
        model.base_model.get_decoder()


def test_a_head_that_the_base_model_leaves_out_is_missed() -> None:
    model = random_model(FAMILIES["llama"].build(), modules_to_save=["lm_head"])
    with pytest.raises(PrefixNotConsumedError, match="lm_head"):
        model.base_model(input_ids=tokens(1, 4))


def test_it_is_a_model_of_the_bases_architecture_to_transformers() -> None:
    base = FAMILIES["llama"].build("sdpa")
    model = random_model(base)
    assert isinstance(model, PrefixModel)
    assert isinstance(model, PreTrainedModel)
    assert type(model).__name__ == "LlamaForCausalLM"
    own, theirs = (dict(inspect.signature(type(one).forward).parameters) for one in (model, base))
    assert own.pop("prefix_names").default is None
    assert own == theirs
    assert model.config is base.config
    assert model.generation_config is base.generation_config
    assert model.get_base_model() is base
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.get_output_embeddings() is base.get_output_embeddings()
    assert model.can_generate()
    assert model.config._attn_implementation == "sdpa"
    assert type(random_model(FAMILIES["llama"].build())) is type(model)


def test_only_the_prefix_is_trained_and_in_the_state() -> None:
    model = random_model(FAMILIES["llama"].build(), p=4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    roles = [f"{layer}.{role}" for layer in range(3) for role in ("key", "value")]
    assert trained == {f"prefixes.default.decoder.layers.{role}" for role in roles}
    assert set(model.state_dict()) == {*trained, "prefixes._extra_state"}
    assert model.get_nb_trainable_parameters() == (3 * 2 * 2 * 4 * 16, sum(p.numel() for p in model.parameters()))


def test_trainable_parameters_are_printed_as_peft_does(capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(FAMILIES["llama"].build())
    model.print_trainable_parameters()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert capsys.readouterr().out == (
        f"trainable params: 768 || all params: {total:,} || trainable%: {100 * 768 / total:.4f}\n"
    )


def test_training_mode_is_the_bases_and_reaches_it() -> None:
    base = FAMILIES["llama"].build()
    model = random_model(base)
    assert not model.training
    model.train()
    assert base.training
    model.eval()
    assert not base.training


def test_several_prefixes_share_a_base_and_are_switched(tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    first, second = random_model(base, init_seed=1), random_model(base, p=7, init_seed=2)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    text = tokens(2, 6)
    model = PrefixModel.from_pretrained(base, tmp_path / "first", name="one")
    model.load_prefix(tmp_path / "second", name="two")
    with torch.no_grad():
        assert torch.equal(model(input_ids=text).logits, first(input_ids=text).logits)
        model.set_prefix("two")
        assert torch.equal(model(input_ids=text).logits, second(input_ids=text).logits)
    model.add_prefix("three", PrefixConfig(num_virtual_tokens=2))
    assert model.active_prefix == "three"
    assert model.base is base
    with pytest.raises(PrefixConfigError, match="no prefix 'four'; there are"):
        model.set_prefix("four")
    with pytest.raises(PrefixConfigError, match="a prefix 'one' already"):
        model.load_prefix(tmp_path / "first", name="one")
    with pytest.raises(PrefixConfigError, match="consists of letters"):
        model.add_prefix("../evil", PrefixConfig())
    with pytest.raises(PrefixConfigError, match="'train' means something else in Python"):
        model.add_prefix("train", PrefixConfig())
    with pytest.raises(PrefixConfigError, match="300 virtual tokens leave no room for text: the base model has 256"):
        model.add_prefix("long", PrefixConfig(num_virtual_tokens=300))


def test_training_reaches_the_active_prefix_alone() -> None:
    model = random_model(FAMILIES["llama"].build())
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=2))
    model(input_ids=tokens(1, 5)).logits.sum().backward()
    for name, parameter in model.prefixes.named_parameters():
        assert (parameter.grad is not None) == name.startswith("other."), name


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"].build())
    before = model.state_dict()
    with pytest.raises(PrefixFileError):
        model.load_prefix(tmp_path, name="broken")
    assert set(model.state_dict()) == set(before)
    assert model.active_prefix == "default"


def test_a_model_without_prefixes_says_so() -> None:
    with pytest.raises(PrefixConfigError, match="has no prefix yet"):
        PrefixModel(FAMILIES["llama"].build())(input_ids=tokens(1, 2))


def test_copies_are_independent() -> None:
    model = random_model(FAMILIES["gpt_neo"].build())
    text = tokens(1, 20)
    with torch.no_grad():
        expected = model(input_ids=text).logits
        other = copy.deepcopy(model)
        other.prefixes["default"].decoder["layers"]["0"].key.zero_()
        assert type(other) is type(model)
        assert torch.equal(model(input_ids=text).logits, expected)
        assert not torch.equal(other(input_ids=text).logits, expected)


def test_wrapping_twice_is_refused() -> None:
    model = random_model(FAMILIES["llama"].build())
    with pytest.raises(PrefixInputError, match="has prefixes already"):
        get_prefix_model(model)
    with pytest.raises(PrefixConfigError, match="config must be a PrefixConfig, not dict"):
        get_prefix_model(FAMILIES["llama"].build(), dict(num_virtual_tokens=3))  # type: ignore[arg-type]


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_training_state_is_restored(reparameterization: str) -> None:
    base = FAMILIES["llama"].build()
    model = random_model(base, reparameterization=reparameterization, init_seed=1)
    other = random_model(base, reparameterization=reparameterization, init_seed=2)
    other.load_state_dict(model.state_dict())
    for name, tensor in model.prefix_state_dict().items():
        assert torch.equal(other.prefix_state_dict()[name], tensor)
    broken = dict(model.state_dict())
    broken.popitem()
    with pytest.raises(PrefixFileError, match="does not fit this model's prefixes"):
        other.load_state_dict(broken, strict=False)


def test_training_state_remembers_the_active_prefix() -> None:
    base = FAMILIES["llama"].build()
    model, other = random_model(base), random_model(base)
    for each in (model, other):
        each.add_prefix("second", PrefixConfig(num_virtual_tokens=2))
    other.set_prefix("default")
    other.load_state_dict(model.state_dict())
    assert other.active_prefix == "second"


def test_the_vocabulary_can_be_resized() -> None:
    model = random_model(FAMILIES["llama"].build())
    model.resize_token_embeddings(210)
    assert model(input_ids=tokens(1, 3)).logits.shape[-1] == 210


def test_text_generation_pipeline(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(FAMILIES["llama"].build())
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    (result,) = generate("w5 w9 w7", max_new_tokens=5, do_sample=False, return_full_text=False)
    expected = model.generate(torch.tensor([[5, 9, 7]]), max_new_tokens=5, do_sample=False)
    assert result["generated_text"].split() == tokenizer().decode(expected[0, 3:]).split()
    assert not [record for record in caplog.records if "not supported" in record.getMessage()]


@pytest.mark.parametrize("method", ["load_adapter", "add_adapter", "set_adapter"])
def test_adapter_methods_of_transformers_lead_to_ours(method: str) -> None:
    model = random_model(FAMILIES["llama"].build())
    with pytest.raises(PrefixInputError, match="use load_prefix, add_prefix and set_prefix"):
        getattr(model, method)("some")
