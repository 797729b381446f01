"""Prefixes of encoder-decoder models in use: sites, encoder outputs, initializers, other heads, the Seq2SeqTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ENCODER_DECODERS, FAMILIES
from family import Family
from helpers import assert_close, random_model, source_of, tokens
from torch.utils.data import Dataset
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_prefix import (
    IncompatibleBaseError,
    PrefixConfig,
    PrefixConfigError,
    PrefixInputError,
    PrefixModel,
    get_prefix_model,
)
from peft_prefix.passes import remove_gates

SITES = ("encoder", "decoder", "cross")


def logits(model: PreTrainedModel, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**source_of(model, 2), decoder_input_ids=tokens(2, 6), **more).logits  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- sites


def test_all_sites_are_the_default_and_any_subset_can_be_chosen() -> None:
    base = FAMILIES["bart"].build()
    assert get_prefix_model(base).prefixes.entry("default").config.sites == SITES
    for sites in (["cross"], ["decoder", "encoder"]):
        model = random_model(base, sites=sites)
        names = {name.split(".")[0] for name in model.prefix_state_dict()}
        assert names == set(sites)
        assert model.prefixes.entry("default").config.sites == tuple(site for site in SITES if site in sites)


def test_a_site_that_the_base_does_not_have_is_an_error() -> None:
    with pytest.raises(PrefixConfigError, match=r"LlamaForCausalLM has no site 'cross' .* it has 'decoder'"):
        get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(sites=["decoder", "cross"]))


@pytest.mark.parametrize("family", ["bart", "t5", "whisper", "bert_gpt2", "longt5_global", "prophetnet"])
def test_every_site_acts_by_itself_and_all_sites_act_together(family: str) -> None:
    base = FAMILIES[family].build()
    whole = random_model(base)
    tensors = whole.prefix_state_dict()
    results = [logits(base), logits(whole)]
    for site in SITES:
        alone = random_model(base, sites=[site])
        alone.prefixes.entry().module.start_from(tensors)
        results.append(logits(alone))
    for index, one in enumerate(results):
        for other in results[:index]:
            assert (one - other).abs().max() > 1e-3


def test_a_subset_is_saved_and_loaded(tmp_path: Path) -> None:
    model = random_model(FAMILIES["t5"].build(), sites=["encoder", "cross"])
    model.save_pretrained(tmp_path)
    loaded = PrefixModel.from_pretrained(FAMILIES["t5"].build(), tmp_path)
    assert loaded.prefixes.entry("default").config.sites == ("encoder", "cross")
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(IncompatibleBaseError, match=r"has the sites .* does not have"):
        PrefixModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)


def test_prefixes_with_different_sites_and_lengths_are_switched() -> None:
    base = FAMILIES["bart"].build()
    model = random_model(base, sites=["encoder"])
    model.add_prefix("second", PrefixConfig(num_virtual_tokens=7, init="normal", init_std=1.0, sites=["cross"]))
    second = logits(model)
    model.set_prefix("default")
    first = logits(model)
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(first, logits(random_model(base, sites=["encoder"])))


def test_dropout_differs_between_rows_and_is_the_same_for_all_passes_of_a_call() -> None:
    base = FAMILIES["t5"].build()
    model = random_model(base, dropout=0.5).train()
    ids = tokens(1, 6).expand(3, -1)
    output = model(input_ids=ids, decoder_input_ids=ids).logits
    assert (output[0] - output[1]).abs().max() > 1e-3
    assert torch.equal(logits(model.eval()), logits(model))


def test_a_decoder_may_be_deeper_than_its_encoder() -> None:
    """transformers sizes T5's cache by the depth of its encoder; training and a cache that grows do without."""
    config = T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_decoder_layers=3,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = random_model(T5ForConditionalGeneration(config).eval())
    assert len(model.geometry.sites["cross"]) == 3
    ids, text = torch.arange(3, 9)[None], torch.arange(10, 14)[None]
    model.train()(input_ids=ids, labels=text).loss.backward()
    assert all(parameter.grad is not None for parameter in model.prefixes.parameters())
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, decoder_input_ids=text, use_cache=False).logits
        parts = [
            model(input_ids=ids, decoder_input_ids=text[:, part], past_key_values=cache).logits
            for part in (slice(0, 2), slice(2, 4))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


# ---------------------------------------------------------------------- encoder outputs and caches


def test_encoder_outputs_without_the_prefix_are_an_error() -> None:
    model = random_model(FAMILIES["bart"].build())
    source, text = source_of(model.base, 1), tokens(1, 4)
    plain = model.base.get_encoder()(**source)
    with pytest.raises(PrefixInputError, match=r"not known to come from .*model\.get_encoder"):
        model(encoder_outputs=plain, decoder_input_ids=text)
    with pytest.raises(PrefixInputError, match="not known to come from this model's encoder prefix"):
        model.generate(encoder_outputs=plain, max_new_tokens=2)
    mine = model.get_encoder()(**source)
    with (
        model.disable_prefix(),
        pytest.raises(PrefixInputError, match=r"made with prefix 'default'.*base\.get_encoder"),
    ):
        model(encoder_outputs=mine, decoder_input_ids=text)
    model.initialize_prefix(input_ids=tokens(1, 4)[0])
    with pytest.raises(PrefixInputError, match="made with prefix 'default'"):
        model(encoder_outputs=mine, decoder_input_ids=text)


def test_without_an_encoder_site_encoder_outputs_are_the_bases() -> None:
    model = random_model(FAMILIES["bart"].build(), sites=["decoder", "cross"])
    source, text = source_of(model.base, 1), tokens(1, 4)
    encoded = model.base.get_encoder()(**source)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=text).logits
        assert_close(model(encoder_outputs=encoded, decoder_input_ids=text).logits, expected)
    assert torch.equal(model.get_encoder()(**source)[0], encoded[0])


