"""The list of structural exceptions in the documentation is complete."""

from __future__ import annotations

from pathlib import Path

import peft_prefix
from peft_prefix import local_windows, slots, written_out


def test_every_structural_exception_is_listed_with_its_reason() -> None:
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    table = page.split("## Structural exceptions")[1].split("##")[0]
    own = [local_windows.LocalWindows, slots.SlotLayer, *written_out.LAYOUTS]
    for exception in own:
        assert f"`{exception.__name__}` in `{exception.__module__.split('.')[-1]}.py`" in table
    assert table.count("\n|") == len(own) + 2


def test_no_module_asks_for_the_name_of_a_model() -> None:
    for file in Path(peft_prefix.__file__).parent.glob("*.py"):
        code = file.read_text(encoding="utf-8")
        for question in ("model_type", "__name__ ==", "__name__ in", "config.architectures"):
            assert question not in code, (file.name, question)
