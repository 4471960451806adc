"""Makes the artifact of a stage, or reuses it: tracked in MLflow, shown in Prefect, its models registered."""

import json
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from datasets.image_shards import build_image_shards
from datasets.manifest import Manifest
from datasets.store import Store
from flows.attempts import announce, attempt_here
from flows.console import show_own_logs
from flows.invocation import Invocation
from flows.pages import publish
from flows.preflight import planned_list
from flows.progress import StageReport
from flows.request import DOWNLOAD_SHARDS, NotBuiltError, Request
from flows.staleness import flat
from flows.tracking import open_tracker
from ldm.config import Recipe
from ldm.stages import STAGES
from ldm.stages.stage import Job, environment
from ldm.tracking import TrackedRun

logger = logging.getLogger(__name__)
PARENT_RUN: ContextVar[str | None] = ContextVar("PARENT_RUN", default=None)
"""MLflow run under which the stages of `reproduce` are shown."""
RUN_FILE = "mlflow.json"
"""Names the tracked run of an unfinished attempt, in its work area."""
REGISTERED = {"train-first-stage": "first-stage-{recipe.first_stage.name}", "train-ldm": "ldm-{recipe.name}"}


class Receipt(BaseModel):
    """What a stage's flow hands on: small, JSON, and enough to find the rest."""

    model_config = ConfigDict(frozen=True)

    stage: str
    key: str
    digest: str
    uri: str
    reused: bool
    mlflow_run: str | None
    wall_s: float
    cpu_s: float
    bytes: int


def receipt_of(request: Request, manifest: Manifest, *, reused: bool) -> Receipt:
    """The receipt of an artifact."""
    provenance = manifest.provenance
    return Receipt(
        stage=manifest.stage,
        key=manifest.key,
        digest=manifest.digest,
        uri=request.store.uri_of(manifest),
        reused=reused,
        mlflow_run=provenance.get("mlflow_run"),
        wall_s=float(provenance.get("wall_s", 0.0)),
        cpu_s=float(provenance.get("cpu_s", 0.0)),
        bytes=manifest.num_bytes,
    )


def produce(request: Request, stage: str) -> Receipt:
    """The artifact of a stage whose inputs are there: reused if it exists, made otherwise."""
    show_own_logs()
    manifest = request.find(stage)
    reused = manifest is not None
    if manifest is None:
        manifest = make(request, stage)
        request.found[stage] = manifest
    else:
        run = manifest.provenance.get("mlflow_run")
        logger.info("%s reuses artifact %s, made by MLflow run %s", stage, manifest.short, run)
        complete_run(request, manifest)
    receipt = receipt_of(request, manifest, reused=reused)
    publish(manifest, receipt.uri, reused=reused)
    return receipt


@task(name="make", task_run_name="make {stage}", cache_policy=NO_CACHE, persist_result=False)
def make(request: Request, stage: str) -> Manifest:
    """Do the work of a stage in a tracked run."""
    key, params = plan(request, stage)
    inputs = inputs_of(request, stage)
    with (
        tracked(request, stage, key, params, inputs=inputs) as run,
        StageReport(request.store, stage, key, run) as report,
    ):

        def provenance() -> dict[str, Any]:
            return {
                "mlflow_run": run.id,
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "host": socket.gethostname(),
                "environment": environment(request.recipe),
                "recipe": request.recipe.model_dump(mode="json"),
                "asked": request.asked and request.asked.model_dump(mode="json"),
                **report.costs(),
            }

        if stage == DOWNLOAD_SHARDS:
            manifest = build_image_shards(
                request.store, request.recipe.dataset, progress=report.progress, provenance=provenance
            )
        else:
            require_there(request.store, inputs)
            for role, parent in inputs.items():
                run.input(role, digest=parent.digest, uri=request.store.uri_of(parent), context=role)
            manifest = STAGES[stage].run(
                Job(STAGES[stage], request.store, request.recipe, key, inputs, report), provenance
            )
        request.store.work(stage, key).clear()
        describe(request, run, manifest)
    return manifest


def inputs_of(request: Request, stage: str) -> dict[str, Manifest]:
    """The artifacts a stage reads, which its flow has found or made before."""
    roles = STAGES[stage].inputs if stage in STAGES else {}
    return {role: request.found[parent] for role, parent in roles.items()}


