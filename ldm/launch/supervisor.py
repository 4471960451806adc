"""Starts ranks on this machine, watches them, and starts them again from the last good checkpoint.

An attempt ends as a whole: when a rank has died or all wait too long, all are killed and the next attempt
meets at a new store. The children are forked from a server that has imported what they need.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ldm.errors import TrainingError, WorkerError
from ldm.launch.beacons import cpu_seconds, overdue
from ldm.launch.task import Task, task_of
from ldm.launch.telling import Told
from ldm.training.checkpoint import saved
from ldm.training.loop import CHECKPOINT_EVERY_S
from ldm.training.stopping import Stopping

if TYPE_CHECKING:
    from ldm.stages.stage import Job

logger = logging.getLogger(__name__)
POLL_S = 0.05
NUM_STALLED = 4
"""So many attempts in a row that saved nothing new end the run."""
STOP_GRACE_S = 60.0
"""How long ranks that were told to stop may take to save."""
PRELOAD = ["__main__", "ldm.launch.worker", "ldm.stages"]


def supervise(job: "Job", num_ranks: int, *, checkpoint_every_s: float = CHECKPOINT_EVERY_S) -> None:
    """Train in ranks until the final checkpoint is in the job's work area, through whatever happens to them.

    SIGTERM is passed on: the ranks save and end, and so does this.

    Raises:
        TrainingError: a rank found a reason to stop that another attempt would find again.
        WorkerError: attempt after attempt ended without a new checkpoint.
    """
    with TemporaryDirectory(prefix="ldm-ranks-") as name, Stopping() as stopping:
        task = task_of(job, folder=name, checkpoint_every_s=checkpoint_every_s)
        told = Told(Path(name), job.report)
        num_stalled, num_attempts = 0, 0
        while True:
            before, num_attempts = saved(job.work), num_attempts + 1
            with attempt(task, num_ranks) as ranks:
                reason = watch(ranks, task, told, stopping)
            told.pass_on()
            job.report.spent(cpu_seconds(Path(name)))
            errors = told.errors()
            if reason is None or stopping.asked:
                return
            raise_final(errors)
            num_stalled = 0 if saved(job.work) != before else num_stalled + 1
            if num_stalled == NUM_STALLED:
                raise WorkerError(
                    f"ranks must get further in one of {NUM_STALLED} attempts, but saved nothing new "
                    f"({reason}); look at the log above{told_by(errors)}"
                )
            logger.warning(
                "%s; %d ranks start again from the last checkpoint (attempt %d)",
                reason,
                num_ranks,
                num_attempts + 1,
            )


@contextmanager
def attempt(task: Task, num_ranks: int) -> Iterator[list[ForkServerProcess]]:
    """The ranks of one attempt, which meet at a store of their own; leaving kills those that still live."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    from ldm.launch.worker import work

    ranks = [
        context.Process(
            target=work,
            args=(task.model_dump_json(), rank, num_ranks, store.port),
            name=f"rank {rank}",
            daemon=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        for process in ranks:
            process.start()
        yield ranks
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()


def watch(ranks: Sequence[ForkServerProcess], task: Task, told: Told, stopping: Stopping) -> str | None:
    """Wait for the end of an attempt; None when all ranks have ended well, else what happened."""
    since, passed_on_at = time.monotonic(), None
    while True:
        told.pass_on()
        codes = {process.name: process.exitcode for process in ranks}
        if all(code == 0 for code in codes.values()):
            return None
        ended = {name: code for name, code in codes.items() if code}
        if stopping.asked and passed_on_at is None:
            passed_on_at = time.monotonic()
            for process in ranks:
                if process.is_alive():
                    os.kill(process.pid or 0, signal.SIGTERM)
        if passed_on_at is not None:
            if None not in codes.values() or time.monotonic() - passed_on_at > STOP_GRACE_S:
                return "told to stop"
        elif ended:
            time.sleep(POLL_S)  # for the others to say why, if they can
            return " and ".join(how_it_ended(name, code) for name, code in ended.items())
        elif late := overdue(Path(task.folder), len(ranks), since=since):
            return f"ranks must say in time that they live, but {late}"
        time.sleep(POLL_S)


def how_it_ended(name: str, code: int) -> str:
    """The end of a process in words."""
    return (
        f"{name} was killed by {signal.Signals(-code).name}" if code < 0 else f"{name} ended with code {code}"
    )


def raise_final(errors: dict[int, dict[str, Any]]) -> None:
    """Raise what a rank gave as a reason that another attempt would find again, if one did.

    Raises:
        TrainingError: with its words.
    """
    for rank, error in errors.items():
        if error["is_final"]:
            logger.info("rank %d ended with\n%s", rank, error["traceback"])
            raise TrainingError(error["message"])


def told_by(errors: dict[int, dict[str, Any]]) -> str:
    """The first reason that ranks gave, to be put after a message."""
    return next((f"; rank {rank}: {e['kind']}: {e['message']}" for rank, e in errors.items()), "")
