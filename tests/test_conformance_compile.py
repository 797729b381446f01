"""`torch.compile`: the same numbers as without it, and no graph breaks that the base does not have."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ENCODER_DECODERS, KINDS, Family
from family import LLAMA
from helpers import random_model, source_of, tokens
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from peft_prefix import PrefixConfig, PrefixInputError, PrefixModel, get_prefix_model

every_family = pytest.mark.parametrize("family", KINDS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def _attention(family: Family) -> str:
    return "sdpa" if getattr(transformers, family.model)._supports_sdpa else "eager"


def _inputs(family: str, base: PreTrainedModel, rows: int, length: int, padding: int = 0) -> dict[str, Any]:
    """A text, padded on the left, or a source, padded on the right, and a text."""
    ids = tokens(rows, length)
    if family in ENCODER_DECODERS:
        source = source_of(base, rows)
        if padding:
            source["attention_mask"][0, -padding:] = 0
        return {**source, "decoder_input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return dict(input_ids=ids, attention_mask=mask)


def _compiled(family: str, model: PrefixModel, backend: str = "eager") -> Any:
    """The model, compiled in one graph if the base can be."""
    return torch.compile(model, fullgraph=_is_one_graph(family, model.training), backend=backend)


@cache
def _is_one_graph(family: str, training: bool) -> bool:
    """Whether the base alone compiles without a break."""
    base = KINDS[family].build(_attention(KINDS[family])).train(training)
    try:
        with torch.no_grad():
            torch.compile(base, fullgraph=True, backend="eager")(**_inputs(family, base, 2, 12))
    except torch._dynamo.exc.Unsupported:
        return False
    finally:
        torch.compiler.reset()
    return True


@pytest.mark.ways("compiled forward")
@every_family
def test_compiled_logits_are_the_same(family: str) -> None:
    base = KINDS[family].build(_attention(KINDS[family]))
    model = random_model(base)
    compiled = _compiled(family, model)
    with torch.no_grad():
        for length, padding in ((12, 3), (15, 5), (12, 0)):
            inputs = _inputs(family, base, 2, length, padding)
            expected, actual = model(**inputs).logits, compiled(**inputs).logits
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        plain = base(**inputs).logits
        assert (expected - plain).abs().max() > 1e-2
        with model.disable_prefix():
            torch.testing.assert_close(compiled(**inputs).logits, plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.ways("compiled training")
@pytest.mark.parametrize(("family", "form"), [*((family, "none") for family in KINDS), ("llama", "mlp")])
def test_a_compiled_training_step_is_the_same(family: str, form: str) -> None:
    base = KINDS[family].build(_attention(KINDS[family])).train()
    base.loss_type = "ForCausalLM"  # without one the base logs something, which breaks its graph
    model = random_model(base, reparameterization=form, mlp_hidden_size=8).train()
    inputs = _inputs(family, base, 2, 12)
    inputs["labels"] = inputs.pop("decoder_input_ids", inputs["input_ids"]).clone()
    inputs["labels"][0, :5] = -100
    compiled = _compiled(family, model, "aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    graphs = []
    for _ in range(2):
        found = []
        for run in (model, compiled):
            try:
                loss = run(**inputs).loss
                loss.backward()
            except RuntimeError:
                if run is model or _trains(base, inputs):
                    raise
                pytest.skip("this backend of the compiler fails on the base itself")
            found.append((loss.detach(), {n: p.grad.clone() for n, p in model.prefixes.named_parameters()}))
            model.zero_grad()
        (expected, gradients), (actual, others) = found
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-6)
        for name, parameter in model.prefixes.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
        model.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]  # new numbers are no reason to compile again


def _trains(base: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether the base alone can be trained when it is compiled."""
    embeddings = base.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
    try:
        torch.compile(base, backend="aot_eager")(inputs_embeds=embeddings, labels=inputs["labels"]).loss.backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.ways("compiled generation")
@every_family
def test_compiled_generation_gives_the_same_tokens(family: str) -> None:
    base = KINDS[family].build(_attention(KINDS[family]))
    text = source_of(base, 2) if family in ENCODER_DECODERS else _inputs(family, base, 2, 9, padding=4)
    options = dict(max_new_tokens=12, do_sample=False, cache_implementation="static")
    settings = CompileConfig(backend="eager", fullgraph=False)
    settings._compile_all_devices = True
    if not _compiles(base, text, options, settings):
        pytest.skip("the base itself does not compile its generation")
    model = random_model(base)
    plain = base.generate(**text, **options, compile_config=settings)
    expected = model.generate(**text, max_new_tokens=12, do_sample=False)
    assert not torch.equal(expected, plain)
    before = counters["stats"]["unique_graphs"]
    assert torch.equal(model.generate(**text, **options, compile_config=settings), expected)
    assert counters["stats"]["unique_graphs"] > before
    assert torch.equal(base.generate(**text, **options, compile_config=settings), plain)
    with model.disable_prefix():
        assert torch.equal(model.generate(**text, **options, compile_config=settings), plain)


