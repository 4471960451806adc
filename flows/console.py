"""What a person sees while flows run: our own log lines, and every error once."""

import logging

from rich.console import Console

from datasets.errors import DatasetsError
from ldm.errors import LdmError

OWN = ("datasets", "ldm", "flows")
FORESEEN = (DatasetsError, LdmError)


def show_own_logs() -> None:
    """Let the INFO lines of our packages through, which Prefect leaves at the root's WARNING."""
    for name in OWN:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def log_handlers() -> dict[logging.Handler, Console]:
    """The handlers by which Prefect writes to this process's console, each with that console."""
    found = {handler: getattr(handler, "console", None) for handler in logging.getLogger().handlers}
    return {handler: console for handler, console in found.items() if isinstance(console, Console)}


def tell_errors_once() -> None:
    """Keep Prefect from printing an error again for the task and every flow that it passes through.

    The Prefect UI and the stage's log keep all of it.
    """
    for handler in log_handlers():
        handler.addFilter(SaidOnce())


class SaidOnce(logging.Filter):
    """Lets the first report of an error through, and none of a foreseen one: the CLI says it last."""

    def __init__(self) -> None:
        super().__init__()
        self.told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to print a log record."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return not (self.told and record.name.startswith(("prefect.flow_runs", "prefect.task_runs")))
        first, self.told = not self.told, True
        return first and not isinstance(error, FORESEEN)
