"""How the tests build one tiny model of a family, from its config class (no downloads)."""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

VOCAB = 200
WINDOW = 8
"""Sliding window of every family that has one: shorter than the test's texts, as it is in real use."""


@dataclass(frozen=True)
class Family:
    """How to build one tiny model: the config class's name, the model class's name and the sizes."""

    config: str
    model: str
    kwargs: dict[str, object] = field(default_factory=dict)
    sliding: bool = False
    """Whether some layer has a window of `WINDOW` tokens, so that texts longer than it lose their beginning."""
    limit: int | None = 256
    """Declared maximum of positions; `None` for families that have none."""
    recurrent: bool = False
    """Whether some layer keeps a recurrent state, which a prefix does not touch."""

    since: str = "5.17"
    """First of the tested versions of transformers in which the base itself is right."""
    sdpa_since: str = "5.17"
    """The same for its scaled-dot-product attention."""

    def build(self, attn: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
        """A model with random weights, large enough that logits differ clearly between inputs."""
        if Version(transformers.__version__) < Version(self.since):
            pytest.skip(f"the base itself is wrong before transformers {self.since}")
        config = getattr(transformers, self.config)(**deepcopy(self.kwargs))  # some versions take nested dicts apart
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)._from_config(config, attn_implementation=attn)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.08)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.eos_token_id = generation.forced_eos_token_id = None
            generation.pad_token_id = 0
            generation.encoder_no_repeat_ngram_size = None
            generation.suppress_tokens = generation.begin_suppress_tokens = None
        return model.to(dtype).eval()

    def arguments(self) -> set[str]:
        """Names of the arguments of the model's forward."""
        return set(inspect.signature(getattr(transformers, self.model).forward).parameters)


def supported_attention(family: Family) -> list[str]:
    """The attention implementations that this family's class declares, of those that run on a CPU."""
    has_sdpa = getattr(transformers, family.model)._supports_sdpa
    is_right = Version(transformers.__version__) >= Version(family.sdpa_since)
    return ["eager", *(["sdpa"] if has_sdpa and is_right else [])]


COMMON = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    COMMON,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
