"""Bases that count positions from 1, change themselves, keep statistics or ignore arguments."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, WINDOW
from families_multimodal import IMAGE_TOKEN, MULTI, image_batch
from family import COMMON, Family
from helpers import assert_close, cache_of_tokens, model_with_tokens, random_model, tokens, with_text
from transformers import PreTrainedModel

from peft_prefix import PrefixConfig, PrefixInputError, UnsupportedModelError, get_prefix_model

SMALL = dict(COMMON, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
BIG_BIRD = dict(
    COMMON,
    d_model=64,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    max_position_embeddings=256,
    decoder_start_token_id=2,
    block_size=4,
    num_random_blocks=1,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
)


def paligemma2() -> PreTrainedModel:
    """Its outer model counts positions from 1, padding included, and makes the masks."""
    text = dict(
        MULTI,
        model_type="gemma2",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        vision_use_head=False,
    )
    kwargs = dict(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, projection_dim=64)
    return Family("PaliGemmaConfig", "PaliGemmaForConditionalGeneration", kwargs).build()


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_an_image_is_not_taken_for_packed_texts(family: str) -> None:
    """Its three rows of positions stand still in time over an image."""
    base = FAMILIES[family].build()
    model, batch = random_model(base), image_batch(family)
    mask = batch.pop("attention_mask")
    with torch.no_grad():
        expected = model(**batch, attention_mask=mask).logits
        assert_close(model(**batch, use_cache=False).logits, expected)
        assert_close(model.train()(**batch).logits, expected)
        assert_close(model.train()(**batch, attention_mask=mask).logits, expected)


def test_left_padding_is_refused_where_an_outer_model_counts_it() -> None:
    base = paligemma2()
    model, text = random_model(base), tokens(2, 7)
    mask = torch.ones_like(text)
    mask[0, :3] = 0
    with pytest.raises(PrefixInputError, match="counts padding on the left as text"):
        model(input_ids=text, attention_mask=mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + 1
    with torch.no_grad():
        alone = model(input_ids=text[:1, 3:]).logits
        assert_close(model(input_ids=text, attention_mask=mask, position_ids=positions).logits[:1, 3:], alone)


@pytest.mark.parametrize("sliding", ["plain", "pinned"])
def test_positions_that_begin_at_1_do_not_move_a_window(sliding: str) -> None:
    base = paligemma2()
    prefix, text = tokens(1, 3, seed=2)[0], tokens(2, 12 if sliding == "plain" else 5)
    config = PrefixConfig(num_virtual_tokens=3, init="cache", sliding_window=sliding)
    model = get_prefix_model(base, config, past_key_values=cache_of_tokens(base, prefix[None]))
    with torch.no_grad():
        assert_close(model(input_ids=text).logits, base(input_ids=with_text(prefix, text)).logits[:, 3:])
    options = dict(max_new_tokens=6 if sliding == "plain" else 1, do_sample=False)
    expected = base.generate(with_text(prefix, text), **options)[:, 3:]
    assert torch.equal(model.generate(text, **options), expected)


def test_an_image_does_not_move_a_plain_window() -> None:
    kwargs: dict[str, Any] = dict(FAMILIES["qwen2_5_vl"].kwargs)
    text = {**kwargs["text_config"], "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    base = Family("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", {**kwargs, "text_config": text}).build()
    prefix, batch = tokens(1, 3, seed=2)[0], image_batch("qwen2_5_vl", before=4, after=6)
    config = PrefixConfig(num_virtual_tokens=3, init="cache", sliding_window="plain")
    model = get_prefix_model(base, config, past_key_values=cache_of_tokens(base, prefix[None]))
    wider = {**batch, "input_ids": with_text(prefix, batch["input_ids"])}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        wider[name] = torch.nn.functional.pad(batch[name], (3, 0), value=value)
    with torch.no_grad():
        assert_close(model(**batch).logits, base(**wider).logits[:, 3:])


def test_left_padding_is_refused_where_keys_are_rotated_by_their_place_in_the_cache() -> None:
    config = {**SMALL, "is_decoder": True, "embedding_size": 64, "hidden_dropout_prob": 0.0}
    kwargs = {**config, "attention_probs_dropout_prob": 0.0}
    base = Family("RoFormerConfig", "RoFormerForCausalLM", kwargs, since="5.23").build()
    prefix, text = tokens(1, 3, seed=2)[0], tokens(2, 6)
    model = model_with_tokens(base, prefix)
    with torch.no_grad():
        assert_close(model(input_ids=text).logits, base(input_ids=with_text(prefix, text)).logits[:, 3:])
    mask = torch.ones(2, 6)
    mask[0, :2] = 0
    with pytest.raises(PrefixInputError, match="counts padding on the left as text"):
        model(input_ids=text, attention_mask=mask)


def test_running_statistics_of_the_base_stay() -> None:
    base = FAMILIES["llama"].build()
    base.model.norm = torch.nn.Sequential(base.model.norm, _Normed())
    model = random_model(base).train()
    before = {name: buffer.clone() for name, buffer in base.named_buffers()}
    model(input_ids=tokens(2, 6))
    for name, buffer in base.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert model.base.model.layers[0].training


class _Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(64)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(("family", "counts"), [("llama", True), ("bart", False), ("t5", False), ("bert_gpt2", False)])
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way to train encoder-decoder models")
def test_a_loss_that_ignores_the_number_of_items_is_known(family: str, counts: bool) -> None:
    assert random_model(FAMILIES[family].build()).accepts_loss_kwargs is counts


@pytest.mark.parametrize("problem", [None, "regression", "single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_losses_of_classifiers_count_no_items(head: str, problem: str | None) -> None:
    """The Trainer would multiply their loss by the number of processes, and add up accumulated batches."""
    sizes = {**FAMILIES["llama"].kwargs, "num_labels": 3, "problem_type": problem}
    config = transformers.LlamaConfig(**sizes)
    model = random_model(getattr(transformers, f"LlamaFor{head}")(config))
    assert model.accepts_loss_kwargs is False
    assert model.config.problem_type == problem


def test_a_base_that_exchanges_its_attention_for_short_inputs_is_refused_and_left_as_it_was() -> None:
    family = Family("BigBirdPegasusConfig", "BigBirdPegasusForConditionalGeneration", BIG_BIRD)
    base = family.build()
    modules, ids = list(base.modules()), tokens(1, 96)
    with torch.no_grad():
        expected = base(input_ids=ids, decoder_input_ids=tokens(1, 4)).logits
    with pytest.raises(UnsupportedModelError, match=r"exchanges parts of itself .* attention_type='original_full'"):
        get_prefix_model(base)
    assert list(base.modules()) == modules
    assert base.model.encoder.attention_type == "block_sparse"
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids, decoder_input_ids=tokens(1, 4)).logits, expected)


def test_masks_of_encoders_are_found_also_where_their_layers_know_another_one() -> None:
    kwargs = {**BIG_BIRD, "attention_type": "original_full"}
    model = random_model(Family("BigBirdPegasusConfig", "BigBirdPegasusForConditionalGeneration", kwargs).build())
    assert "encoder" in model.geometry.sites
    ids, text = tokens(2, 12), tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    with torch.no_grad():
        alone = model(input_ids=ids[:1, :7], decoder_input_ids=text[:1]).logits
        assert_close(model(input_ids=ids, attention_mask=mask, decoder_input_ids=text).logits[:1], alone)


@pytest.mark.parametrize("family", ["llama", "bart", "longt5_local"])
def test_a_model_can_be_sent_to_another_process(family: str) -> None:
    model = random_model(FAMILIES[family].build(), reparameterization="mlp", mlp_hidden_size=8)
    arguments = dict(input_ids=tokens(2, 6))
    if family != "llama":
        arguments["decoder_input_ids"] = tokens(2, 4)
    other = pickle.loads(pickle.dumps(model))
    assert type(other) is type(model)
    with torch.no_grad():
        assert torch.equal(other(**arguments).logits, model(**arguments).logits)


def test_what_a_model_says_while_it_is_tried_is_cut_short() -> None:
    config = transformers.T5Config(**{**FAMILIES["t5"].kwargs, "num_labels": 3})
    with pytest.raises(UnsupportedModelError) as caught:
        get_prefix_model(transformers.T5ForTokenClassification(config))
    assert len(str(caught.value)) < 600
