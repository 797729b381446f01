"""Models that would read a prefix wrongly are refused before they are trained."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import CAUSAL, FAMILIES
from family import COMMON
from helpers import assert_close, model_with_tokens, random_model, tokens, with_text

import peft_prefix.written_out
from peft_prefix import (
    PrefixConfig,
    PrefixConfigError,
    PrefixInputError,
    PrefixModel,
    PrefixWarning,
    UnsupportedModelError,
    get_prefix_model,
)

SMALL = dict(COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def test_a_model_that_counts_positions_in_its_own_way_is_refused() -> None:
    base = transformers.RobertaForCausalLM(transformers.RobertaConfig(**SMALL, is_decoder=True)).eval()
    torch.nn.init.normal_(base.roberta.embeddings.position_embeddings.weight)
    with pytest.raises(UnsupportedModelError, match="does not read a prefix of real tokens"):
        get_prefix_model(base)


def test_a_model_that_cannot_run_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    base = FAMILIES["llama"].build()
    monkeypatch.setattr(type(base.model.layers[0].self_attn), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(UnsupportedModelError, match=r"could not be run with a prefix .*: ZeroDivisionError"):
        get_prefix_model(base)


def test_an_encoder_without_a_way_in_is_left_out_after_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    base = FAMILIES["longt5_local"].build()
    monkeypatch.setattr(peft_prefix.written_out, "LAYOUTS", ())
    with pytest.warns(PrefixWarning, match="encoder of LongT5ForConditionalGeneration does not take a prefix"):
        model = get_prefix_model(base)
    assert list(model.geometry.sites) == ["decoder", "cross"]
    with pytest.raises(PrefixConfigError, match="has no site 'encoder'"):
        model.add_prefix("other", PrefixConfig(sites=["encoder"]))


def test_left_padding_is_refused_where_the_base_counts_it_as_text() -> None:
    sizes = dict(d_model=32, num_hidden_layers=2, encoder_layers=2, decoder_layers=2, decoder_attention_heads=2)
    base = transformers.BartForCausalLM(transformers.BartConfig(**COMMON, **sizes, is_encoder_decoder=False)).eval()
    torch.nn.init.normal_(base.model.decoder.embed_positions.weight, std=0.5)
    torch.nn.init.normal_(base.lm_head.weight, std=0.5)
    prefix, text = tokens(1, 3)[0], tokens(2, 6)
    model = model_with_tokens(base, prefix)
    with torch.no_grad():
        assert_close(model(input_ids=text).logits, base(input_ids=with_text(prefix, text)).logits[:, 3:])
    mask = torch.ones(2, 6)
    mask[0, 4:] = 0
    model(input_ids=text, attention_mask=mask)
    with pytest.raises(PrefixInputError, match="counts padding on the left as text"):
        model(input_ids=text, attention_mask=mask.flip(1))


@pytest.mark.parametrize("family", CAUSAL)
def test_models_of_the_conformance_table_do_not_count_left_padding(family: str) -> None:
    assert not random_model(CAUSAL[family].build())._injection.decoder.counts_left_padding


def test_models_without_weights_are_taken_as_they_are() -> None:
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**FAMILIES["llama"].kwargs))
    assert len(list(PrefixModel(base).geometry.layers())) == 3
