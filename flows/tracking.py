"""The tracker beside a store, and what runs had to say that MLflow has yet to take."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from datasets.store import Store
from ldm.tracking import Tracker, tracking_uri, waiting

DELIVER_S = 5.0


def journals_of(store: Store) -> Path:
    """Where runs leave what they have to say until MLflow has it."""
    return store.local_root / "tracking"


def open_tracker(store: Store) -> Tracker:
    """The tracker beside a store, or the one that MLFLOW_TRACKING_URI names."""
    return Tracker(tracking_uri(store.local_root), journals_of(store))


def deliver_waiting(store: Store) -> None:
    """Try for a few seconds to send what runs in this store left behind, and print what still waits."""
    open_tracker(store).deliver(DELIVER_S)
    print_waiting(store)


def print_waiting(store: Store) -> None:
    """Print a line for each address of MLflow that something waits for."""
    for one in waiting(journals_of(store)):
        Console().print(f"[yellow]{escape(str(one))}[/yellow]", soft_wrap=True)
