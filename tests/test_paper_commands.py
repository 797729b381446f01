"""The commands that a reader of the paper types, on tiny models and data: nothing but these differ."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_paper import tiny_model, tiny_place

pytest.importorskip("peft")
pytest.importorskip("rouge_score")

import reproduce
from paper import experiments, scoring
from paper.data import Item
from paper.experiments import Experiment
from paper.files import read_json
from paper.metrics import MissingTool
from paper.metrics.evaluations import EVALUATIONS
from paper.processes import alone
from paper.report import read_paper

SHORT = {"steps": 2, "batch_size": 4, "evaluations": 2, "warmup_steps": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_place(tmp_path_factory.mktemp("paper"))


@pytest.fixture(autouse=True)
def _without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR and the others that start Java have tests of their own."""
    java = {"meteor", "meteor_text", "rouge_l", "cider"}
    for name, rules in EVALUATIONS.items():
        quick = tuple(metric for metric in rules.metrics if metric not in java)
        monkeypatch.setitem(EVALUATIONS, name, replace(rules, metrics=quick))
    assert scoring.score_dataset("e2e", ["a"], [["a"]]).keys() == {"bleu", "nist"}


def shortened(experiment: Experiment) -> Experiment:
    """The same methods on the same data set, with one seed, and one size and subset of the training data."""
    vary = {method: {name: [*values][:2] for name, values in grid.items()} for method, grid in experiment.vary.items()}
    return replace(experiment, subsets=[0], seeds=[0], train_sizes=[*experiment.train_sizes][:1], vary=vary)


# Those with larger models differ in the model only.
NAMES = [name for name in experiments.load() if not name.startswith("small") and not name.endswith("-large")]


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_experiments_run_from_the_data_to_the_tables(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from paper import settings
    from paper.data import subsets

    experiment = shortened(experiments.load()[name])
    base = "encoder-decoder" if "bart" in experiment.model else "causal"
    monkeypatch.setattr(experiments, "load", lambda: {name: experiment})
    method = settings.DatasetSettings.method
    monkeypatch.setattr(
        settings.DatasetSettings,
        "method",
        lambda self, of, changes: method(
            replace(self, max_new_tokens=4), of, {**tiny(self.methods[of]), **changes, **SHORT}
        ),
    )
    draw = subsets._draw
    monkeypatch.setattr(subsets, "_draw", lambda items, count, seed: draw(items, min(count, 4), seed))
    where = ["--data", str(place / "data"), "--runs", str(tmp_path / "runs"), "--model", str(place / base)]
    reproduce.main(["run", name, *where])
    folders = ["--kept", str(tmp_path / "kept"), "--pages", str(tmp_path / "pages")]
    reproduce.main(["report", name, *where[2:], *folders])
    lines = (tmp_path / "kept" / f"{name}.jsonl").read_text().splitlines()
    assert len(lines) == len(experiment.runs())
    page = (tmp_path / "pages" / f"{name}.md").read_text()
    assert experiment.about in page
    first = json.loads(lines[0])
    if experiment.dataset == "webnlg":
        assert {"seen", "unseen"} <= first["metrics"].keys()


@pytest.mark.parametrize("dataset", ["e2e", "webnlg", "dart", "xsum"])
def test_what_is_scored_is_what_the_paper_printed(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    rules = EVALUATIONS[dataset]
    monkeypatch.setattr(scoring, "score_dataset", lambda dataset, texts, references, names: dict.fromkeys(names, 1.0))
    scoring.score_texts(dataset, [Item("a", ("b",))], ["b"], tmp_path)
    scored = read_json(tmp_path / "metrics.json")["metrics"]["all"].keys()
    printed = {
        metric
        for row in read_paper().scores
        if row.dataset == dataset
        for scores in row.metrics.values()
        for metric in scores
    }
    assert printed
    assert printed - set(rules.optional) <= scored


def tiny(fields: dict[str, Any]) -> dict[str, Any]:
    """What a method of three narrow layers cannot have otherwise."""
    return {"fraction": 0.2} if "fraction" in fields else {}


OWN = """
bbc:
  separator: " Headline :"
  target_start: " "
  instruction: "Write each headline ."
  max_new_tokens: 8
  methods:
    prefix:
      kind: prefix
      length: 4
      reparameterization: mlp
      learning_rate: 0.001
      <<: &budget {steps: 30, batch_size: 4, evaluations: 3}
    fine_tuning: {kind: fine_tuning, learning_rate: 0.0003, select: best, <<: *budget}
    too_many_shots: {kind: prompting, shots: 99}
"""

START = """
import reproduce
from paper import experiments
from paper.experiments import Experiment

experiments.load = lambda: {{"own": Experiment("", "bbc", {settings!r}, {model!r}, ["prefix", "fine_tuning"], [12])}}
reproduce.main()
"""


def run_in_a_process(place: Path, folder: Path, *launcher: str) -> list[dict[str, Any]]:
    """What `reproduce.py run` and `report` leave."""
    (folder / "settings.yaml").write_text(OWN)
    start = START.format(settings=str(folder / "settings.yaml"), model=str(place / "encoder-decoder-plain"))
    (folder / "start.py").write_text(start)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(Path(reproduce.__file__).parent), str(Path(reproduce.__file__).parents[1])]),
    }
    runs = ["--runs", str(folder / "runs")]
    commands = (
        [sys.executable, *launcher, str(folder / "start.py"), "run", "own", "--data", str(place / "data"), *runs],
        [sys.executable, str(folder / "start.py"), "report", *runs, "--kept", str(folder), "--pages", str(folder)],
    )
    for command in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (folder / "own.jsonl").read_text().splitlines()]


