"""Tables and pages of runs: every cell against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from paper.report import FinishedRun, build, finished_run, group_runs, read_paper
from paper.report.groups import UnlikeRunsError, telling_settings
from paper.report.pages import topics_of
from paper.report.tables import caption, cost_table, results_table


def record(**changes: Any) -> dict[str, Any]:
    """A finished run as it is kept."""
    return {
        "experiment": "little",
        "dataset": "e2e",
        "model": "gpt2-medium",
        "method": "prefix",
        "setting": {"kind": "prefix", "length": 5, "learning_rate": 8e-5},
        "train_size": None,
        "subset": 0,
        "seed": 0,
        "train_groups": None,
        "test_groups": None,
        "metrics": {"all": {"bleu": 0.6616, "nist": 8.5446}},
        "dev_loss": 1.38,
        "curve": [{"step": 50, "dev_loss": 1.5}, {"step": 100, "dev_loss": 1.38}],
        "trained_parameters": 460_800,
        "base_parameters": 134_515_008,
        "stored_bytes": 921_600,
        "seconds": 241.0,
        "inputs_scored": 630,
        "versions": {"torch": "2.13.0"},
    } | changes


def run(**changes: Any) -> FinishedRun:
    return finished_run(record(**changes), "here")


def cells(table: str) -> list[list[str]]:
    """Rows of a Markdown table, the line under its head left out."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    assert set(lines[1]) == {"---"}
    assert {len(line) for line in lines} == {len(lines[0])}
    return [lines[0], *lines[2:]]


def table(*runs: FinishedRun) -> list[list[str]]:
    return cells(results_table(group_runs(runs), read_paper()))


def test_runs_whose_texts_were_made_in_other_ways_are_not_put_together(tmp_path: Path) -> None:
    greedy, beams = {"generation": {"num_beams": 1}}, {"generation": {"num_beams": 5}}
    with pytest.raises(UnlikeRunsError, match="differ in task"):
        group_runs([run(task=greedy), run(task=beams, seed=1)])
    with pytest.raises(UnlikeRunsError, match="must not be compared"):
        build([run(task=greedy), run(task=beams, method="lora")], tmp_path)


def test_results_with_the_papers_numbers_under_ours() -> None:
    assert table(
        run(metrics={"all": {"bleu": 0.65, "nist": 8.5, "cider": 2.2}}, dev_loss=1.4),
        run(metrics={"all": {"bleu": 0.67, "nist": 8.7, "cider": 2.4}}, dev_loss=1.5, seed=1),
        run(metrics={"all": {"bleu": 0.6616, "nist": 8.5446}}, dev_loss=None, method="lora", setting={"rank": 8}),
    ) == [
        ["method", "model", "runs", "BLEU", "NIST", "CIDEr", "dev loss"],
        ["lora", "gpt2-medium", "1", "66.2", "8.54", "", ""],
        ["prefix", "gpt2-medium", "2", "66.0 ± 1.4", "8.60 ± 0.14", "2.30 ± 0.14", "1.450 ± 0.071"],
        ["PREFIX (0.1%), paper", "gpt2-medium", "", "70.3", "8.82", "2.46", ""],
    ]


def test_another_base_stands_above_all_of_the_papers() -> None:
    rows = table(run(model="some/small"))
    assert [row[1] for row in rows[1:]] == ["small", "gpt2-medium", "gpt2-large"]
    assert [row[3] for row in rows[1:]] == ["66.2", "70.3", "70.3"]


def test_seen_and_unseen_have_columns_of_their_own() -> None:
    scores = {"all": {"multi_bleu": 0.5, "ter": 0.4}, "seen": {"multi_bleu": 0.6, "ter": 0.3}}
    scores["unseen"] = {"multi_bleu": 0.4}
    rows = table(run(dataset="webnlg", metrics=scores, dev_loss=None))
    assert rows[0][3:] == ["BLEU seen", "BLEU unseen", "BLEU all", "TER seen", "TER all"]
    assert rows[1][3:] == ["60.0", "40.0", "50.0", "30.0", "40.0"]
    assert rows[2][3:] == ["62.9", "45.3", "55.0", "35", "42"]  # 0.35 and 0.42 in the paper


def test_a_summary_has_the_papers_two_decimals() -> None:
    rows = table(
        run(dataset="xsum", model="facebook/bart-large", metrics={"all": {"rouge_1": 0.4, "rouge_L": 0.31234}})
    )
    assert rows[1][3:5] == ["40.00", "31.23"]
    assert rows[2][:5] == ["PREFIX (2%), paper", "bart-large", "", "43.80", "36.05"]


def test_a_metric_that_the_paper_lacks_has_an_empty_cell() -> None:
    rows = table(run(metrics={"all": {"bleu": 0.5, "bertscore": 0.9345}}))
    assert [row[3:5] for row in rows] == [["BLEU", "BERTScore"], ["50.0", "93.5"], ["70.3", ""]]


def test_little_data_are_not_compared_with_the_papers_full_data() -> None:
    rows = table(run(train_size=100))
    assert rows[0][:3] == ["method", "training pairs", "model"]
    assert [row[:3] for row in rows[1:]] == [["prefix", "100", "gpt2-medium"]]


@pytest.mark.parametrize("part", [{"notes": ["found less"]}, {"task": {"test_inputs": 100}}], ids=["notes", "inputs"])
def test_other_data_are_not_compared_with_the_papers(part: dict[str, Any]) -> None:
    assert {row[0] for row in table(run())[1:]} > {"prefix"}
    assert [row[0] for row in table(run(**part))[1:]] == ["prefix"]


