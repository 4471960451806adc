"""Who works on what: each attempt says in its work area which process it is and what it reads."""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from datasets.errors import CorruptionError
from datasets.manifest import Manifest, Parent
from datasets.store import Store
from datasets.work import WorkArea
from flows.invocation import Invocation

PREFIX = "attempt-"
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9.-]")
CLOCK_S = 5.0
"""How far apart two readings of one process's start may be: the system's idea of it moves with the clock."""


class Attempt(BaseModel):
    """A process at work on an artifact.

    Attributes:
        stage: What it makes, as work areas are named.
        key: Key of its work area.
        host: Its machine.
        pid: Its number there.
        process_started: When it began, in seconds of Unix time; tells it from a later one of its number.
        asked: The runs it is a part of or consists of.
        inputs: What it reads, by role.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    key: str
    host: str
    pid: int
    process_started: float
    asked: tuple[Invocation, ...]
    inputs: dict[str, Parent]

    @property
    def folder(self) -> str:
        """Its work area, as the store names it."""
        return f"{self.stage}/{self.key[:16]}"

    @property
    def file_name(self) -> str:
        """Its file there; two processes may work side by side."""
        return f"{PREFIX}{NOT_IN_A_NAME.sub('-', self.host)}-{self.pid}.json"

    @property
    def state(self) -> Literal["running", "cut off", "on another machine"]:
        """Whether the process lives, as far as this machine can tell."""
        if self.host != socket.gethostname():
            return "on another machine"
        return "running" if is_alive(self.model_dump()) else "cut off"


def attempt_here(
    stage: str, key: str, *, asked: Sequence[Invocation], inputs: Mapping[str, Manifest]
) -> Attempt:
    """An attempt of this process."""
    process = psutil.Process()
    return Attempt(
        stage=stage,
        key=key,
        host=socket.gethostname(),
        pid=os.getpid(),
        process_started=process.create_time(),
        asked=tuple(asked),
        inputs={role: Parent(m.stage, m.key, m.digest) for role, m in inputs.items()},
    )


def announce(store: Store, attempt: Attempt) -> None:
    """Write an attempt into its work area; from then on nothing it reads is removed (decision 0014)."""
    area = store.work(attempt.stage, attempt.key)
    area.write(attempt.file_name, attempt.model_dump_json().encode())


def attempts(store: Store) -> list[Attempt]:
    """All attempts that a store knows of.

    Raises:
        CorruptionError: what one says of itself cannot be read.
    """
    areas = store.work_areas().values()
    return [_read(area, name) for area in areas for name in area.names(PREFIX)]


def _read(area: WorkArea, name: str) -> Attempt:
    try:
        return Attempt.model_validate_json(area.read(name) or b"")
    except ValidationError as error:
        raise CorruptionError(
            f"{area.uri}/{name} must say who works there, but cannot be read ({error.error_count()} "
            "mistakes); remove it if nobody does"
        ) from error


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether the process of that `pid` and `process_started` runs; a later one of its number is another."""
    try:
        started = psutil.Process(process["pid"]).create_time()
    except psutil.NoSuchProcess:
        return False
    return abs(started - process["process_started"]) < CLOCK_S