def test_two_processes_do_what_one_does(place: Path, tmp_path: Path) -> None:
    tiny_model(place / "encoder-decoder-plain", encoder_decoder=True, dropout=0.0, std=0.3)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = run_in_a_process(place, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    config = Path(reproduce.__file__).parent / "accelerate" / "ddp.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", port)
    together = run_in_a_process(place, tmp_path / "two", *launcher)
    assert len(list((tmp_path / "two" / "runs").rglob("texts-1.jsonl"))) == len(alone) == 2
    for one, two in zip(alone, together, strict=True):
        assert two["method"] == one["method"]
        assert two["dev_loss"] == pytest.approx(one["dev_loss"], rel=1e-3)
        assert two["dev_loss"] < one["curve"][0]["dev_loss"]
        assert two["inputs_scored"] == one["inputs_scored"]
    texts = {folder: sorted((tmp_path / folder).rglob("predictions.txt")) for folder in ("one", "two")}
    for file, other in zip(*texts.values(), strict=True):
        assert file.read_text() == other.read_text()
    written = [file.read_text().splitlines() for file in texts["one"]]
    assert max(len(set(lines)) for lines in written) > 1, "the texts are all alike, so their order cannot be seen"


def test_counts_are_told_beside_the_published_ones(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce.main(["data", "--data", str(place / "data"), "--only", "e2e"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("e2e     train     12 inputs      12 texts  e2e train: expected 42061 texts")


def test_unknown_names_end_with_a_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"There is no experiment 'tabel2'. There are"):
        reproduce.main(["run", "tabel2", "--data", str(place)])
    with pytest.raises(SystemExit, match=r"There is no method of table2-e2e 'lora'. There are"):
        reproduce.main(["run", "table2-e2e", "--data", str(place), "--only", "prefix", "lora"])
    with pytest.raises(SystemExit, match="There is no experiment 'tabel2'"):
        reproduce.main(["report", "tabel2", "--runs", str(place)])


def test_a_report_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--runs", str(tmp_path / "runs"), "--kept", str(tmp_path / "kept"), "--pages", str(tmp_path / "pages")]
    reproduce.main(["report", "table2-e2e", *folders])
    assert "no run is done" in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()


def test_runs_without_metrics_do_not_keep_others_from_running(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings.yaml").write_text(OWN.replace("steps: 30", "steps: 3"))
    own = Experiment("", "bbc", str(tmp_path / "settings.yaml"), str(place / "causal"), ["prefix", "fine_tuning"], [12])
    monkeypatch.setattr(experiments, "load", lambda: {"own": own})
    where = ["own", "--data", str(place / "data"), "--runs", str(tmp_path / "runs")]

    def fails(*_: Any) -> None:
        raise MissingTool("there is no Java")

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "score_dataset", fails)
        with pytest.raises(SystemExit, match="no Java"):
            reproduce.main(["run", *where])
    assert len(list((tmp_path / "runs").rglob("predictions.txt"))) == 2
    reproduce.main(["score", *where])
    assert len(list((tmp_path / "runs").rglob("metrics.json"))) == 2


def test_runs_that_cannot_be_done_do_not_keep_others_from_running(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings.yaml").write_text(OWN.replace("steps: 30", "steps: 3"))
    methods = ["too_many_shots", "prefix", "fine_tuning"]
    own = Experiment("", "bbc", str(tmp_path / "settings.yaml"), str(place / "causal"), methods, [12])
    monkeypatch.setattr(experiments, "load", lambda: {"own": own})
    (busy,) = [run for run in own.runs() if run.method == "fine_tuning"]
    where = ["own", "--data", str(place / "data"), "--runs", str(tmp_path / "runs")]
    with alone(tmp_path / "runs" / busy.folder), pytest.raises(SystemExit) as stopped:
        reproduce.main(["run", *where])
    first, second = str(stopped.value).splitlines()
    assert first.startswith("UnfinishedError: bbc/too_many_shots-12")
    assert first.endswith("prompting: 99 shots need as many training rows, not 12.")
    assert second.startswith(f"{busy.folder}: Another call works on it.")
    (done,) = (tmp_path / "runs").rglob("metrics.json")
    assert "prefix-12" in str(done)
    with pytest.raises(SystemExit, match="99 shots"):
        reproduce.main(["run", *where])
    assert len(list((tmp_path / "runs").rglob("metrics.json"))) == 2


def test_the_list_names_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    reproduce.main(["list"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in experiments.load())


def test_texts_can_be_scored_anew(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text(OWN)
    own = Experiment("", "bbc", str(tmp_path / "settings.yaml"), str(place / "causal"), ["prefix"], [12])
    monkeypatch.setattr(experiments, "load", lambda: {"own": own})
    where = ["own", "--data", str(place / "data"), "--runs", str(tmp_path / "runs")]
    reproduce.main(["run", *where])
    (file,) = (tmp_path / "runs").rglob("metrics.json")
    wanted = file.read_text()
    file.unlink()
    with alone(file.parents[1]), pytest.raises(SystemExit, match="Another call works on it"):
        reproduce.main(["score", *where])
    reproduce.main(["score", *where])
    assert file.read_text() == wanted
    with pytest.raises(SystemExit, match="SettingError: There is no metric on request of bbc 'bertscore'"):
        reproduce.main(["score", *where, "--also", "bertscore"])
    assert file.read_text() == wanted
    monkeypatch.setitem(reproduce.OPTIONAL_METRICS, "bbc", ("bertscore",))
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "score_dataset", lambda dataset, texts, references, names: dict.fromkeys(names, 1.0))
        reproduce.main(["score", *where, "--also", "bertscore"])
    assert read_json(file)["metrics"]["all"].keys() == {"rouge_1", "rouge_2", "rouge_L", "bertscore"}
    file.write_text(wanted)
    (texts,) = (tmp_path / "runs").rglob("texts-0.jsonl")
    texts.write_text("".join(texts.read_text().splitlines(keepends=True)[:-1]))
    reproduce.main(["score", *where])
    assert "left out" in capsys.readouterr().out
