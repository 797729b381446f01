"""The example that compares methods: plans that continue where they stopped, tables that say what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def result(run: Any, loss: float, before: float = 3.0) -> dict[str, Any]:
    from learning import described

    curve = {25: (before + loss) / 2, 50: loss + 0.1, 100: loss}
    return {**described(run), "trained": 1000, "before": before, "curve": curve, "seconds": 1.0}


def test_a_plan_goes_on_from_what_is_done_and_repeats_only_the_best_rates(tmp_path: Path) -> None:
    from learning import Log
    from plans import GRIDS, SEEDS, TASKS, comparison

    log = Log(tmp_path / "comparison.jsonl")
    first = comparison(log.best_rate)
    assert len(first) == len(TASKS) * sum(map(len, GRIDS.values()))
    assert {run.seed for run in first} == {0}
    for number, run in enumerate(first[:-1]):
        assert not log.has(run)
        log.add(result(run, loss=2.0 - (run.learning_rate == GRIDS[run.method][1]) + number / 1000))
        assert log.has(run)
    later = [run for run in comparison(log.best_rate) if not log.has(run)]
    assert later[-1] == first[-1]
    others = later[:-1]
    assert len(others) == (len(TASKS) * len(GRIDS) - 1) * (len(SEEDS) - 1)
    assert all(run.learning_rate == GRIDS[run.method][1] and run.seed > 0 for run in others)


def test_tables_and_pictures_say_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import learning_report
    from learning import Log
    from methods import PeftPrefix, Prefix
    from plans import Run

    goal, own = PeftPrefix(from_text=True), Prefix("vocabulary", 40)
    log, swept = Log(tmp_path / "comparison.jsonl"), Log(tmp_path / "sweep.jsonl")
    Log(tmp_path / "regularization.jsonl").add(result(Run("e2e", own, 3e-2), 1.3))
    for task in ("e2e", "webnlg"):
        log.add(result(Run(task, goal, 1e-2), 1.6))
        log.add(result(Run(task, goal, 3e-2), 1.5))
        log.add(result(Run(task, goal, 3e-2, seed=1), 1.7))
        log.add(result(Run(task, own, 3e-2), 1.4))
        log.add(result(Run(task, own, 3e-2, seed=1), 1.45))
        swept.add(result(Run(task, own, 3e-2), 1.4))
    options = ["--results", str(tmp_path), "--pictures", str(tmp_path), "--goals", goal.name]
    monkeypatch.setattr("sys.argv", ["learning_report.py", *options])
    learning_report.main()
    text = capsys.readouterr().out
    assert f"| E2E | {goal.name} | 1,000 | 0.03 | 3.000 | 1.500, 1.700 | **1.600** |" in text
    assert text.index(f"| E2E | {own.name} |") < text.index(f"| E2E | {goal.name} |") < text.index("| WebNLG |")
    assert f"| E2E | {goal.name} | 0.01: 1.600, 0.03: 1.500 |" in text
    assert f"| E2E | {own.name} | 50, 44 |" in text
    assert f"| E2E | {goal.name} | 100, 100 |" in text
    assert f"| E2E | {own.name} | 2.150 | 1.400 | 1.300 |" in text
    for name in ("learning-comparison.png", "learning-sweep.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_loss_to_be_reached_is_the_lowest_of_a_method() -> None:
    from learning_report import steps_table
    from methods import PeftPrefix, Prefix
    from plans import Run

    goal, own = PeftPrefix(from_text=True), Prefix("vocabulary", 40)
    turning = {**result(Run("e2e", goal, 3e-2), 1.6), "curve": {"25": 2.0, "50": 1.5, "100": 1.6}}
    falling = {**result(Run("e2e", own, 3e-2), 1.4), "curve": {"25": 2.0, "50": 1.6, "100": 1.4}}
    table = steps_table([turning, falling], goal.name)
    assert f"| E2E | {goal.name} | 50 |" in table
    assert f"| E2E | {own.name} | 75 |" in table


def test_steps_to_a_loss_are_read_off_straight_lines() -> None:
    from learning_report import steps_to

    run = json.loads(json.dumps({"before": 3.0, "curve": {25: 2.0, 50: 1.5}}))
    assert steps_to(run, 2.5) == pytest.approx(12.5)
    assert steps_to(run, 1.75) == pytest.approx(37.5)
    assert steps_to(run, 1.4) is None
    assert steps_to(run, 3.5) == 0


@pytest.mark.slow
def test_the_default_recipe_learns_table_to_text_on_real_weights() -> None:
    import table_to_text
    from learning import execute
    from plans import GRIDS, Run

    if not table_to_text.E2E_BESIDE_CHECKOUT.is_dir():
        pytest.skip("the E2E data set is not beside the checkout")
    method = next(iter(GRIDS))
    result = execute(Run("e2e", method, learning_rate=3e-2, steps=50, measured_at=(50,)))
    assert result["curve"][50] <= 1.50 < result["before"] - 0.3
