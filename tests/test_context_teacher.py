"""A teacher says what the plain base says that reads the context and a row as one text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, WINDOW
from helpers import assert_close, random_model, tokens
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from peft_prefix import ContextTeacher, PrefixConfigError, PrefixInputError, PrefixModel
from peft_prefix.context_teacher import context_ids

CONTEXT, LENGTH = 30, 12
CAUSAL = ("llama", "gpt2", "mistral", "gemma3_text", "mpt", "deepseek_v3", "llama4_text", "gpt_neo", "qwen3_next")
ENCODER_DECODERS = ("bart", "t5", "t5gemma")
READ_EACH_TIME = {"llama4_text", "gpt_neo", "qwen3_next", *ENCODER_DECODERS}


def context() -> torch.Tensor:
    return tokens(1, CONTEXT, seed=3)[0]


def padded_batch(base: PreTrainedModel, side: str = "right") -> dict[str, torch.Tensor]:
    """Three rows, of which one is shorter and one has labels in the middle only."""
    text, mask = tokens(3, LENGTH, seed=5), torch.ones(3, LENGTH, dtype=torch.long)
    labels = text.clone() if not base.config.is_encoder_decoder else tokens(3, 8, seed=6)
    labels[2, -3:] = -100
    if not base.config.is_encoder_decoder:
        labels[:, :4] = -100
    padding = slice(LENGTH - 4, None) if side == "right" else slice(0, 4)
    mask[1, padding] = 0
    text[1, padding] = 0
    if not base.config.is_encoder_decoder:
        labels[1, padding] = -100
    return dict(input_ids=text, attention_mask=mask, labels=labels)


def said_by_the_base(base: PreTrainedModel, before: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities at labelled positions, row by row, with the context as text."""
    found = []
    for ids, mask, labels in zip(*(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        own = ids[mask.bool()]
        whole = torch.cat([before, own])[None]
        with torch.no_grad():
            if base.config.is_encoder_decoder:
                found.append(base(input_ids=whole, labels=labels[None]).logits[0][labels != -100])
                continue
            logits = base(input_ids=whole).logits[0]
        for place, label in enumerate(labels[mask.bool()].tolist()):
            if label != -100 and place > 0:
                found.append(logits[len(before) + place - 1][None])
    return torch.cat(found).log_softmax(dim=-1)


@pytest.mark.parametrize("family", [*CAUSAL, *ENCODER_DECODERS])
def test_it_says_what_the_base_says_about_context_and_row_as_text(family: str) -> None:
    base = FAMILIES[family].build()
    assert not FAMILIES[family].sliding or CONTEXT > 2 * WINDOW
    model = random_model(base)
    teacher = ContextTeacher(model, context(), top_k=None)
    assert ("read with each row" in repr(teacher)) is (family in READ_EACH_TIME)
    for side in ("right", "left"):
        batch = padded_batch(base, side)
        expected = said_by_the_base(base, context(), batch)
        assert_close(teacher.targets(batch).log_probs, expected)
        # All of the context counts, wherever no window hides it, and the model's own prefix does not.
        without = said_by_the_base(base, context()[:0], batch)
        assert float((without - expected).abs().max()) > 0.05
    kept = ContextTeacher(model, context(), top_k=5).targets(batch)
    assert kept.ids is not None
    values, ids = expected.topk(5)
    assert torch.equal(kept.ids, ids)
    assert_close(kept.log_probs[:, :5], values)
    rest = 1 - values.exp().sum(dim=-1)
    torch.testing.assert_close(kept.log_probs[:, 5].exp(), rest, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_next", "bart", "t5"])
def test_it_generates_what_the_base_generates_after_the_context(family: str) -> None:
    base = FAMILIES[family].build()
    teacher = ContextTeacher(random_model(base), context())
    prompts, mask = tokens(2, 7, seed=8), torch.ones(2, 7, dtype=torch.long)
    prompts[0, :3] = mask[0, :3] = 0
    options: dict[str, Any] = dict(max_new_tokens=9, do_sample=False)
    actual = teacher.generate(prompts, mask, **options)
    for row, own in enumerate((prompts[0, 3:], prompts[1])):
        whole = torch.cat([context(), own])[None]
        if base.config.is_encoder_decoder:
            assert torch.equal(actual[row], base.generate(whole, **options)[0])
        else:
            assert torch.equal(actual[row, :7], prompts[row])
            assert torch.equal(actual[row, 7:], base.generate(whole, **options)[0, whole.shape[1] :])
    if not base.config.is_encoder_decoder:
        several = teacher.generate(prompts[1:], **options, num_beams=2, num_return_sequences=2)
        assert several.shape == (2, 16)
        assert torch.equal(several[:, :7], prompts[1:].expand(2, -1))


def test_a_long_context_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_prefix.context_teacher._PIECE", 7)
    for family in ("llama", "gpt2", "mistral", "gemma3_text", "mpt", "deepseek_v3", "gemma3n_text"):
        base = FAMILIES[family].build()
        batch = padded_batch(base)
        actual = ContextTeacher(random_model(base), context(), top_k=None).targets(batch).log_probs
        assert_close(actual, said_by_the_base(base, context(), batch))


def test_the_model_does_not_know_of_it() -> None:
    model = random_model(FAMILIES["llama"].build())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.train().modules()]
    teacher = ContextTeacher(model, context())
    teacher.targets(padded_batch(model.base))
    assert list(model.prefixes.entries) == ["default"]
    assert model.prefixes.active == "default"
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(value.requires_grad for value in teacher.targets(padded_batch(model.base)).__dict__.values())


def test_dropout_of_the_base_in_training_is_none_of_the_teachers() -> None:
    base = LlamaForCausalLM(LlamaConfig(**{**FAMILIES["llama"].kwargs, "attention_dropout": 0.5}))  # type: ignore[arg-type]
    model = random_model(base).train()
    teacher = ContextTeacher(model, context(), top_k=None)
    batch = padded_batch(base)
    one, two = teacher.targets(batch).log_probs, teacher.targets(batch).log_probs
    assert torch.equal(one, two)
    assert_close(one, said_by_the_base(base.eval(), context(), batch))


def test_a_context_is_a_text_or_ids() -> None:
    for adds in ("", "bos", "eos", "boseos"):
        tokenizer = tiny_tokenizer(adds=adds)
        ids = context_ids("the Blue Spice", tokenizer).tolist()
        assert ids == [
            *([1] if "bos" in adds else []),
            *tokenizer("the Blue Spice", add_special_tokens=False).input_ids,
        ]
    assert context_ids([5, 6]).tolist() == context_ids(torch.tensor([[5, 6]])).tolist() == [5, 6]
    with pytest.raises(PrefixConfigError, match="pass the tokenizer"):
        context_ids("the Blue Spice")
    for wrong in ([], torch.zeros(2, 3, dtype=torch.long), [0.5], [[1], [2, 3]], None):
        with pytest.raises(PrefixInputError, match="The context must be"):
            context_ids(wrong)  # type: ignore[arg-type]


def test_a_context_that_is_too_long_is_an_error_with_numbers() -> None:
    for family in ("llama", "gpt2", "bart"):
        model = random_model(FAMILIES[family].build())
        with pytest.raises(PrefixInputError, match=r"context has 256 tokens and leaves no room.*has 256 positions"):
            ContextTeacher(model, tokens(1, 256)[0])
        teacher = ContextTeacher(model, tokens(1, 250)[0])
        ids = tokens(1, 7)
        message = r"a row of 7 need 257 positions.*has 256"
        with pytest.raises(PrefixInputError, match=message):
            teacher.targets(dict(input_ids=ids, labels=ids))
        with pytest.raises(PrefixInputError, match=message):
            teacher.generate(ids)


def test_what_cannot_teach_is_refused() -> None:
    base = FAMILIES["llama"].build()
    with pytest.raises(PrefixConfigError, match="the base of a PrefixModel"):
        ContextTeacher(base, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(PrefixConfigError, match=r"language model that reads text, which WhisperFor.* is not"):
        ContextTeacher(random_model(FAMILIES["whisper"].build()), [1, 2])
    model: PrefixModel = random_model(FAMILIES["qwen3_next"].build())
    with pytest.raises(PrefixInputError, match="give max_new_tokens"):
        ContextTeacher(model, [4, 5]).generate(tokens(1, 3), max_length=20)
