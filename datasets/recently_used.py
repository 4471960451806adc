"""Things that are costly to make, kept in memory while they are used."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass
class _Place(Generic[Value]):
    """Where one thing goes: made by the first that asks, while the others wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    made: tuple[Value, int] | None = None


class RecentlyUsed(Generic[Key, Value]):
    """The last used of things, within a bound on their size; threads may share it, and none is made twice.

    Args:
        make: Returns the thing of a key and its size in bytes; what it raises reaches who asked, and the next
            who asks tries again.
        max_bytes: The bound on what is kept; the one just asked for is kept even if it is larger.
    """

    def __init__(self, make: Callable[[Key], tuple[Value, int]], *, max_bytes: int) -> None:
        self._make = make
        self._max_bytes = max_bytes
        self._places: OrderedDict[Key, _Place[Value]] = OrderedDict()
        self._lock = threading.Lock()

    def next_of(self, keys: Iterable[Key]) -> Key:
        """Return the key to ask for first: of a thing that is kept, else of one that nobody is making.

        So what is kept is used before something new pushes it out, and threads that need the same things make
        different ones.
        """
        places = {key: self._places.get(key) for key in keys}

        def readiness(key: Key) -> int:
            place = places[key]
            return 1 if place is None else 0 if place.made is not None else 2

        return min(places, key=readiness)

    def get(self, key: Key) -> Value:
        """Return the thing of a key, made if it is not kept."""
        with self._lock:
            place = self._places.setdefault(key, _Place())
            self._places.move_to_end(key)
        with place.lock:
            if place.made is None:
                place.made = self._make(key)
                self._forget(key)
            return place.made[0]

    def _forget(self, used: Key) -> None:
        """Let go of the least recently used until the rest is within the bound."""
        with self._lock:
            sizes = {key: place.made[1] for key, place in self._places.items() if place.made is not None}
            held_bytes = sum(sizes.values())
            for key, num_bytes in sizes.items():
                if held_bytes <= self._max_bytes:
                    break
                if key != used:
                    del self._places[key]
                    held_bytes -= num_bytes
