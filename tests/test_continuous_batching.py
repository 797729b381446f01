"""Batches of requests (`generate_batch`): one prefix for all of them, and never another one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from helpers import model_with_tokens, random_model, tokens, with_text
from packaging.version import Version
from transformers import GenerationConfig
from transformers.generation.configuration_utils import CompileConfig, ContinuousBatchingConfig

from peft_prefix import PrefixConfig, PrefixInputError, PrefixModel, PrefixWarning, UnsupportedModelError

NEW = 12
GREEDY = dict(max_new_tokens=NEW, do_sample=False)
pytestmark = pytest.mark.filterwarnings("ignore:.*`generation_config` default values:UserWarning")


def settings(**more: Any) -> dict[str, Any]:
    """Pages of 8 tokens, and no more than 32 tokens in one pass: long requests come in pieces."""
    size = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # before transformers 5.18
    pages = {size: 8, "num_blocks": 64, "max_batch_tokens": 32}
    return dict(
        generation_config=GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(**{**pages, **more}),
    )


def requests() -> list[list[int]]:
    """Texts of several lengths, two of which begin with the same whole pages."""
    texts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 12, 40, 9)]
    return [*texts, texts[2][:20] + tokens(1, 3)[0].tolist()]


def generated(model: Any, texts: list[list[int]], **more: Any) -> list[list[int]]:
    results = model.generate_batch(texts, **{**settings(), **more})
    assert [result.error for result in results.values()] == [None] * len(texts)
    return [result.generated_tokens for result in results.values()]


def alone(model: Any, text: list[int]) -> list[int]:
    return model.generate(torch.tensor([text]), **GREEDY)[0, len(text) :].tolist()


def test_prefixes_for_single_requests_are_refused() -> None:
    model = random_model(FAMILIES["llama"].build())
    with pytest.raises(PrefixInputError, match=r"one prefix for all requests.*generate\(prefix_names"):
        model.generate_batch([[5, 6, 7]], prefix_names=["default"])


def test_requests_see_a_prefix_of_real_tokens_as_those_tokens() -> None:
    base, prefix = FAMILIES["llama"].build("sdpa"), tokens(1, 5, seed=8)[0]
    expected = [
        base.generate(with_text(prefix, torch.tensor([text])), **GREEDY)[0, -NEW:].tolist() for text in requests()
    ]
    assert generated(model_with_tokens(base, prefix), requests()) == expected
    assert expected != [alone(base, text) for text in requests()]


@pytest.mark.parametrize("sliding", ["pinned", "plain"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss", "opt"])
def test_requests_give_what_each_gives_alone(family: str, sliding: str) -> None:
    """With windows of every kind, several of them long."""
    model = random_model(FAMILIES[family].build(), sliding_window=sliding)
    assert generated(model, requests()) == [alone(model, text) for text in requests()]
    assert model.config._attn_implementation == "eager"


def test_several_sequences_of_a_request_share_its_pages() -> None:
    model = random_model(FAMILIES["llama"].build("sdpa"))
    options = settings()
    options["generation_config"].num_return_sequences = 3
    results = model.generate_batch(requests(), **options)
    if Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the base itself gives the first sequence of a request alone")
    assert [result.generated_tokens for result in results.values()] == [
        alone(model, text) for text in requests() for _ in range(3)
    ]


def test_the_prefixs_own_modules_act_in_the_managers_thread() -> None:
    config = dict(modules_to_save=["lm_head"])
    model = random_model(FAMILIES["llama"].build("sdpa"), **config)
    with torch.no_grad():
        for parameter in model.prefixes.entry().weights.parameters():
            parameter.mul_(-1)
    assert generated(model, requests()) == [alone(model, text) for text in requests()]


def test_a_network_gives_the_prefix() -> None:
    model = random_model(FAMILIES["llama"].build("sdpa"), reparameterization="mlp", mlp_hidden_size=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    assert generated(model, requests()) == [alone(model, text) for text in requests()]


def test_a_disabled_prefix_is_not_there() -> None:
    base = FAMILIES["llama"].build("sdpa")
    model = random_model(base)
    with_prefix = generated(model, requests())
    with model.disable_prefix():
        assert generated(model, requests()) == [alone(base, text) for text in requests()] != with_prefix
    assert generated(model, requests()) == with_prefix


def test_a_kept_manager_stays_with_its_prefix() -> None:
    model = random_model(FAMILIES["llama"].build("sdpa"))
    first = generated(model, requests(), persistent_manager=True)
    assert generated(model, requests(), persistent_manager=True) == first
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=3, init="normal", init_std=1.0))
    with pytest.raises(PrefixInputError, match="destroy_cached"):
        generated(model, requests())
    model.destroy_cached_continuous_batching_manager()
    second = generated(model, requests())
    assert second == [alone(model, text) for text in requests()] != first
    model.set_prefix("default")
    assert generated(model, requests()) == first
    with torch.no_grad():
        next(model.prefixes["default"].parameters()).add_(1.0)  # as a training step does
    changed = generated(model, requests())
    assert changed == [alone(model, text) for text in requests()] != first


def test_a_running_manager_takes_no_requests_for_another_prefix() -> None:
    model = random_model(FAMILIES["llama"].build("sdpa"))
    text, expected = requests()[1], alone(model, requests()[1])
    with model.continuous_batching_context_manager(**settings()) as manager:
        manager.add_request(text, request_id="before", max_new_tokens=NEW)
        model.add_prefix("other", PrefixConfig(num_virtual_tokens=3, init="normal", init_std=1.0))
        with pytest.raises(PrefixInputError, match="Make a manager for each prefix"):
            manager.add_request(text)
        with model.disable_prefix(), pytest.raises(PrefixInputError, match="active is none"):
            manager.add_request(text)
        result = None
        while result is None:
            result = manager.get_result(timeout=1)
    assert result.generated_tokens == expected


def test_positions_end_with_a_warning_or_an_error() -> None:
    """Before the request runs: an error in the manager's thread would end all requests."""
    model = random_model(FAMILIES["gpt2"].build("sdpa"), p=6)
    texts = [tokens(1, 245)[0].tolist(), tokens(1, 5)[0].tolist()]
    with pytest.warns(PrefixWarning, match="after 5 new tokens"):
        results = generated(model, texts)
    assert [len(result) for result in results] == [5, NEW]
    with model.continuous_batching_context_manager(**settings()) as manager:  # noqa: SIM117
        with pytest.raises(PrefixInputError, match="no room"):
            manager.add_request(tokens(1, 250)[0].tolist())


