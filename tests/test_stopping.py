from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from helpers import random_model, source_of, tokens

from peft_prefix import PrefixWarning

LIMIT, P = 256, 10


def test_generation_keeps_what_it_has_when_the_positions_are_used_up() -> None:
    model = random_model(FAMILIES["gpt2"].build(), p=P)
    text = tokens(2, 240)
    with pytest.warns(PrefixWarning, match="Generation stops: the base model has 256 positions"):
        ids = model.generate(text, max_new_tokens=50, do_sample=False)
    assert ids.shape == (2, LIMIT - P)
    assert (
        torch.equal(ids, model.generate(text, max_new_tokens=5, do_sample=False)[:, : LIMIT - P]) or ids.shape[1] > 245
    )


def test_padding_takes_no_positions_and_embeddings_are_no_ids() -> None:
    model = random_model(FAMILIES["llama"].build(), p=P)
    text, mask = tokens(2, 240), torch.ones(2, 240, dtype=torch.long)
    text[:, :20], mask[:, :20] = 0, 0
    with pytest.warns(PrefixWarning, match="Generation stops"):
        assert model.generate(text, attention_mask=mask, max_new_tokens=50, do_sample=False).shape[1] == LIMIT - P + 20
    embeddings = model.get_input_embeddings()(tokens(1, 240))
    with pytest.warns(PrefixWarning, match="Generation stops"):
        assert model.generate(inputs_embeds=embeddings, max_new_tokens=50, do_sample=False).shape[1] == LIMIT - P - 240


def test_a_decoder_with_its_own_limit_stops_there() -> None:
    model = random_model(FAMILIES["whisper"].build(), p=P)
    with pytest.warns(PrefixWarning, match="has 64 positions"):
        ids = model.generate(**source_of(model.base, 1), max_length=64, do_sample=False, num_beams=2)
    assert ids.shape[1] <= 64 - P
    without = random_model(FAMILIES["whisper"].build(), p=P, sites=["encoder"])
    assert without.generate(**source_of(model.base, 1), max_length=64, do_sample=False).shape[1] > 64 - P
