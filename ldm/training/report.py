"""Where long work tells how far it is, whoever listens."""

from collections.abc import Mapping
from typing import Protocol


class Report(Protocol):
    """Where long work tells how far it is."""

    def metrics(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Scalars at a point of the run."""
        ...

    def picture(self, name: str, images_seen: int, png: bytes) -> None:
        """A picture at a point of the run."""
        ...

    def progress(self, done: int, total: int) -> None:
        """How many of how many images."""
        ...

    def spent(self, cpu_s: float) -> None:
        """CPU seconds that processes which are none of this one's children spent on the work."""
        ...

    def flush(self) -> object:
        """Wait until all that was told so far is kept; called before each checkpoint."""
        ...


class Silent:
    """A report that keeps nothing."""

    def metrics(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Ignored."""

    def picture(self, name: str, images_seen: int, png: bytes) -> None:
        """Ignored."""

    def progress(self, done: int, total: int) -> None:
        """Ignored."""

    def spent(self, cpu_s: float) -> None:
        """Ignored."""

    def flush(self) -> None:
        """Nothing to keep."""