def test_settings_that_vary_become_columns() -> None:
    runs = [run(method="infix", setting={"length": length, "learning_rate": 1e-3}) for length in (20, 1, 10)]
    rows = table(*runs)
    assert [row[:2] for row in rows] == [
        ["method", "length"],
        ["infix", "1"],
        ["INFIX-1, paper", "1"],
        ["infix", "10"],
        ["INFIX-10, paper", "10"],
        ["infix", "20"],
        ["INFIX-20, paper", "20"],
    ]
    assert [row[4] for row in rows if "paper" in row[0]] == ["67.9", "67.2", "66.7"]


def test_settings_of_other_methods_do_not_tell_anything() -> None:
    groups = group_runs([run(), run(method="lora", setting={"rank": 8})])
    assert telling_settings(groups) == []
    words = [run(setting={"init": "text", "init_text": word}) for word in ("a|b", "banana")]
    assert [row[1] for row in table(*words)[1:3]] == ["“a\\|b”", "“banana”"]


def test_a_score_that_some_runs_lack_says_so() -> None:
    lacking = {"all": {"bleu": None, "nist": 8.0}}
    rows = table(run(), run(seed=1, metrics=lacking), run(seed=2, metrics={"all": {"bleu": 0.6416, "nist": 8.0}}))
    assert rows[1][3] == "65.2 ± 1.4 (2 of 3)"
    assert table(run(metrics=lacking))[1][3] == ""


def test_different_inputs_scored_are_said() -> None:
    rows = table(run(), run(method="lora", inputs_scored=100))
    assert [row[2] for row in rows] == ["inputs scored", "100", "630", ""]


def test_costs() -> None:
    groups = group_runs(
        [
            run(),
            run(seed=1, seconds=243.0),
            run(method="prompting", trained_parameters=0, stored_bytes=0, seconds=None),
            run(method="fine_tuning", trained_parameters=134_515_008, stored_bytes=538_060_032, seconds=100.4),
        ]
    )
    assert cells(cost_table(groups)) == [
        [
            "method",
            "model",
            "runs",
            "trained parameters",
            "of the base",
            "bytes stored per task",
            "seconds of training",
        ],
        ["fine_tuning", "gpt2-medium", "1", "134,515,008", "100 %", "538,060,032", "100"],
        ["prompting", "gpt2-medium", "1", "0", "0 %", "0", ""],
        ["prefix", "gpt2-medium", "2", "460,800", "0.34 %", "921,600", "242 ± 1"],
    ]


def test_caption_says_the_units() -> None:
    assert "BLEU, METEOR, ROUGE-1, ROUGE-2, ROUGE-L, TER and BERTScore in per cent" in caption()
    assert "NIST, CIDEr, MoverScore and BLEURT as their tools print them" in caption()
    assert "better, but for TER and the dev loss" in caption()


def test_a_page_for_each_experiment(tmp_path: Path) -> None:
    scores = {"all": {"bleu": 0.5}, "seen": {"bleu": 0.6}, "unseen": {"bleu": 0.4}}
    runs = [
        *(run(experiment="sizes", train_size=size, seed=seed) for size in (50, 100) for seed in (0, 1)),
        run(experiment="lengths", setting={"length": 1}, curve=[], versions={"torch": "2.12.0"}),
        run(experiment="lengths", setting={"length": 10}, curve=[], inputs_scored=1000),
        run(experiment="words", setting={"init": "text", "init_text": "a"}, curve=[]),
        run(experiment="words", setting={"init": "zeros"}, curve=[], notes=["expected 3 texts", "found 2"]),
        run(experiment="facts", dataset="webnlg", metrics=scores, curve=[]),
    ]
    files = build(runs, tmp_path / "new", about={"sizes": "What more data do"})
    assert sorted(file.name for file in files) == sorted(file.name for file in (tmp_path / "new").iterdir())
    assert {file.name for file in files} == {
        "facts-seen-unseen.png", "facts.md", "lengths-length.png", "lengths.md", "sizes-data-size.png",
        "sizes-dev-loss.png", "sizes.md", "words-initialization.png", "words.md",
    }  # fmt: skip
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in files if file.suffix == ".png")
    page = (tmp_path / "new" / "lengths.md").read_text()
    assert page.startswith("# lengths\n\nBase: gpt2-medium. Scored on 630 to 1,000 inputs. With torch 2.12.0")
    assert "![Scores over the prefix's length](lengths-length.png)" in page
    assert "- Best prefix length, table-to-text (DART): 10 (Section 7.1, figure 4)" in page
    assert "embeddings alone" not in page
    assert (tmp_path / "new" / "sizes.md").read_text().startswith("# sizes\n\nWhat more data do.\n\nBase: ")
    words = (tmp_path / "new" / "words.md").read_text()
    assert "The data are not the published ones:\n\n- expected 3 texts\n- found 2\n\nMean" in words
    assert "not the published" not in page
    assert "On unseen WebNLG categories" in (tmp_path / "new" / "facts.md").read_text()


def test_topics_are_what_varies() -> None:
    def topics(*runs: FinishedRun) -> set[str]:
        return topics_of(group_runs(runs))

    assert topics(run()) == set()
    assert topics(run(), run(method="lora")) == {"comparison", "cost"}
    assert topics(run(train_size=50), run(train_size=100)) == {"low_data"}
    assert topics(run(test_groups=["sport"])) == {"extrapolation"}
    assert topics(run(method="embedding_only")) == {"embedding"}
    # Two methods of different length do not show what length does.
    assert topics(run(train_size=50), run(train_size=50, method="infix", setting={"length": 9})) == {"cost", "infix"}
