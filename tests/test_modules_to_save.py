"""Other heads on the same backbones, and modules that are trained and saved with a prefix.

References: the base model itself with real tokens as text, and modules whose weights are put into a copy of the base.
"""

from __future__ import annotations

import copy
import json
import math
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import DECODERS, FAMILIES, WINDOW, Family
from helpers import TOLERANCE, cache_of_tokens, fits_window, prefix_metadata, tokens
from safetensors.torch import load_file, save_file
from test_trainer import losses, make_trainer
from torch import nn
from torch.utils.data import Dataset
from transformers import DynamicCache, PreTrainedModel, Trainer, pipeline

from peft_prefix import (
    IncompatibleBaseError,
    PrefixConfig,
    PrefixConfigError,
    PrefixFileError,
    PrefixInputError,
    PrefixModel,
    PrefixNotConsumedError,
    PrefixWarning,
    UnsupportedModelError,
    get_prefix_model,
)
from peft_prefix.passes import remove_gates

LABELS = 3
KINDS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def _heads() -> dict[str, Family]:
    """Every head that transformers has for the families, by the name of its class and family."""
    found = {}
    for name, family in DECODERS.items():
        stem = family.model.replace("ForCausalLM", "").replace("LMHeadModel", "")
        for kind in KINDS:
            if hasattr(transformers, f"{stem}For{kind}"):
                labels = 2 if kind == "QuestionAnswering" else LABELS
                kwargs = {**family.kwargs, "num_labels": labels}
                found[f"{name}-{kind}"] = Family(family.config, f"{stem}For{kind}", kwargs, family.sliding)
    return found


HEADS = _heads()
every_head = pytest.mark.parametrize("head", HEADS)
some_heads = pytest.mark.parametrize(
    "head",
    [
        *(f"llama-{kind}" for kind in KINDS),
        *(f"gpt2-{kind}" for kind in KINDS),
        "qwen2-TokenClassification",
        "biogpt-TokenClassification",
        "mpt-SequenceClassification",
        "gpt_neo-SequenceClassification",
    ],
)


def classifier(seed: int = 0, family: str = "llama", **kwargs: Any) -> PreTrainedModel:
    """A tiny model that tells three classes of texts apart."""
    head = HEADS[f"{family}-SequenceClassification"]
    return Family(head.config, head.model, {**head.kwargs, **kwargs}).build(seed=seed)


def with_head(base: PreTrainedModel, p: int = 4, **config: Any) -> PrefixModel:
    """A model with a prefix of random numbers as large as real activations."""
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=p, init="normal", init_std=1.0, **config))


def answers(output: Any) -> torch.Tensor:
    """What a head says: one row of numbers per text or per token."""
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], dim=-1)


def trained(model: PrefixModel) -> dict[str, torch.Tensor]:
    """The active prefix's weights for modules of the base, by their names in the base."""
    return {
        name.removeprefix("modules_to_save."): tensor
        for name, tensor in model.prefix_state_dict().items()
        if name.startswith("modules_to_save.")
    }


def disturb(model: PrefixModel, seed: int = 5) -> None:
    """Move all weights of the active prefix's modules, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.prefixes.entry().weights.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def assert_equal_answers(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The answers agree, and are not so uniform that anything would."""
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[torch.float32])


# ---------------------------------------------------------------------- the prefix


@every_head
def test_a_prefix_of_real_tokens_acts_like_those_tokens(head: str) -> None:
    base = HEADS[head].build()
    p = 3
    prefix, text = tokens(1, p, seed=2), tokens(2, fits_window(HEADS[head], 16) - p)
    cache = cache_of_tokens(base, prefix)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=p, init="cache"), past_key_values=cache)
    with torch.no_grad():
        expected = answers(base(input_ids=torch.cat([prefix.expand(2, -1), text], dim=1)))
        actual, without = answers(model(input_ids=text)), answers(base(input_ids=text))
    if "Sequence" not in head:
        expected = expected[:, p:]
    assert_equal_answers(actual, expected)
    assert (actual - without).abs().max() > 100 * (actual - expected).abs().max()


