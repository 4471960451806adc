"""What runs had to say and MLflow has yet to take: sent once more when a command ends, and said."""

from rich.console import Console
from rich.markup import escape

from datasets.store import Store
from flows.models import journals_of, open_tracker
from ldm.tracking import waiting

DELIVER_S = 5.0


def deliver_waiting(store: Store) -> None:
    """Try for a few seconds to send what runs in this store left behind, and print what still waits."""
    open_tracker(store).deliver(DELIVER_S)
    print_waiting(store)


def print_waiting(store: Store) -> None:
    """Print a line for each address of MLflow that something waits for."""
    for one in waiting(journals_of(store)):
        Console().print(f"[yellow]{escape(str(one))}[/yellow]", soft_wrap=True)
