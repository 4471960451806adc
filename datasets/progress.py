"""The callback through which long work reports how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total), both counts of the same thing, each time a part of the work is finished."""


def no_progress(done: int, total: int) -> None:
    """Report nothing; the default of functions that take a ``Progress``."""
