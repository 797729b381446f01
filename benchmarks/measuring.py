"""What the benchmarks share: variants measured in turn, ratios within a round, and how much memory is resident."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.progress import track

Variants = dict[str, Callable[[], object]]
Seconds = dict[str, list[float]]
"""Of each variant, in each round."""


def measured(variants: Variants, rounds: int, clock: Callable[[], float] = time.perf_counter) -> Seconds:
    """Seconds of each variant in each round.

    Args:
        variants: What to run, in turn.
        rounds: How often.
        clock: Tells the time; `time.process_time` where other work has the processor, too.
    """
    seconds: Seconds = {name: [] for name in variants}
    for variant in variants.values():
        variant()
    for number in track(range(rounds), description="measuring", transient=True):
        names = list(variants)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # each is the first one in turn
            start = clock()
            variants[name]()
            seconds[name].append(clock() - start)
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile of two or more values."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def ratios(values: Sequence[float], references: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles and median of the ratios within each round."""
    return quartiles([value / other for value, other in zip(values, references, strict=True)])


def mebibytes(field: str) -> float:
    """A figure about this process's memory, as Linux counts it: `VmRSS` or `VmHWM`, for example."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024
