"""Flex attention, whose masks are block masks, agrees with eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import ENCODER_DECODERS, FAMILIES
from helpers import assert_close, random_model, source_of, tokens
from torch._inductor.exc import InductorError

from peft_prefix import PrefixConfig, UnsupportedModelError

# Warnings of torch and transformers while flex attention is compiled; the library's own are none of these classes.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "bart"])
def test_flex_attention_agrees_with_eager(family: str) -> None:
    torch.compiler.reset()
    results, mixed, dropped = [], [], []
    for attn in ("eager", "flex_attention"):
        base = FAMILIES[family].build(attn)
        inputs: dict[str, Any] = dict(input_ids=tokens(2, 20))
        if family in ENCODER_DECODERS:
            inputs = dict(**source_of(base, 2), decoder_input_ids=tokens(2, 9))
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, -3:] = 0
        try:
            with torch.no_grad():
                model = random_model(base)
                results.append(model(**inputs).logits[:, :9])
                plain = base(**inputs).logits[:, :9]
                model.add_prefix("longer", PrefixConfig(num_virtual_tokens=7, init="normal", init_std=1.0))
                mixed.append(model(**inputs, prefix_names=["default", "longer"]).logits[:, :9])
                model.add_prefix(
                    "d", PrefixConfig(num_virtual_tokens=4, init="normal", init_std=1.0, token_dropout=0.5)
                )
                torch.manual_seed(1)
                dropped.append(model.train()(**inputs).logits[:, :9])
        except (InductorError, UnsupportedModelError) as error:
            if isinstance(error, InductorError) or isinstance(error.__cause__, InductorError):
                pytest.skip("torch's compiler fails on a kernel of this shape")
            raise
    assert_close(results[1], results[0])
    assert_close(mixed[1], mixed[0])
    assert_close(dropped[1], dropped[0])
    assert (dropped[0] - results[0]).abs().amax(dim=(1, 2)).min() > 1e-2
    assert_close(mixed[0][:1], results[0][:1])
    assert (results[0] - plain).abs().max() > 1e-2
