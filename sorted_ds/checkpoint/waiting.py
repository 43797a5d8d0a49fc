"""Patience with shared file systems: what one host wrote may be seen by another one only later."""

import time
from collections.abc import Callable

SECONDS_TO_APPEAR = 30.0


def wait_for(is_so: Callable[[], bool]) -> bool:
    """Whether it was so, or came to be so within `SECONDS_TO_APPEAR`."""
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not (found := is_so()) and time.monotonic() < end:
        time.sleep(0.1)
    return found
