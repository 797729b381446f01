"""The conformance table: every test with a `conformance` mark fills one cell, family × check."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from families import FAMILIES

_Cells = dict[tuple[str, str], list[str]]
_MARK = "<!-- written by the tests: family × check -->"
_SYMBOL = {"passed": "ok", "skipped": "–", "failed": "FAIL"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-table", type=Path, help="replace the table in this Markdown page")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "conformance(check): the test fills the cell family × check of the table")
    config.stash[_CELLS] = defaultdict(list)


_CELLS = pytest.StashKey[_Cells]()


@pytest.fixture(autouse=True)
def _conformance_cell(request: pytest.FixtureRequest, record_property: pytest.FixtureRequest) -> None:
    mark = request.node.get_closest_marker("conformance")
    if mark is not None:
        record_property("conformance", f"{request.node.callspec.params['family']}|{mark.args[0]}")


class _Collector:
    def __init__(self, cells: _Cells) -> None:
        self.cells = cells

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        for name, value in report.user_properties:
            if name == "conformance":
                family, check = str(value).split("|")
                self.cells[family, check].append(report.outcome)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Collector(session.config.stash[_CELLS]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    cells = config.stash[_CELLS]
    if not cells:
        return
    checks = sorted({check for _, check in cells})
    families = [family for family in FAMILIES if any((family, check) in cells for check in checks)]
    terminalreporter.section("conformance: family × check")
    width = max(map(len, families))
    terminalreporter.write_line(" " * width + "  " + "  ".join(checks))
    for family in families:
        row = "  ".join(_cell(cells, family, check).ljust(len(check)) for check in checks)
        terminalreporter.write_line(f"{family.ljust(width)}  {row}")
    page = config.getoption("--conformance-table")
    if page is not None:
        lines = ["| family | " + " | ".join(checks) + " |", "| --- |" + " :-: |" * len(checks)]
        lines += [f"| {f} | " + " | ".join(_cell(cells, f, c) for c in checks) + " |" for f in families]
        text = page.read_text(encoding="utf-8").split(_MARK)[0]
        page.write_text(text + _MARK + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def _cell(cells: _Cells, family: str, check: str) -> str:
    outcomes = cells.get((family, check), [])
    for outcome in ("failed", "passed", "skipped"):
        if outcome in outcomes:
            return _SYMBOL[outcome]
    return ""
