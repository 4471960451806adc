"""One tracking address: starts runs, finds what was tracked."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ldm.errors import TrackingError
from ldm.tracking.connection import Connection, is_hopeless, tracking_uri
from ldm.tracking.delivery import first_line
from ldm.tracking.journal import Room, Waiting
from ldm.tracking.mlflow_runs import JOURNAL_TAG, NUM_PER_CALL, MlflowRuns, RegisteredVersion, registered
from ldm.tracking.outbox import Outbox
from ldm.tracking.sender import deliver_left_behind
from ldm.tracking.tracked_run import TrackedRun, name_allowed

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

__all__ = ["RunRow", "Tracker", "tracking_uri"]

logger = logging.getLogger(__name__)


class RunRow(TypedDict):
    """One line of a listing of runs; times in ms of Unix time, `metrics` the latest value of each key."""

    id: str
    name: str
    status: str
    start_ms: int
    end_ms: int | None
    metrics: dict[str, float]
    tags: dict[str, str]


def _row(run: "Run") -> RunRow:
    info, data = run.info, run.data
    return RunRow(
        id=info.run_id,
        name=info.run_name or "",
        status=info.status,
        start_ms=info.start_time,
        end_ms=info.end_time,
        metrics=dict(data.metrics),
        tags=dict(data.tags),
    )


def _all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yields everything that a search of MLflow finds."""
    page = search(max_results=NUM_PER_CALL)
    yield from page
    while page.token:
        page = search(max_results=NUM_PER_CALL, page_token=page.token)
        yield from page


class Tracker:
    """One MLflow address.

    Args:
        uri: what `tracking_uri` returns, or any MLflow tracking address.
        journals: folder where runs leave what they have to say until MLflow has it.
        artifact_root: folder of the runs' files when `uri` is SQLite (default: `mlflow-artifacts` beside the
            database); leave it None with a server, which has its own.
    """

    def __init__(self, uri: str, journals: Path, *, artifact_root: Path | None = None) -> None:
        self._connection = Connection(uri, artifact_root=artifact_root)
        self.uri = self._connection.uri
        self._room = Room(journals, self.uri)
        self._runs = MlflowRuns(self._connection)

    def start(
        self,
        stage: str,
        *,
        name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        run_id: str | None = None,
        parent_run_id: str | None = None,
        system_metrics: bool = True,
    ) -> TrackedRun:
        """Returns a running run of experiment `stage`, at once: MLflow hears of it from a thread.

        Args:
            stage: name of the stage, which is the experiment.
            name: the run's name in listings.
            params: flat; values are written as text. A re-opened run keeps those it has and gains new keys.
            tags: flat; those given replace those of an earlier attempt.
            run_id: continue this run (after a kill); if MLflow has no such run, another is begun.
            parent_run_id: the run under which the UI shows this one.
            system_metrics: also record CPU, memory, disk, network and GPU use every 10 s.
        """
        self._connection.prepare()
        begin = {
            "stage": stage,
            "name": name,
            "params": {name_allowed(key): str(value) for key, value in params.items()},
            "tags": {name_allowed(key): value for key, value in tags.items()},
            "parent": parent_run_id,
            "continues": run_id is not None,
        }
        journal = self._room.journal(stage, run_id)
        try:
            outbox = Outbox(self._room, journal, begin, self._runs)
        except OSError as error:
            message = "%s cannot be written; %s goes on untracked: %s"
            logger.warning(message, journal.path, stage, first_line(error))
            return TrackedRun(None)
        return TrackedRun(outbox, registry=self._runs.version_of, system_metrics=system_metrics)

    def deliver(self, timeout_s: float) -> Waiting | None:
        """Sends what earlier runs left behind, for about `timeout_s` seconds; returns what still waits."""
        deadline = time.monotonic() + timeout_s
        if self._room.waiting() is not None:
            deliver_left_behind(self._room, self._runs, is_due_elsewhere=lambda: time.monotonic() > deadline)
        return self._room.waiting()

    def resolve_model(self, spec: str) -> RegisteredVersion | None:
        """Returns the registered version that `name` (the newest), `name@alias` or `name/version` means.

        None if there is none, and, with a logged warning, if MLflow cannot be asked.
        """
        named, _, alias = spec.partition("@")
        name, _, number = named.partition("/")
        try:
            client = self._connection.client()
            if alias:
                return registered(client.get_model_version_by_alias(name, alias))
            if number:
                return registered(client.get_model_version(name, number))
            wanted, newest_first = f"name='{name}'", ["version_number DESC"]
            newest = client.search_model_versions(wanted, max_results=1, order_by=newest_first)
            return registered(newest[0]) if newest else None
        except Exception as error:
            if not is_hopeless(error):
                logger.warning("MLflow (%s) cannot look up %r: %s", self.uri, spec, first_line(error))
            return None

    def runs(self, stage: str, *, num_max: int = 100) -> list[RunRow]:
        """Returns the runs of `stage`, newest first; none, with a warning, if MLflow cannot be asked."""
        try:
            client = self._connection.client()
            experiment = client.get_experiment_by_name(stage)
            ids = [] if experiment is None else [experiment.experiment_id]
            newest_first = ["attributes.start_time DESC"]
            found = client.search_runs(ids, max_results=num_max, order_by=newest_first) if ids else []
        except Exception as error:
            logger.warning("MLflow (%s) cannot list runs of %s: %s", self.uri, stage, first_line(error))
            return []
        return [_row(run) for run in found]

    def is_unfinished(self, stage: str, run_id: str) -> bool:
        """Whether a run of `stage` did not say how it ended.

        False, with a warning, if its journal is not here and MLflow cannot be asked.
        """
        journal = self._room.known(run_id)
        if journal is not None:
            return not journal.has_ended
        running = [row for row in self.runs(stage) if row["status"] == "RUNNING"]
        return any(run_id in {row["id"], row["tags"].get(JOURNAL_TAG)} for row in running)

    def aliases(self) -> dict[str, list[str]]:
        """Returns `name@alias` of every registered model that has one, by the digest it stands for.

        Those that MLflow has yet to be told of are among them.

        Raises:
            TrackingError: MLflow cannot be asked.
        """
        found: dict[str, list[str]] = {}
        for journal in self._room.journals():
            for entry in journal.undelivered():
                if entry["do"] == "register":
                    found.setdefault(entry["tags"]["digest"], []).append(f"{entry['name']}@{entry['alias']}")
        with self._answering() as client:
            if client is None:
                return found
            for model in _all_pages(client.search_registered_models):
                for alias, number in model.aliases.items():
                    digest = registered(client.get_model_version(model.name, str(number)))["digest"]
                    found.setdefault(digest, []).append(f"{model.name}@{alias}")
        return found

    def knows(self, run_id: str) -> bool:
        """True if that run is tracked here.

        Raises:
            TrackingError: MLflow cannot be asked.
        """
        if self._room.known(run_id) is not None:
            return True
        with self._answering() as client:
            return client is not None and self._runs.find(run_id) is not None

    @contextmanager
    def _answering(self) -> "Iterator[MlflowClient | None]":
        """The client, None where nothing was ever tracked; what goes wrong is an error, unlike elsewhere."""
        try:
            yield None if self._connection.is_unused else self._connection.client()
        except Exception as error:
            raise TrackingError(
                f"MLflow must say which models are in use, but {self.uri} does not ({first_line(error)}); "
                "start it, or name another with MLFLOW_TRACKING_URI"
            ) from error
