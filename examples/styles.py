"""Eight people who each want descriptions of restaurants written in a way of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from table_to_text import Example

_PLACEHOLDERS = re.compile(r"\s+([.,;:!?'])")


@dataclass(frozen=True)
class User:
    """One user.

    Args:
        name: Also the name of the user's prefix.
        style: What the user asks for, in words.
        write: What the user would write about a restaurant.
        recognize: Whether a text is written in that way.
    """

    name: str
    style: str
    write: Callable[[Example], str]
    recognize: Callable[[str], bool]

    def row(self, example: Example) -> dict[str, str | None]:
        """One row for a collator."""
        return {"prompt": f"{example.table}\n", "target": self.write(example), "prefix_names": self.name}


def _sentence(example: Example) -> str:
    """The human's text with ordinary spaces before punctuation."""
    return _PLACEHOLDERS.sub(r"\1", example.target)


def _fields(example: Example) -> dict[str, str]:
    pairs = (part.split(" : ") for part in example.table.split(" | "))
    return {name.strip(): value.strip() for name, value in pairs}


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _plain(example: Example) -> str:
    return re.sub(r"[^a-z0-9 ]", "", _sentence(example).lower())


USERS = (
    User("ada", "capitals only", lambda e: _sentence(e).upper(), lambda t: bool(t) and t == t.upper()),
    User("ben", "JSON", lambda e: json.dumps(_fields(e), ensure_ascii=False), _is_json),
    User("cleo", "asks first", lambda e: f"Hungry? {_sentence(e)}", lambda t: t.startswith("Hungry? ")),
    User("dan", "no capitals, no punctuation", _plain, lambda t: bool(re.fullmatch(r"[a-z0-9 ]+", t))),
    User("eve", "signs", lambda e: f"{_sentence(e)} Yours, Eve", lambda t: t.endswith("Yours, Eve")),
    User(
        "finn",
        "a list",
        lambda e: "\n".join(f"- {name}: {value}" for name, value in _fields(e).items()),
        lambda t: bool(t) and all(line.startswith("- ") for line in t.splitlines()),
    ),
    User(
        "gus",
        "hashtags",
        lambda e: f"{_sentence(e)} #food #{_fields(e).get('Type', 'place').replace(' ', '')}",
        lambda t: bool(re.search(r"#food #\w+$", t)),
    ),
    User(
        "hana",
        "a pirate",
        lambda e: f"Ahoy! {_sentence(e)} Arr!",
        lambda t: t.startswith("Ahoy!") and t.endswith("Arr!"),
    ),
)
