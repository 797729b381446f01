"""Tables and pictures of finished runs, with the paper's numbers beside ours."""

from paper.report.groups import Group, Spread, UnlikeRunsError, group_runs
from paper.report.pages import build
from paper.report.published import Paper, read_paper
from paper.report.runs import FinishedRun, ReportError, asked_for, finished_run, keep, read_kept

__all__ = [
    "FinishedRun",
    "Group",
    "Paper",
    "ReportError",
    "Spread",
    "UnlikeRunsError",
    "asked_for",
    "build",
    "finished_run",
    "group_runs",
    "keep",
    "read_kept",
    "read_paper",
]
