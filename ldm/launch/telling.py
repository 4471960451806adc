"""What ranks tell their supervisor, in files that outlive them: reports, log records, a last error."""

import json
import logging
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.training.report import Report

TOLD = "told-{rank}-{pid}.jsonl"
ERROR = "error-{rank}.json"


class Telling(logging.Handler):
    """One rank's end: a report for the loop, and a handler for its log records.

    Args:
        folder: shared with the supervisor.
        rank: who tells.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self._folder, self._rank = folder, rank
        # of this process alone: one that was killed may have left half a line
        path = folder / TOLD.format(rank=rank, pid=os.getpid())
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._num_pictures = 0

    def _tell(self, what: str, *about: Any) -> None:
        os.write(self._file, json.dumps([what, *about]).encode() + b"\n")  # at once, as several threads tell

    def metrics(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Scalars at a point of the run."""
        self._tell("metrics", images_seen, dict(values))

    def picture(self, name: str, images_seen: int, png: bytes) -> None:
        """A picture at a point of the run."""
        path = self._folder / f"{self._rank}-{images_seen}-{self._num_pictures}.png"
        self._num_pictures += 1
        path.write_bytes(png)
        self._tell("picture", name, images_seen, path.name)

    def progress(self, done: int, total: int) -> None:
        """How many of how many images."""
        self._tell("progress", done, total)

    def spent(self, cpu_s: float) -> None:
        """Nothing: the supervisor reads it off the beacons."""

    def flush(self) -> None:
        """Nothing waits: what was told is in the file, and the supervisor reads it even if this rank dies."""

    def emit(self, record: logging.LogRecord) -> None:
        """A log record."""
        self._tell("log", record.levelno, record.name, record.getMessage())

    def error(self, error: BaseException, *, is_final: bool) -> None:
        """Why this rank ends; `is_final` when another attempt would end the same way."""
        about = {
            "kind": type(error).__name__,
            "message": str(error),
            "is_final": is_final,
            "traceback": "".join(traceback.format_exception(error)),
        }
        path = self._folder / ERROR.format(rank=self._rank)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(about), encoding="utf-8")
        unfinished.replace(path)


class Told:
    """The supervisor's end: passes on what ranks tell, once, although ranks that start again tell it again.

    Args:
        folder: shared with the ranks.
        report: who is told.
    """

    def __init__(self, folder: Path, report: Report) -> None:
        self._folder, self._report = folder, report
        self._read: dict[Path, int] = {}
        self._seen: dict[str, int] = {}

    def pass_on(self) -> None:
        """Pass on what was told since the last call; a line that is not whole yet waits."""
        for path in sorted(self._folder.glob(TOLD.format(rank="*", pid="*"))):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                what, *about = json.loads(line)
                getattr(self, f"_{what}")(*about)

    def _is_new(self, name: str, images_seen: int) -> bool:
        is_new = images_seen > self._seen.get(name, -1)
        self._seen[name] = max(images_seen, self._seen.get(name, -1))
        return is_new

    def _metrics(self, images_seen: int, values: dict[str, float]) -> None:
        new = {name: value for name, value in values.items() if self._is_new(f"metric {name}", images_seen)}
        if new:
            self._report.metrics(images_seen, new)

    def _picture(self, name: str, images_seen: int, file: str) -> None:
        if self._is_new(f"picture {name}", images_seen):
            self._report.picture(name, images_seen, (self._folder / file).read_bytes())

    def _progress(self, done: int, total: int) -> None:
        self._report.progress(done, total)

    def _log(self, level: int, name: str, message: str) -> None:
        logging.getLogger(name).log(level, "%s", message)

    def errors(self) -> dict[int, dict[str, Any]]:
        """What ranks gave as reasons for their end, by rank; forgotten once asked for."""
        found = {}
        for path in sorted(self._folder.glob(ERROR.format(rank="*"))):
            found[int(path.stem.partition("-")[2])] = json.loads(path.read_text("utf-8"))
            path.unlink()
        return found
