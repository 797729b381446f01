"""The smallest inputs that a base model runs on, for finding out about it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .placement import can_run, home


def example_inputs(base: PreTrainedModel, input_ids: torch.Tensor | None = None) -> dict[str, Any]:
    """Arguments of one forward pass, without a cache.

    Args:
        base: Any transformers model.
        input_ids: Tokens to read, `(batch, tokens)`; an encoder-decoder model gets them on both sides. One ordinary
            token if left out.

    Raises:
        UnsupportedModelError: The model's encoder reads something else than text or the features of speech.
    """
    ids = ordinary_ids(base, 1)[None] if input_ids is None else input_ids
    ids = ids.to(home(base))
    if not base.config.is_encoder_decoder:
        return {"input_ids": ids}
    return {**source_inputs(base, ids), "decoder_input_ids": ids}


def source_inputs(base: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, Any]:
    """Arguments for the encoder of an encoder-decoder model.

    Args:
        base: An encoder-decoder model.
        input_ids: Tokens to read, `(batch, tokens)`. An encoder of speech gets noise instead, `(batch, mel bins,
            frames)`, of the one length that it takes and other noise for other tokens.

    Raises:
        UnsupportedModelError: The encoder reads something else.
    """
    if base.main_input_name == "input_ids":
        return {"input_ids": input_ids}
    config: Any = base.config
    if base.main_input_name == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * config.max_source_positions  # the second convolution of the encoder halves them
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        noise = torch.randn(input_ids.shape[0], config.num_mel_bins, frames, generator=generator)
        return {"input_features": noise.to(home(base), base.dtype)}
    raise UnsupportedModelError(
        f"The encoder of {type(base).__name__} reads {base.main_input_name} in a form that is not known here; prefixes "
        "are supported for encoders of text and for speech encoders like Whisper's."
    )


def ordinary_tokens(base: PreTrainedModel) -> torch.Tensor:
    """1.0 for every word of the vocabulary and 0.0 for the tokens that a config names, `(vocabulary,)`.

    Those are beginning, end and padding, and the placeholders of images and the like.
    """
    text_config: Any = base.config.get_text_config(decoder=True)
    ordinary = torch.ones(text_config.vocab_size)
    for config in (base.config, text_config):
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                for index in value if isinstance(value, list) else [value]:
                    if isinstance(index, int) and 0 <= index < len(ordinary):
                        ordinary[index] = 0.0
    return ordinary


def ordinary_ids(base: PreTrainedModel, count: int) -> torch.Tensor:
    """Different ordinary tokens, spread over the vocabulary, `(count,)`."""
    allowed = torch.nonzero(ordinary_tokens(base))[:, 0]
    chosen: torch.Tensor = allowed[torch.arange(1, count + 1) * len(allowed) // (count + 2)]
    return chosen.to(home(base))


def start_token(base: PreTrainedModel) -> torch.Tensor:
    """The token that the decoder of an encoder-decoder model begins with, `(1,)`."""
    for config in (getattr(base, "generation_config", None), base.config, base.config.get_text_config(decoder=True)):
        for name in ("decoder_start_token_id", "bos_token_id"):
            value = getattr(config, name, None)
            if isinstance(value, int):
                return torch.tensor([value])
    return ordinary_ids(base, 1).cpu()


def loss_counts_items(base: PreTrainedModel) -> bool:
    """Whether the loss depends on `num_items_in_batch`; `True` where that cannot be tried, as transformers assumes."""
    if not can_run(base):
        return True
    ids = ordinary_ids(base, 3)[None]
    inputs = {"input_ids": ids} if not base.config.is_encoder_decoder else source_inputs(base, ids)
    classes = torch.zeros(1, int(getattr(base.config, "num_labels", 1)), device=ids.device)
    problem = getattr(base.config, "problem_type", None)
    try:
        # Labels of a language model, of tokens, of a text, and several of a text.
        for labels in (ids, torch.zeros_like(ids), torch.zeros_like(ids[:, 0]), classes):
            losses = _losses(base, inputs, labels)
            if losses is not None:
                one, two = losses
                return bool((one - two).abs() > 0.1 * one.abs())
    finally:
        if hasattr(base.config, "problem_type"):
            base.config.problem_type = problem  # classifiers note what they were first given
    return True


def _losses(
    base: PreTrainedModel, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The loss when it is told of one item and of two; `None` if it takes no such labels."""
    try:
        with torch.no_grad():
            one, two = (
                base(**inputs, labels=labels, num_items_in_batch=torch.tensor(count, device=labels.device)).loss
                for count in (1, 2)
            )
    except (ValueError, RuntimeError, IndexError, TypeError):
        return None
    return None if one is None or two is None else (one, two)
