"""Experiment tracking in MLflow: what a stage was given, how it went and what it left behind.

The only module that imports MLflow (inside functions: it takes seconds). By default everything lies in one
SQLite file below the store, without a server. Tracking never stops the work: an MLflow that is locked or gone
costs a warning.

    Tracker     one tracking address: starts runs, finds registered models
    TrackedRun  what `Tracker.start` returns (see ldm.tracked_run)
"""

import fcntl
import importlib.util
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar
from urllib.parse import urlsplit

from ldm.errors import TrackingError
from ldm.outbox import Point, with_patience
from ldm.tracked_run import RegisteredVersion, Status, TrackedRun, first_line, name_allowed

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

__all__ = ["RegisteredVersion", "RunRow", "TrackedRun", "Tracker", "tracking_uri"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

SQLITE_PREFIX = "sqlite:///"
LOCK_TIMEOUT_S = 30.0
SYSTEM_METRICS_INTERVAL_S = 10
NUM_DIGEST_CHARS = 36
NUM_PER_CALL = 100
NUM_TEXT_CHARS = 6000
HOPELESS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "BAD_REQUEST"}
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development"
}  # else the UI shows pages for chat bots
ENVIRONMENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class RunRow(TypedDict):
    """One line of a listing of runs; times in ms of Unix time, `metrics` the latest value of each key."""

    id: str
    name: str
    status: str
    start_ms: int
    end_ms: int | None
    metrics: dict[str, float]
    tags: dict[str, str]


def tracking_uri(local_root: Path) -> str:
    """Returns MLFLOW_TRACKING_URI if it is set, else that of the SQLite file mlflow.db in `local_root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE_PREFIX}{local_root.resolve() / 'mlflow.db'}"


def is_hopeless(error: Exception) -> bool:
    """True for a call that MLflow will never accept, however often it is tried."""
    hopeless_kinds = (TypeError, ValueError, FileNotFoundError)
    return getattr(error, "error_code", None) in HOPELESS or isinstance(error, hopeless_kinds)


@contextmanager
def _only_one_process(lock: Path) -> Iterator[None]:
    """Holds the lock file; the system releases it when the process dies. Raises TimeoutError."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    with lock.open("w") as handle:
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            raise TimeoutError(f"{lock} is still held by another process after {LOCK_TIMEOUT_S:g} s")
        yield


def _create_database(path: Path, artifact_root: Path) -> None:
    """Puts MLflow's SQLite file at `path` whole or not at all.

    Of processes that create the tables at once all but one fail, and one killed there can leave a file that
    no later run can use; so the file is made beside its place, under a lock, and renamed.
    """
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_one_process(path.with_name(f"{path.name}.lock")):
        if path.exists():
            return
        unfinished = path.with_name(f"{path.name}.unfinished")
        for left_over in path.parent.glob(f"{unfinished.name}*"):
            left_over.unlink()
        SqlAlchemyStore(f"{SQLITE_PREFIX}{unfinished}", artifact_root.as_uri()).engine.dispose()
        unfinished.replace(path)


def _dataset(name: str, *, digest: str, uri: str) -> Any:
    """Returns an MLflow dataset that points at `uri`; MLflow takes at most 36 characters of digest."""
    from mlflow.entities import Dataset

    scheme = urlsplit(uri).scheme
    kind = {"": "local", "file": "local", "https": "http"}.get(scheme, scheme)
    source = json.dumps({"url" if kind == "http" else "uri": uri})
    return Dataset(name, digest[:NUM_DIGEST_CHARS], source_type=kind, source=source)


def _registered(version: "ModelVersion") -> RegisteredVersion:
    return RegisteredVersion(
        name=version.name,
        version=str(version.version),
        uri=version.tags.get("uri", version.source or ""),
        digest=version.tags.get("digest", ""),
        run_id=version.run_id,
    )


