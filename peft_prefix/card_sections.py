"""The generated sections of a README.md, each between two lines that mark it; everything else is the user's text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

_MARKER = re.compile(
    r"^<!-- (?P<end>end of )?peft_prefix: (?P<label>[A-Za-z0-9_./-]+)(?: \((?P<number>[0-9]{1,9})\))? -->[ \t]*"
    r"(?:\r?\n|\Z)",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Section:
    """A generated section in a text.

    Args:
        label: Which prefix it is about.
        number: What tells it from sections of the same prefix of which only one marker is left.
        start: Where its first marker begins.
        end: Where its last marker ends, with the line break.
    """

    label: str
    number: str | None
    start: int
    end: int


def sections(text: str) -> Iterator[Section]:
    """The sections of a text, in order.

    A section begins with a marker and ends with the next one, which must be its end. Where it is another, somebody has
    deleted a marker, and nobody can tell where generated text ends: then all of it is the user's.
    """
    markers = list(_MARKER.finditer(text))
    for first, second in pairwise(markers):
        is_pair = first["label"] == second["label"] and first["number"] == second["number"]
        if is_pair and not first["end"] and second["end"]:
            yield Section(first["label"], first["number"], first.start(), second.end())


def with_section(text: str, label: str, content: str, line_break: str = "\n") -> str:
    """A text with a section, in the place of the one that has its label, or at the end.

    Args:
        text: The text.
        label: Which prefix the section is about.
        content: What stands between the markers.
        line_break: How lines end.
    """
    own = [section for section in sections(text) if section.label == label]
    for section in reversed(own):
        text = f"{text[: section.start]}{_marked(section, content, line_break)}{text[section.end :]}"
    if own:
        return text
    # With a marker that is left of an old section, a new one must not pair, even if its own partner is deleted, too.
    taken = {marker["number"] for marker in _MARKER.finditer(text) if marker["label"] == label}
    number = next(one for one in (None, *map(str, range(2, len(taken) + 3))) if one not in taken)
    gap = "" if not text or text.endswith(("\n\n", "\n\r\n")) else line_break if text.endswith("\n") else 2 * line_break
    return f"{text}{gap}{_marked(Section(label, number, 0, 0), content, line_break)}"


def _marked(section: Section, content: str, line_break: str) -> str:
    name = section.label if section.number is None else f"{section.label} ({section.number})"
    lines = [f"<!-- peft_prefix: {name} -->", "", *content.strip("\n").split("\n"), ""]
    return line_break.join([*lines, f"<!-- end of peft_prefix: {name} -->", ""])
