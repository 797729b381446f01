from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, model_with_tokens, tokens, with_text

from peft_prefix.local_windows import LocalWindows


def test_the_prefix_is_visible_beyond_a_window_that_is_a_buffer() -> None:
    """Reference: the base itself on the same tokens, with its buffer opened by hand."""
    base = FAMILIES["gpt_neo"].build()
    prefix, text = tokens(1, 4, seed=2)[0], tokens(2, 30)
    local = base.transformer.h[1].attn.attention
    original = local.bias.clone()
    model = model_with_tokens(base, prefix)
    with torch.no_grad():
        actual = model(input_ids=text).logits
        assert torch.equal(local.bias, original)
        local.bias[..., 4:, :4] = True
        expected = base(input_ids=with_text(prefix, text)).logits[:, 4:]
        local.bias.copy_(original)
        windowed = base(input_ids=with_text(prefix, text)).logits[:, 4:]
    assert_close(actual, expected)
    assert (expected - windowed).abs().max() > 1e-2


def test_buffers_are_restored_after_an_error() -> None:
    base = FAMILIES["gpt_neo"].build()
    windows = LocalWindows(base)
    originals = [module.bias for module in windows.modules]
    assert len(originals) == 2

    def fail() -> None:
        with windows.opened(3):
            assert windows.modules[1].bias[0, 0, 100, 2]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(module.bias is original for module, original in zip(windows.modules, originals, strict=True))


def test_opened_buffers_are_made_again_when_the_model_is_converted() -> None:
    base = FAMILIES["gpt_neo"].build()
    windows = LocalWindows(base)
    with windows.opened(3):
        first = windows.modules[1].bias
    with windows.opened(3):
        assert windows.modules[1].bias is first
    windows.modules[1].bias = windows.modules[1].bias.clone()
    with windows.opened(3):
        assert windows.modules[1].bias is not first


def test_most_models_have_none() -> None:
    assert LocalWindows(FAMILIES["llama"].build()).modules == []
