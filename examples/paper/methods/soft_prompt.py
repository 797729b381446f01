"""Virtual tokens that are trained in the embedding layer alone: Li & Liang's ablation, and PEFT's prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from peft_prefix.example_inputs import ordinary_tokens

from .method import Adapted, Method, MethodError, Setting, require_positive
from .slots import SlotModel, Slots, first_real, input_embeddings
from .tensors import read_tensors, write_tensors

Init = Literal["vocabulary", "text", "normal"]


@dataclass(frozen=True)
class SoftPrompt(Method):
    """Embeddings of virtual tokens before the input.

    Args:
        length: Number of virtual tokens.
        init: Embeddings of random words of the vocabulary, of a text, or normal random numbers.
        init_text: For `init="text"`, cut or repeated to the length; the task's instruction if left out.
        init_std: Standard deviation of `init="normal"`.
    """

    length: int = 10
    init: Init = "vocabulary"
    init_text: str | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "length")
        if self.init_text is not None and self.init != "text":
            raise ValueError(f'{self.kind}: init_text is read with init="text" only, not {self.init!r}.')

    def initial(self, setting: Setting) -> torch.Tensor:
        """Embeddings to start from, `(p, width)`.

        Raises:
            MethodError: The text has no tokens.
        """
        embeddings: Any = input_embeddings(setting.base)
        generator = torch.Generator().manual_seed(setting.seed)
        if self.init == "normal":
            return self.init_std * torch.randn(self.length, embeddings.weight.shape[1], generator=generator)
        if self.init == "text":
            text = setting.instruction if self.init_text is None else self.init_text
            words = torch.tensor(setting.tokenizer(text)["input_ids"], dtype=torch.long)
            if not len(words):
                raise MethodError(f"{self.kind}: the initial text has no tokens: set init_text.")
            words = words.repeat(-(-self.length // len(words)))[: self.length]
        else:
            words = torch.multinomial(ordinary_tokens(setting.base), self.length, replacement=True, generator=generator)
        with torch.no_grad():
            initial: torch.Tensor = embeddings(words.to(embeddings.weight.device))
        return initial.detach().float()


@dataclass(frozen=True)
class EmbeddingOnly(SoftPrompt):
    """[PREFIX; x; y] with the prefix in the embedding layer only; the layers above compute it as they do any token.

    Args:
        length, init, init_text, init_std: As in `SoftPrompt`.
        reparameterization: `"none"` trains the embeddings, `"mlp"` the paper's network that produces them.
        mlp_hidden_size: Width of the network.
    """

    kind: ClassVar[str] = "embedding_only"
    reparameterization: Literal["none", "mlp"] = "none"
    mlp_hidden_size: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "mlp_hidden_size")

    def build(self, setting: Setting) -> Adapted:
        """The base behind virtual tokens."""
        initial = self.initial(setting).to(setting.base.device)
        trained: DirectEmbeddings | EmbeddingNetwork = DirectEmbeddings(initial)
        if self.reparameterization == "mlp":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(setting.seed)
                trained = EmbeddingNetwork(initial, self.mlp_hidden_size).to(initial.device)
        return EmbeddingsAdapted(SoftPromptModel(setting.base, trained, self.length))


class DirectEmbeddings(nn.Module):
    """Embeddings that are trained themselves, `(p, width)`."""

    def __init__(self, initial: torch.Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(initial.clone())

    def forward(self) -> torch.Tensor:
        return self.embeddings

    def start_from(self, embeddings: torch.Tensor) -> None:
        """Make these the embeddings."""
        with torch.no_grad():
            self.embeddings.copy_(embeddings)


class EmbeddingNetwork(nn.Module):
    """The paper's network, whose output is added to the initial embeddings and starts at zero, as in a prefix."""

    initial: torch.Tensor

    def __init__(self, initial: torch.Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("initial", initial.clone())
        self.embedding = nn.Parameter(torch.randn(len(initial), width))
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, initial.shape[1])
        self.start_from(initial)

    def forward(self) -> torch.Tensor:
        embeddings: torch.Tensor = self.initial + self.output(torch.tanh(self.hidden(self.embedding)))
        return embeddings

    def start_from(self, embeddings: torch.Tensor) -> None:
        """Start anew from these embeddings."""
        with torch.no_grad():
            self.initial.copy_(embeddings)
            self.output.weight.zero_()
            self.output.bias.zero_()


class SoftPromptModel(SlotModel):
    """A base whose input begins with trained embeddings."""

    def places(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Before the first token that is no padding."""
        return first_real(mask)

    def inputs(self, slots: Slots, embeddings: torch.Tensor) -> dict[str, Any]:
        """Embeddings with the trained ones among them."""
        return {"inputs_embeds": slots.filled(embeddings, self.trained())}


class EmbeddingsAdapted(Adapted):
    """Stores the embeddings, whatever has produced them."""

    model: SoftPromptModel

    def save(self, folder: Path) -> None:
        """Write them."""
        write_tensors(folder, self._tensors())

    def load(self, folder: Path) -> None:
        """Go on from those that were written."""
        trained: Any = self.model.trained
        trained.start_from(read_tensors(folder, self._tensors())["embeddings"])

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"embeddings": self.model.trained()}
