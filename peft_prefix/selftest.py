"""The library's central promise, tried on the user's own model: a prefix of real tokens acts like those tokens.

Models differ in how they count positions and build masks, and new ones appear every month. A few forward passes on a
handful of tokens show, before any training, whether this model reads a prefix as it should.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .geometry import activations, evaluation_mode, ordinary_tokens

if TYPE_CHECKING:
    from .injection import Injection

_OWNER = "the self-test"


def check_base(base: PreTrainedModel, injection: Injection) -> None:
    """Compare the base with two tokens as a prefix against the base with the same tokens as text.

    Sets `injection.counts_left_padding` if padding on the left moves the positions of this model, so that such a batch
    can be refused when it comes.

    Raises:
        UnsupportedModelError: The logits (or hidden states) differ.
    """
    if any(parameter.is_meta for parameter in base.parameters()):
        return  # there is nothing to compute with
    allowed = torch.nonzero(ordinary_tokens(base))[:, 0]
    ids = allowed[torch.arange(1, 6) * len(allowed) // 7][None].to(base.device)
    cache = activations(base, ids[:, :2])
    prefix = [(layer.keys, layer.values) for layer in cast("Any", cache.layers)]

    def told(text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        arguments = {"input_ids": text, "attention_mask": mask, "use_cache": False}
        entered = injection.enter(base, arguments, prefix, _OWNER)
        return _told(injection.leave(base, base(**entered), entered["past_key_values"]))

    text = ids[:, 2:]
    padded = torch.cat([text[:, :1].expand(-1, 2), text], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    with evaluation_mode(base), torch.no_grad():
        expected = _told(base(input_ids=ids, use_cache=False))[:, 2:]
        actual = told(text, torch.ones_like(text))
        after_padding = told(padded, mask)[:, 2:]
    if not _equal(actual, expected):
        raise UnsupportedModelError(
            f"{type(base).__name__} does not read a prefix of real tokens as it reads the same tokens as text, so its "
            "results with any prefix would be wrong. It probably counts positions or builds masks in a way of its own."
        )
    injection.counts_left_padding = not _equal(after_padding, expected)


def _told(output: Any) -> torch.Tensor:
    """What a model says about every token: its logits, or the last hidden states of one without a head."""
    told: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
    return told


def _equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results agree up to rounding; a wrong position or mask changes one by about as much as it varies."""
    tolerance = 1e-2 if expected.dtype == torch.float32 else 0.5
    spread = (expected.float() - expected.float().mean()).norm()
    return bool((actual.float() - expected.float()).norm() <= tolerance * spread)
