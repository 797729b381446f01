"""Gradient checkpointing changes nothing: loss and every gradient, reentrant or not, switched on before or after."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from families import ENCODER_DECODERS, FAMILIES
from helpers import random_model, source_of, tokens

from peft_prefix import PrefixInputError, PrefixModel

# Its new name is not known to all supported versions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
SHARING = ("gemma3n_text", "gemma4_text")


def step(model: PrefixModel, family: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one pass over two padded rows."""
    arguments: dict[str, Any] = dict(input_ids=tokens(2, 12), attention_mask=torch.ones(2, 12, dtype=torch.long))
    arguments["attention_mask"][0, -3:] = 0
    if family in ENCODER_DECODERS:
        arguments = {**source_of(model.base, 2), "decoder_input_ids": tokens(2, 9)}
    torch.manual_seed(0)
    loss = model.train()(**arguments).logits.float().square().mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.prefixes.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def moved(model: PrefixModel) -> PrefixModel:
    """The model with a network whose output is not zero, so that all of its parameters get gradients."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.prefixes.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


@pytest.mark.conformance("checkpointing")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("form", ["none", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same(family: str, form: str, reentrant: bool) -> None:
    if reentrant and family in SHARING:
        pytest.skip("layers share caches, where reentrant checkpointing is refused")
    base = FAMILIES[family].build()
    config = dict(reparameterization=form, mlp_hidden_size=8, dropout=0.2)
    before = moved(random_model(base, **config))
    loss, gradients = step(before, family)
    before.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    after = moved(random_model(base, **config))
    for model in (before, after):
        other_loss, other_gradients = step(model, family)
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=1e-7)
        assert set(other_gradients) == set(gradients)
        for name, gradient in gradients.items():
            largest = float(gradient.abs().max())
            assert largest > 0, name
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=2e-6 * max(largest, 1e-3))


@pytest.mark.parametrize("family", SHARING)
def test_reentrant_checkpointing_is_refused_where_layers_share_caches(family: str) -> None:
    model = random_model(FAMILIES[family].build()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(PrefixInputError, match="reentrant gradient checkpointing loses the gradients"):
        model(input_ids=tokens(1, 4))
    model.eval()(input_ids=tokens(1, 4))


def test_layers_really_run_twice() -> None:
    model = random_model(FAMILIES["llama"].build()).train()
    runs: list[int] = []
    for layer in model.base.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    step(model, "llama")
    once = len(runs)
    model.gradient_checkpointing_enable()
    step(model, "llama")
    assert len(runs) - once == 2 * once
    model.gradient_checkpointing_disable()
    step(model, "llama")
    assert len(runs) == 4 * once


def test_two_passes_may_be_open_at_once_and_nothing_stays_on_the_base() -> None:
    base = FAMILIES["bart"].build()
    one, other = random_model(base), random_model(base, p=6, init_seed=1)
    alone = [step(model, "bart")[1] for model in (one, other)]
    one.gradient_checkpointing_enable()
    functions = {module: vars(module).get("_gradient_checkpointing_func") for module in base.modules()}
    hooks = [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in base.modules()]
    arguments = {**source_of(base, 2), "decoder_input_ids": tokens(2, 9)}
    losses = [model.train()(**arguments).logits.float().square().mean() for model in (one, other)]
    assert {module: vars(module).get("_gradient_checkpointing_func") for module in base.modules()} == functions
    for loss in losses:
        loss.backward()
    for model, gradients in zip((one, other), alone, strict=True):
        for name, parameter in model.prefixes.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)
    assert [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in base.modules()] == hooks


def test_a_cache_cannot_be_continued_by_layers_that_run_twice() -> None:
    model = random_model(FAMILIES["llama"].build())
    cache = model(input_ids=tokens(1, 4), use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    with pytest.raises(PrefixInputError, match="a cache cannot be continued"):
        model.train()(input_ids=tokens(1, 2), past_key_values=cache)


def test_two_threads_may_train_prefixes_of_one_base() -> None:
    base = FAMILIES["llama"].build()
    models = [random_model(base, init_seed=seed) for seed in (0, 1)]
    models[0].gradient_checkpointing_enable()
    expected = [step(model, "llama") for model in models]
    results: list[list[tuple[torch.Tensor, dict[str, torch.Tensor]]]] = [[], []]

    def train(index: int) -> None:
        for _ in range(10):
            results[index].append(step(models[index], "llama"))

    threads = [threading.Thread(target=train, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (loss, gradients), found in zip(expected, results, strict=True):
        assert len(found) == 10
        for other_loss, other_gradients in found:
            assert torch.equal(other_loss, loss)
            for name, gradient in gradients.items():
                torch.testing.assert_close(other_gradients[name], gradient)


def test_the_plain_base_runs_in_another_thread_in_the_middle_of_a_checkpointed_pass() -> None:
    base = FAMILIES["llama"].build()
    model, ids = random_model(base), tokens(2, 12)
    model.gradient_checkpointing_enable()
    model.train()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    found: list[torch.Tensor] = []

    def beside() -> None:
        found.append(base(input_ids=ids).logits.detach())

    def in_the_middle(module: torch.nn.Module, args: Any) -> None:
        if not found:
            found.append(torch.empty(0))
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()
            with model.disable_prefix():
                found.append(base(input_ids=ids).logits.detach())

    handle = base.model.layers[1].register_forward_pre_hook(in_the_middle)
    model(input_ids=ids)
    handle.remove()
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(found[2], expected)
