"""How far a stage is: a bar for who waits, a status file for who asks, metrics and pictures for MLflow."""

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from datasets.store import Store
from flows.console import OWN, log_handlers, show_own_logs
from ldm.tracking import TrackedRun

logger = logging.getLogger(__name__)
STATUS_EVERY_S = 2.0
LOG_EVERY_S = 20.0


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def status_folder(store: Store) -> Path:
    """Where the status files of a store's stages are."""
    return store.local_root / "status"


def log_file(store: Store, stage: str, key: str) -> Path:
    """The log of all attempts at one artifact."""
    return store.local_root / "logs" / f"{stage}-{key[:12]}.log"


def not_shown_by_bar(record: logging.LogRecord) -> bool:
    """Whether a log line says what no progress bar says already."""
    return not getattr(record, "shown_by_bar", False)


class StageReport:
    """Progress of one stage, for as long as it is entered.

    Time spent is carried over from an attempt that was cut off, as far as its last status says.
    """

    def __init__(self, store: Store, stage: str, key: str, run: TrackedRun) -> None:
        self.stage, self.key, self.run = stage, key, run
        self.path = status_folder(store) / f"{stage}-{key[:12]}.json"
        self.log_path = log_file(store, stage, key)
        self.before = self.saved_costs()
        self.done = self.total = 0
        self.cpu_elsewhere_s = 0.0
        self.first: tuple[float, int] | None = None
        self.written_at = 0.0
        self.bar: Progress | None = None
        self.task: Any = None

    def saved_costs(self) -> dict[str, float]:
        """Wall and CPU seconds of earlier attempts that did not finish."""
        try:
            status = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {"wall_s": 0.0, "cpu_s": 0.0}
        unfinished = status.get("state") != "finished"
        return {name: float(status[name]) if unfinished else 0.0 for name in ("wall_s", "cpu_s")}

    def __enter__(self) -> Self:
        self.started, self.cpu_at_start = time.monotonic(), cpu_seconds()
        self.logged_at = self.started
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.handler = logging.FileHandler(self.log_path, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        show_own_logs()
        for name in OWN:
            logging.getLogger(name).addHandler(self.handler)
        if sys.stderr.isatty():
            self.show_bar()
        logger.info("%s %s starts", self.stage, self.key[:12])
        self.write_status("running")
        return self

    def show_bar(self) -> None:
        """Start the bar, on the console that log lines go to, so that they scroll by above it."""
        handlers = log_handlers()
        for handler in handlers:
            handler.addFilter(not_shown_by_bar)
        console = next(iter(handlers.values()), None) or Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.bar.start()
        self.task = self.bar.add_task(self.stage, total=None, rate="")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if error is None:
            logger.info("%s %s finished: %s", self.stage, self.key[:12], self.closing_line())
        else:
            logger.error("%s %s failed", self.stage, self.key[:12], exc_info=error)
        self.write_status("finished" if error is None else "failed")
        for name in OWN:
            logging.getLogger(name).removeHandler(self.handler)
        self.handler.close()

    def costs(self) -> dict[str, float]:
        """Wall and CPU seconds spent on this artifact."""
        return {
            "wall_s": round(self.before["wall_s"] + time.monotonic() - self.started, 1),
            "cpu_s": round(
                self.before["cpu_s"] + cpu_seconds() - self.cpu_at_start + self.cpu_elsewhere_s, 1
            ),
        }

    def metrics(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Scalars to MLflow."""
        self.run.metrics(images_seen, values)

    def picture(self, name: str, images_seen: int, png: bytes) -> None:
        """A picture to MLflow."""
        self.run.picture(name, images_seen, png)

    def progress(self, done: int, total: int) -> None:
        """Show how far; cheap enough for every step."""
        now = time.monotonic()
        self.done, self.total = done, total
        if self.first is None:
            self.first = (now, done)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, rate=f"{self.rate():.1f} images/s")
        if now - self.written_at > STATUS_EVERY_S:
            self.write_status("running")
        if now - self.logged_at > LOG_EVERY_S:
            self.logged_at = now
            logger.info("%s", self.line(), extra={"shown_by_bar": self.bar is not None})

    def spent(self, cpu_s: float) -> None:
        """Count what ranks have spent, which are children of their fork server."""
        self.cpu_elsewhere_s += cpu_s

    def flush(self) -> None:
        """Wait until what was reported is safe on disk, from where it reaches MLflow sooner or later."""
        self.run.sync()

    def rate(self) -> float:
        """Images per second of this attempt."""
        if self.first is None:
            return 0.0
        return (self.done - self.first[1]) / max(time.monotonic() - self.first[0], 1e-6)

    def line(self) -> str:
        """One line: done, total, rate, time left."""
        rate = self.rate()
        left = f"{(self.total - self.done) / rate:,.0f} s left" if rate > 0 else "time left not known yet"
        return f"{self.stage}: {self.done:,} of {self.total:,} images, {rate:.1f} images/s, {left}"

    def closing_line(self) -> str:
        """One line: how much was done, what it cost, all attempts together."""
        wall_s, cpu_s = self.costs()["wall_s"], self.costs()["cpu_s"]
        rate = self.done / max(wall_s, 0.1)
        return f"{self.done:,} images in {wall_s:,} s, {rate:.1f} images/s, {cpu_s:,} CPU s"

    def write_status(self, state: str) -> None:
        """Replace the status file."""
        self.written_at = time.monotonic()
        status = {
            "stage": self.stage,
            "key": self.key,
            "state": state,
            "pid": os.getpid(),
            "process_started": psutil.Process().create_time(),
            "done": self.done,
            "total": self.total,
            "images_per_s": round(self.rate(), 2),
            "updated": time.time(),
            **self.costs(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(status), "utf-8")
        temporary.replace(self.path)
