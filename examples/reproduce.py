"""Rerun the experiments of "Prefix-Tuning" (Li & Liang, ACL 2021).

    python examples/reproduce.py list                                       # the experiments
    python examples/reproduce.py data --data ../shared/data                 # counts of the data sets
    python examples/reproduce.py run small-e2e-low-data --data ../shared/data
    accelerate launch examples/reproduce.py run table2-e2e --data /data/e2e
    python examples/reproduce.py report

A run that is done is not repeated, and one that was interrupted goes on. `docs/paper.md` tells more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from paper import experiments
from paper.data import DATASETS, DataError, check, digest, load
from paper.execute import Options, claim, execute, is_done, result_of
from paper.generation import kept
from paper.methods import MethodError
from paper.metrics import OPTIONAL_METRICS, MissingTool
from paper.processes import BusyError, alone, processes
from paper.report import ReportError, asked_for, build, keep, read_kept
from paper.run import Run
from paper.scoring import score_texts
from paper.splits import splits_of
from paper.training import BatchError
from paper.yaml_files import SettingError, only
from tqdm.auto import tqdm

from peft_prefix import PrefixError


class UnfinishedError(RuntimeError):
    """Runs that could not be done to their end, and why. What they have is kept."""


KEPT = Path(__file__).with_name("results") / "paper"


def list_experiments(options: argparse.Namespace) -> None:
    """Print names, numbers of runs and what they are about."""
    for name, one in experiments.load().items():
        print(f"{name:28} {len(one.runs()):4} runs  {one.model:38} {one.about}")


def count_data(options: argparse.Namespace) -> None:
    """Print the numbers of inputs and texts, and where they differ from the published ones."""
    for dataset in options.only or DATASETS:
        for split in ("train", "dev", "test"):
            try:
                items = load(dataset, options.data, split)
            except DataError as error:
                print(f"{dataset:7} {split:5} not there: {error}")
                continue
            texts = sum(len(item.references) for item in items)
            note = check(dataset, split, items) or "as published"
            print(f"{dataset:7} {split:5} {len(items):6} inputs {texts:7} texts  {note}")


def run_experiments(options: argparse.Namespace) -> None:
    """Do all runs that are not done."""
    where = Options(options.data, options.runs, options.accumulation, options.generation_batch)
    todo = [(name, run) for name in options.experiments for run in _runs(name, options)]
    is_main = processes().is_main_process
    unfinished: dict[str, str] = {}
    for name, run in tqdm(todo, desc="runs", unit="run", disable=not is_main):
        try:
            result = execute(run, where, name)
        except (MethodError, PrefixError, BatchError, MissingTool, BusyError) as error:
            unfinished[run.folder] = str(error)
            continue
        if is_main:
            scores = ", ".join(f"{metric} {value:.4f}" for metric, value in result["metrics"]["all"].items())
            tqdm.write(f"{run.folder}: dev loss {result['dev_loss']}, {scores}")
    _require_no(unfinished)


def score_again(options: argparse.Namespace) -> None:
    """Compute the metrics of all texts anew."""
    unfinished: dict[str, str] = {}
    for run in (run for name in options.experiments for run in _runs(name, options)):
        try:
            with alone(options.runs / run.folder):
                _score(run, options)
        except (MissingTool, BusyError) as error:
            unfinished[run.folder] = str(error)
    _require_no(unfinished)


def report(options: argparse.Namespace) -> None:
    """Keep what runs gave in small files, and make tables and pictures of them."""
    known = experiments.load()
    for name in only(known, options.experiments or list(known), "experiment"):
        file = options.kept / f"{name}.jsonl"
        asked = _runs(name, options)
        done = [run for run in asked if is_done(run, options.runs)]
        if done:
            keep([result_of(run, options.runs, name) for run in done], file)
        found = read_kept(file)
        runs = asked_for(found, [run.asked for run in asked])
        if len(runs) < len(found):
            print(f"{name}: {len(found) - len(runs)} of {len(found)} runs in {file} are not asked for; left out.")
        if not runs:
            print(f"{name}: no run is done in {options.runs}, and none is kept in {options.kept}.")
        for written in build(runs, options.pages, about={name: known[name].about}):
            print(written)


def _score(run: Run, options: argparse.Namespace) -> None:
    on_request = dict.fromkeys(OPTIONAL_METRICS[run.data.dataset])
    also = list(only(on_request, options.also, f"metric on request of {run.data.dataset}"))
    texts = options.runs / run.folder / f"texts-{run.texts_key}"
    splits = splits_of(run.data, options.data)
    written = kept(texts)
    if len(written) < len(splits.test):
        print(f"{run.folder}: {len(written)} of {len(splits.test)} texts are there; left out.")
        return
    claim(texts / "digests.json", {"test": digest(splits.test)})
    predictions = [written[index] for index in range(len(splits.test))]
    score_texts(run.data.dataset, splits.test, predictions, texts, also)


def _require_no(unfinished: dict[str, str]) -> None:
    """Raise what kept runs from their end, each reason once."""
    runs: dict[str, list[str]] = {}
    for folder, reason in unfinished.items():
        runs.setdefault(reason, []).append(folder)
    if runs:
        raise UnfinishedError("\n".join(f"{', '.join(folders)}: {reason}" for reason, folders in runs.items()))


def _runs(name: str, options: argparse.Namespace) -> list[Run]:
    experiment = only(experiments.load(), [name], "experiment")[name]
    if options.model:
        experiment = replace(experiment, model=options.model)
    runs = experiment.runs()
    methods = only({run.method: run for run in runs}, options.only, f"method of {name}")
    return [run for run in runs if not methods or run.method in methods]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(function=function)
        return one

    command("list", list_experiments, "list the experiments")
    data = command("data", count_data, "count inputs and texts, against the published numbers")
    run = command("run", run_experiments, "do the runs of experiments, as far as they are not done")
    again = command("score", score_again, "compute the metrics of kept texts anew")
    tables = command("report", report, "tables and pictures of what was run, beside the paper's figures")
    for one in (data, run, again):
        one.add_argument("--data", required=True, help="folder of the data sets, or an id on the Hub")
    data.add_argument("--only", nargs="*", choices=DATASETS, help="only these data sets")
    for one in (run, again):
        one.add_argument("experiments", nargs="+", metavar="EXPERIMENT")
    for one in (run, again, tables):
        one.add_argument("--model", help="another base than the experiment's: a folder or an id on the Hub")
        one.add_argument("--only", nargs="*", default=[], metavar="METHOD", help="only these methods")
        one.add_argument("--runs", type=Path, default=Path("paper-runs"), help="folder of all runs")
    run.add_argument("--accumulation", type=int, default=1, help="parts of a batch, one after another, to save memory")
    run.add_argument("--generation-batch", type=int, default=16, help="texts at the same time")
    again.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="METRIC",
        choices=sorted({*chain(*OPTIONAL_METRICS.values())}),
        help="metrics beside the usual ones, whose weights must be at hand: %(choices)s",
    )
    tables.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="all without it")
    tables.add_argument("--kept", type=Path, default=KEPT, help="folder of the small files with results")
    tables.add_argument("--pages", type=Path, default=Path("paper-report"), help="folder of the tables and pictures")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options.function(options)
    except (SettingError, DataError, ReportError, UnfinishedError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
