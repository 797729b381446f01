"""Rows are independent: each row of a mixed batch equals that row alone with its own prefix, or without any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CAUSAL, FAMILIES, KINDS, supported_attention
from helpers import assert_close, random_model, source_of, tokens
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from peft_prefix import PrefixConfig, PrefixModel

# Its new name is not known to all supported versions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

LONG = 30
"""Length of texts that are several windows long."""
NAMES: list[str | None] = ["long", None, "short", "other", "short"]
LENGTHS = {"long": 7, "short": 2, "other": 4}
EQUAL_LENGTHS_ONLY = {"prophetnet"}
"""Families that count positions in a way of their own."""
BACKENDS = [(name, attn) for name, family in FAMILIES.items() for attn in supported_attention(family)]
every_backend = pytest.mark.parametrize(("family", "attn"), BACKENDS)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_kind = pytest.mark.parametrize("family", KINDS)
NEW = 8
GREEDY: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, use_cache=True)
FAULTS = (ValueError, TypeError, RuntimeError, AttributeError, AssertionError, IndexError, KeyError)
"""What bases raise in ways of generating that they do not support."""


def bank_of(base: PreTrainedModel, lengths: dict[str, int] = LENGTHS, **config: Any) -> PrefixModel:
    """A model with several loud prefixes, all of them different."""
    (first, p), *others = lengths.items()
    model = random_model(base, p, init_seed=0, **config)
    for seed, (name, length) in enumerate([(first, p), *others]):
        settings = PrefixConfig(num_virtual_tokens=length, init="normal", init_std=1.0, init_seed=seed, **config)
        model.add_prefix(name, settings)
    model.remove_prefix("default")
    model.set_prefix(None)
    return model


def batch_of(base: PreTrainedModel, family: str) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """A batch with padding on both sides, where the family allows it, and its rows alone without padding."""
    rows = len(NAMES)
    text, mask = tokens(rows, LONG), torch.ones(rows, LONG, dtype=torch.long)
    spans = [slice(0, LONG)] * rows
    if family in CAUSAL:
        mask[0, :5] = mask[2, :9] = mask[3, LONG - 8 :] = 0
        spans[0], spans[2], spans[3] = slice(5, LONG), slice(9, LONG), slice(0, LONG - 8)
        alone = [dict(input_ids=text[row : row + 1, span]) for row, span in enumerate(spans)]
        return dict(input_ids=text.masked_fill(mask == 0, 0), attention_mask=mask), alone
    if family != "prophetnet":  # the base itself reads padding on the right of the decoder's text
        mask[3, LONG - 8 :], spans[3] = 0, slice(0, LONG - 8)
    source = source_of(base, rows)
    alone = [
        {**{name: value[row : row + 1] for name, value in source.items()}, "decoder_input_ids": text[row : row + 1]}
        for row in range(rows)
    ]
    if "attention_mask" in source:
        source["attention_mask"][2, 7:] = 0
        alone[2] = {**alone[2], "input_ids": source["input_ids"][2:3, :7], "attention_mask": torch.ones(1, 7)}
    alone[3]["decoder_input_ids"] = text[3:4, spans[3]]
    return {**source, "decoder_input_ids": text, "decoder_attention_mask": mask}, alone


def alone_with(model: PrefixModel, name: str | None, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of one row with one prefix, or of the plain base."""
    if name is None:
        return model.base(**inputs, use_cache=False).logits
    model.set_prefix(name)
    logits = model(**inputs, use_cache=False).logits
    model.set_prefix(None)
    return logits


def lengths_for(family: str) -> dict[str, int]:
    return dict.fromkeys(LENGTHS, 4) if family in EQUAL_LENGTHS_ONLY else LENGTHS


def names_for(family: str) -> list[str | None]:
    return [name or "other" for name in NAMES] if family in EQUAL_LENGTHS_ONLY else list(NAMES)


@pytest.mark.conformance("rows")
@every_backend
def test_a_row_of_a_mixed_batch_equals_that_row_alone(family: str, attn: str) -> None:
    model = bank_of(FAMILIES[family].build(attn), lengths_for(family))
    batch, alone = batch_of(model.base, family)
    with torch.no_grad():
        together = model(**batch, prefix_names=names_for(family)).logits
        mask = batch["attention_mask" if family in CAUSAL else "decoder_attention_mask"].bool()
        for row, name in enumerate(names_for(family)):
            assert_close(together[row : row + 1, mask[row]], alone_with(model, name, alone[row]))
        without_mask = {name: value for name, value in batch.items() if not name.endswith("attention_mask")}
        unpadded = model(**without_mask, prefix_names=names_for(family)).logits
        one = {name: value[1:2] for name, value in without_mask.items()}
        assert_close(unpadded[1:2], alone_with(model, names_for(family)[1], one))


