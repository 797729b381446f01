"""[x; INFIX; y]: trained activations of all layers between the input and the output (Li & Liang 2021, section 7.3).

The infix stands before the separator, which belongs to the output's side: prompts are read as x, infix, separator.

How it is made exact. A row is read with `p` more tokens between x and the separator, and in every layer their keys and
values are replaced by the trained ones as they go into the cache. Everything else is the base's own: its causal mask
hides the infix from x and shows it to the separator and to y; its positions are `0..n-1` for x, `n..n+p-1` for the
infix and those behind it for the rest, in rows of every length; its sliding windows slide over the infix as over text.
What the layers compute at the `p` tokens themselves is read by nobody.

Trained keys are taken as they are, also in models with rotary positions: as in a prefix they are numbers that stand
where a rotated key would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from peft_prefix import PrefixConfig, get_prefix_model

from .method import Adapted, Method, MethodError, Setting
from .slots import IGNORED, SlotModel, Slots
from .tensors import read_tensors, write_tensors


@dataclass(frozen=True)
class Infix(Method):
    """Trained keys and values in all layers between the input and the separator. For causal models.

    Args:
        length: Number of virtual tokens.
        init: What they start from, as in a prefix; a text is `init_text`, or else the task's instruction.
        init_text: See `init`.
        init_std: Standard deviation of `init="normal"`.
        reparameterization: `"none"`, or `"mlp"` for the paper's network.
        mlp_hidden_size: Width of that network.
    """

    kind: ClassVar[str] = "infix"
    length: int = 10
    init: Literal["vocabulary", "text", "normal", "zeros"] = "vocabulary"
    init_text: str | None = None
    init_std: float = 0.02
    reparameterization: Literal["none", "mlp"] = "none"
    mlp_hidden_size: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        self._config(seed=0, instruction="")  # says now if a value cannot be

    def build(self, setting: Setting) -> Adapted:
        """The base with the infix.

        Raises:
            MethodError: The base is no causal model whose layers all keep keys and values, or the prompts do not end
                with the separator's tokens.
        """
        if setting.base.config.is_encoder_decoder:
            raise MethodError(
                "infix: in an encoder-decoder model nothing stands between the input and the output, since each is "
                "read by a part of its own. Use a causal model, or the method prefix."
            )
        separator = list(setting.tokenizer(setting.separator, add_special_tokens=False)["input_ids"])
        for row in setting.rows[:100]:  # to say it early; each batch is checked, too
            ids = list(setting.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"])
            if separator and ids[-len(separator) :] != separator:
                raise MethodError(_no_separator(repr(row["prompt"][-60:])))
        # The library finds the shapes, and fills and keeps the numbers; they are not used as a prefix.
        prefix = get_prefix_model(setting.base, self._config(setting.seed, setting.instruction), setting.tokenizer)
        if any(layer is None for layer in prefix.geometry.sites["decoder"]):
            raise MethodError(
                "infix: some layers of the base keep no keys and values and would read the place of the infix as text. "
                "Use a base with attention in all layers, or the method prefix."
            )
        trained = prefix.prefixes.entry().module
        return InfixAdapted(InfixModel(prefix.base, trained, self.length, separator))

    def _config(self, seed: int, instruction: str) -> PrefixConfig:
        return PrefixConfig(
            num_virtual_tokens=self.length,
            init=self.init,
            init_text=instruction if self.init == "text" and self.init_text is None else self.init_text,
            init_std=self.init_std,
            init_seed=seed,
            reparameterization=self.reparameterization,
            mlp_hidden_size=self.mlp_hidden_size,
        )


class InfixCache(DynamicCache):
    """A cache that puts trained keys and values into the slots of the first pass.

    Args:
        config: The base's.
        slots: Where they go.
        states: Keys and values of each layer, `(heads, p, width)`.
    """

    def __init__(self, config: Any, slots: Slots, states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(config=config)
        self.slots, self.states = slots, states
        self.filled: set[int] = set()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values and return all of the layer's."""
        if layer_idx not in self.filled:
            self.filled.add(layer_idx)
            slots, (key, value) = self.slots.repeated(len(key_states)), self.states[layer_idx]
            key_states, value_states = slots.filled(key_states, key), slots.filled(value_states, value)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class InfixModel(SlotModel):
    """A base that reads trained keys and values before the separator.

    Args:
        base: The base model.
        trained: Gives keys and values by name.
        count: Number of virtual tokens.
        separator: Token ids that every prompt ends with.
    """

    def __init__(self, base: PreTrainedModel, trained: nn.Module, count: int, separator: Sequence[int]) -> None:
        super().__init__(base, trained, count)
        self.register_buffer("separator", torch.tensor(separator, dtype=torch.long, device=base.device))
        self.cache: InfixCache | None = None

    def places(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Before the separator, which ends the prompt: where labels begin, or the row ends.

        Raises:
            ValueError: A prompt does not end with it.
        """
        column = torch.arange(ids.shape[1], device=ids.device)
        ends = ((column + 1) * mask).amax(dim=1)
        if labels is not None:
            learned = labels != IGNORED
            ends = torch.where(learned.any(dim=1), learned.long().argmax(dim=1), ends)
        separator: Any = self.separator
        places = ends - len(separator)
        found = ids.gather(1, (places[:, None] + torch.arange(len(separator), device=ids.device)).clamp(min=0))
        wrong = (found != separator).any(dim=1) | (places < (mask.long().argmax(dim=1)))
        if wrong.any():
            raise ValueError(_no_separator(f"row {int(wrong.long().argmax())} of a batch"))
        return places

    def inputs(self, slots: Slots, embeddings: torch.Tensor) -> dict[str, Any]:
        """Embeddings of any tokens in the slots, and the cache that replaces what they become."""
        tensors = self.trained()
        layers = range(len(tensors) // 2)
        states = [(tensors[f"decoder.layers.{i}.key"], tensors[f"decoder.layers.{i}.value"]) for i in layers]
        self.cache = InfixCache(self.config.get_text_config(decoder=True), slots, states)
        return {"inputs_embeds": embeddings, "past_key_values": self.cache}

    def check(self) -> None:
        """Say if a layer has not asked the cache.

        Raises:
            RuntimeError: One has not.
        """
        cache, self.cache = self.cache, None
        assert cache is not None
        if len(cache.filled) < len(cache.states):
            raise RuntimeError(
                "Some layers of the base have not read the infix: they were given no cache. Gradient checkpointing "
                "does that; switch it off for this method."
            )


class InfixAdapted(Adapted):
    """Stores the infix's keys and values, whatever has produced them."""

    model: InfixModel

    def save(self, folder: Path) -> None:
        """Write them."""
        write_tensors(folder, self.model.trained())

    def load(self, folder: Path) -> None:
        """Go on from those that were written."""
        trained: Any = self.model.trained
        trained.start_from(read_tensors(folder, trained()))


def _no_separator(where: str) -> str:
    return (
        f"infix: the prompt of {where} does not end with the separator's tokens, so the place of the infix is not "
        "known. Let every prompt end with the separator, one that the tokenizer does not join with the text before it."
    )
