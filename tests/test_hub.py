from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES

from peft_prefix import PrefixFileError, PrefixModel


@pytest.mark.parametrize("name", ["nobody/nothing", "not/a/repository", "no such folder"])
def test_what_is_neither_here_nor_on_the_hub_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(PrefixFileError, match="is no folder here, and the Hub did not give"):
        PrefixModel.from_pretrained(FAMILIES["llama"].build(), name, cache_dir=tmp_path, local_files_only=True)
