"""The YAML block at the top of a README.md, edited so that whatever is not edited stays as it was written.

Loading and dumping a whole block, as `ModelCard` does, would drop comments, change quotes and turn `language: no` into
`false`. Here only the lines of the keys that change are written anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from .errors import PrefixFileError, some_of

_LONGEST = 200_000
_DEEPEST = 20
_MOST_VALUES = 20_000


class FrontMatter:
    """The metadata of a README.md.

    Args:
        text: The whole file; `None` or one without metadata gives an empty block.

    Attributes:
        body: What stands below the metadata.

    Raises:
        PrefixFileError: The metadata cannot be read.
    """

    def __init__(self, text: str | None) -> None:
        text = (text or "").removeprefix("\ufeff")
        self.line_break = "\r\n" if "\r\n" in text else "\n"
        match = REGEX_YAML_BLOCK.search(text)
        if match is None:
            _require_no_half(text)
            self._opening, self._block, self._closing = (
                f"---{self.line_break}",
                "",
                f"---{self.line_break}",
            )
            self.body = text
        else:
            self._opening, block, closing = match.group(1), match.group(2), match.group(3)
            self._closing = closing.lstrip("\r\n")
            self._block = block + closing[: len(closing) - len(self._closing)]
            self.body = text[match.end() :]
        self._data: dict[Any, Any] = {}
        self._data = self._read(self._block)

    def __str__(self) -> str:
        return f"{self._opening}{self._block}{self._closing}{self.body}"

    def get(self, key: str) -> Any:
        """The value of a key, `None` if it is not there."""
        return self._data.get(key)

    def others(self, keys: Iterable[str]) -> list[tuple[str, str]]:
        """The keys that are not among some, with their values as texts."""
        left_out = set(keys)
        return [(str(key), repr(value)) for key, value in self._data.items() if key not in left_out]

    def texts(self, key: str) -> list[Any]:
        """The values of a key that may have one or many.

        Raises:
            PrefixFileError: It has something else.
        """
        value = self.get(key)
        if value is None:
            return []
        values = list(value) if isinstance(value, (list, tuple, set)) else [value]
        if any(isinstance(one, (dict, list)) for one in values):
            raise PrefixFileError(
                f"{key!r} in the metadata at the top of README.md must be one value or a list of them. Correct it; "
                "nothing has been changed."
            )
        return values

    def add(self, key: str, values: Iterable[Any]) -> None:
        """Add those of some values that a key does not have yet; a key whose value is not a list becomes one."""
        present = self.texts(key)
        missing = [value for value in dict.fromkeys(values) if value not in present]
        if missing:
            self.set(key, [*present, *missing])

    def set(self, key: str, value: Any) -> None:
        """Give a key a value, or with `None` remove it; a key that has it already stays as it is written."""
        if self._data.get(key) == value:
            return
        wanted = {**self._data, key: value}
        dumped = yaml_dump({key: value}, sort_keys=False, line_break=self.line_break)
        if value is None:
            del wanted[key]
            dumped = ""
        start, end = self._place(key)
        block = f"{self._block[:start]}{dumped}{self._block[end:]}"
        try:
            kept = self._read(block) == wanted
        except PrefixFileError:
            kept = False
        # Written in braces, or with anchors: no part can be exchanged.
        self._block = block if kept else yaml_dump(wanted, sort_keys=False, line_break=self.line_break)
        self._data = wanted

    def _place(self, key: str) -> tuple[int, int]:
        """Where in the block a key and its value stand, without comments below; the end if it is not there."""
        node = yaml.compose(self._block, Loader=yaml.SafeLoader)
        names = [name for name, _ in node.value] if node is not None else []
        starts = [name.start_mark.index - name.start_mark.column for name in names]
        for name, start, end in zip(names, starts, [*starts, len(self._block)][1:], strict=True):
            if name.value == key:
                lines = self._block[start:end].splitlines(keepends=True)
                while len(lines) > 1 and lines[-1].strip()[:1] in ("", "#"):
                    end -= len(lines.pop())
                return start, end
        return len(self._block), len(self._block)

    def _read(self, block: str) -> dict[Any, Any]:
        try:
            _require_simple(block)
            node = yaml.compose(block, Loader=yaml.SafeLoader)
            data = yaml.safe_load(block)
        except Exception as error:  # a tag such as !!bool on something else ends with whatever Python raises
            raise PrefixFileError(
                f"The metadata between the lines '---' at the top of README.md is not valid YAML "
                f"({type(error).__name__}: {str(error)[:500]}). Correct it; nothing has been changed."
            ) from error
        if data is None:
            return {}
        if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
            raise PrefixFileError(
                "The metadata between the lines '---' at the top of README.md must be lines of 'key: value'. Correct "
                "it, or write '***' for a line across the page; nothing has been changed."
            )
        names = [str(name.value) for name, _ in node.value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PrefixFileError(
                f"The metadata at the top of README.md has keys twice: {some_of(twice)}. Leave one of each; nothing "
                "has been changed."
            )
        return data


def _require_simple(block: str) -> None:
    """Check that a block is as small and flat as metadata are, before it is made into objects.

    Raises:
        ValueError: It is long or deep, or repeats parts of itself so that it would become large.
    """
    if len(block) > _LONGEST:
        raise ValueError(f"it has more than {_LONGEST:,} characters")
    sizes: dict[str | None, int] = {}
    around: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(block, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            around.append((event.anchor, 1))
            sizes.pop(event.anchor, None)  # what is inside may not repeat it
            if len(around) > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = around.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"it repeats a part of itself inside of that part (*{event.anchor})")
            anchor, size = None, sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        around[-1] = (around[-1][0], around[-1][1] + size)
        if around[-1][1] > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES:,} values, with those that it repeats")


def _require_no_half(text: str) -> None:
    """Check that a text without metadata does not begin with some.

    Raises:
        PrefixFileError: The line that closes it is missing.
    """
    first, _, rest = text.lstrip().partition("\n")
    word, colon, _ = rest.partition("\n")[0].partition(":")
    if first.strip() == "---" and colon and word.replace("_", "").replace("-", "").isalnum():
        raise PrefixFileError(
            f"README.md begins with metadata ({word}: ...), but the line '---' that ends it is missing. Add it; "
            "nothing has been changed."
        )
