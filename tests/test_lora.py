"""An adapter of PEFT in the base, beside a prefix: both act, both learn, and each is saved by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, model_with_states, model_with_tokens, random_model, source_of, tokens, with_text
from safetensors import safe_open
from test_trainer import Rows, losses
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments

from peft_prefix import (
    PrefixConfig,
    PrefixConfigError,
    PrefixFileError,
    PrefixInputError,
    PrefixModel,
    PrefixWarning,
    get_prefix_model,
)
from peft_prefix.adapters import adapter_parameters, base_parameters
from peft_prefix.fingerprint import same_weights, weights_fingerprint
from peft_prefix.recording import record
from peft_prefix.structure import find_structure

peft = pytest.importorskip("peft")
# PEFT asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "fc1"],
}
FAMILY = pytest.mark.parametrize("family", TARGETS)
CAUSAL = pytest.mark.parametrize("family", ["llama", "gpt2"])
ENCODER_DECODER = pytest.mark.parametrize("family", ["t5", "bart"])


def lora(family: str = "llama", **options: Any) -> Any:
    settings = dict(r=4, lora_alpha=8, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2")
    return peft.LoraConfig(**{**settings, **options})


def randomized(base: Any, seed: int = 5) -> Any:
    """Adapters that act: PEFT's start as if they were not there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return base


def with_lora(family: str = "llama", **options: Any) -> PreTrainedModel:
    """A base whose adapter acts, made by transformers."""
    base = FAMILIES[family].build()
    base.add_adapter(lora(family, **options))
    return randomized(base).eval()  # type: ignore[no-any-return]


def with_peft(family: str = "llama", **options: Any) -> Any:
    """The same in a `PeftModel`."""
    return randomized(peft.get_peft_model(FAMILIES[family].build(), lora(family, **options))).eval()