def prompts_of(base: PreTrainedModel, family: str) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """What is generated from: prompts with padding on the left, or sources, together and alone."""
    batch, alone = batch_of(base, family)
    if family in CAUSAL:
        batch["attention_mask"][3], batch["input_ids"][3] = 1, tokens(len(NAMES), LONG)[3]
        return batch, [*alone[:3], dict(input_ids=batch["input_ids"][3:4]), *alone[4:]]
    rows = [{name: value for name, value in row.items() if not name.startswith("decoder")} for row in alone]
    return {name: value for name, value in batch.items() if not name.startswith("decoder")}, rows


def generated_alone(model: PrefixModel, name: str | None, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """What one row generates with one prefix, or the plain base."""
    if name is None:
        return model.base.generate(**inputs, **options)
    model.set_prefix(name)
    result = model.generate(**inputs, **options)
    model.set_prefix(None)
    return result


def assert_generates_as_alone(model: PrefixModel, family: str, copies: int = 1, **options: Any) -> None:
    """Every row of a mixed batch generates what it generates alone without these options' cache."""
    batch, alone = prompts_of(model.base, family)
    plain = {name: value for name, value in options.items() if name in ("num_beams", "num_return_sequences")}
    together = model.generate(**batch, **{**GREEDY, **options}, prefix_names=names_for(family))
    for row, name in enumerate(names_for(family)):
        expected = generated_alone(model, name, alone[row], **GREEDY, **plain)
        assert torch.equal(together[row * copies : (row + 1) * copies, -NEW:], expected[:, -NEW:]), (row, name)


def base_can(base: PreTrainedModel, family: str, **options: Any) -> bool:
    """Whether the base itself generates the same with these options."""
    batch, _ = prompts_of(base, family)
    try:
        return torch.equal(base.generate(**batch, **{**GREEDY, **options}), base.generate(**batch, **GREEDY))
    except FAULTS:
        return False


@pytest.mark.conformance("rows")
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@every_family
def test_rows_generate_what_they_generate_alone(family: str, cache: str) -> None:
    base = FAMILIES[family].build()
    options = dict(none=dict(use_cache=False), static=dict(cache_implementation="static")).get(cache, {})
    if not base_can(base, family, **options):
        pytest.skip("the base itself does not generate so")
    assert_generates_as_alone(bank_of(base, lengths_for(family)), family, **options)


def gradients_of(model: PrefixModel) -> dict[str, torch.Tensor]:
    found = {name: one.grad.clone() for name, one in model.prefixes.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.conformance("rows")
@pytest.mark.parametrize(("form", "checkpointing"), [("none", None), ("mlp", "non-reentrant"), ("none", "reentrant")])
@every_family
def test_each_prefix_gets_the_gradient_of_its_own_rows(family: str, form: str, checkpointing: str | None) -> None:
    if checkpointing == "reentrant" and family in ("gemma3n_text", "gemma4_text"):
        pytest.skip("layers share caches, where reentrant checkpointing is refused")
    model = bank_of(FAMILIES[family].build(), lengths_for(family), reparameterization=form, mlp_hidden_size=8).train()
    batch, alone = batch_of(model.base, family)
    mask = batch["attention_mask" if family in CAUSAL else "decoder_attention_mask"].bool()
    expected: dict[str, torch.Tensor] = {}
    for row, name in enumerate(names_for(family)):
        if name is not None:
            model.set_prefix(name)
            model(**alone[row]).logits.float().square().sum().backward()
            model.set_prefix(None)
            for key, gradient in gradients_of(model).items():
                expected[key] = expected.get(key, torch.zeros(())) + gradient
    if checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
    model(**batch, prefix_names=names_for(family)).logits.float()[mask].square().sum().backward()
    actual = gradients_of(model)
    assert set(actual) == set(expected)
    assert {key.split(".")[0] for key in actual} == {name for name in names_for(family) if name}
    for key, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0 or form == "mlp", key
        torch.testing.assert_close(actual[key], gradient, rtol=1e-3, atol=max(2e-5 * scale, 1e-5))


WAYS: dict[str, dict[str, Any]] = {
    "beams": dict(num_beams=3),
    "several sequences": dict(num_beams=4, num_return_sequences=2),
    "chunked prefill": dict(prefill_chunk_size=7),
    "static, beams": dict(num_beams=3, cache_implementation="static"),
    "dynamic_full": dict(cache_implementation="dynamic_full"),
}


@pytest.mark.ways("mixed batches")
@pytest.mark.parametrize("way", WAYS)
@every_kind
def test_rows_generate_the_same_in_every_way(family: str, way: str) -> None:
    base = KINDS[family].build()
    if not base_can(base, family, **{name: value for name, value in WAYS[way].items() if not name.startswith("num")}):
        pytest.skip("the base itself does not generate so")
    assert_generates_as_alone(bank_of(base), family, WAYS[way].get("num_return_sequences", 1), **WAYS[way])


@pytest.mark.ways("mixed batches")
@every_kind
def test_sampled_tokens_have_the_probabilities_that_they_have_alone(family: str) -> None:
    model = bank_of(KINDS[family].build())
    batch, alone = prompts_of(model.base, family)
    options = dict(GREEDY, do_sample=True, top_k=None, num_return_sequences=2, return_dict_in_generate=True)
    result = model.generate(**batch, **options, output_logits=True, prefix_names=NAMES)
    logits = torch.stack(result.logits, dim=1)
    assert not torch.equal(result.sequences[0], result.sequences[1])
    for row, name in enumerate(NAMES):
        for copy in (2 * row, 2 * row + 1):
            new = result.sequences[copy : copy + 1, -NEW:]
            inputs = dict(alone[row])
            if family in CAUSAL:
                inputs["input_ids"] = torch.cat([inputs["input_ids"], new[:, :-1]], dim=1)
            else:
                inputs["decoder_input_ids"] = result.sequences[copy : copy + 1, :-1]
            with torch.no_grad():
                expected = alone_with(model, name, inputs)[:, -NEW:]
            assert_close(logits[copy : copy + 1], expected)


@pytest.mark.ways("mixed batches")
@every_kind
def test_a_text_may_go_on_in_the_same_cache(family: str) -> None:
    """Several turns, each with several new tokens, padded rows and the user's own cache."""
    model = bank_of(KINDS[family].build())
    batch, _ = batch_of(model.base, family)
    text = "input_ids" if family in CAUSAL else "decoder_input_ids"
    mask_name = "attention_mask" if family in CAUSAL else "decoder_attention_mask"
    source = {name: value for name, value in batch.items() if name not in (text, mask_name)}
    mask = batch[mask_name].clone()
    mask[3] = 1  # padding on the right belongs at the end of a text
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    if family not in CAUSAL:
        cache = EncoderDecoderCache(cache, DynamicCache())
    pieces = []
    with torch.no_grad():
        expected = model(**source, **{text: batch[text], mask_name: mask}, use_cache=False, prefix_names=NAMES).logits
        for start, end in [(0, 12), (12, 13), (13, 20), (20, LONG)]:
            part = {text: batch[text][:, start:end], mask_name: mask[:, :end]}
            pieces.append(model(**source, **part, past_key_values=cache, prefix_names=NAMES).logits)
    assert_close(torch.cat(pieces, dim=1)[mask.bool()], expected[mask.bool()])


@pytest.mark.ways("mixed batches")
@every_kind
def test_embeddings_and_sources_by_themselves_give_the_same(family: str) -> None:
    model = bank_of(KINDS[family].build())
    batch, _ = prompts_of(model.base, family)
    expected = model.generate(**batch, **GREEDY, prefix_names=NAMES)[:, -NEW:]
    if family in CAUSAL:
        embedded = {**batch, "inputs_embeds": model.get_input_embeddings()(batch.pop("input_ids"))}
        actual = model.generate(**{**batch, "inputs_embeds": embedded["inputs_embeds"]}, **GREEDY, prefix_names=NAMES)
    else:
        with torch.no_grad():
            encoded = model.get_encoder()(**batch, prefix_names=NAMES)
        known = dict(encoder_outputs=encoded, attention_mask=batch["attention_mask"])
        actual = model.generate(**known, **GREEDY, prefix_names=NAMES)
    assert torch.equal(actual[:, -NEW:], expected)
