"""What a rank has to know of the work, as JSON, which goes to other machines and of which nothing is run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import BaseModel, ConfigDict

from datasets.store import Store
from ldm.errors import ContractError
from ldm.recipe import parse_recipe

if TYPE_CHECKING:
    from ldm.stages.stage import Job


class Task(BaseModel):
    """A piece of training that several ranks do together.

    Attributes:
        stage: `train-first-stage` or `train-ldm`.
        store: its URI.
        key: of the result, which names the work area.
        recipe: resolved.
        inputs: stage and key of each artifact that is read, by role.
        folder: where ranks tell their supervisor how they are; on its machine.
        checkpoint_every_s: seconds between checkpoints.
        supervisor: process number and start (seconds of Unix time) of the supervisor.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    store: str
    key: str
    recipe: dict[str, Any]
    inputs: dict[str, tuple[str, str]]
    folder: str
    checkpoint_every_s: float
    supervisor: tuple[int, float]


def task_of(job: Job, *, folder: str, checkpoint_every_s: float) -> Task:
    """The task of a job, supervised by this process."""
    return Task(
        stage=job.stage.name,
        store=job.store.uri,
        key=job.key,
        recipe=job.recipe.model_dump(mode="json"),
        inputs={role: (manifest.stage, manifest.key) for role, manifest in job.inputs.items()},
        folder=folder,
        checkpoint_every_s=checkpoint_every_s,
        supervisor=(os.getpid(), psutil.Process().create_time()),
    )


def job_of(task: Task) -> Job:
    """The job of a task, as a rank does it.

    Raises:
        ContractError: an input is no longer in the store.
    """
    from ldm.stages import STAGES
    from ldm.stages.stage import Job
    from ldm.training.report import Silent

    store, stage = Store(task.store), STAGES[task.stage]
    inputs = {}
    for role, (of, key) in task.inputs.items():
        manifest = store.find(of, key)
        if manifest is None:
            raise ContractError(
                f"the {role} {of} {key[:12]} must stay while it is read, but is gone from {store.uri}; run "
                "the same command again"
            )
        inputs[role] = manifest
    recipe = parse_recipe(task.recipe, source="the task of a rank")
    return Job(stage, store, recipe, task.key, inputs, Silent())
