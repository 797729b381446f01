"""Asking the Hub again where that may help. Its client does so for some requests only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the client raises where there is no answer at all; from httpx or from httpx2, by its version."""
HUB_ERRORS: tuple[type[Exception], ...] = (
    HTTP_ERROR,
    HFValidationError,
    EntryNotFoundError,
    OSError,
    RuntimeError,  # huggingface_hub 1.5 asks once more through a client that it has closed
)
"""Everything that a request to the Hub may end with."""
_ATTEMPTS = 5
_CONFLICT = 412
"""Somebody else has committed since we looked."""
_TEMPORARY = (408, 429, 500, 502, 503, 504)
"""What may be over after a while: too many requests, or trouble on the other side."""
_LONGEST_WAIT = 60.0
"""Seconds."""

Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer]) -> Answer:
    """What a function gives that asks the Hub, called again after errors that may pass, as late as the Hub says.

    Args:
        ask: May be called several times.

    Raises:
        Exception: That of the last attempt, one of `HUB_ERRORS` or another one.
    """
    for attempt in range(_ATTEMPTS - 1):
        try:
            return ask()
        except HUB_ERRORS as error:
            wait = _wait_after(error, attempt)
            if wait is None:
                raise
            time.sleep(wait)
    return ask()


def _wait_after(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before trying again; `None` if that would not help."""
    response = getattr(error, "response", None)
    if response is None:  # no answer at all
        return 2.0**attempt if isinstance(error, (HTTP_ERROR, LocalEntryNotFoundError)) else None
    if response.status_code == _CONFLICT:
        return 0.0
    if response.status_code not in _TEMPORARY:
        return None
    try:
        wanted = float(response.headers.get("retry-after", ""))
    except ValueError:
        wanted = 2.0**attempt
    return min(max(wanted, 0.0), _LONGEST_WAIT)
