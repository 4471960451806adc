"""What all stages share: the key of a result, and the way from inputs to a committed artifact."""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from datasets.keys import artifact_key
from datasets.manifest import Content, FileRecord, Manifest, Parent
from datasets.store import Store, WorkArea
from ldm.config import Recipe
from ldm.device import facts, resolve
from ldm.launch.supervisor import supervise
from ldm.training.loop import History, Trainee, train
from ldm.training.memory import available_bytes, require_memory
from ldm.training.ranks import ALONE, Ranks
from ldm.training.report import Report
from ldm.training_config import Training

TraineeT = TypeVar("TraineeT", bound=Trainee)


@dataclass(frozen=True)
class Job:
    """One piece of work: a stage's inputs, found, and where its result goes."""

    stage: "Stage"
    store: Store
    recipe: Recipe
    key: str
    inputs: Mapping[str, Manifest]
    report: Report

    @property
    def work(self) -> WorkArea:
        """State of unfinished attempts; it is cleared once the result is committed."""
        return self.store.work(self.stage.name, self.key)

    @property
    def configuration(self) -> dict[str, Any]:
        """What decides the result: the recipe's part of it, and the digests of its inputs."""
        digests = {role: manifest.digest for role, manifest in self.inputs.items()}
        return {"stage": self.stage.name, **self.stage.what(self.recipe), "inputs": digests}

    def put(self, name: str, data: bytes, *, count: int | None = None) -> FileRecord:
        """Store one file of the result."""
        return self.store.put(self.stage.name, self.key, name, data, count=count)


@dataclass(frozen=True)
class Result:
    """What a stage made: its files, stored already, and facts about the whole."""

    files: tuple[FileRecord, ...]
    statistics: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A kind of work.

    The key of its result is a digest of its name, CODE_VERSION, `what` and its inputs' content: same key,
    same result, no work (ADR 0007).
    """

    name: str
    code_version: int
    """Raised when the code gives another result for the same inputs."""
    inputs: Mapping[str, str]
    """Role -> the stage whose artifact takes it."""
    what: Callable[[Recipe], dict[str, Any]]
    """The part of a recipe that decides the result."""
    build: Callable[[Job], Result]
    """Does the work, from wherever an earlier attempt left off."""
    need_bytes: Callable[[Recipe, Mapping[str, Manifest]], int]
    """Free space the work takes at its height."""
    make_trainee: "Callable[[Job, Ranks], Trainee] | None" = None
    """What is trained, as one of several ranks sees it; None for stages that train nothing."""

    def key(self, recipe: Recipe, inputs: Mapping[str, Manifest]) -> str:
        """Key of the result of these inputs."""
        digests = {role: manifest.digest for role, manifest in inputs.items()}
        return artifact_key(self.name, self.code_version, what=self.what(recipe), parents=digests)

    def find(self, store: Store, recipe: Recipe, inputs: Mapping[str, Manifest]) -> Manifest | None:
        """The result, when the store has it."""
        return store.find(self.name, self.key(recipe, inputs))

    def run(self, job: Job, provenance: Callable[[], Mapping[str, Any]]) -> Manifest:
        """Do the work and commit the result; `provenance` is asked when the work is done.

        Raises:
            SpaceError: the store has too little room to finish.
        """
        job.store.require_free(self.need_bytes(job.recipe, job.inputs), purpose=self.name)
        torch.set_num_threads(job.recipe.threads)
        result = self.build(job)
        content = Content(
            stage=self.name,
            key=job.key,
            code_version=self.code_version,
            what=self.what(job.recipe),
            parents={role: Parent(m.stage, m.key, m.digest) for role, m in job.inputs.items()},
            files=result.files,
            statistics=result.statistics,
        )
        manifest = job.store.commit(content, provenance())
        job.work.clear()
        return manifest


def trained(job: Job, training: Training, make: Callable[[Job, Ranks], TraineeT]) -> tuple[TraineeT, History]:
    """A trainee in its final state, and all that it logged.

    Ranks, if there are several, leave their final checkpoint in the work area; from there this process goes
    on as if it had been cut off.

    Raises:
        RecipeError: a step needs more memory than there is; what to set is said.
    """
    require_memory(
        job.recipe,
        "train-ldm" if job.stage.name == "train-ldm" else "train-first-stage",
        available_bytes=available_bytes(resolve(job.recipe.device), ranks=training.ranks),
        ranks=training.ranks,
    )
    if training.ranks > 1:
        supervise(job, training.ranks)
    trainee = make(job, ALONE)
    return trainee, train(trainee, job.work, report=job.report, of=job.configuration)


def environment(recipe: Recipe) -> dict[str, Any]:
    """What equal bits depend on besides the recipe: torch build, class of device, threads, instruction set.

    Equality is claimed for one class of device, the same torch build and the same number of threads; a GPU
    and a CPU agree up to rounding.
    """
    return {
        "torch": torch.__version__,
        **facts(resolve(recipe.device)),
        "threads": recipe.threads,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