def require_there(store: Store, inputs: Mapping[str, Manifest]) -> None:
    """Look again that inputs are there, now that the attempt that reads them is announced (decision 0014).

    Raises:
        NotBuiltError: one was removed since it was found.
    """
    for role, manifest in inputs.items():
        if store.find(manifest.stage, manifest.key) is None:
            raise NotBuiltError(
                f"the {role} {manifest.stage} {manifest.short} must stay while it is read, but was removed "
                f"from {store.uri} a moment ago; run the same command again"
            )


def plan(request: Request, stage: str) -> tuple[str, dict[str, Any]]:
    """Key under which attempts at a stage are kept, and the parameters that MLflow shows."""
    recipe = request.recipe
    if stage == DOWNLOAD_SHARDS:
        dataset = recipe.dataset.model_dump(mode="json", exclude={"description", "licence", "attribution"})
        return planned_list(recipe.dataset).key, dict(flat("", dataset))
    key = STAGES[stage].key(recipe, inputs_of(request, stage))
    return key, dict(flat("", STAGES[stage].what(recipe)))


@contextmanager
def tracked(
    request: Request,
    stage: str,
    key: str,
    params: Mapping[str, Any],
    *,
    inputs: Mapping[str, Manifest] | None = None,
    asked: Sequence[Invocation] | None = None,
) -> Iterator[TrackedRun]:
    """The MLflow run of a piece of work: the same run again when an earlier attempt was cut off.

    Args:
        request: what was asked for.
        stage: the experiment.
        key: of the work area, which says from now on who works there.
        params: for MLflow.
        inputs: artifacts that are read.
        asked: the runs that the work consists of, when not the request alone.
    """
    consists_of = asked or ([request.asked] if request.asked else [])
    announce(request.store, attempt_here(stage, key, asked=consists_of, inputs=inputs or {}))
    work = request.store.work(stage, key)
    saved = work.read(RUN_FILE)
    run = open_tracker(request.store).start(
        stage,
        name=f"{request.recipe.name}-{key[:8]}",
        params=dict(params),
        tags={"recipe": request.recipe.name, "key": key, "store": request.store.uri},
        run_id=json.loads(saved)["run_id"] if saved else None,
        parent_run_id=PARENT_RUN.get(),
    )
    if run.id is not None:
        work.write(RUN_FILE, json.dumps({"run_id": run.id}).encode())
    with run:
        yield run


def complete_run(request: Request, manifest: Manifest) -> None:
    """Finish the MLflow run of an artifact whose maker was killed between storing it and telling of it."""
    run_id, tracker = manifest.provenance.get("mlflow_run"), open_tracker(request.store)
    if run_id is not None and tracker.is_unfinished(manifest.stage, run_id):
        name = f"{request.recipe.name}-{manifest.key[:8]}"
        with tracker.start(manifest.stage, name=name, params={}, tags={}, run_id=run_id) as run:
            describe(request, run, manifest)


def describe(request: Request, run: TrackedRun, manifest: Manifest) -> None:
    """Tell MLflow what came out: digest, manifest, costs, numbers, registered model, and the way back."""
    store, uri = request.store, request.store.uri_of(manifest)
    run.output(manifest.stage, digest=manifest.digest, uri=uri)
    run.json("manifest.json", json.loads(manifest.to_json()))
    run.metrics(0, {name: manifest.provenance[name] for name in ("wall_s", "cpu_s")})
    run.metrics(0, {"artifact_bytes": manifest.num_bytes})
    if manifest.stage == DOWNLOAD_SHARDS:
        parent = manifest.content.parents["url_list"]
        url_list = store.find(parent.stage, parent.key)
        if url_list is not None:
            run.input("url_list", digest=url_list.digest, uri=store.uri_of(url_list), context="source")
        outcomes = manifest.content.statistics["outcomes"]
        run.metrics(0, {f"outcome_{reason}": count for reason, count in outcomes.items()})
    name = registered_name(manifest.stage, request.recipe)
    if name:
        tags = {"recipe": request.recipe.name, "key": manifest.key}
        run.register(name, uri=uri, digest=manifest.digest, tags=tags, alias="candidate")


def registered_name(stage: str, recipe: Recipe) -> str | None:
    """Name in the registry of what a stage makes; None when it is no model."""
    form = REGISTERED.get(stage)
    return None if form is None else form.format(recipe=recipe)
