"""Runs that are read, kept and grouped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from paper.report import Group, ReportError, UnlikeRunsError, asked_for, group_runs, keep, read_kept
from test_paper_report import record, run


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("experiment", "other"),
        ("dataset", "webnlg"),
        ("model", "gpt2-large"),
        ("method", "lora"),
        ("setting", {"kind": "prefix", "length": 5, "learning_rate": 5e-5}),
        ("train_size", 100),
        ("train_groups", ["news"]),
        ("test_groups", ["sport"]),
        ("inputs_scored", 100),
        ("trained_parameters", 1),
        ("base_parameters", 1),
    ],
)
def test_unlike_runs_are_not_averaged(name: str, value: Any) -> None:
    one, other = run(), run(seed=1, **{name: value})
    with pytest.raises(UnlikeRunsError, match=f"differ in {name} must not be averaged"):
        Group((one, other))


def test_same_name_and_settings_on_other_inputs_is_an_error() -> None:
    with pytest.raises(UnlikeRunsError, match="inputs_scored"):
        group_runs([run(), run(seed=1, inputs_scored=100)])


def test_seeds_subsets_and_versions_may_differ() -> None:
    runs = [run(), run(seed=1, versions={"torch": "2.12.0"}), run(subset=1), run(subset=1, seed=1, seconds=None)]
    assert [len(group.runs) for group in group_runs(runs)] == [4]


def test_one_seed_with_two_results_is_an_error() -> None:
    with pytest.raises(UnlikeRunsError, match="Subset 0 with seed 0 of prefix is there twice"):
        group_runs([run(), run(dev_loss=2.0)])
    with pytest.raises(UnlikeRunsError, match="no runs"):
        Group(())


def test_a_name_for_one_data_size_is_the_method_of_all() -> None:
    groups = group_runs([run(method=f"prefix_low_data_{size}", train_size=size) for size in (50, 100)])
    assert [group.method for group in groups] == ["prefix_low_data"] * 2
    assert group_runs([run(method="adapter_3")])[0].method == "adapter_3"


def test_runs_are_read_from_lines(tmp_path: Path) -> None:
    lines = [json.dumps(record(seed=seed, steps=steps)) for seed, steps in ((2, 100), (3, None))]
    (tmp_path / "kept.jsonl").write_text("\n\n".join(lines) + "\n")
    runs = read_kept(tmp_path / "kept.jsonl")
    assert [(one.seed, one.steps) for one in runs] == [(2, 100), (3, None)]
    assert runs[1].source == f"{tmp_path / 'kept.jsonl'}, line 3"


def test_runs_of_other_settings_are_not_asked_for() -> None:
    wanted = [{"setting": run().setting, "seed": seed} for seed in (0, 1)]
    runs = [run(), run(seed=1), run(seed=2), run(setting={"kind": "prefix", "length": 7}), run(model="gpt2-large")]
    assert asked_for(runs, wanted) == [runs[0], runs[1], runs[4]]
    assert asked_for(runs, []) == []


def test_kept_runs_take_the_place_of_older_ones(tmp_path: Path) -> None:
    file = tmp_path / "results" / "little.jsonl"
    assert read_kept(file) == []
    keep([record(seed=1), record(seed=0)], file)
    keep([record(seed=1, dev_loss=1.25), record(seed=2), record(seed=0, inputs_scored=100)], file)
    assert {(one.seed, one.inputs_scored, one.dev_loss) for one in read_kept(file)} == {
        (0, 630, 1.38), (0, 100, 1.38), (1, 630, 1.25), (2, 630, 1.38)
    }  # fmt: skip
    before = file.read_text()
    keep(reversed([json.loads(line) for line in before.splitlines()]), file)
    assert file.read_text() == before
    with pytest.raises(ReportError, match="lacks"):
        keep([{"experiment": "x"}], file)
    assert file.read_text() == before
    file.write_text(before + '{"experiment": "x"}\n')
    with pytest.raises(ReportError, match="line 5 lacks"):
        keep([record()], file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"experiment": ', r"line 1 is no JSON.*run it again"),
        ("[]", "must hold the fields of one run, not list"),
        (json.dumps(record(metric=1)), r"\['metric'\], which is not known.*'metrics'"),
        (json.dumps({"experiment": "x"}), "lacks .*'base_parameters'"),
        (json.dumps(record(dev_loss=float("nan"))), "dev_loss is nan"),
        (json.dumps(record(metrics={"all": {"bleu": "0.6"}})), "all bleu is '0.6', which is no finite number"),
        (json.dumps(record(metrics={"seen": {"bleu": True}})), "seen bleu is True"),
        (json.dumps(record(curve=[{"step": 5, "dev_loss": float("inf")}])), "dev_loss at step 5 is inf"),
    ],
)
def test_what_is_no_run_is_an_error(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "kept.jsonl").write_text(content)
    with pytest.raises(ReportError, match=message):
        read_kept(tmp_path / "kept.jsonl")
