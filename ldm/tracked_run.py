"""What a stage sees of its tracked run: report and go on. Knows a tracking service by protocol only."""

import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self, TypedDict

from ldm.outbox import Outbox, Point

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 5.0
NUM_NON_FINITE_NOTED = 100
NOT_IN_A_NAME = re.compile(r"[^\w\-./ ]", re.ASCII)

Status = Literal["FINISHED", "FAILED", "KILLED"]


class RegisteredVersion(TypedDict):
    """A version in the model registry: where the weights lie, their sha256, the run that made them."""

    name: str
    version: str
    uri: str
    digest: str
    run_id: str | None


class RunService(Protocol):
    """One run in a tracking service: blocking calls that may raise and that may safely be repeated."""

    address: str
    run_id: str
    tags: Mapping[str, str]

    def send_points(self, points: Sequence[Point]) -> None:
        """Records metric points; those that an earlier attempt of the run recorded are left out."""
        ...

    def send_picture(self, name: str, images_seen: int, *, png: bytes) -> None:
        """Adds one picture to the series `name`, once."""
        ...

    def keep(self, path_in_run: str, write: Callable[[Path], object]) -> None:
        """Stores the file that `write` writes as `path_in_run`."""
        ...

    def add_input(self, name: str, *, digest: str, uri: str, context: str) -> None:
        """Records a dataset that the run reads."""
        ...

    def set_tag(self, key: str, value: str) -> None:
        """Sets or replaces a tag."""
        ...

    def register(self, model_name: str, *, tags: Mapping[str, str], alias: str) -> RegisteredVersion:
        """Returns the version whose digest is `tags["digest"]`, new or known, now called `alias`."""
        ...

    def end(self, status: Status) -> None:
        """Ends the run."""
        ...

    def is_hopeless(self, error: Exception, /) -> bool:
        """True for an error that trying again cannot cure."""
        ...


def name_allowed(name: str) -> str:
    """Returns `name` with every character that MLflow refuses in names replaced by an underscore."""
    return NOT_IN_A_NAME.sub("_", name)


def first_line(error: Exception) -> str:
    """Returns what an error says in one line fit for a log."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


class TrackedRun:
    """One stage run. As a context manager it ends FINISHED, FAILED on an exception or KILLED on an interrupt.

    Only `register`, `flush` and `finish` wait (a thread sends), and nothing raises because of the service.
    What is reported again after a resume is recorded once; call `flush` before a checkpoint is written, and
    nothing is missing either.

    Attributes:
        id: the run's id, to be kept for `Tracker.start(run_id=...)`; None when the run is untracked.
    """

    def __init__(self, service: RunService | None) -> None:
        self.id: str | None = None if service is None else service.run_id
        self._service = service
        self._outbox: Outbox | None = None
        self._non_finite: dict[str, list[str]] = {}
        if service is not None:
            self._outbox = Outbox(service.send_points, service.is_hopeless, service=service.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def metrics(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Records each value at `images_seen`; NaN and infinity are noted in the tag `non_finite.<key>`."""
        if self._outbox is None:
            return
        now_ms = int(time.time() * 1000)
        points: list[Point] = []
        for name, raw in values.items():
            key, value = name_allowed(name), float(raw)
            if math.isfinite(value):
                points.append(Point(key, value, images_seen, now_ms))
            else:
                self._note_non_finite(f"non_finite.{key}", f"{value} at {images_seen}")
        self._outbox.add_points(points)

    def picture(self, name: str, images_seen: int, png: bytes) -> None:
        """Records one picture of the series `name`, which the UI shows with a slider over images seen."""
        key = name_allowed(name)
        self._later(f"picture {name}", lambda service: service.send_picture(key, images_seen, png=png))

    def figure(self, path_in_run: str, png: bytes) -> None:
        """Keeps a PNG as the run's file `path_in_run`; a second call replaces it."""
        self._keep(path_in_run, lambda path: path.write_bytes(png))

    def json(self, path_in_run: str, value: object) -> None:
        """Keeps `value` as the run's JSON file `path_in_run`; a second call replaces it."""
        self.text(path_in_run, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")

    def text(self, path_in_run: str, text: str) -> None:
        """Keeps `text` as the run's file `path_in_run`; a second call replaces it."""
        self._keep(path_in_run, lambda path: path.write_text(text, encoding="utf-8"))

    def file(self, path_in_run: str, local: Path) -> None:
        """Keeps a copy of `local` as the run's file `path_in_run`; `local` must stay until `flush`."""
        self._keep(path_in_run, lambda path: shutil.copyfile(local, path))

    def input(self, name: str, *, digest: str, uri: str, context: str) -> None:
        """Records a dataset that the run reads; `context` is its role, for example "training".

        Its whole digest is also the tag `input.<name>`, equal to the tag `output.<name>` of its maker.
        """
        self._later(
            f"input {name}",
            lambda service: service.add_input(name, digest=digest, uri=uri, context=context),
        )
        self.tag(f"input.{name}", digest)

    def output(self, name: str, *, digest: str, uri: str) -> None:
        """Records what the run leaves behind as the tags `output.<name>` (digest) and `output.<name>.uri`."""
        self.tag(f"output.{name}", digest)
        self.tag(f"output.{name}.uri", uri)

    def tag(self, key: str, value: str) -> None:
        """Sets a tag; a second call replaces it."""
        self._later(f"tag {key}", lambda service: service.set_tag(name_allowed(key), value))

    def register(
        self, model_name: str, *, uri: str, digest: str, tags: Mapping[str, str], alias: str
    ) -> RegisteredVersion | None:
        """Returns the version of `model_name` that holds `digest`, new or known, with `alias` now set on it.

        A version is the folder `model` of this run with one file, model.json, that says where the weights lie
        (`uri`) and their sha256; no weights are copied. None with a logged warning if that cannot be done.
        """
        if self._service is None:
            return None
        self.json("model/model.json", {"name": model_name, "uri": uri, "digest": digest, "tags": dict(tags)})
        self.flush()
        try:
            version_tags = {"uri": uri, "digest": digest, **tags}
            return self._service.register(model_name, tags=version_tags, alias=alias)
        except Exception as error:
            address = self._service.address
            logger.warning("%s did not register %s: %s", address, model_name, first_line(error))
            return None

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """True if all that was reported so far is recorded, after waiting at most `timeout_s` seconds."""
        return self._outbox is not None and self._outbox.flush(timeout_s)

    def finish(self, status: Status = "FINISHED") -> None:
        """Sends what is left, for at most CLOSE_TIMEOUT_S seconds, and ends the run; once."""
        if self._outbox is not None:
            self._later("the end of the run", lambda service: service.end(status))
            outbox, self._outbox = self._outbox, None
            outbox.close(CLOSE_TIMEOUT_S)

    def _note_non_finite(self, tag: str, note: str) -> None:
        if tag not in self._non_finite:
            earlier = self._service.tags.get(tag, "") if self._service else ""
            self._non_finite[tag] = earlier.split(", ") if earlier else []
        notes = self._non_finite[tag]
        if note not in notes and len(notes) < NUM_NON_FINITE_NOTED:
            notes.append(note)
            self.tag(tag, ", ".join(notes))

    def _later(self, label: str, call: Callable[[RunService], object]) -> None:
        service = self._service
        if self._outbox is not None and service is not None:
            self._outbox.add_job(label, lambda: call(service))

    def _keep(self, path_in_run: str, write: Callable[[Path], object]) -> None:
        self._later(f"file {path_in_run}", lambda service: service.keep(path_in_run, write))