@every_head
def test_padding_does_not_matter(head: str) -> None:
    model = with_head(HEADS[head].build())
    length, pad = 3 * WINDOW, 5
    text = tokens(2, length)
    left, right = text.clone(), text.clone()
    left[0, :pad], right[0, length - pad :] = 0, 0
    right[0, : length - pad] = text[0, pad:]
    with torch.no_grad():
        alone = answers(model(input_ids=text[:1, pad:]))
        padded_left = answers(model(input_ids=left, attention_mask=(left != 0).long()))[:1]
        padded_right = answers(model(input_ids=right, attention_mask=(right != 0).long()))[:1]
    if "Sequence" not in head:
        padded_left, padded_right = padded_left[:, pad:], padded_right[:, : length - pad]
    assert_equal_answers(padded_left, alone)
    assert_equal_answers(padded_right, alone)


def targets(head: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Labels as the head wants them."""
    if "Sequence" in head:
        return dict(labels=torch.arange(rows) % LABELS)
    if "Token" in head:
        return dict(labels=(torch.arange(rows * length) % LABELS).view(rows, length))
    return dict(start_positions=torch.arange(rows), end_positions=torch.arange(rows) + 1)


@every_head
def test_every_virtual_token_and_the_head_learn_and_the_base_does_not(head: str) -> None:
    base = HEADS[head].build()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = with_head(base).train()
    text = tokens(2, 3 * WINDOW)
    text[0, -5:] = 0
    model(input_ids=text, attention_mask=(text != 0).long(), **targets(head, *text.shape)).loss.backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in learning if ".modules_to_save." in name}
    assert heads
    for name, parameter in learning.items():
        assert parameter.grad is not None, name
        if name not in heads:
            assert (parameter.grad.abs().sum(dim=(0, 2)) > 1e-9).all(), name
        elif not name.endswith("bias"):  # a bias common to all positions of an answer changes nothing
            assert (parameter.grad.abs().sum(dim=-1) > 1e-9).all(), name
    torch.optim.AdamW(learning.values(), lr=0.1).step()
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in base.parameters())


@some_heads
def test_the_gradient_of_the_head_is_that_of_a_base_trained_with_the_prefix_as_text(head: str) -> None:
    base = HEADS[head].build()
    p = 3
    prefix, text = tokens(1, p, seed=2), tokens(2, fits_window(HEADS[head], 12) - p)
    cache = cache_of_tokens(base, prefix)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=p, init="cache"), past_key_values=cache)
    reference = copy.deepcopy(base).requires_grad_(True)
    weight = torch.randn(answers(model(input_ids=text)).shape, generator=torch.Generator().manual_seed(3))
    (answers(model(input_ids=text)) * weight).sum().backward()
    expected = answers(reference(input_ids=torch.cat([prefix.expand(2, -1), text], dim=1)))
    ((expected if "Sequence" in head else expected[:, p:]) * weight).sum().backward()
    for name, parameter in model.prefixes.entry().weights.named_parameters():
        torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


@some_heads
def test_disabled_it_is_the_base_bit_for_bit(head: str) -> None:
    base = HEADS[head].build()
    text = tokens(2, 12)
    with torch.no_grad():
        expected = answers(base(input_ids=text))
        model = with_head(base)
        disturb(model)
        enabled = answers(model(input_ids=text))
        with model.disable_prefix():
            assert torch.equal(answers(model(input_ids=text)), expected)
        assert torch.equal(answers(base(input_ids=text)), expected)
        assert torch.equal(answers(model(input_ids=text)), enabled)
    assert not torch.allclose(enabled, expected, atol=1e-2)


def test_a_bare_backbone_is_prefixed_without_a_head() -> None:
    family = Family("LlamaConfig", "LlamaModel", FAMILIES["llama"].kwargs)
    base = family.build()
    prefix, text = tokens(1, 3, seed=2), tokens(2, 9)
    config = PrefixConfig(num_virtual_tokens=3, init="text")
    model = get_prefix_model(base, config, input_ids=prefix)
    with torch.no_grad():
        expected = base(input_ids=torch.cat([prefix.expand(2, -1), text], dim=1)).last_hidden_state[:, 3:]
        assert_equal_answers(model(input_ids=text).last_hidden_state, expected)
    assert model.prefixes.entry("default").config.modules_to_save == ()
    with pytest.raises(PrefixInputError, match="LlamaModel has no language model's head and cannot generate"):
        model.generate(text)


def test_a_text_can_be_given_in_pieces() -> None:
    model = with_head(classifier())
    text = tokens(2, 12)
    with torch.no_grad():
        expected = model(input_ids=text, use_cache=False).logits
        first = model(input_ids=text[:, :7], use_cache=True)
        assert first.past_key_values.get_seq_length() == 7
        assert_equal_answers(model(input_ids=text[:, 7:], past_key_values=first.past_key_values).logits, expected)
        with model.disable_prefix(), pytest.raises(PrefixInputError, match="tokens that were read with prefix"):
            model(input_ids=text[:, 7:], past_key_values=first.past_key_values)
        cache = DynamicCache()
        assert model(input_ids=text, past_key_values=cache).past_key_values is cache
        assert_equal_answers(model(input_ids=text, return_dict=False)[0], expected)
    with pytest.raises(PrefixInputError, match="does not understand lables"):
        model(input_ids=text, lables=torch.zeros(2))


def test_several_choices_per_row_reach_the_backbone_as_rows_of_their_own() -> None:
    """A head may arrange its inputs as it likes before the backbone sees them."""

    class Choices(transformers.LlamaForSequenceClassification):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            output = self.model(input_ids.flatten(0, 1), **kwargs)
            scores = self.score(output.last_hidden_state[:, -1])
            return transformers.modeling_outputs.MultipleChoiceModelOutput(logits=scores.view(input_ids.shape[:2]))

    torch.manual_seed(0)
    base = Choices(transformers.LlamaConfig(**FAMILIES["llama"].kwargs, num_labels=1)).eval()
    nn.init.normal_(base.score.weight)
    model, text = with_head(base), tokens(6, 5).view(2, 3, 5)
    with torch.no_grad():
        together = model(input_ids=text).logits
        apart = torch.stack([model(input_ids=row[None]).logits[0] for row in text])
    assert_equal_answers(together, apart)


def test_a_base_that_runs_around_its_backbone_is_noticed() -> None:
    base = classifier()
    model = with_head(base)
    base.model.__class__ = type("Backbone", (type(base.model),), {"__call__": type(base.model).forward})
    with pytest.raises(PrefixNotConsumedError, match="ran without reading the prefix at decoder"):
        model(input_ids=tokens(1, 4))


@pytest.mark.parametrize("tied", [True, False])
def test_the_default_initializer_needs_no_language_models_head(tied: bool) -> None:
    family = Family(
        "LlamaConfig", "LlamaForSequenceClassification", {**FAMILIES["llama"].kwargs, "tie_word_embeddings": tied}
    )
    base = family.build()
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=6, init_seed=4))
    if tied:  # the words are those that the language model with these embeddings writes
        language_model = Family("LlamaConfig", "LlamaForCausalLM", family.kwargs).build()
        language_model.model.load_state_dict(base.model.state_dict())
        expected = get_prefix_model(language_model, PrefixConfig(num_virtual_tokens=6, init_seed=4)).prefix_state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(model.prefix_state_dict()[name], tensor)
    other = get_prefix_model(base, PrefixConfig(num_virtual_tokens=6, init_seed=5))
    one, two = (each.prefix_state_dict()["decoder.layers.0.value"] for each in (model, other))
    assert one.std() > 0.1
    assert not torch.allclose(one, two)


# ---------------------------------------------------------------------- whose weights


def test_each_prefix_has_a_head_of_its_own() -> None:
    base = classifier()
    text = tokens(2, 9)
    models = []
    for seed in (1, 2):
        models.append(with_head(base, init_seed=seed))
        disturb(models[-1], seed)
    both = with_head(base, init_seed=1)
    disturb(both, 1)
    both.add_prefix("other", PrefixConfig(num_virtual_tokens=4, init="normal", init_std=1.0, init_seed=2))
    disturb(both, 2)
    with torch.no_grad():
        assert torch.equal(both(input_ids=text).logits, models[1](input_ids=text).logits)
        both.set_prefix("default")
        assert torch.equal(both(input_ids=text).logits, models[0](input_ids=text).logits)
    both(input_ids=text).logits.sum().backward()
    for name, parameter in both.prefixes.named_parameters():
        assert (parameter.grad is not None) == name.startswith("default."), name


def test_the_weights_of_the_prefix_act_as_if_they_were_the_bases() -> None:
    base = classifier()
    model = with_head(base, modules_to_save=["score", "norm", "layers.1.mlp"])
    assert model.prefixes.entry("default").config.modules_to_save == ("model.layers.1.mlp", "model.norm", "score")
    disturb(model)
    changed = copy.deepcopy(base)
    changed.load_state_dict({**base.state_dict(), **trained(model)})
    expected = with_head(changed, modules_to_save=[])
    text = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(input_ids=text).logits, expected(input_ids=text).logits)


def test_a_language_models_own_parts_can_be_trained_too() -> None:
    base = FAMILIES["llama"].build()
    model = with_head(base, modules_to_save=["lm_head"])
    disturb(model)
    changed = copy.deepcopy(base)
    changed.load_state_dict({**base.state_dict(), **trained(model)})
    expected, text = with_head(changed), tokens(2, 6)
    for options in (dict(do_sample=False), dict(num_beams=3, do_sample=False), dict(use_cache=False, do_sample=False)):
        assert torch.equal(
            model.generate(text, max_new_tokens=8, **options), expected.generate(text, max_new_tokens=8, **options)
        )
    with model.disable_prefix():
        disabled = model.generate(text, max_new_tokens=8, do_sample=False)
    assert torch.equal(disabled, base.generate(text, max_new_tokens=8, do_sample=False))
    assert not torch.equal(disabled, model.generate(text, max_new_tokens=8, do_sample=False))
    assert with_head(base).prefixes.entry("default").config.modules_to_save == ()


def test_a_tied_parameter_is_trained_where_it_is_named() -> None:
    base = FAMILIES["gpt2"].build()
    assert base.lm_head.weight is base.transformer.wte.weight
    text = tokens(2, 6)
    untied = copy.deepcopy(base)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())

    alone = with_head(base, modules_to_save=["lm_head"])
    disturb(alone)
    assert set(trained(alone)) == {"lm_head.weight"}
    untied.lm_head.load_state_dict({"weight": trained(alone)["lm_head.weight"]})
    with torch.no_grad():
        assert torch.equal(alone(input_ids=text).logits, with_head(untied)(input_ids=text).logits)

    together = with_head(base, modules_to_save=["lm_head", "wte"])
    disturb(together)
    assert set(trained(together)) == {"transformer.wte.weight"}
    tied = copy.deepcopy(base)
    tied.transformer.wte.load_state_dict({"weight": trained(together)["transformer.wte.weight"]})
    assert tied.lm_head.weight is tied.transformer.wte.weight
    with torch.no_grad():
        assert torch.equal(together(input_ids=text).logits, with_head(tied)(input_ids=text).logits)


def test_nothing_is_left_on_the_base() -> None:
    base = classifier()
    before = {name: set(vars(module)) for name, module in base.named_modules()}
    names = set(base.state_dict())
    model = with_head(base)
    model(input_ids=tokens(1, 4))
    with pytest.raises(IndexError):
        model(input_ids=tokens(1, 4) + 10_000)
    assert {name: set(vars(module)) for name, module in base.named_modules()} == before
    assert set(base.state_dict()) == names
    remove_gates(base)
    assert not base.model._forward_pre_hooks
    assert not base.model._forward_hooks


def test_threads_run_different_prefixes_and_the_base_at_once() -> None:
    base, text = classifier(), tokens(2, 9)
    models = [with_head(base, init_seed=seed) for seed in (1, 2)]
    for seed, model in enumerate(models):
        disturb(model, seed)
    with torch.no_grad():
        expected = [model(input_ids=text).logits for model in [*models, base]]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal([*models, base][index](input_ids=text).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "forward" not in vars(base.score)


def test_the_heads_dropout_follows_the_models_mode() -> None:
    base = HEADS["llama-TokenClassification"].build()
    base.score = nn.Sequential(nn.Dropout(0.5), base.score)
    model, text = with_head(base), tokens(1, 6)
    assert model.prefixes.entry("default").config.modules_to_save == ("score",)
    assert set(trained(model)) == {"score.1.weight", "score.1.bias"}
    with torch.no_grad():
        assert torch.equal(model(input_ids=text).logits, model(input_ids=text).logits)
        model.train()
        assert not torch.equal(model(input_ids=text).logits, model(input_ids=text).logits)


class Counting(AlignDevicesHook):
    """accelerate's hook that moves inputs to a module's device, counting its calls."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().pre_forward(module, *args, **kwargs)


def test_hooks_on_the_module_go_on_working() -> None:
    base, text = classifier(), tokens(1, 5)
    with torch.no_grad():
        model = with_head(base)
        disturb(model)
        expected = model(input_ids=text).logits
        hook = Counting(execution_device="cpu", io_same_device=True)
        add_hook_to_module(base.score, hook)
        shapes: list[tuple[int, ...]] = []
        base.score.register_forward_hook(lambda *called: shapes.append(tuple(called[2].shape)))
        assert torch.equal(model(input_ids=text).logits, expected)
        assert shapes == [(1, 5, LABELS)]
        assert hook.calls == 1
        hooked = with_head(base)
        disturb(hooked)
        assert torch.equal(hooked(input_ids=text).logits, expected)
        copied = copy.deepcopy(hooked)
        assert torch.equal(copied(input_ids=text).logits, expected)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_pass_that_ends_leaves_those_that_still_run_alone(hooked: bool) -> None:
    base, states = classifier(), torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    if hooked:
        add_hook_to_module(base.score, AlignDevicesHook(execution_device="cpu"))
    models = [with_head(base), with_head(base)]
    for seed, model in enumerate(models):
        disturb(model, seed)
    expected = [states @ trained(model)["score.weight"].T for model in models]
    set_before = set(vars(base.score))
    with torch.no_grad():
        own = base.score(states)
        with models[0].prefixes.entry().weights.in_place(base):
            with models[1].prefixes.entry().weights.in_place(base):
                assert_equal_answers(base.score(states), expected[1])
            assert_equal_answers(base.score(states), expected[0])
        assert torch.equal(base.score(states), own)
    assert set(vars(base.score)) == set_before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_trained_in_float32_and_act_in_the_bases_precision(dtype: torch.dtype) -> None:
    base = classifier().to(dtype)
    model, text = with_head(base), tokens(2, 9)
    plain = with_head(base, modules_to_save=[])
    with torch.no_grad():
        assert torch.equal(model(input_ids=text).logits, plain(input_ids=text).logits)
    model(input_ids=text, labels=torch.tensor([0, 1])).loss.backward()
    weight = model.prefixes.entry().weights.get_parameter("score.weight")
    assert weight.dtype == weight.grad.dtype == torch.float32
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1e-5)  # far below the precision of the base around 0.1
    assert (weight != before).all()


