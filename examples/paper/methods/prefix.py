"""Prefixes of this library."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft_prefix import PrefixConfig, PrefixModel, PromptTargetCollator, get_prefix_model

from .method import Adapted, Method, MethodError, Row, Setting

_SEARCHED = 1000
"""How many training rows are looked at for demonstrations."""


@dataclass(frozen=True)
class Prefix(Method):
    """A prefix; the fields are those of `PrefixConfig`.

    Args:
        length: Number of virtual tokens.
        init: What it starts from. `"text"` reads `init_text`, e.g. one word, which is repeated, or else the task's
            instruction; `"demonstrations"` reads the instruction (`init_text`, or the task's) and, behind it, the
            training rows that fit.
        init_text: See `init`.
        init_std: Standard deviation of `init="normal"`.
        reparameterization: `"none"`, or `"mlp"` for the paper's network.
        mlp_hidden_size: Width of that network.
        dropout: Of single numbers.
        token_dropout: Of virtual tokens.
        freeze_first_token: Whether virtual token 0 stays as it starts.
        leave_one_out: Whether a row that is a demonstration does not see itself.
        sites: Where it acts in an encoder-decoder model; everywhere if left out.
        sliding_window: What happens to it in layers with a sliding window.
    """

    kind: ClassVar[str] = "prefix"
    length: int = 10
    init: Literal["vocabulary", "text", "demonstrations", "normal", "zeros"] = "vocabulary"
    init_text: str | None = None
    init_std: float = 0.02
    reparameterization: Literal["none", "mlp"] = "none"
    mlp_hidden_size: int = 512
    dropout: float = 0.0
    token_dropout: float = 0.0
    freeze_first_token: bool = False
    leave_one_out: bool = True
    sites: tuple[Literal["encoder", "decoder", "cross"], ...] | None = None
    sliding_window: Literal["pinned", "plain"] = "pinned"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._config(seed=0, instruction="")  # says now if a value cannot be

    def build(self, setting: Setting) -> Adapted:
        """The base with the prefix.

        Raises:
            MethodError: No training row fits behind the instruction.
        """
        config = self._config(setting.seed, setting.instruction)
        more: dict[str, Any] = {}
        if self.init == "demonstrations":
            more["demonstrations"] = fitting_rows(setting, self.length, config.init_text or "")
        return Prefixed(get_prefix_model(setting.base, config, setting.tokenizer, **more))

    def _config(self, seed: int, instruction: str) -> PrefixConfig:
        text = self.init_text
        if text is None and self.init == "text":
            text = instruction
        elif text is None and self.init == "demonstrations" and instruction:
            text = f"{instruction}\n"
        return PrefixConfig(
            num_virtual_tokens=self.length,
            init=self.init,
            init_text=text,
            init_std=self.init_std,
            init_seed=seed,
            reparameterization=self.reparameterization,
            mlp_hidden_size=self.mlp_hidden_size,
            dropout=self.dropout,
            token_dropout=self.token_dropout,
            freeze_first_token=self.freeze_first_token,
            leave_one_out=self.leave_one_out,
            sites=self.sites,
            sliding_window=self.sliding_window,
        )


class Prefixed(Adapted):
    """A model with a prefix, saved and loaded by the library. A loaded one is frozen."""

    model: PrefixModel

    def save(self, folder: Path) -> None:
        """Write the prefix."""
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Put a saved prefix in the place of the one that is there."""
        before = self.model.active_prefix
        assert before is not None
        name = "loaded" if before != "loaded" else "default"
        self.model.load_prefix(folder, name)
        self.model.set_prefix(name)
        self.model.remove_prefix(before)


def fitting_rows(setting: Setting, length: int, instruction: str) -> list[Row]:
    """Training rows that fit whole into a length, one after another behind an instruction.

    In an encoder-decoder model the sources must fit behind the instruction, and the targets behind the start token.

    Raises:
        MethodError: Not one fits.
    """
    encode = PromptTargetCollator(setting.tokenizer, setting.base).encode
    source_room, target_room = length - len(setting.tokenizer(instruction)["input_ids"]), length - 1
    is_pair, chosen = bool(setting.base.config.is_encoder_decoder), []
    shortest = None
    for row in itertools.islice(setting.rows, _SEARCHED):
        encoded = encode(row)
        source, target = len(encoded["input_ids"]), len(encoded["labels"]) if is_pair else 0
        shortest = source if shortest is None else min(shortest, source)
        if source <= source_room and target <= target_room:
            chosen.append(row)
            source_room, target_room = source_room - source, target_room - target
    if not chosen:
        raise MethodError(
            f'prefix: with init="demonstrations" no training row fits into {length} virtual tokens behind the '
            f"instruction, which leaves {source_room}; the shortest has {shortest} tokens. Use a larger length."
        )
    return chosen
