"""PEFT's LoRA and prompt tuning. The other methods need no PEFT, so it is imported where these are built."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_prefix.structure import find_structure

from .method import Adapted, Method, Setting, require_positive
from .slots import Slots, behind, first_real, input_embeddings
from .soft_prompt import SoftPrompt
from .tensors import require_alike

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class Lora(Method):
    """LoRA on the projections of queries and values in all attention, with those of keys where they are one matrix.

    Args:
        rank: Of the update.
        alpha: The update is scaled by `alpha / rank`; twice the rank if left out.
        dropout: Of the update's input.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 8
    alpha: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "rank", "alpha")

    def build(self, setting: Setting) -> Adapted:
        """PEFT's model."""
        from peft import LoraConfig

        names = query_and_value(setting.base)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=names,
            fan_in_fan_out=isinstance(setting.base.get_submodule(names[0]), Conv1D),
            task_type=_task(setting.base),
        )
        return PeftAdapted(_with_peft(setting, config))


@dataclass(frozen=True)
class PromptTuning(SoftPrompt):
    """PEFT's prompt tuning: embeddings before the input, before the encoder's in an encoder-decoder model.

    Args: as `SoftPrompt`.
    """

    kind: ClassVar[str] = "prompt_tuning"

    def build(self, setting: Setting) -> Adapted:
        """PEFT's model."""
        from peft import PromptTuningConfig

        initial = self.initial(setting)
        # PEFT would put as many again before the decoder's input in training, but none in generation.
        config = PromptTuningConfig(
            num_virtual_tokens=self.length, num_transformer_submodules=1, task_type=_task(setting.base)
        )
        model: Any = _with_peft(setting, config)
        # PEFT takes the first embedding of the vocabulary's size, which need not be the one that the encoder has.
        model.word_embeddings = input_embeddings(setting.base)
        weight = model.get_parameter("prompt_encoder.default.embedding.weight")
        with torch.no_grad():
            weight.copy_(initial)
        if not setting.base.config.is_encoder_decoder:
            model.generate = functools.partial(_generate, model)
        return PeftAdapted(model)


class PeftAdapted(Adapted):
    """PEFT saves and loads its own."""

    model: PeftModel

    def save(self, folder: Path) -> None:
        """Write PEFT's files."""
        self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def load(self, folder: Path) -> None:
        """Read them.

        Raises:
            ValueError: They are of other modules, or of another rank or length.
        """
        from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

        tensors = load_peft_weights(str(folder), device="cpu")
        require_alike(tensors, get_peft_model_state_dict(self.model, save_embedding_layers=False), folder)
        set_peft_model_state_dict(self.model, tensors)


@torch.no_grad()
def _generate(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **more: Any
) -> torch.Tensor:
    """Generation behind a soft prompt that stands next to each row's text, as it does in training.

    PEFT would put it before the padding of shorter prompts, and count that padding as positions.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompt = model.get_prompt(batch_size=1)[0]
    slots = Slots.at(first_real(mask), len(prompt), input_ids.shape[1])
    embeddings = slots.filled(model.word_embeddings(slots.widened(input_ids)), prompt)
    sequences = model.base_model.generate(inputs_embeds=embeddings, attention_mask=slots.widened(mask, 1), **more)
    return behind(input_ids, sequences)


def query_and_value(base: PreTrainedModel) -> list[str]:
    """Full names of the projections to queries and values in all attention layers.

    In an attention layer they are the linear modules whose names begin as "query" and "value" do. Where none does,
    queries, keys and values are made by one matrix, which is the layer's widest.
    """
    structure = find_structure(base)
    attention = (*structure.encoder_attention, *structure.self_attention, *structure.cross_attention)
    wanted: set[nn.Module] = set()
    for one in attention:
        linear = {name: part for name, part in one.module.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
        named = [part for name, part in linear.items() if name.rpartition(".")[2].lower().startswith(("q", "v"))]
        wanted.update(named or [max(linear.values(), key=_outputs)])
    return [name for name, module in base.named_modules() if module in wanted]


def _outputs(module: nn.Module) -> int:
    return module.nf if isinstance(module, Conv1D) else int(module.get_parameter("weight").shape[0])


def _task(base: PreTrainedModel) -> str:
    return "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"


def _with_peft(setting: Setting, config: PeftConfig) -> PeftModel:
    from peft import get_peft_model

    with _without_noise(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        return get_peft_model(setting.base, config)


@contextmanager
def _without_noise() -> Iterator[None]:
    """PEFT asks a model by a name that transformers is about to change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
