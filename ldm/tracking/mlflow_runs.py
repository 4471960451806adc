"""Runs in MLflow: the service that journals are delivered to. Every call may be made twice."""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import urlsplit

from ldm.tracking.connection import Connection, is_hopeless, with_patience
from ldm.tracking.delivery import KnownRun, Point
from ldm.tracking.journal import NAME, Entry, Journal

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

JOURNAL_TAG = "journal"
"""Tag of a run that names the journal it was created for, so that it is created once."""
NUM_DIGEST_CHARS = 36
NUM_PER_CALL = 100
NUM_TEXT_CHARS = 6000
NUM_NON_FINITE_NOTED = 100
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development"
}  # else the UI shows pages for chat bots


class RegisteredVersion(TypedDict):
    """A version in the model registry: where the weights lie, their sha256, the run that made them."""

    name: str
    version: str
    uri: str
    digest: str
    run_id: str | None


class MlflowRuns:
    """The runs of one MLflow address."""

    is_hopeless = staticmethod(is_hopeless)

    def __init__(self, connection: Connection) -> None:
        self.address = f"MLflow ({connection.uri})"
        self._connection = connection
        self._send: Mapping[str, Callable[[str, Entry, Journal], object]] = {
            "picture": self._picture,
            "keep": self._keep,
            "input": self._input,
            "tag": self._tag,
            "non_finite": self._non_finite,
            "register": self._register,
            "end": self._end,
        }

    def answers(self) -> bool:
        """Whether it is there at all."""
        try:
            self._client().search_experiments(max_results=1)
        except Exception:
            return False
        return True

    def find(self, name: str) -> KnownRun | None:
        """Returns the run that has this id, or was created for the journal of this name."""
        run = self._by_id(name) or self._by_journal(name)
        return None if run is None else KnownRun(run.info.run_id, int(run.data.tags.get("attempts", "0")))

    def create(self, begin: Entry, *, journal: str) -> str:
        """Returns the id of a new run, created for a journal as its first entry says."""
        experiment = with_patience(lambda: self._experiment(begin["stage"]))
        run = self._client().create_run(
            experiment, start_time=begin["at_ms"], tags={JOURNAL_TAG: journal}, run_name=begin["name"]
        )
        return run.info.run_id

    def describe(self, run_id: str, begin: Entry, *, parent: str | None, attempt: int) -> None:
        """Marks a run as running and adds tags and the parameters that it does not have yet."""
        from mlflow.entities import Param, RunTag

        client = self._client()
        client.update_run(run_id, status="RUNNING")
        params = client.get_run(run_id).data.params
        tags = {**begin["tags"], "attempts": str(attempt)}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        new_tags = [RunTag(key, value[:NUM_TEXT_CHARS]) for key, value in tags.items()]
        named = {key: value[:NUM_TEXT_CHARS] for key, value in begin["params"].items()}
        new_params = [Param(key, value) for key, value in named.items() if key not in params]
        for first in range(0, max(len(new_params), len(new_tags)), NUM_PER_CALL):
            some = slice(first, first + NUM_PER_CALL)
            client.log_batch(run_id, params=new_params[some], tags=new_tags[some])

    def last_step(self, run_id: str, key: str) -> int:
        """Returns the last step of a series of points; -1 if there is none."""
        history = self._client().get_metric_history(run_id, key)
        return max((metric.step for metric in history), default=-1)

    def has_picture(self, run_id: str, name: str, step: int) -> bool:
        """Whether a series of pictures has one at this step, with its small copy, which is sent last."""
        paths = (str(file.path) for file in self._client().list_artifacts(run_id, "images"))
        found = {path.partition("+timestamp+")[0] for path in paths if path.endswith("+compressed.webp")}
        return f"images/{_title(name, step)}" in found

    def send_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Records metric points; MLflow keeps one of those that are equal, times included."""
        from mlflow.entities import Metric

        metrics = [Metric(point.key, point.value, point.timestamp_ms, point.step) for point in points]
        self._client().log_batch(run_id, metrics=metrics)

    def send(self, run_id: str, entry: Entry, *, journal: Journal) -> None:
        """Records anything else."""
        self._send[entry["do"]](run_id, entry, journal)

    def version_of(self, model_name: str, digest: str) -> RegisteredVersion | None:
        """Returns the registered version of a model that holds `digest`."""
        for known in self._client().search_model_versions(f"name='{model_name}'"):
            if known.tags.get("digest") == digest:
                return registered(known)
        return None

    def _client(self) -> "MlflowClient":
        return self._connection.client()

    def _by_id(self, run_id: str) -> "Run | None":
        try:
            run = self._client().get_run(run_id)
        except Exception as error:
            if not is_hopeless(error):
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _by_journal(self, name: str) -> "Run | None":
        return next(iter(self._all_by_journal(name)), None)

    def _all_by_journal(self, name: str) -> "Sequence[Run]":
        if not NAME.fullmatch(name):
            return []
        client = self._client()
        experiments = [one.experiment_id for one in client.search_experiments()]
        wanted = f"tags.{JOURNAL_TAG} = '{name}'"
        return client.search_runs(experiments, wanted) if experiments else []

    def _experiment(self, stage: str) -> str:
        from mlflow.exceptions import MlflowException

        client, root = self._client(), self._connection.artifact_root
        location = (root / stage).as_uri() if root else None
        known = client.get_experiment_by_name(stage)
        if known is None:
            try:
                return client.create_experiment(stage, artifact_location=location, tags=EXPERIMENT_TAGS)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            known = client.get_experiment_by_name(stage)
        assert known is not None
        if known.lifecycle_stage == "deleted":
            client.restore_experiment(known.experiment_id)
        return known.experiment_id

    def _picture(self, run_id: str, entry: Entry, journal: Journal) -> None:
        """Adds a picture as MLflow's own `log_image` does, under a name that is the same each time.

        MLflow would add another copy when a call is repeated.
        """
        from mlflow.tracking.multimedia import compress_image_size
        from PIL import Image

        title, at_ms = _title(entry["name"], entry["step"]), entry["at_ms"]
        name = f"{title}+timestamp+{at_ms}+{uuid.uuid5(uuid.NAMESPACE_OID, f'{journal.name}/{title}')}"
        with TemporaryDirectory(prefix="ldm-tracking-") as scratch:
            png, small = Path(scratch, f"{name}.png"), Path(scratch, f"{name}+compressed.webp")
            with Image.open(BytesIO((journal.files / entry["file"]).read_bytes())) as image:
                picture = image.convert("RGB")
            picture.save(png)
            compress_image_size(picture).save(small)
            for path in (png, small):
                self._client().log_artifact(run_id, str(path), "images")
        self._client().set_tag(run_id, "mlflow.loggedImages", True)

    def _keep(self, run_id: str, entry: Entry, journal: Journal) -> None:
        place = PurePosixPath(entry["path"])
        folder = None if place.parent == PurePosixPath(".") else str(place.parent)
        with TemporaryDirectory(prefix="ldm-tracking-") as scratch:
            local = Path(scratch) / place.name
            local.write_bytes((journal.files / entry["file"]).read_bytes())
            self._client().log_artifact(run_id, str(local), folder)

    def _input(self, run_id: str, entry: Entry, _: Journal) -> None:
        """Records an MLflow dataset as the run's input; its tag `sha256` holds the whole digest."""
        from mlflow.entities import DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", entry["context"]), InputTag("sha256", entry["digest"])]
        dataset = _dataset(entry["name"], digest=entry["digest"], uri=entry["uri"])
        self._client().log_inputs(run_id, [DatasetInput(dataset, tags)])

    def _tag(self, run_id: str, entry: Entry, _: Journal) -> None:
        self._client().set_tag(run_id, entry["key"], entry["value"][:NUM_TEXT_CHARS])

    def _non_finite(self, run_id: str, entry: Entry, _: Journal) -> None:
        """Adds a note to the tag `non_finite.<key>`, once."""
        tag = f"non_finite.{entry['key']}"
        earlier = self._client().get_run(run_id).data.tags.get(tag, "")
        notes = earlier.split(", ") if earlier else []
        if entry["note"] not in notes and len(notes) < NUM_NON_FINITE_NOTED:
            self._client().set_tag(run_id, tag, ", ".join([*notes, entry["note"]])[:NUM_TEXT_CHARS])

    def _register(self, run_id: str, entry: Entry, _: Journal) -> None:
        """Makes the version whose digest is in the tags, if there is none, and sets the alias on it."""
        known = with_patience(lambda: self._version(run_id, entry))
        with_patience(
            lambda: self._client().set_registered_model_alias(entry["name"], entry["alias"], known["version"])
        )

    def _version(self, run_id: str, entry: Entry) -> RegisteredVersion:
        from mlflow.exceptions import MlflowException

        client, name, tags = self._client(), entry["name"], entry["tags"]
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = self.version_of(name, tags["digest"])
        return known or registered(
            client.create_model_version(name, f"runs:/{run_id}/model", run_id, tags=dict(tags))
        )

    def _end(self, run_id: str, entry: Entry, journal: Journal) -> None:
        """Ends a run, and removes twins: a stalled server may create a run after the call was given up."""
        for twin in self._all_by_journal(journal.name):
            if twin.info.run_id != run_id and "attempts" not in twin.data.tags:
                self._client().delete_run(twin.info.run_id)
        self._client().set_terminated(run_id, entry["status"], end_time=entry["at_ms"])


def registered(version: "ModelVersion") -> RegisteredVersion:
    """Returns what the registry holds of a version."""
    return RegisteredVersion(
        name=version.name,
        version=str(version.version),
        uri=version.tags.get("uri", version.source or ""),
        digest=version.tags.get("digest", ""),
        run_id=version.run_id,
    )


def _title(name: str, step: int) -> str:
    """Returns how the files of a picture begin."""
    return f"{name.replace('/', '~')}+step+{step}"


def _dataset(name: str, *, digest: str, uri: str) -> Any:
    """Returns an MLflow dataset that points at `uri`; MLflow takes at most 36 characters of digest."""
    from mlflow.entities import Dataset

    scheme = urlsplit(uri).scheme
    kind = {"": "local", "file": "local", "https": "http"}.get(scheme, scheme)
    source = json.dumps({"url" if kind == "http" else "uri": uri})
    return Dataset(name, digest[:NUM_DIGEST_CHARS], source_type=kind, source=source)
