"""The divergence from a teacher's most likely tokens, computed by hand."""

from __future__ import annotations

import pytest
import torch

from peft_prefix import PrefixConfigError
from peft_prefix.teacher_targets import TeacherTargets, require_top_k

V = 50


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(6, V, generator=torch.Generator().manual_seed(seed))


def by_hand(teacher: torch.Tensor, student: torch.Tensor, k: int | None, temperature: float) -> torch.Tensor:
    """In float64, with probabilities instead of their logarithms."""
    result = []
    for one, other in zip(teacher.double(), student.double(), strict=True):
        p, q = (row.exp() / row.exp().sum() for row in (one, other))
        if k is not None:
            top = sorted(range(V), key=lambda token, p=p: -float(p[token]))[:k]
            p, q = (torch.cat([row[top], 1 - row[top].sum()[None]]) for row in (p, q))
        p, q = (row ** (1 / temperature) / (row ** (1 / temperature)).sum() for row in (p, q))
        result.append((p * (p / q).log()).sum())
    return torch.stack(result)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, V - 1, None])
def test_it_is_the_divergence_of_top_tokens_and_the_rest(k: int | None, temperature: float) -> None:
    teacher, student = logits(1), logits(2)
    actual = TeacherTargets.of(teacher, k).divergence(student, temperature)
    torch.testing.assert_close(actual.double(), by_hand(teacher, student, k, temperature), rtol=1e-4, atol=1e-5)
    assert (TeacherTargets.of(teacher, k).top_tokens == teacher.argmax(dim=-1)).all()


def test_probabilities_add_up_and_more_tokens_than_there_are_is_all_of_them() -> None:
    targets = TeacherTargets.of(logits(1), 5)
    torch.testing.assert_close(targets.log_probs.exp().sum(dim=-1), torch.ones(6))
    assert targets.log_probs.shape == (6, 6)
    assert TeacherTargets.of(logits(1), V).ids is None


@pytest.mark.parametrize("k", [3, None])
def test_a_rest_that_is_nothing_is_no_trouble(k: int | None) -> None:
    sure = torch.full((2, V), -300.0)
    sure[:, 7] = 300.0
    hidden = logits(3)[:2]
    hidden[:, 10:] = float("-inf")  # as bases do with a part of their vocabulary
    for teacher in (sure, hidden, logits(1)[:2]):
        for start in (sure, hidden, logits(2)[:2]):
            student = start.clone().requires_grad_()
            divergence = TeacherTargets.of(teacher, k).divergence(student, 1.5)
            divergence.sum().backward()
            assert divergence.isfinite().all()
            assert (divergence > -1e-5).all()
            assert student.grad is not None
            assert student.grad.isfinite().all()
    assert float(TeacherTargets.of(sure, k).divergence(sure).abs().max()) < 1e-6


@pytest.mark.parametrize("k", [0, -1, True, 2.0])
def test_a_number_of_tokens_is_checked(k: object) -> None:
    with pytest.raises(PrefixConfigError, match="top_k must be a number of tokens"):
        require_top_k(k)
