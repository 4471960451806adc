"""Clients of MLflow, its SQLite file, and what its errors mean."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

T = TypeVar("T")

SQLITE_PREFIX = "sqlite:///"
LOCK_TIMEOUT_S = 30.0
HOPELESS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"}
ENVIRONMENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def tracking_uri(local_root: Path) -> str:
    """Returns MLFLOW_TRACKING_URI if it is set, else that of the SQLite file mlflow.db in `local_root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE_PREFIX}{local_root.resolve() / 'mlflow.db'}"


def is_hopeless(error: Exception) -> bool:
    """True for a call that MLflow will never accept, however often it is tried."""
    is_ours = isinstance(error, TypeError | ValueError) and not isinstance(error, OSError)
    return getattr(error, "error_code", None) in HOPELESS or is_ours or isinstance(error, FileNotFoundError)


def with_patience(call: Callable[[], T], *, num_tries: int = 4, pause_s: float = 0.25) -> T:
    """Returns what `call` returns; repeats it while another process holds a SQLite file locked."""
    for _ in range(num_tries - 1):
        try:
            return call()
        except Exception as error:
            if "locked" not in str(error):
                raise
            time.sleep(pause_s)
    return call()


class Connection:
    """One MLflow address; its client is made when it is first needed.

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
        self.artifact_root = None if artifact_root is None else artifact_root.resolve()
        self._connected: MlflowClient | None = None

    @property
    def is_unused(self) -> bool:
        """Whether nothing was ever tracked here, as far as this machine can tell."""
        return self._database is not None and not self._database.exists()

    def prepare(self) -> None:
        """Imports MLflow, which takes seconds but asks nobody; once, and best in the main thread."""
        for variable, value in ENVIRONMENT_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        import mlflow.tracking  # noqa: F401

    def client(self) -> "MlflowClient":
        """Returns the client. Raises what MLflow raises."""
        if self._connected is None:
            self.prepare()
            from mlflow.tracking import MlflowClient

            if self._database is not None and self.artifact_root is not None:
                _create_database(self._database, self.artifact_root)
            self._connected = with_patience(lambda: MlflowClient(self.uri, self.uri))
        return self._connected


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
