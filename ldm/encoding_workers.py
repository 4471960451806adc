"""Encodes in several processes of this machine, which end with the one that started them."""

from __future__ import annotations

import logging
import signal
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from ldm.encoding import Encoded, encode_parts
from ldm.training.loop import Silent

if TYPE_CHECKING:  # the stage imports this module
    from ldm.stages.stage import Job

logger = logging.getLogger(__name__)


def encode_in_workers(job: Job, encoded: Encoded) -> list[int]:
    """Encode all parts in `encoding.workers` processes, and return how those ended that were cut off.

    A worker that is killed is survived: its part is free again, and another takes it. Only what no worker is
    left for stays undone.

    Returns:
        Exit codes of the workers that ended before their work, negative for signals.

    Raises:
        StoreError, ContractError: what a worker raised; the others are ended.
    """
    context = get_context("spawn")
    alone = replace(job, report=Silent())
    workers: dict[Connection, Any] = {}
    for number in range(job.recipe.encoding.workers):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=work, args=(alone, sender, number), name=f"encoder-{number}", daemon=True
        )
        process.start()
        sender.close()
        workers[receiver] = process
    try:
        return listen(dict(workers), encoded)
    finally:
        for receiver, process in workers.items():
            receiver.close()
            process.terminate()
            process.join()


def listen(workers: dict[Connection, Any], encoded: Encoded) -> list[int]:
    """Pass on what workers say until all have ended; the exit codes of those that were cut off."""
    cut_off = []
    while workers:
        for receiver in wait(list(workers)):
            assert isinstance(receiver, Connection)
            try:
                said = receiver.recv()
            except EOFError:
                process = workers.pop(receiver)
                process.join()
                if process.exitcode:
                    logger.warning("%s ended with exit code %d", process.name, process.exitcode)
                    cut_off.append(process.exitcode)
                continue
            if isinstance(said, BaseException):
                raise said
            encoded(said)
    return cut_off


def work(job: Job, sender: Connection, number: int) -> None:
    """What a worker does; it ends when nobody listens any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; who started this one decides
    try:
        encode_parts(job, sender.send, worker=number)
    except BrokenPipeError:
        return
    except Exception as error:
        sender.send(error)