def _compiles(base: PreTrainedModel, text: Any, options: Any, settings: CompileConfig) -> bool:
    """Whether the base compiles its decoding steps and gets the same tokens as without."""
    try:
        compiled = base.generate(**text, **options, compile_config=settings)
    except (ValueError, TypeError, RuntimeError, AttributeError, torch._dynamo.exc.TorchDynamoException):
        return False
    return counters["stats"]["unique_graphs"] > 0 and torch.equal(compiled, base.generate(**text, **options))


def test_what_is_compiled_knows_prefix_thread_and_call() -> None:
    base = KINDS["llama"].build("sdpa")
    base.compile(backend="eager")
    model = random_model(base)
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=4, init="normal", init_seed=5))
    ids, found = tokens(2, 12), {}
    reference = random_model(KINDS["llama"].build("sdpa"))
    reference.add_prefix("other", PrefixConfig(num_virtual_tokens=4, init="normal", init_seed=5))
    with torch.no_grad():
        plain = reference.base(input_ids=ids).logits
        for _ in range(2):
            for name in ("default", "other"):
                model.set_prefix(name)
                reference.set_prefix(name)
                torch.testing.assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits)
                torch.testing.assert_close(base(input_ids=ids).logits, plain)

        class Beside(torch.nn.Module):
            """Runs the base in another thread, in the middle of a pass with the prefix."""

            def forward(self, states: torch.Tensor) -> torch.Tensor:
                if not found:
                    found["logits"] = None
                    thread = threading.Thread(target=self.run)
                    thread.start()
                    thread.join()
                return states

            def run(self) -> None:
                with torch.no_grad():
                    found["logits"] = base(input_ids=ids).logits

        beside = Beside()
        handle = base.model.norm.register_forward_hook(lambda module, args, output: beside(output))
        model.base._compiled_call_impl = None
        model(input_ids=ids)
        handle.remove()
    torch.testing.assert_close(found["logits"], plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_inductor_compiles_a_training_step() -> None:
    model = random_model(KINDS["llama"].build("sdpa")).train()
    ids = tokens(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.prefixes.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True)(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.prefixes.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_checkpoints_give_the_same_gradients(reentrant: bool) -> None:
    model = random_model(KINDS["llama"].build("sdpa")).train()
    ids = tokens(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.prefixes.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.compile(model, backend="aot_eager")(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.prefixes.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_compiled_classifier_trains_its_head() -> None:
    base = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3))
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4)).train()
    ids, labels = tokens(2, 12), torch.tensor([0, 2])

    def step(run: Any) -> dict[str, torch.Tensor]:
        run(input_ids=ids, labels=labels).loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.prefixes.named_parameters()}
        model.zero_grad()
        return gradients

    expected, actual = step(model), step(torch.compile(model, backend="aot_eager"))
    assert any("modules_to_save" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler itself
def test_the_trainer_compiles(tmp_path: Path) -> None:
    ids = tokens(8, 12)
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def trained(**more: Any) -> PrefixModel:
        model = random_model(KINDS["llama"].build("sdpa"))
        arguments = dict(output_dir=str(tmp_path), max_steps=3, report_to="none", use_cpu=True, save_strategy="no")
        arguments |= dict(per_device_train_batch_size=4, learning_rate=3e-2, disable_tqdm=True)
        Trainer(model=model, args=TrainingArguments(**arguments, **more), train_dataset=rows).train()
        return model

    expected = trained().prefix_state_dict()
    compiled = trained(torch_compile=True, torch_compile_backend="aot_eager")
    assert counters["stats"]["unique_graphs"] > 0
    for name, tensor in compiled.prefix_state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_packed_texts_stay_apart_when_compiled() -> None:
    model = random_model(KINDS["gemma3_text"].build("sdpa"))
    first, second = tokens(1, 10), tokens(1, 12, seed=5)
    packed = dict(input_ids=torch.cat([first, second], dim=1))
    packed["position_ids"] = torch.cat([torch.arange(10), torch.arange(12)])[None]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=first).logits, model(input_ids=second).logits], dim=1)
        for mode in (True, False):
            compiled = torch.compile(model.train(mode), backend="eager")
            torch.testing.assert_close(compiled(**packed).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(PrefixInputError, match="recurrent"):
        torch.compile(random_model(KINDS["qwen3_next"].build()), backend="eager")(**packed)


def test_each_prefix_is_compiled_once() -> None:
    model = random_model(KINDS["llama"].build("sdpa"))
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=7, init="normal", init_seed=5))
    compiled, ids, graphs = torch.compile(model, backend="eager"), tokens(2, 8), []
    with torch.no_grad():
        for name in ("default", "other", "default", "other"):
            model.set_prefix(name)
            for parameter in model.prefixes.parameters():
                parameter.add_(0.1)
            torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2]