@pytest.mark.parametrize(
    "family", ["falcon_multi_query", "mpt", "deepseek_v3", "t5", "gpt_neo", "qwen3_next", "llama4_text"]
)
def test_what_cannot_be_is_refused_before_it_runs(family: str) -> None:
    model = random_model(FAMILIES[family].build())
    with pytest.raises(PrefixInputError, match="cannot serve"):
        model.generate_batch(requests(), **settings())
    assert model.config._attn_implementation == "eager"
    if FAMILIES[family].recurrent or model.config.is_encoder_decoder:
        return
    with torch.no_grad():
        model(input_ids=tokens(1, 4))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (dict(varlen_compile_config=CompileConfig()), "Compiled passes"),
        (dict(default_compile_level=1), "Compiled passes"),
    ],
)
def test_compiled_passes_are_refused(option: dict[str, Any], reason: str) -> None:
    model = random_model(FAMILIES["llama"].build())
    with pytest.raises(PrefixInputError, match=reason):
        model.generate_batch(requests(), **settings(**option))
    assert model.config._attn_implementation == "eager"
    assert generated(model, requests()) == [alone(model, text) for text in requests()]


def test_flash_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(FAMILIES["llama"].build("sdpa"))
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(UnsupportedModelError, match="sdpa"):
        model.generate_batch(requests(), **settings())


def test_a_model_without_a_language_models_head_is_refused() -> None:
    from transformers import LlamaModel

    model = random_model(LlamaModel(FAMILIES["llama"].build().config))
    with pytest.raises(PrefixInputError, match="cannot generate"):
        model.generate_batch(requests(), **settings())


def test_a_model_that_has_served_requests_can_be_copied() -> None:
    model = random_model(FAMILIES["llama"].build("sdpa"))
    expected = generated(model, requests())
    other: PrefixModel = copy.deepcopy(model)
    with torch.no_grad():
        next(model.prefixes["default"].parameters()).add_(1.0)
    assert generated(other, requests()) == expected != generated(model, requests())


def test_a_manager_generates_as_many_tokens_as_it_was_told() -> None:
    model = random_model(FAMILIES["llama"].build("sdpa"))
    options = settings()
    options["generation_config"].max_new_tokens = 3
    with model.continuous_batching_context_manager(**options) as manager:
        manager.add_request(tokens(1, 6)[0].tolist())
        result = manager.get_result(timeout=60)
    assert len(result.generated_tokens) == 3


def test_running_requests_keep_their_modules() -> None:
    model = random_model(FAMILIES["llama"].build("sdpa"), modules_to_save=["lm_head"])
    own = dict(model.prefixes.entry().weights.named_parameters())
    served = dict(model._requests()._weights.named_parameters())
    with torch.no_grad():
        own["lm_head.weight"].zero_()
    assert served["lm_head.weight"].abs().sum() > 0
    assert not served["lm_head.weight"].requires_grad
