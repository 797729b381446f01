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

    def items(self) -> Iterable[tuple[Any, Any]]:
        """All keys and values."""
        return self._data.items()

    def texts(self, key: str) -> list[Any]:
        """The values of a key that may have one or many.

        Raises:
            PrefixFileError: It has something else.
        """
        value = self.get(key)
        if value is None:
            return []
        if isinstance(value, dict):
            raise PrefixFileError(
                f"{key!r} in the metadata at the top of README.md must be a list or one value, not {value!r}. Correct "
                "it; nothing has been changed."
            )
        return list(value) if isinstance(value, (list, tuple, set)) else [value]

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
            node = yaml.compose(block, Loader=yaml.SafeLoader)
            data = yaml.safe_load(block)
        except (yaml.YAMLError, ValueError) as error:
            raise PrefixFileError(
                f"The metadata between the lines '---' at the top of README.md is not valid YAML ({error}). Correct "
                "it; nothing has been changed."
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
