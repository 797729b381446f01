from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mutations
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="measures memory as Unix does")
PARTS = 2


@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_and_forged_files_are_refused_or_load_identically(part: int, tmp_path: Path) -> None:
    begin, end = (mutations.MUTATIONS * number // PARTS for number in (part, part + 1))
    command = [sys.executable, mutations.__file__, str(tmp_path), str(begin), str(end)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # also none that brings the process down
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["failures"], "\n".join(found["failures"])
    assert found["grown"] < 200e6
    assert found["slowest"] < 5
    outcomes = found["outcomes"]
    for kind in mutations.KINDS:
        counts = {outcome: sum(n for label, n in outcomes.items() if label.startswith(kind) and label.endswith(outcome))
                  for outcome in ("refused", "loaded")}  # fmt: skip
        assert counts["loaded"] > 0, (kind, outcomes)
        assert counts["refused"] > 0 or kind == "config", (kind, outcomes)  # the copy beside a prefix is for people
