"""Asking again while a store does not answer."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TypeVar

from datasets.errors import CorruptionError, StoreError

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 10.0

T = TypeVar("T")
_log = logging.getLogger(__name__)


def patiently(read: Callable[[], T], *, for_s: float) -> T:
    """Return what reading returns, tried again with growing waits while the store fails to answer.

    Bytes that are not those recorded are asked for once more, since they may have been damaged on their way.

    Args:
        read: Reads, and does nothing else.
        for_s: How long after the first failure another attempt may begin.

    Raises:
        CorruptionError: When two attempts gave wrong bytes.
        StoreError: The last failure, when that time is over.
    """
    failed_at, wait_s, num_corrupt = math.inf, FIRST_WAIT_S, 0
    while True:
        try:
            return read()
        except CorruptionError:
            num_corrupt += 1
            if num_corrupt > 1:
                raise
        except StoreError as error:
            failed_at = min(failed_at, time.monotonic())
            if time.monotonic() + wait_s - failed_at > for_s:
                raise
            _log.warning("asked again in %.1f s: %s", wait_s, error)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
