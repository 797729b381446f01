"""The conformance tables: every test with a `conformance` or `ways` mark fills one cell, family × check.

`conformance` is for what holds for every family, `ways` for ways to train and generate, over families that differ in
kind.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, KINDS
from hub_client import ada as ada
from hub_client import hub as hub
from hub_client import pauses as pauses

_Outcome = tuple[str, str]
"""Outcome of one test, and the reason if it was skipped."""
_MARK = "<!-- written by the tests: family × check -->"
_TITLES = {"conformance": "Every family", "ways": "Ways to train and generate"}
"""The tables, by the mark that fills them."""
_NO_ENCODER = "has no encoder"
_NOT_TESTED = {
    "chat": "chat templates are for causal models",
    "cross": _NO_ENCODER,
    "encoder": _NO_ENCODER,
    "encoder_outputs": _NO_ENCODER,
    "image": "reads no images",
    "plain windows": "has no sliding window",
    "SFTTrainer": "TRL's trainer is for causal models",
    "several turns": "the base's own generate reads a text again that a given cache holds already",
}
"""Why a family has no test of a check at all."""
_NO_PLAIN_WINDOWS = {
    "gpt_neo": "its windows are buffers, where plain windows are refused; see test_plain_windows.py",
    "llama4_text": "its chunks count real tokens, so no base can be asked; see test_plain_windows.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-table", type=Path, help="replace the table in this Markdown page")


def pytest_configure(config: pytest.Config) -> None:
    for mark, title in _TITLES.items():
        config.addinivalue_line("markers", f"{mark}(check): the test fills the cell family × check of {title!r}")
    config.stash[_TABLES] = [Table("conformance", list(FAMILIES)), Table("ways", list(KINDS))]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first: at the end, one process would work on them while the other has nothing left to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


class Table:
    """What the tests with one mark found, and how it reads.

    Args:
        mark: The mark.
        known: Families in order.
    """

    def __init__(self, mark: str, known: list[str]) -> None:
        self.mark = mark
        self.known = known
        self.cells: dict[tuple[str, str], list[_Outcome]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        for name, value in report.user_properties:
            if name == self.mark:
                family, check = str(value).split("|")
                self.cells[family, check].append((report.outcome, _reason(report.longrepr)))

    @property
    def checks(self) -> list[str]:
        return sorted({check for _, check in self.cells})

    @property
    def families(self) -> list[str]:
        return [family for family in self.known if any((family, check) in self.cells for check in self.checks)]

    def cell(self, family: str, check: str) -> _Outcome:
        """`ok`, `FAIL` or `–` with the reason."""
        outcomes = self.cells.get((family, check), [])
        for outcome, symbol in (("failed", "FAIL"), ("passed", "ok")):
            if any(found == outcome for found, _ in outcomes):
                return symbol, ""
        return "–", outcomes[0][1] if outcomes else _why_not_tested(family, check)

    def lines(self) -> list[str]:
        """The table as plain text."""
        width = max(map(len, self.families))
        rows = [" " * width + "  " + "  ".join(self.checks)]
        for family in self.families:
            cells = "  ".join(self.cell(family, check)[0].ljust(len(check)) for check in self.checks)
            rows.append(f"{family.ljust(width)}  {cells}")
        return rows

    def markdown(self) -> str:
        """The table in Markdown, with the reasons as numbered notes below."""
        notes: dict[str, int] = {}
        rows = ["| family | " + " | ".join(self.checks) + " |", "| --- |" + " :-: |" * len(self.checks)]
        for family in self.families:
            cells = []
            for check in self.checks:
                symbol, reason = self.cell(family, check)
                if symbol == "–":
                    symbol += f"<sup>{notes.setdefault(reason, len(notes) + 1)}</sup>"
                cells.append(symbol)
            rows.append(f"| {family} | " + " | ".join(cells) + " |")
        reasons = [f"{number}. {reason}" for reason, number in notes.items()]
        why = ["", "Why a check does not apply:", "", *reasons] if reasons else []
        return "\n".join([f"## {_TITLES[self.mark]}", "", *rows, *why]) + "\n"


_TABLES = pytest.StashKey[list[Table]]()


@pytest.fixture(autouse=True)
def _conformance_cell(request: pytest.FixtureRequest, record_property: Any) -> None:
    for name in _TITLES:
        mark = request.node.get_closest_marker(name)
        if mark is not None:
            record_property(name, f"{request.node.callspec.params['family']}|{mark.args[0]}")


def pytest_sessionstart(session: pytest.Session) -> None:
    for table in session.config.stash[_TABLES]:
        session.config.pluginmanager.register(table)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tables = [table for table in config.stash[_TABLES] if table.cells]
    for table in tables:
        terminalreporter.section(f"{_TITLES[table.mark]}: family × check")
        for line in table.lines():
            terminalreporter.write_line(line)
    page = config.getoption("--conformance-table")
    if page is None or not tables:
        return
    if any("FAIL" in line for table in tables for line in table.lines()):
        raise pytest.UsageError("A table with a failing cell is not written.")
    text = page.read_text(encoding="utf-8").split(_MARK)[0]
    content = "\n".join(table.markdown() for table in tables)
    page.write_text(f"{text}{_MARK}\n\n{content}", encoding="utf-8")


def _reason(longrepr: Any) -> str:
    """Why a test was skipped: pytest gives file, line and "Skipped: reason"."""
    return longrepr[2].removeprefix("Skipped: ") if isinstance(longrepr, tuple) else ""


def _why_not_tested(family: str, check: str) -> str:
    if check == "plain windows" and FAMILIES[family].sliding:
        return _NO_PLAIN_WINDOWS[family]
    return _NOT_TESTED.get(check, "not run")
