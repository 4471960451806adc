"""Ends what a run has started once the run is gone, however it went: Prefect's server, downloaders, workers.

It is a process of its own, `python -m flows.guardian TAG PID`. What belongs to a run is known by a tag in the
environment, which every process inherits from the one that started it.
"""

import os
import sys
import time
import uuid
from contextlib import suppress
from subprocess import DEVNULL, Popen

import psutil

TAG = "LDM_RUN"
POLL_S = 0.5
NUM_ROUNDS = 3


def guard_this_run() -> None:
    """Start a guardian of this process, unless it is itself a part of a run that has one."""
    if TAG in os.environ:
        return
    tag = uuid.uuid4().hex
    Popen(
        [sys.executable, "-m", __name__, tag, str(os.getpid())],
        stdin=DEVNULL,
        stdout=DEVNULL,
        stderr=DEVNULL,
        start_new_session=True,
    )
    os.environ[TAG] = tag


def tagged(tag: str) -> list[psutil.Process]:
    """The processes that carry a tag."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TAG) == tag:
                found.append(process)
        except psutil.Error:
            continue
    return found


def main() -> None:
    """Wait until the process that started this one is gone, then kill what it left behind."""
    tag, parent = sys.argv[1], int(sys.argv[2])
    while os.getppid() == parent:
        time.sleep(POLL_S)
    for _ in range(NUM_ROUNDS):  # more than once, as a process may be between its fork and its exec
        for process in tagged(tag):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
