"""What `examples/learning.py` runs: which method, on which task, with which learning rate and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from methods import FittedNetwork, FullFineTuning, Lora, Method, PeftPrefix, Prefix

TASKS = ("e2e", "webnlg")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        task: Name of the task.
        method: What is trained.
        learning_rate: The highest one, after the warm-up.
        seed: Of the method and of the order of the data.
        steps: Optimizer steps.
        measured_at: Steps after which the dev loss is measured.
    """

    task: str
    method: Method
    learning_rate: float
    seed: int = 0
    steps: int = 100
    measured_at: tuple[int, ...] = (25, 50, 100)


BestRate = Callable[[str, Method, tuple[float, ...]], float | None]
"""The rate of a grid that was best for a task and method with the first seed; `None` before all have been tried."""

GRIDS: dict[Method, tuple[float, ...]] = {
    Prefix("demonstrations", fields=(("token_dropout", 0.2),)): (1e-2, 3e-2, 6e-2),
    Prefix(): (1e-2, 3e-2, 6e-2),
    PeftPrefix(): (1e-2, 3e-2, 1e-1),
    PeftPrefix(from_text=True): (1e-2, 3e-2, 6e-2),
    Lora(): (3e-4, 1e-3, 3e-3),
    FullFineTuning(): (2e-5, 5e-5, 2e-4),
}
"""Learning rates that each method is tried at."""


def comparison(best_rate: BestRate) -> list[Run]:
    """Every method at every rate of its grid with the first seed, and at the best of them with the others."""
    runs = []
    for task, (method, rates) in product(TASKS, GRIDS.items()):
        runs += [Run(task, method, rate) for rate in rates]
        best = best_rate(task, method, rates)
        runs += [] if best is None else [Run(task, method, best, seed) for seed in SEEDS[1:]]
    return runs


def sweep(best_rate: BestRate) -> list[Run]:
    """Learning rate, initializer, form and length against each other; the fitted network on the first task."""
    starts, lengths = ("vocabulary", "text"), (10, 40)
    direct, network = (1e-2, 3e-2, 1e-1), (3e-4, 1e-3, 3e-3)
    grid: list[tuple[str, Method, tuple[float, ...]]] = []
    for task, init, length in product(TASKS, starts, lengths):
        grid += [(task, Prefix(init, length), direct), (task, Prefix(init, length, "mlp"), network)]
    grid += [(TASKS[0], FittedNetwork(init, 40), network) for init in starts]
    return [Run(task, method, rate, steps=50, measured_at=(50,)) for task, method, rates in grid for rate in rates]


def regularization(best_rate: BestRate) -> list[Run]:
    """Both kinds of dropout, on E2E with the first seed."""
    tried: list[tuple[int, dict[str, float]]] = [(160, {}), (160, {"dropout": 0.1})]
    tried += [(160, {"token_dropout": rate}) for rate in (0.1, 0.2, 0.5)]
    tried += [(512, {"token_dropout": rate}) for rate in (0.1, 0.3)]
    return [Run("e2e", Prefix("demonstrations", length, fields=tuple(more.items())), 3e-2) for length, more in tried]


PLANS = {"comparison": comparison, "sweep": sweep, "regularization": regularization}