def _all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yields everything that a search of MLflow finds."""
    page = search(max_results=NUM_PER_CALL)
    yield from page
    while page.token:
        page = search(max_results=NUM_PER_CALL, page_token=page.token)
        yield from page


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


def _start_monitor(run_id: str, uri: str) -> Any:
    """Returns MLflow's monitor of CPU, memory, disk, network and GPU, started; None without psutil."""
    if importlib.util.find_spec("psutil") is None:
        logger.info("system metrics are not recorded: psutil is not installed")
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=SYSTEM_METRICS_INTERVAL_S, resume_logging=True, tracking_uri=uri
    )
    monitor.start()
    return monitor


class MlflowRun:
    """One run in MLflow: the RunService that a TrackedRun reports to."""

    is_hopeless = staticmethod(is_hopeless)

    def __init__(self, client: "MlflowClient", run: "Run", *, address: str, resumed: bool) -> None:
        self.address = address
        self.run_id: str = run.info.run_id
        self.tags: Mapping[str, str] = run.data.tags
        self.monitor: Any = None
        self._client = client
        self._params: Mapping[str, str] = run.data.params
        self._resumed = resumed
        self._last_steps: dict[str, int] = {}
        self._pictures: set[str] | None = None

    def describe(self, *, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Adds tags, the number of attempts, and those parameters that the run does not have yet."""
        from mlflow.entities import Param, RunTag

        attempts = int(self.tags.get("attempts", "0")) + 1
        tags = {**tags, "attempts": str(attempts)}
        new_tags = [RunTag(name_allowed(key), value[:NUM_TEXT_CHARS]) for key, value in tags.items()]
        named = {name_allowed(key): str(value)[:NUM_TEXT_CHARS] for key, value in params.items()}
        new_params = [Param(key, value) for key, value in named.items() if key not in self._params]
        for first in range(0, max(len(new_params), len(new_tags)), NUM_PER_CALL):
            some = slice(first, first + NUM_PER_CALL)
            self._client.log_batch(self.run_id, params=new_params[some], tags=new_tags[some])

    def send_points(self, points: Sequence[Point]) -> None:
        """Records metric points; those that an earlier attempt of the run recorded are left out."""
        from mlflow.entities import Metric

        new = [point for point in points if point.step > self._last_step(point.key)]
        if new:
            metrics = [Metric(point.key, point.value, point.timestamp_ms, point.step) for point in new]
            self._client.log_batch(self.run_id, metrics=metrics)

    def send_picture(self, name: str, images_seen: int, *, png: bytes) -> None:
        """Adds a picture to the series `name`; MLflow adds a small copy, which marks it as complete."""
        from PIL import Image

        self._pictures = self._complete_pictures() if self._pictures is None else self._pictures
        title = f"images/{name.replace('/', '~')}+step+{images_seen}"
        if title not in self._pictures:
            with Image.open(BytesIO(png)) as image:
                self._client.log_image(self.run_id, image.convert("RGB"), key=name, step=images_seen)
            self._pictures.add(title)

    def keep(self, path_in_run: str, write: Callable[[Path], object]) -> None:
        """Stores the file that `write` writes as the artifact `path_in_run`."""
        place = PurePosixPath(path_in_run)
        folder = None if place.parent == PurePosixPath(".") else str(place.parent)
        with tempfile.TemporaryDirectory(prefix="ldm-tracking-") as scratch:
            local = Path(scratch) / place.name
            write(local)
            self._client.log_artifact(self.run_id, str(local), folder)

    def add_input(self, name: str, *, digest: str, uri: str, context: str) -> None:
        """Records an MLflow dataset as the run's input; its tag `sha256` holds the whole digest."""
        from mlflow.entities import DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", context), InputTag("sha256", digest)]
        dataset = _dataset(name, digest=digest, uri=uri)
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def set_tag(self, key: str, value: str) -> None:
        """Sets or replaces a tag."""
        self._client.set_tag(self.run_id, key, value[:NUM_TEXT_CHARS])

    def register(self, model_name: str, *, tags: Mapping[str, str], alias: str) -> RegisteredVersion:
        """Returns the version whose digest is `tags["digest"]`, new or known, now called `alias`."""
        known = _registered(with_patience(lambda: self._version(model_name, tags=tags)))
        with_patience(lambda: self._client.set_registered_model_alias(model_name, alias, known["version"]))
        return known

    def end(self, status: Status) -> None:
        """Ends the run and its system metrics."""
        if self.monitor is not None:
            self.monitor.finish()
        self._client.set_terminated(self.run_id, status)

    def _last_step(self, key: str) -> int:
        if not self._resumed:
            return -1
        if key not in self._last_steps:
            history = self._client.get_metric_history(self.run_id, key)
            self._last_steps[key] = max((metric.step for metric in history), default=-1)
        return self._last_steps[key]

    def _complete_pictures(self) -> set[str]:
        if not self._resumed:
            return set()
        paths = [str(file.path) for file in self._client.list_artifacts(self.run_id, "images")]
        return {path.partition("+timestamp+")[0] for path in paths if path.endswith("+compressed.webp")}

    def _version(self, model_name: str, *, tags: Mapping[str, str]) -> "ModelVersion":
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for known in self._client.search_model_versions(f"name='{model_name}'"):
            if known.tags.get("digest") == tags["digest"]:
                return known
        source = f"runs:/{self.run_id}/model"
        return self._client.create_model_version(model_name, source, self.run_id, tags=dict(tags))


class Tracker:
    """One MLflow address.

    Args:
        uri: what `tracking_uri` returns, or any MLflow tracking address.
        artifact_root: folder of the runs' files when `uri` is SQLite (default: `mlflow-artifacts` beside the
            database); leave it None with a server, which has its own.
    """

    def __init__(self, uri: str, *, artifact_root: Path | None = None) -> None:
        self.uri, self._database = uri, None
        if uri.startswith(SQLITE_PREFIX):
            self._database = Path(uri.removeprefix(SQLITE_PREFIX)).resolve()
            self.uri = f"{SQLITE_PREFIX}{self._database}"
            artifact_root = artifact_root or self._database.parent / "mlflow-artifacts"
        self._artifact_root = None if artifact_root is None else artifact_root.resolve()
        self._connected: MlflowClient | None = None

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
        """Returns a running run of experiment `stage`; an untracked one (id None) if MLflow cannot be used.

        Args:
            stage: name of the stage, which is the experiment.
            name: the run's name in listings.
            params: flat; values are written as text. A re-opened run keeps those it has and gains new keys.
            tags: flat; those given replace those of an earlier attempt.
            run_id: continue this run (after a kill); if MLflow has no such run, another is begun.
            parent_run_id: the run under which the UI shows this one.
            system_metrics: also record CPU, memory, disk, network and GPU use every 10 s.
        """
        all_tags = dict(tags) | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})
        try:
            client = self._client()
            known = self._reopened(client, run_id) if run_id else None
            run = known or with_patience(lambda: self._begun(client, stage, name=name))
            service = MlflowRun(client, run, address=f"MLflow ({self.uri})", resumed=known is not None)
            with_patience(lambda: service.describe(params=params, tags=all_tags))
            if system_metrics:
                service.monitor = _start_monitor(service.run_id, self.uri)
        except Exception as error:
            logger.warning("MLflow (%s) fails; %s goes on untracked: %s", self.uri, stage, first_line(error))
            return TrackedRun(None)
        return TrackedRun(service)

    def resolve_model(self, spec: str) -> RegisteredVersion | None:
        """Returns the registered version that `name` (the newest), `name@alias` or `name/version` means.

        None if there is none, and, with a logged warning, if MLflow cannot be asked.
        """
        named, _, alias = spec.partition("@")
        name, _, number = named.partition("/")
        try:
            client = self._client()
            if alias:
                return _registered(client.get_model_version_by_alias(name, alias))
            if number:
                return _registered(client.get_model_version(name, number))
            wanted, newest_first = f"name='{name}'", ["version_number DESC"]
            newest = client.search_model_versions(wanted, max_results=1, order_by=newest_first)
            return _registered(newest[0]) if newest else None
        except Exception as error:
            if not is_hopeless(error):
                logger.warning("MLflow (%s) cannot look up %r: %s", self.uri, spec, first_line(error))
            return None

    def runs(self, stage: str, *, num_max: int = 100) -> list[RunRow]:
        """Returns the runs of `stage`, newest first; none, with a warning, if MLflow cannot be asked."""
        try:
            client = self._client()
            experiment = client.get_experiment_by_name(stage)
            ids = [] if experiment is None else [experiment.experiment_id]
            newest_first = ["attributes.start_time DESC"]
            found = client.search_runs(ids, max_results=num_max, order_by=newest_first) if ids else []
        except Exception as error:
            logger.warning("MLflow (%s) cannot list runs of %s: %s", self.uri, stage, first_line(error))
            return []
        return [_row(run) for run in found]

    def aliases(self) -> dict[str, list[str]]:
        """Returns `name@alias` of every registered model that has one, by the digest it stands for.

        Raises:
            TrackingError: MLflow cannot be asked.
        """
        found: dict[str, list[str]] = {}
        with self._answering() as client:
            if client is None:
                return {}
            for model in _all_pages(client.search_registered_models):
                for alias, number in model.aliases.items():
                    digest = _registered(client.get_model_version(model.name, str(number)))["digest"]
                    found.setdefault(digest, []).append(f"{model.name}@{alias}")
        return found

    def knows(self, run_id: str) -> bool:
        """True if that run is tracked here.

        Raises:
            TrackingError: MLflow cannot be asked.
        """
        with self._answering() as client:
            try:
                return client is not None and bool(client.get_run(run_id))
            except Exception as error:
                if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False

    @contextmanager
    def _answering(self) -> "Iterator[MlflowClient | None]":
        """The client, None where nothing was ever tracked; what goes wrong is an error, unlike elsewhere."""
        try:
            nothing = self._database is not None and not self._database.exists()
            yield None if nothing else self._client()
        except Exception as error:
            raise TrackingError(
                f"MLflow must say which models are in use, but {self.uri} does not ({first_line(error)}); "
                "start it, or name another with MLFLOW_TRACKING_URI"
            ) from error

    def _client(self) -> "MlflowClient":
        if self._connected is None:
            for variable, value in ENVIRONMENT_DEFAULTS.items():
                os.environ.setdefault(variable, value)
            from mlflow.tracking import MlflowClient

            if self._database is not None and self._artifact_root is not None:
                _create_database(self._database, self._artifact_root)
            self._connected = with_patience(lambda: MlflowClient(self.uri, self.uri))
        return self._connected

    def _begun(self, client: "MlflowClient", stage: str, *, name: str) -> "Run":
        from mlflow.exceptions import MlflowException

        location = (self._artifact_root / stage).as_uri() if self._artifact_root else None
        known = client.get_experiment_by_name(stage)
        if known is None:
            try:
                client.create_experiment(stage, artifact_location=location, tags=EXPERIMENT_TAGS)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            known = client.get_experiment_by_name(stage)
        assert known is not None
        if known.lifecycle_stage == "deleted":
            client.restore_experiment(known.experiment_id)
        return client.create_run(known.experiment_id, run_name=name)

    def _reopened(self, client: "MlflowClient", run_id: str) -> "Run | None":
        try:
            with_patience(lambda: client.update_run(run_id, status="RUNNING"))
            return client.get_run(run_id)
        except Exception as error:
            if not is_hopeless(error):
                raise
            logger.warning("MLflow (%s) has no run %s to continue; another is begun", self.uri, run_id)
            return None