def test_a_cache_without_a_place_for_cross_attention_is_an_error() -> None:
    model = random_model(FAMILIES["bart"].build())
    with pytest.raises(PrefixInputError, match=r"EncoderDecoderCache\(DynamicCache\(\), DynamicCache\(\)\)"):
        model(**source_of(model.base, 1), decoder_input_ids=tokens(1, 3), past_key_values=DynamicCache())


def test_a_cache_belongs_to_one_prefix() -> None:
    model = random_model(FAMILIES["t5"].build())
    source = source_of(model.base, 1)
    cache = model(**source, decoder_input_ids=tokens(1, 3), use_cache=True).past_key_values
    with model.disable_prefix(), pytest.raises(PrefixInputError, match="read with prefix 'default'"):
        model(**source, decoder_input_ids=tokens(1, 1), past_key_values=cache)


def test_nothing_stays_on_the_base_also_after_an_error() -> None:
    model = random_model(FAMILIES["bart"].build())
    with pytest.raises(RuntimeError):
        model(**source_of(model.base, 2), decoder_input_ids=tokens(3, 4))
    remove_gates(model.base)
    for module in model.base.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


# ---------------------------------------------------------------------- initializers


@pytest.mark.parametrize(
    "family", ["bart", "t5", "t5gemma", "whisper", "bert_bert", "led", "longt5_global", "pegasus_x"]
)
@pytest.mark.parametrize("length", [1, 5])
def test_words_fill_every_site(family: str, length: int) -> None:
    base = FAMILIES[family].build()
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=length))
    other = get_prefix_model(base, PrefixConfig(num_virtual_tokens=length, init_seed=1))
    same = get_prefix_model(base, PrefixConfig(num_virtual_tokens=length))
    for name, tensor in model.prefix_state_dict().items():
        assert tensor.shape[1] == length
        assert tensor.float().std() > 1e-3, name
        assert torch.equal(same.prefix_state_dict()[name], tensor)
    assert any(not torch.equal(other.prefix_state_dict()[n], t) for n, t in model.prefix_state_dict().items())


def test_a_text_gives_the_activations_of_its_tokens_on_both_sides() -> None:
    base = FAMILIES["bart"].build()
    text = tokens(1, 5)[0]
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=5, init="text"), input_ids=text)
    start = torch.tensor([base.config.decoder_start_token_id])
    with torch.no_grad():
        output = base(input_ids=text[None], decoder_input_ids=torch.cat([start, text[:-1]])[None], use_cache=True)
    cache, tensors = output.past_key_values, model.prefix_state_dict()
    for index in range(2):
        decoder, cross = cache.self_attention_cache.layers[index], cache.cross_attention_cache.layers[index]
        assert torch.equal(tensors[f"decoder.layers.{index}.key"], decoder.keys[0])
        assert torch.equal(tensors[f"cross.layers.{index}.value"], cross.values[0])
    attention = base.model.encoder.layers[0].self_attn
    hidden = base.model.encoder(input_ids=text[None], output_hidden_states=True).hidden_states[0]
    expected = attention.k_proj(hidden).unflatten(-1, (4, -1)).transpose(1, 2)[0]
    torch.testing.assert_close(tensors["encoder.layers.0.key"], expected)


