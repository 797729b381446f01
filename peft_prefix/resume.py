"""Finding the checkpoint to go on from after a run that was killed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_WRITTEN_LAST = "trainer_state.json"


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The last checkpoint that the `Trainer` has finished writing.

    A run that is killed while it saves leaves a folder with some of its files. `resume_from_checkpoint=True` takes the
    folder with the highest number and fails on such a one; this function looks for the file that is written last.

    Args:
        output_dir: The `output_dir` of the training arguments.

    Returns:
        The folder, for `resume_from_checkpoint=`; `None` if there is none, which starts from the beginning.

    Example:
        >>> trainer.train(resume_from_checkpoint=last_checkpoint("runs"))  # doctest: +SKIP
    """
    found = {
        int(match.group(1)): folder
        for folder in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else ())
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)) and _is_finished(folder)
    }
    return str(found[max(found)]) if found else None


def _is_finished(folder: Path) -> bool:
    try:
        json.loads((folder / _WRITTEN_LAST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
