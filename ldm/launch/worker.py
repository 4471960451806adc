"""One rank: joins the others and runs the loop. Started by a supervisor, by torchrun or by Ray."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from datasets.errors import DatasetsError
from ldm.device import LOCAL_RANK, resolve
from ldm.errors import LdmError
from ldm.launch.beacons import Beacon
from ldm.launch.task import Task, job_of
from ldm.launch.telling import Telling
from ldm.training.loop import train
from ldm.training.ranks import Ranks

PEER_TIMEOUT = timedelta(minutes=60)
"""The supervisor's limits are shorter: it ends ranks that wait for nobody."""
POLL_S = 0.5
LOOPBACK = "lo"


def work(task_json: str, rank: int, world_size: int, port: int) -> None:
    """What a rank does that a supervisor on this machine has started.

    Args:
        task_json: a `Task`.
        rank: which of them.
        world_size: how many.
        port: of the store on this machine where they meet.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; who started this one decides
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    os.environ[LOCAL_RANK] = str(rank)
    task, ranks = Task.model_validate_json(task_json), Ranks(rank, world_size)
    end_with(*task.supervisor)
    sys.exit(0 if do(task, ranks, lambda: join(task, ranks, port)) else 1)


def join(task: Task, ranks: Ranks, port: int) -> None:
    """Meet the other ranks.

    Raises:
        RecipeError: this rank has no GPU, and the recipe wants one.
    """
    device = resolve(task.recipe["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=TCPStore("127.0.0.1", port, world_size=ranks.world_size, is_master=False),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=PEER_TIMEOUT,
    )


def do(task: Task, ranks: Ranks, join: Callable[[], None]) -> bool:
    """Train until the final checkpoint is saved; whether it went well, else the folder says why not."""
    from ldm.stages import STAGES

    folder = Path(task.folder)
    beacon, telling = Beacon(folder, ranks.rank), Telling(folder, ranks.rank)
    for name in ("datasets", "ldm"):
        logger = logging.getLogger(name)
        logger.addHandler(telling)
        logger.setLevel(logging.INFO)
    beacon("start", 0)
    try:
        join()
        job = job_of(task)
        torch.set_num_threads(job.recipe.threads)
        make_trainee = STAGES[task.stage].make_trainee
        assert make_trainee is not None
        train(
            make_trainee(job, ranks),
            job.work,
            report=telling,
            of=job.configuration,
            ranks=ranks,
            pulse=beacon,
            checkpoint_every_s=task.checkpoint_every_s,
        )
    except Exception as error:
        is_final = isinstance(error, LdmError | DatasetsError | MemoryError | torch.OutOfMemoryError)
        telling.error(error, is_final=is_final)
        return False
    return True


def end_with(pid: int, started: float) -> None:
    """End this process, whatever it does, soon after that other one has ended."""

    def watch() -> None:
        while is_process(pid, started):
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-supervisor", daemon=True).start()


def is_process(pid: int, started: float) -> bool:
    """Whether the process of that number and start runs."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
