"""What a stage sees of its tracked run: report and go on. It writes a journal; a thread sends from there."""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from ldm.tracking.delivery import first_line
from ldm.tracking.mlflow_runs import NUM_NON_FINITE_NOTED, RegisteredVersion
from ldm.tracking.outbox import Outbox
from ldm.tracking.system_metrics import SystemMetrics

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 5.0
NOT_IN_A_NAME = re.compile(r"[^\w\-./ ]", re.ASCII)

Status = Literal["FINISHED", "FAILED", "KILLED"]


def name_allowed(name: str) -> str:
    """Returns `name` with every character that MLflow refuses in names replaced by an underscore."""
    return NOT_IN_A_NAME.sub("_", name)


class TrackedRun:
    """One stage run. As a context manager it ends FINISHED, FAILED on an exception or KILLED on an interrupt.

    Only `register`, `flush` and `finish` wait for MLflow, a few seconds, and nothing raises because of it.
    All else is a line appended to a file, from which a thread sends. What MLflow has not taken when the
    process ends, however it ends, is sent when the next run begins; what is reported again after a resume is
    recorded once.

    Args:
        outbox: what it reports to; None for a run that is not tracked.
        registry: looks a version up, by the model's name and its digest; may raise what MLflow raises.
        system_metrics: also record CPU, memory, disk, network and GPU use every 10 s.
    """

    def __init__(
        self,
        outbox: Outbox | None,
        *,
        registry: Callable[[str, str], RegisteredVersion | None] = lambda name, digest: None,
        system_metrics: bool = False,
    ) -> None:
        self._outbox = self._last_outbox = outbox
        self._registry = registry
        self._num_non_finite = Counter[str]()
        self._monitor = SystemMetrics(self._next_points) if outbox is not None and system_metrics else None

    @property
    def id(self) -> str | None:
        """What to keep for `Tracker.start(run_id=...)`; None when the run is untracked.

        It is the run's id in MLflow, but until the run was created there the name of its journal.
        """
        return None if self._last_outbox is None else self._last_outbox.run_id

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
        self._points(images_seen, values)

    def picture(self, name: str, images_seen: int, png: bytes) -> None:
        """Records one picture of the series `name`, which the UI shows with a slider over images seen."""
        self._write({"do": "picture", "name": name_allowed(name), "step": images_seen}, data=png)

    def figure(self, path_in_run: str, png: bytes) -> None:
        """Keeps a PNG as the run's file `path_in_run`; a second call replaces it."""
        self._write({"do": "keep", "path": path_in_run}, data=png)

    def json(self, path_in_run: str, value: object) -> None:
        """Keeps `value` as the run's JSON file `path_in_run`; a second call replaces it."""
        self.text(path_in_run, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")

    def text(self, path_in_run: str, text: str) -> None:
        """Keeps `text` as the run's file `path_in_run`; a second call replaces it."""
        self._write({"do": "keep", "path": path_in_run}, data=text.encode())

    def file(self, path_in_run: str, local: Path) -> None:
        """Keeps a copy of `local` as the run's file `path_in_run`. Raises OSError if it cannot be read."""
        self._write({"do": "keep", "path": path_in_run}, data=local.read_bytes())

    def input(self, name: str, *, digest: str, uri: str, context: str) -> None:
        """Records a dataset that the run reads; `context` is its role, for example "training".

        Its whole digest is also the tag `input.<name>`, equal to the tag `output.<name>` of its maker.
        """
        self._write({"do": "input", "name": name, "digest": digest, "uri": uri, "context": context})
        self.tag(f"input.{name}", digest)

    def output(self, name: str, *, digest: str, uri: str) -> None:
        """Records what the run leaves behind as the tags `output.<name>` (digest) and `output.<name>.uri`."""
        self.tag(f"output.{name}", digest)
        self.tag(f"output.{name}.uri", uri)

    def tag(self, key: str, value: str) -> None:
        """Sets a tag; a second call replaces it."""
        self._write({"do": "tag", "key": name_allowed(key), "value": value})

    def register(
        self, model_name: str, *, uri: str, digest: str, tags: Mapping[str, str], alias: str
    ) -> RegisteredVersion | None:
        """Returns the version of `model_name` that holds `digest`, new or known, with `alias` now set on it.

        A version is the folder `model` of this run with one file, model.json, that says where the weights lie
        (`uri`) and their sha256; no weights are copied. None with a logged warning if MLflow takes too long:
        it is registered later then, as everything is sent.
        """
        self.json("model/model.json", {"name": model_name, "uri": uri, "digest": digest, "tags": dict(tags)})
        version_tags = {"uri": uri, "digest": digest, **tags}
        self._write({"do": "register", "name": model_name, "tags": version_tags, "alias": alias})
        found, reason = None, "it does not answer yet"
        if self.flush():
            try:
                found = self._registry(model_name, digest)
            except Exception as error:
                reason = first_line(error)
        if found is None and self._outbox is not None:
            logger.warning("MLflow has not registered %s; that is tried again: %s", model_name, reason)
        return found

    def sync(self) -> None:
        """Waits until what was reported is safe on disk; before a checkpoint, so that nothing is missing."""
        if self._outbox is not None:
            self._outbox.sync()

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """True if MLflow has all that was reported so far, after waiting at most `timeout_s` seconds."""
        return self._outbox is not None and self._outbox.flush(timeout_s)

    def finish(self, status: Status = "FINISHED") -> None:
        """Ends the run, and waits at most CLOSE_TIMEOUT_S seconds for MLflow to take what is left; once."""
        if self._outbox is None:
            return
        if self._monitor is not None:
            self._monitor.end()
        self._write({"do": "end", "status": status})
        self._outbox.close(CLOSE_TIMEOUT_S)
        self._outbox = None

    def _next_points(self, values: Mapping[str, float]) -> None:
        """Writes points, each as the next one of its series."""
        self._points(None, values)

    def _points(self, step: int | None, values: Mapping[str, float]) -> None:
        if self._outbox is None:
            return
        finite: dict[str, float] = {}
        for name, raw in values.items():
            key, value = name_allowed(name), float(raw)
            if math.isfinite(value):
                finite[key] = value
            elif self._num_non_finite[key] < NUM_NON_FINITE_NOTED:
                self._num_non_finite[key] += 1
                self._write({"do": "non_finite", "key": key, "note": f"{value} at {step}"})
        if finite:
            self._outbox.put({"do": "points", "step": step, "values": finite}, is_urgent=False)

    def _write(self, entry: dict[str, Any], *, data: bytes | None = None) -> None:
        if self._outbox is not None:
            self._outbox.put(entry, data=data)