def test_gradient_checkpointing_of_a_trained_module_is_refused() -> None:
    base = FAMILIES["llama"].build()
    model = with_head(base, modules_to_save=["layers.1.mlp"]).train()
    for module in base.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    weights = model.prefixes.entry().weights
    with (
        pytest.raises(PrefixInputError, match=r"would compute 'model.layers.1.mlp' a second time"),
        weights.in_place(base),
    ):
        pass
    with with_head(base, modules_to_save=["lm_head"]).train().prefixes.entry().weights.in_place(base):
        pass


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["scor"], "LlamaForSequenceClassification has no module 'scor' .* did you mean 'score'"),
        (["model.layer.0.mlp"], "did you mean 'model.layers.0.mlp'"),
        (["ore"], "has no module 'ore'"),
        (["zzz"], "its parts are model, score"),
        (["layers"], "'model.layers' in modules_to_save is only a container"),
        (["act_fn"], r"'model.layers.0.mlp.act_fn' in modules_to_save is without parameters"),
    ],
)
def test_names_that_stand_for_nothing_are_errors(wanted: list[str], message: str) -> None:
    with pytest.raises(PrefixConfigError, match=message):
        with_head(classifier(), modules_to_save=wanted)


@pytest.mark.parametrize("value", ["score", [""], [3], 5])
def test_names_must_be_a_list(value: Any) -> None:
    with pytest.raises(
        PrefixConfigError, match=r"modules_to_save must be a list of module names, e.g. \[.score.\], not"
    ):
        PrefixConfig(modules_to_save=value)