def inputs(family: str, rows: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    text = tokens(rows, length)
    if not FAMILIES[family].build().config.is_encoder_decoder:
        return dict(input_ids=text)
    return dict(source_of(FAMILIES[family].build(), rows), decoder_input_ids=text)


def learn(model: Any, family: str, steps: int = 2) -> dict[str, torch.Tensor]:
    """Train on one batch; return the gradients of the first step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    gradients: dict[str, torch.Tensor] = {}
    for _ in range(steps):
        model(**inputs(family), labels=tokens(2, 6)).loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def changed(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}


@CAUSAL
def test_real_tokens_as_a_prefix_of_a_base_with_an_adapter(family: str) -> None:
    reference, prefix, text = with_peft(family), tokens(1, 4, seed=2)[0], tokens(2, 9)
    with torch.no_grad():
        expected = reference(input_ids=with_text(prefix, text)).logits[:, 4:]
        without = FAMILIES[family].build()(input_ids=with_text(prefix, text)).logits[:, 4:]
        for base in (with_lora(family), with_peft(family)):
            inner = base.get_base_model() if isinstance(base, peft.PeftModel) else base
            assert_close(model_with_tokens(inner, prefix)(input_ids=text).logits, expected)
            generated = model_with_tokens(inner, prefix).generate(text, max_new_tokens=5, do_sample=False)
            by_hand = reference.generate(input_ids=with_text(prefix, text), max_new_tokens=5, do_sample=False)
            assert torch.equal(generated[:, 9:], by_hand[:, 13:])
    assert (expected - without).abs().max() > 0.1


@ENCODER_DECODER
def test_real_tokens_as_a_prefix_of_an_encoder_decoder_with_an_adapter(family: str) -> None:
    reference, prefix, text = with_peft(family), tokens(1, 3, seed=2)[0], tokens(1, 6)
    source, base = source_of(FAMILIES[family].build(), 1), with_lora(family)
    states = record(base, find_structure(base), {**source, "decoder_input_ids": prefix[None]})
    model = model_with_states(base, {"decoder": states["decoder"]}, 3)
    with torch.no_grad():
        expected = reference(**source, decoder_input_ids=with_text(prefix, text)).logits[:, 3:]
        assert_close(model(**source, decoder_input_ids=text).logits, expected)


@pytest.mark.parametrize("how", ["transformers", "peft"])
@FAMILY
def test_both_learn_and_nothing_else(family: str, how: str) -> None:
    base = with_lora(family) if how == "transformers" else with_peft(family)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4)).train()
    before = snapshot(model)
    trainable = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {name for name in trainable if name.startswith("base.")} == {name for name in before if "lora_" in name}
    gradients = learn(model, family)
    assert set(gradients) == trainable
    assert all(one.abs().max() > 0 for one in gradients.values())
    assert changed(model, before) == trainable


@FAMILY
def test_the_adapters_gradients_are_those_of_peft_behind_the_same_cache(family: str) -> None:
    """Against PEFT alone, with the prefix in an ordinary cache."""
    from transformers import DynamicCache, EncoderDecoderCache

    base, reference = with_lora(family), with_peft(family).train()
    is_causal = not base.config.is_encoder_decoder
    sites = None if is_causal else ("decoder",)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, init="normal", init_std=1.0, sites=sites)).train()
    state = model.prefix_state_dict()
    cache, arguments = DynamicCache(), dict(inputs(family), labels=tokens(2, 6))
    for index in range(sum(name.endswith("key") for name in state)):
        keys, values = (state[f"decoder.layers.{index}.{role}"].expand(2, -1, -1, -1) for role in ("key", "value"))
        cache.update(keys, values, index)
    past = cache if is_causal else EncoderDecoderCache(cache, DynamicCache())
    more = dict(position_ids=torch.arange(4, 10).expand(2, -1)) if is_causal else {}
    expected = reference(**arguments, **more, past_key_values=past)
    actual = model(**arguments)
    torch.testing.assert_close(actual.loss, expected.loss)
    expected.loss.backward()
    actual.loss.backward()
    plain = dict(reference.base_model.model.named_parameters())
    for name, one in adapter_parameters(base).items():
        torch.testing.assert_close(one.grad, plain[name].grad, rtol=1e-4, atol=1e-6)


@FAMILY
def test_one_learns_while_the_other_is_frozen(family: str, tmp_path: Path) -> None:
    model = get_prefix_model(with_lora(family), PrefixConfig(num_virtual_tokens=4)).train()
    for parameter in adapter_parameters(model.base).values():
        parameter.requires_grad_(False)
    before = snapshot(model)
    learn(model, family)
    assert changed(model, before) == {name for name in before if name.startswith("prefixes.")}
    assert not [name for name in model.state_dict() if name.startswith("base.")]

    model = get_prefix_model(with_lora(family), PrefixConfig(num_virtual_tokens=4)).train()
    model.prefixes["default"].requires_grad_(False)
    before = snapshot(model)
    learn(model, family)
    assert changed(model, before) == {name for name in before if "lora_" in name}

    random_model(with_lora(family)).save_pretrained(tmp_path)
    model = PrefixModel.from_pretrained(with_lora(family), tmp_path).train()
    before, numbers = snapshot(model), model.prefix_state_dict()
    learn(model, family)
    assert changed(model, before) == {name for name in before if "lora_" in name}
    assert all(torch.equal(one, numbers[name]) for name, one in model.prefix_state_dict().items())


def test_a_frozen_adapter_stays_frozen(tmp_path: Path) -> None:
    with_peft().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)
    model = get_prefix_model(loaded, PrefixConfig(num_virtual_tokens=4))
    assert all(name.startswith("prefixes.") for name, one in model.named_parameters() if one.requires_grad)


def test_what_is_trainable_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    base = with_lora()
    adapter = sum(one.numel() for one in adapter_parameters(base).values())
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
    prefix = sum(one.numel() for one in model.prefixes.parameters())
    assert adapter == sum(one.numel() for name, one in base.named_parameters() if "lora_" in name) > 0
    assert model.get_nb_trainable_parameters()[0] == adapter + prefix
    model.print_trainable_parameters()
    assert f"trainable params: {adapter + prefix:,} ||" in capsys.readouterr().out


@FAMILY
@pytest.mark.parametrize("how", ["transformers", "peft"])
def test_each_is_saved_by_itself_and_loaded_again(how: str, family: str, tmp_path: Path) -> None:
    given = with_lora(family) if how == "transformers" else with_peft(family)
    model = get_prefix_model(given, PrefixConfig(num_virtual_tokens=4)).train()
    learn(model, family)
    remedy = "model.base" if how == "transformers" else "your PeftModel"
    with pytest.warns(PrefixWarning, match=rf"adapter .* is not saved here.*save_pretrained\(folder\) of {remedy}"):
        model.eval().save_pretrained(tmp_path / "prefix")
    (model.base if how == "transformers" else given).save_pretrained(tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "prefix").iterdir()}
    assert files == {"prefix.safetensors", "prefix_config.json", "README.md"}
    files = {file.name for file in (tmp_path / "adapter").iterdir()} - {"README.md", "generation_config.json"}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as content:
        assert all("lora_" in name for name in content.keys())  # noqa: SIM118

    fresh = FAMILIES[family].build()
    fresh.load_adapter(str(tmp_path / "adapter"))
    around = peft.PeftModel.from_pretrained(FAMILIES[family].build(), tmp_path / "adapter")
    arguments = inputs(family)
    with torch.no_grad():
        expected = model(**arguments).logits
        for base in (fresh, around):  # and no warning: it is the same base with the same adapter
            loaded = PrefixModel.from_pretrained(base, tmp_path / "prefix")
            assert torch.equal(loaded(**arguments).logits, expected)
        with pytest.warns(PrefixWarning, match="is without the adapter that acted beside it"):
            alone = PrefixModel.from_pretrained(FAMILIES[family].build(), tmp_path / "prefix")
        assert (alone(**arguments).logits - expected).abs().max() > 1e-2


def test_fingerprints_tell_bases_by_the_adapter_that_acts(tmp_path: Path) -> None:
    plain, base = FAMILIES["llama"].build(), with_lora()
    assert not same_weights(weights_fingerprint(plain), weights_fingerprint(base))
    base.disable_adapters()
    assert weights_fingerprint(plain) == weights_fingerprint(base)
    base.enable_adapters()
    named = FAMILIES["llama"].build()
    named.add_adapter(lora(), adapter_name="another_name")
    assert weights_fingerprint(randomized(named)) == weights_fingerprint(base)
    with pytest.warns(UserWarning, match="multiple adapters"):
        base.add_adapter(lora(), adapter_name="second")  # acts from now on
    assert not same_weights(weights_fingerprint(named), weights_fingerprint(base))
    base.set_adapter("default")
    assert weights_fingerprint(named) == weights_fingerprint(base)
    assert same_weights(weights_fingerprint(base), weights_fingerprint(base.to(torch.bfloat16)))
    with torch.no_grad():
        next(iter(adapter_parameters(named).values())).mul_(1.01)
    assert not same_weights(weights_fingerprint(named), weights_fingerprint(with_lora()))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 7]}],
    ids=str,
)
def test_the_bases_own_weights_are_recognized_under_any_wrapper(options: dict[str, Any]) -> None:
    plain, base = FAMILIES["llama"].build(), with_lora(**options)
    own = {one.plain_name: one.parameter for one in base_parameters(base) if not one.in_adapter}
    assert set(own) == {name for name, _ in plain.named_parameters()}
    for name, one in plain.named_parameters():
        assert torch.equal(own[name], one)
    assert [one.name for one in base_parameters(base)] == [name for name, _ in base.named_parameters()]
    trained = {name for name, one in base.named_parameters() if one.requires_grad}
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4)).train()
    assert (
        {name for name, one in base.named_parameters() if one.requires_grad} == trained == {*adapter_parameters(base)}
    )
    gradients = learn(model, "llama")
    assert {name.removeprefix("base.") for name in gradients if name.startswith("base.")} == trained
    assert {name.removeprefix("base.") for name in model.state_dict() if name.startswith("base.")} == trained


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_an_adapter_trains_go_on_learning(bias: str) -> None:
    base = with_peft("gpt2", bias=bias)
    trained = {name for name, one in base.get_base_model().named_parameters() if one.requires_grad}
    assert any(name.endswith(".bias") for name in trained)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
    assert {name for name, one in model.base.named_parameters() if one.requires_grad} == trained
    assert {name.removeprefix("base.") for name in model.state_dict() if name.startswith("base.")} == trained


def test_other_methods_than_lora() -> None:
    for config in (
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.VeraConfig(r=4, target_modules=["q_proj"]),
        peft.LoHaConfig(r=4, target_modules=["q_proj"]),
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    ):
        around = peft.get_peft_model(FAMILIES["llama"].build(), config)
        trained = {name for name, one in around.get_base_model().named_parameters() if one.requires_grad}
        model = get_prefix_model(around, PrefixConfig(num_virtual_tokens=4)).train()
        assert {name for name, one in model.base.named_parameters() if one.requires_grad} == trained != set()
        before = snapshot(model)
        learn(model, "llama")
        assert {name for name in changed(model, before) if name.startswith("base.")} == {
            f"base.{one}" for one in trained
        }


def test_methods_that_work_around_the_model_are_refused() -> None:
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for config, method in ((prompt, "PROMPT_TUNING"), (prefix, "PREFIX_TUNING")):
        around = peft.get_peft_model(FAMILIES["llama"].build(), config)
        with pytest.raises(PrefixInputError, match=rf"virtual tokens of its own \({method}\).*get_base_model\(\)"):
            get_prefix_model(around)
    ada = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10)
    adaption = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    invoked = lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    for config in (ada, adaption, invoked):
        around = peft.get_peft_model(FAMILIES["llama"].build(), config)
        with pytest.raises(PrefixInputError, match="a part of its work around the transformers model"):
            get_prefix_model(around)


def test_a_mixed_peft_model_is_taken() -> None:
    around = peft.get_peft_model(FAMILIES["llama"].build(), lora(), mixed=True)
    model = get_prefix_model(around, PrefixConfig(num_virtual_tokens=4)).train()
    assert any("lora_" in name for name in learn(model, "llama"))


def test_an_adapter_may_come_later() -> None:
    model = random_model(FAMILIES["llama"].build())
    text = tokens(2, 6)
    with torch.no_grad():
        before = model(input_ids=text).logits
        model.base.add_adapter(lora())
        assert torch.equal(model(input_ids=text).logits, before)  # it starts as if it were not there
        randomized(model.base)
        assert_close(model(input_ids=text).logits, random_model(with_lora())(input_ids=text).logits)
    gradients = learn(model.train(), "llama")
    assert {name.split(".")[0] for name in gradients} == {"base", "prefixes"}
    with pytest.raises(PrefixInputError, match=r"belongs to the base: call the same method of model\.base"):
        model.add_adapter(lora())


def test_switching_adapters_in_the_base() -> None:
    model, text = random_model(with_lora()), tokens(2, 6)
    with torch.no_grad():
        adapted = model(input_ids=text).logits
        model.base.disable_adapters()
        expected = random_model(FAMILIES["llama"].build())(input_ids=text).logits
        assert_close(model(input_ids=text).logits, expected)
        model.base.enable_adapters()
        assert torch.equal(model(input_ids=text).logits, adapted)


def test_without_the_prefix_the_adapter_stays_on() -> None:
    model, text = random_model(with_lora()), tokens(2, 6)
    with torch.no_grad(), model.disable_prefix():
        assert torch.equal(model(input_ids=text).logits, with_peft()(input_ids=text).logits)


@FAMILY
def test_rows_with_prefixes_of_their_own_share_the_adapter(family: str) -> None:
    model = random_model(with_lora(family), p=3)
    model.add_prefix("long", PrefixConfig(num_virtual_tokens=5, init="normal", init_std=1.0, init_seed=1))
    names = ["default", "long", None]
    arguments = inputs(family, rows=3)
    with torch.no_grad():
        together = model(**arguments, prefix_names=names).logits
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in arguments.items()}
            assert_close(together[row : row + 1], model(**one, prefix_names=[name]).logits)
        assert_close(together[2:], with_peft(family)(**one).logits)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("frozen", [False, True], ids=["both", "adapter alone"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["transformers", "peft"])
@FAMILY
def test_gradient_checkpointing_changes_nothing(
    family: str, how: str, reentrant: bool, frozen: bool, tmp_path: Path
) -> None:
    random_model(with_lora(family)).save_pretrained(tmp_path)

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        base = with_lora(family) if how == "transformers" else with_peft(family)
        model = PrefixModel.from_pretrained(base, tmp_path, is_trainable=not frozen).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return learn(model, family, steps=1)

    expected, actual = gradients(False), gradients(True)
    assert set(actual) == set(expected)
    assert any("lora_" in name for name in expected)
    for name, one in expected.items():
        torch.testing.assert_close(actual[name], one, rtol=1e-4, atol=1e-6)


def test_heads_belong_to_whoever_trains_them() -> None:
    sizes = dict(FAMILIES["llama"].kwargs, num_labels=3)

    def base() -> Any:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**sizes)).eval()  # type: ignore[arg-type]

    config = PrefixConfig(num_virtual_tokens=4)
    around = peft.get_peft_model(base(), lora(task_type="SEQ_CLS"))
    model = get_prefix_model(around, config).train()
    assert model.prefixes.entry().config.modules_to_save == ()
    before = snapshot(model)
    learn_labels = dict(input_ids=tokens(2, 6), labels=torch.tensor([0, 2]))
    model(**learn_labels).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert "base.score.modules_to_save.default.weight" in changed(model, before)
    assert "base.score.original_module.weight" not in changed(model, before)

    beside = base()
    beside.add_adapter(lora())
    model = get_prefix_model(beside, config)
    assert model.prefixes.entry().config.modules_to_save == ("score",)
    inside = base()
    inside.add_adapter(lora(target_modules=["score"]))
    for wanted in (None, ["score"]):
        with pytest.raises(PrefixConfigError, match="An adapter of PEFT works in 'score'"):
            get_prefix_model(inside, config.replace(modules_to_save=wanted))
    get_prefix_model(inside, config.replace(modules_to_save=()))


def test_a_vocabulary_projection_with_an_adapter_gives_the_same_loss() -> None:
    options = dict(target_modules=["q_proj", "lm_head", "embed_tokens"])
    model = random_model(with_lora(**options)).train()
    labels = tokens(2, 6)
    labels[:, :4] = -100
    assert model.label_only_logits
    loss = model(input_ids=tokens(2, 6), labels=labels).loss
    model.label_only_logits = False
    torch.testing.assert_close(loss, model(input_ids=tokens(2, 6), labels=labels).loss)


# --- the stock Trainer


def trained(folder: Path, family: str = "gpt2", resume: Path | None = None, **arguments: Any) -> Trainer:
    """Eight steps with dropout in base, prefix and adapter, with a learning rate for each."""
    torch.manual_seed(0)
    base = FAMILIES[family].build()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    base.add_adapter(lora(family, lora_dropout=0.1))
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, dropout=0.1))
    adapter = [one for name, one in model.named_parameters() if one.requires_grad and name.startswith("base.")]
    prefix = [one for one in model.prefixes.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW([{"params": prefix, "lr": 3e-2}, {"params": adapter, "lr": 2e-4}], weight_decay=0.0)
    settings = dict(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=Rows(16, 1),
        eval_dataset=Rows(8, 2),
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def test_a_resumed_run_of_both_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    with safe_open(checkpoint / "model.safetensors", framework="pt") as content:
        names = set(content.keys())
    assert names == set(whole.model.state_dict())
    assert {name.split(".")[0] for name in names} == {"base", "prefixes"}
    resumed = trained(tmp_path / "resumed", resume=checkpoint)
    assert len(losses(whole)) == 8
    assert losses(resumed) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_each_has_its_learning_rate(tmp_path: Path) -> None:
    """No warning about the adapter's rate, and AdamW's first step is as large as the rate of its group."""
    trainer = trained(tmp_path, max_steps=1, save_strategy="no", lr_scheduler_type="constant")
    fresh = get_prefix_model(_fresh_adapter(), PrefixConfig(num_virtual_tokens=4, dropout=0.1))
    steps = {
        name: float((one - fresh.get_parameter(name)).detach().abs().max())
        for name, one in trainer.model.named_parameters()
        if one.requires_grad
    }
    for name, step in steps.items():
        # The gradient of A is zero while B is.
        rate = 0.0 if "lora_A" in name else 2e-4 if "lora_B" in name else 3e-2
        assert step == pytest.approx(rate, rel=0.02, abs=1e-7), name


def test_a_prefix_that_nothing_reaches_while_the_adapter_learns_draws_a_warning() -> None:
    model = get_prefix_model(with_lora(), PrefixConfig(num_virtual_tokens=4)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.base(**inputs("llama"), labels=tokens(2, 6)).loss.backward()  # not the model, so without its prefix
    with pytest.warns(PrefixWarning, match="no gradient has reached 6 of the prefix's 6 tensors"):
        optimizer.step()


def _fresh_adapter() -> PreTrainedModel:
    torch.manual_seed(0)
    base = FAMILIES["gpt2"].build()
    base.add_adapter(lora("gpt2", lora_dropout=0.1))
    return base


def test_the_best_model_is_loaded_at_the_end_with_its_adapter(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
    )
    best = Path(trainer.state.best_model_checkpoint)
    with safe_open(best / "model.safetensors", framework="pt") as content:
        for name in content.keys():  # noqa: SIM118
            assert torch.equal(content.get_tensor(name), trainer.model.state_dict()[name]), name
    assert best.name != "checkpoint-8"


def test_a_state_with_other_adapters_is_refused(tmp_path: Path) -> None:
    model = get_prefix_model(with_lora(), PrefixConfig(num_virtual_tokens=4))
    state = model.state_dict()
    for other in (
        get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(num_virtual_tokens=4)),
        get_prefix_model(with_lora(r=2), PrefixConfig(num_virtual_tokens=4)),
        get_prefix_model(with_lora(target_modules=["q_proj"]), PrefixConfig(num_virtual_tokens=4)),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(PrefixFileError, match=r"does not fit.*same adapters, trained or frozen as they were"):
            other.load_state_dict(state, strict=False)
        assert all(torch.equal(one, before[name]) for name, one in other.state_dict().items())
    model.save_pretrained(tmp_path / "checkpoint-5")
    get_prefix_model(with_lora(target_modules=["q_proj"])).save_pretrained(tmp_path / "checkpoint-5")  # a new run


def test_copies_keep_their_adapters() -> None:
    model = random_model(with_lora())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=tokens(2, 6)).logits, model(input_ids=tokens(2, 6)).logits)
    assert set(twin.state_dict()) == set(model.state_dict())
