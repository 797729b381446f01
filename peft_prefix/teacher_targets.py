"""What a teacher says at labelled positions, and how far a student is from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from .errors import PrefixConfigError

_SMALLEST = -1e4
"""Stands for the logarithm of nothing: finite, also in float16, and its exponential is 0."""


@dataclass(frozen=True)
class TeacherTargets:
    """Log-probabilities of the next token at labelled positions, row after row.

    The `k` most likely tokens are classes of their own; all others together are one more, so that probabilities add up
    to 1.

    Args:
        log_probs: `(positions, k + 1)`, the most likely token first and the rest of the mass last; or
            `(positions, vocabulary)` without a rest.
        ids: The tokens, `(positions, k)`; `None` where all of the vocabulary is there.
    """

    log_probs: torch.Tensor
    ids: torch.Tensor | None

    @classmethod
    def of(cls, logits: torch.Tensor, top_k: int | None) -> TeacherTargets:
        """What logits `(positions, vocabulary)` say.

        Args:
            logits: The teacher's.
            top_k: How many tokens are kept; `None` for all.
        """
        logits = logits.float()
        if top_k is None or top_k >= logits.shape[-1]:
            return cls(logits.log_softmax(dim=-1).clamp(min=_SMALLEST), None)
        ids = logits.topk(top_k, dim=-1).indices
        return cls(_of_classes(logits, ids), ids)

    @property
    def top_tokens(self) -> torch.Tensor:
        """The most likely token at each position."""
        return self.log_probs.argmax(dim=-1) if self.ids is None else self.ids[:, 0]

    def divergence(self, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Kullback-Leibler divergence from the teacher to a student, in nats, `(positions,)`.

        Args:
            logits: The student's, `(positions, vocabulary)`.
            temperature: Above 1 it flattens the probabilities of the classes, for both.
        """
        logits = logits.float()
        student = logits.log_softmax(dim=-1).clamp(min=_SMALLEST) if self.ids is None else _of_classes(logits, self.ids)
        teacher = self.log_probs.float()
        if temperature != 1.0:
            student, teacher = ((one / temperature).log_softmax(dim=-1) for one in (student, teacher))
        return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def require_top_k(top_k: object) -> None:
    """Check a number of tokens.

    Raises:
        PrefixConfigError: It is none.
    """
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise PrefixConfigError(f"top_k must be a number of tokens, at least 1, or None for all, not {top_k!r}.")


def _of_classes(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens and of all others together, `(positions, k + 1)`.

    The rest is summed up itself: as 1 minus the others, a small one would be rounding.
    """
    whole = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(-1, ids)
    rest = logits.scatter(-1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return (torch.cat([chosen, rest], dim=-1) - whole).clamp(min=_SMALLEST)