def test_what_lies_inside_a_named_module_is_trained_once() -> None:
    model = with_head(classifier(), modules_to_save=["mlp", "model.layers.0.mlp.up_proj", "model.layers.0.mlp"])
    assert model.prefixes.entry("default").config.modules_to_save == tuple(f"model.layers.{i}.mlp" for i in range(3))
    disturb(model)
    model(input_ids=tokens(1, 5)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.prefixes.parameters())


def test_modules_that_cannot_be_trained_are_refused() -> None:
    running = classifier()
    running.score = nn.Sequential(running.score, nn.BatchNorm1d(LABELS))
    with pytest.raises(PrefixConfigError, match=r"'score' has state that is not trained, such as running statistics"):
        with_head(running, modules_to_save=["score"])
    quantized = classifier()
    quantized.score.weight = nn.Parameter(torch.zeros(LABELS, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PrefixConfigError, match=r"score.weight cannot be trained, because it is of type torch.int8"):
        with_head(quantized)
    offloaded = classifier()
    model = PrefixModel(offloaded)
    offloaded.score.to("meta")
    with pytest.raises(PrefixConfigError, match="because it is not in memory"):
        model.add_prefix("one", PrefixConfig(num_virtual_tokens=2))


def test_a_module_that_the_base_does_not_call_is_noticed() -> None:
    base = FAMILIES["llama"].build()
    base.unused = nn.Linear(2, 2)
    model = with_head(base, modules_to_save=["unused"])
    with pytest.raises(PrefixNotConsumedError, match="ran without calling unused"):
        model(input_ids=tokens(1, 4))
    with pytest.raises(PrefixNotConsumedError, match="ran without calling unused"):
        model.generate(tokens(1, 4), max_new_tokens=2)
    assert "forward" not in vars(base.unused)
    with_another_part = classifier()
    with_another_part.unused = nn.Linear(2, 2)
    model = with_head(with_another_part)
    assert model.prefixes.entry("default").config.modules_to_save == ("score", "unused")
    with pytest.raises(PrefixNotConsumedError, match="ran without calling unused"):
        model(input_ids=tokens(1, 4))


def test_encoder_models_are_still_refused() -> None:
    config = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(UnsupportedModelError, match="keeps no keys and values"):
        get_prefix_model(transformers.BertForSequenceClassification(transformers.BertConfig(**config)))


# ---------------------------------------------------------------------- files


@some_heads
@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_saved_equals_loaded(head: str, is_trainable: bool, reparameterization: str, tmp_path: Path) -> None:
    model = with_head(HEADS[head].build(), reparameterization=reparameterization, mlp_hidden_size=8)
    disturb(model)
    model.save_pretrained(tmp_path)
    fresh = HEADS[head].build()
    for name in model.prefixes.entry("default").config.modules_to_save or ():  # a fresh head is another one each time
        for parameter in fresh.get_submodule(name).parameters():
            nn.init.normal_(parameter)
    loaded = PrefixModel.from_pretrained(fresh, tmp_path, is_trainable=is_trainable)
    text = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(answers(loaded(input_ids=text)), answers(model(input_ids=text)))
    assert loaded.prefixes.entry().is_trained == is_trainable
    assert {p.requires_grad for p in loaded.prefixes.entry().weights.parameters()} == {is_trainable}
    assert loaded.prefixes.entry().config == model.prefixes.entry().config
    for name, tensor in model.prefix_state_dict().items():
        assert torch.equal(loaded.prefix_state_dict()[name], tensor)


def test_the_file_holds_the_modules_beside_keys_and_values(tmp_path: Path) -> None:
    model = with_head(classifier())
    disturb(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "prefix.safetensors")
    weight = tensors.pop("modules_to_save.score.weight")
    assert torch.equal(weight, trained(model)["score.weight"])
    assert set(tensors) == {f"decoder.layers.{layer}.{role}" for layer in range(3) for role in ("key", "value")}
    description = json.loads((tmp_path / "prefix_config.json").read_text())
    assert description["modules_to_save"] == ["score"]
    with torch.no_grad():
        model.prefixes.entry().weights.get_parameter("score.weight")[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    other = json.loads((tmp_path / "other" / "prefix_config.json").read_text())
    assert other["sha256"] != description["sha256"]
    with torch.no_grad():
        model.prefixes.entry().weights.get_parameter("score.weight")[0, 0] = float("nan")
    with pytest.raises(PrefixFileError, match=r"modules_to_save.score.weight contain NaN"):
        model.save_pretrained(tmp_path)


def test_a_head_of_another_shape_or_another_class_is_refused(tmp_path: Path) -> None:
    with_head(classifier()).save_pretrained(tmp_path)
    with pytest.raises(
        IncompatibleBaseError,
        match=r"another head .*\.score\.weight has shape \(3, 64\) in the file, \(5, 64\) is needed.*same num_labels",
    ):
        PrefixModel.from_pretrained(classifier(num_labels=5), tmp_path)
    with pytest.raises(IncompatibleBaseError, match=r"trained together with score, which .* does not have"):
        PrefixModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)
    model = PrefixModel(classifier())
    with pytest.raises(PrefixFileError):
        model.load_prefix(tmp_path / "nowhere")
    assert model.active_prefix is None
    tensors = load_file(tmp_path / "prefix.safetensors")
    del tensors["modules_to_save.score.weight"]
    save_file(tensors, tmp_path / "prefix.safetensors", metadata=_metadata(tmp_path))
    with pytest.raises(IncompatibleBaseError, match=r"the model needs .*score\.weight, which the file does not have"):
        PrefixModel.from_pretrained(classifier(), tmp_path)


def _metadata(folder: Path) -> dict[str, str]:
    return prefix_metadata((folder / "prefix_config.json").read_text())


def test_a_file_that_names_no_modules_brings_none(tmp_path: Path) -> None:
    base = classifier()
    with_head(base, modules_to_save=[]).save_pretrained(tmp_path)
    description = json.loads((tmp_path / "prefix_config.json").read_text())
    del description["modules_to_save"]
    tensors = load_file(tmp_path / "prefix.safetensors")
    save_file(tensors, tmp_path / "prefix.safetensors", metadata=prefix_metadata(json.dumps(description)))
    loaded = PrefixModel.from_pretrained(base, tmp_path)
    assert loaded.prefixes.entry("default").config.modules_to_save == ()
    assert trained(loaded) == {}


def test_a_resized_head_is_noticed() -> None:
    base = classifier()
    model = with_head(base)
    base.score = nn.Linear(64, LABELS + 1, bias=False)
    with pytest.raises(IncompatibleBaseError, match=r"score.weight of the base has shape \(4, 64\) now"):
        model(input_ids=tokens(1, 4))


def test_another_backbone_draws_a_warning_and_another_head_does_not(tmp_path: Path) -> None:
    with_head(classifier(seed=0)).save_pretrained(tmp_path)
    same = classifier(seed=0)
    nn.init.normal_(same.score.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PrefixModel.from_pretrained(same, tmp_path)
    with pytest.warns(PrefixWarning, match="has the same shape with other weights"):
        PrefixModel.from_pretrained(classifier(seed=1), tmp_path)
    with_head(classifier(seed=0), modules_to_save=[]).save_pretrained(tmp_path / "frozen")
    with pytest.warns(PrefixWarning, match="has the same shape with other weights"):
        PrefixModel.from_pretrained(same, tmp_path / "frozen")


def test_parameters_are_counted_and_copied() -> None:
    model = with_head(classifier())
    assert model.get_nb_trainable_parameters()[0] == 3 * 2 * 2 * 4 * 16 + LABELS * 64
    frozen_head = with_head(classifier(), modules_to_save=[])
    assert frozen_head.get_nb_trainable_parameters()[0] == 3 * 2 * 2 * 4 * 16
    text = tokens(1, 5)
    other = copy.deepcopy(model)
    disturb(other)
    with torch.no_grad():
        assert not torch.allclose(other(input_ids=text).logits, model(input_ids=text).logits, atol=1e-2)
        assert torch.equal(model(input_ids=text).logits, with_head(classifier())(input_ids=text).logits)


# ---------------------------------------------------------------------- training


class Texts(Dataset):
    """Texts of different lengths, each in the four words of its class."""

    def __init__(self, count: int, seed: int) -> None:
        self.labels = tokens(count, 1, seed)[:, 0] % LABELS
        self.ids = LABELS * (1 + tokens(count, 10, seed + 100) % 4) + self.labels[:, None]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index].clone()
        ids[10 - index % 4 :] = 0
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": self.labels[index]}


def trainer(folder: Path, model: PrefixModel | None = None, **arguments: Any) -> Trainer:
    """A trainer of eight steps for a classifier with dropout."""
    model = model or with_head(classifier(family="gpt2", resid_pdrop=0.1, attn_pdrop=0.1), dropout=0.1)
    optimizers = arguments.pop("optimizers", (None, None))
    made = make_trainer(model, folder, **arguments)
    return Trainer(
        model=model, args=made.args, train_dataset=Texts(32, 1), eval_dataset=Texts(16, 2), optimizers=optimizers
    )


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_stock_trainer_learns_a_classifier(precision: str, tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=30, save_strategy="no", bf16=precision == "bf16", learning_rate=1e-2)
    base = one.model.base
    before = {name: value.clone() for name, value in base.state_dict().items()}
    one.train()
    values = list(losses(one).values())
    assert sum(values[-8:]) / 8 < 0.8 * math.log(LABELS)  # guessing gives log(3), and more at the start
    assert values[0] > math.log(LABELS)
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.allclose(trained(one.model)["score.weight"], before["score.weight"], atol=1e-2)
    assert one.predict(Texts(16, 2)).predictions.shape == (16, LABELS)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert len(losses(whole)) == 8
    assert losses(resumed) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    start = trainer(tmp_path / "start").model
    assert not torch.equal(trained(whole.model)["score.weight"], trained(start)["score.weight"])
    state = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert "prefixes.default.modules_to_save.score.weight" in state
    loaded = PrefixModel.from_pretrained(classifier(family="gpt2"), tmp_path / "whole" / "checkpoint-8")
    assert torch.equal(trained(loaded)["score.weight"], trained(whole.model)["score.weight"])
    without = with_head(classifier(family="gpt2"), modules_to_save=[])
    with pytest.raises(PrefixFileError, match=r"does not fit this model's prefixes: .*modules_to_save.score.weight"):
        without.load_state_dict(state)


def test_head_and_prefix_can_have_learning_rates_of_their_own(tmp_path: Path) -> None:
    model = with_head(classifier())
    head = [p for name, p in model.named_parameters() if ".modules_to_save." in name]
    prefix = [p for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in name]
    optimizer = torch.optim.AdamW([{"params": prefix, "lr": 3e-2}, {"params": head, "lr": 1e-3}], weight_decay=0.0)
    before = {name: tensor.clone() for name, tensor in model.prefix_state_dict().items()}
    one = trainer(tmp_path, model, max_steps=1, save_strategy="no", optimizers=(optimizer, None), warmup_steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrefixWarning)
        one.train()
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in model.prefix_state_dict().items()}
    assert moved.pop("modules_to_save.score.weight") == pytest.approx(1e-3, rel=1e-2)
    assert max(moved.values()) == pytest.approx(3e-2, rel=1e-2)


def test_the_learning_rate_warning_is_about_the_prefix_alone() -> None:
    model = with_head(classifier())
    head = [p for name, p in model.named_parameters() if ".modules_to_save." in name]
    prefix = [p for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in name]
    model(input_ids=tokens(1, 4)).logits.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrefixWarning)
        torch.optim.AdamW(head, lr=1e-5).step()
        torch.optim.AdamW([{"params": head, "lr": 1e-5}, {"params": prefix, "lr": 3e-2}]).step()
    model = with_head(classifier())
    model(input_ids=tokens(1, 4)).logits.sum().backward()
    with pytest.warns(PrefixWarning, match="hardly move"):
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5).step()


def test_text_classification_pipeline() -> None:
    from test_initializers import tokenizer

    model = with_head(classifier())
    disturb(model)
    (result,) = pipeline("text-classification", model=model, tokenizer=tokenizer(), device="cpu")("w5 w9 w7")
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([[5, 9, 7]])).logits.softmax(-1)[0]
    assert result["score"] == pytest.approx(float(scores.max()), abs=1e-5)
    assert result["label"] == f"LABEL_{int(scores.argmax())}"
