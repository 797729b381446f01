"""JSON from files that may come from a stranger."""

from __future__ import annotations

import json
from typing import Any, NoReturn


def parse(text: str | bytes) -> Any:
    """What a JSON text says, in which no name may stand twice and every number is finite.

    Args:
        text: Limit its length before.

    Raises:
        ValueError: It is no such text.
    """
    try:
        return json.loads(text, object_pairs_hook=_unambiguous, parse_constant=_refused, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of names that stand there twice, readers differ in which one they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large a number")
    return number
