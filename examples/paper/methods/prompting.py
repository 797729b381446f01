"""No training at all: the base reads an instruction, and solved examples, before each input."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .method import Adapted, Method, MethodError, Row, Setting, require_positive


@dataclass(frozen=True)
class Prompting(Method):
    """The base as it is, with text before each prompt.

    A base that is not trained for the task goes on writing behind its answer, usually with another example. So
    examples are separated by `end`, and whoever generates cuts what was written at the first `end` (`Adapted.end`).

    Args:
        shots: How many solved examples, drawn from the training rows; 0 for the instruction alone.
        end: What stands behind the instruction and behind each example.
        answer_tokens: Positions of the model that are kept free for the answer.
    """

    kind: ClassVar[str] = "prompting"
    trains: ClassVar[bool] = False
    shots: int = 0
    end: str = "\n"
    answer_tokens: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "answer_tokens")
        if self.shots < 0 or not self.end:
            raise ValueError("prompting: shots is 0 or more, and end is a text that is not empty.")

    def build(self, setting: Setting) -> Adapted:
        """The base, frozen.

        Raises:
            MethodError: There are fewer training rows than examples are wanted.
        """
        if self.shots > len(setting.rows):
            raise MethodError(f"prompting: {self.shots} shots need as many training rows, not {len(setting.rows)}.")
        setting.base.requires_grad_(False)
        examples = random.Random(setting.seed).sample(list(setting.rows), self.shots)
        return Prompted(self, setting, examples)


class Prompted(Adapted):
    """A base whose prompts get an instruction and examples.

    Args:
        method: The settings.
        setting: What it was built from.
        examples: The solved examples, in their order.
    """

    def __init__(self, method: Prompting, setting: Setting, examples: Sequence[Row]) -> None:
        super().__init__(setting.base)
        self.end = end = method.end
        self.tokenizer = setting.tokenizer
        self.opening = f"{setting.instruction}{end}" if setting.instruction else ""
        self.examples = [f"{row['prompt']}{row['target']}{end}" for row in examples]
        limit = getattr(setting.base.config.get_text_config(), "max_position_embeddings", None)
        self.room = None if limit is None else limit - method.answer_tokens

    def prompt(self, prompt: str) -> str:
        """The prompt behind instruction and examples; the first examples are left out where positions are too few.

        Raises:
            MethodError: Not even the instruction alone fits.
        """
        for first in range(len(self.examples) + 1):
            text = self.opening + "".join(self.examples[first:]) + prompt
            if self.room is None or len(self.tokenizer(text, verbose=False)["input_ids"]) <= self.room:
                return text
        raise MethodError(
            f"prompting: a prompt is longer than the {self.room} positions that the base has before an answer. Leave "
            "such inputs out, shorten them, or lower answer_tokens."
        )

    def save(self, folder: Path) -> None:
        """Nothing is trained, so there is nothing to store."""

    def load(self, folder: Path) -> None:
        """As there is nothing to store, there is nothing to load."""