def test_a_cache_fills_decoder_and_cross_and_says_that_it_knows_no_encoder() -> None:
    base = FAMILIES["bart"].build()
    ids = tokens(1, 4)
    cache = base(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
    config = PrefixConfig(num_virtual_tokens=4, init="cache")
    with pytest.raises(PrefixConfigError, match="caches hold nothing of encoders"):
        get_prefix_model(base, config, past_key_values=cache)
    model = get_prefix_model(base, config.replace(sites=["decoder", "cross"]), past_key_values=cache)
    expected = cache.cross_attention_cache.layers[1].keys[0]
    assert torch.equal(model.prefix_state_dict()["cross.layers.1.key"], expected)


# ---------------------------------------------------------------------- other heads


@pytest.mark.parametrize("head", ["BartForSequenceClassification", "T5ForSequenceClassification"])
def test_a_classifier_is_trained_and_saved_with_all_sites(head: str, tmp_path: Path) -> None:
    family = FAMILIES["bart" if head.startswith("Bart") else "t5"]
    classifier = Family(family.config, head, {**family.kwargs, "num_labels": 3, "classifier_dropout": 0.0})
    model = random_model(classifier.build())
    ids = torch.cat([tokens(4, 8), torch.full((4, 1), 2)], dim=1)  # these heads read the end token
    assert model.prefixes.entry("default").config.modules_to_save == ("classification_head",)
    with torch.no_grad():
        plain, before = model.base(input_ids=ids).logits, model(input_ids=ids).logits
    assert (plain - before).abs().max() > 1e-3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        loss = model.train()(input_ids=ids, labels=torch.tensor([0, 1, 2, 1])).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.5
    model.eval().save_pretrained(tmp_path)
    loaded = PrefixModel.from_pretrained(classifier.build(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


# ---------------------------------------------------------------------- the Seq2SeqTrainer


class Pairs(Dataset):
    """Texts and the same texts backwards, of different lengths."""

    def __init__(self, count: int) -> None:
        rows = tokens(count, 10, seed=4)
        self.rows = [row[: 5 + index % 6] for index, row in enumerate(rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index].tolist(), "labels": self.rows[index].flip(0).tolist()}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    def padded(name: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(r[name]) for r in rows], True, value)

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": padded("labels", -100)}


def make_trainer(folder: Path, family: str = "bart", **arguments: Any) -> Seq2SeqTrainer:
    model = get_prefix_model(ENCODER_DECODERS[family].build(), PrefixConfig(num_virtual_tokens=3, dropout=0.1))
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        logging_steps=1,
        save_steps=3,
        predict_with_generate=True,
        generation_max_length=6,
        generation_num_beams=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**{**settings, **arguments}),
        train_dataset=Pairs(12),
        eval_dataset=Pairs(5),
        data_collator=collate,
    )


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way to train encoder-decoder models")
@pytest.mark.parametrize("family", ["bart", "t5", "bert_gpt2"])
def test_the_seq2seq_trainer_trains_and_generates(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, family)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    prediction = trainer.predict(Pairs(5))
    assert prediction.metrics["test_loss"] < before
    batch = collate([Pairs(5)[index] for index in range(5)])
    ids = trainer.model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=6, num_beams=2
    )
    width = min(ids.shape[1], prediction.predictions.shape[1])
    assert torch.equal(torch.tensor(prediction.predictions)[:, :width], ids[:, :width])


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    first = make_trainer(tmp_path / "parts", max_steps=6)
    first.train()
    resumed = make_trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for name, tensor in whole.model.prefix_state_dict().items():
        assert torch.equal(resumed.model.prefix_state_dict()[name], tensor), name


class _Pads:
    """As much of a tokenizer as the collator needs."""

    padding_side = "right"

    def pad(self, rows: list[dict[str, Any]], **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True, 0)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_the_collator_gets_decoder_inputs_from_the_base_for_label_smoothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, label_smoothing_factor=0.1, save_strategy="no")
    trainer.data_collator = transformers.DataCollatorForSeq2Seq(_Pads(), model=trainer.model)
    batch = trainer.data_collator([Pairs(5)[index] for index in range(5)])
    expected = trainer.model.base.prepare_decoder_input_ids_from_labels(batch["labels"])
    assert torch.equal(batch["decoder_input_ids"], expected)
    with torch.no_grad():
        scores = trainer.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.log_softmax(-1)
    real = batch["labels"] != -100
    own = -scores.gather(2, batch["labels"].clamp(min=0)[..., None])[..., 0][real].mean()
    smoothed = 0.9 * own - 0.1 * scores.mean(-1)[real].mean()
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), smoothed)
    trainer.train()


def test_encodings_and_caches_from_before_a_training_step_are_known_to_be_old() -> None:
    model = random_model(FAMILIES["bart"].build())
    source, text = source_of(model.base, 1), tokens(1, 3)
    encoded = model.get_encoder()(**source)
    cache = model(**source, decoder_input_ids=text, use_cache=True).past_key_values
    model(**source, decoder_input_ids=text, past_key_values=cache)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(encoder_outputs=encoded, decoder_input_ids=text).logits.square().sum().backward()
    optimizer.step()
    with pytest.raises(PrefixInputError, match="made with prefix 'default'"):
        model(encoder_outputs=encoded, decoder_input_ids=text)
    with pytest.raises(PrefixInputError, match="read with prefix 'default'"):
        model(**source, decoder_input_ids=text, past_key_values=cache)
    model(encoder_outputs=model.get_encoder()(**source), decoder_input_ids=text)
