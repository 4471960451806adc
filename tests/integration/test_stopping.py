"""SIGTERM, which cancelling and preemption send, ends training with a checkpoint; SIGKILL leaves no rank."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ENDLESS = ("--set", "training.num_images=2000000", "--set", "training.virtual_shards=2")
NUM_RANKS = 2


def log_of(store: Path) -> str:
    return "".join(path.read_text("utf-8") for path in (store / "logs").glob("train-ldm-*.log"))


def wait_for(happened: Callable[[], bool], run: subprocess.Popen[str], *, for_s: float = 200.0) -> None:
    end = time.monotonic() + for_s
    while not happened():
        assert run.poll() is None, "the run ended by itself"
        assert time.monotonic() < end
        time.sleep(0.1)


pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def before_training(
    tmp_path_factory: pytest.TempPathFactory,
    ldm: Callable[..., subprocess.CompletedProcess[str]],
    tiny: list[str],
    options: Callable[[list[str]], list[str]],
) -> tuple[Path, list[str]]:
    """A store with all that train-ldm reads, and the options it was made with."""
    store, arguments = tmp_path_factory.mktemp("stopping") / "store", options(tiny)
    assert ldm("encode-latents", "demo", "--store", str(store), *arguments).returncode == 0
    return store, arguments


def is_training(store: Path, run: subprocess.Popen[str]) -> bool:
    """Whether this run has done a step, by what `ldm status` reads."""
    said = [json.loads(path.read_text("utf-8")) for path in (store / "status").glob("train-ldm-*.json")]
    return any(status["pid"] == run.pid and status["done"] for status in said)


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), NUM_RANKS])
def test_sigterm_saves_a_checkpoint_from_which_the_same_command_goes_on(
    num_ranks: int,
    before_training: tuple[Path, list[str]],
    ldm_started: Callable[..., subprocess.Popen[str]],
) -> None:
    store, arguments = before_training
    command = ("train-ldm", "demo", "--store", str(store), *arguments, *ENDLESS)
    seed = ("--set", f"training.seed={num_ranks}", "--set", f"training.ranks={num_ranks}")
    for attempt in (0, 1):
        run = ldm_started(*command, *seed)
        wait_for(lambda run=run: is_training(store, run), run)
        run.terminate()
        assert run.wait(timeout=60) == 143
        assert log_of(store).count("told to stop: saved at") >= attempt + 1
    assert "resuming at" in log_of(store)


def test_sigkill_of_the_flow_leaves_no_rank_behind(
    before_training: tuple[Path, list[str]], ldm_started: Callable[..., subprocess.Popen[str]]
) -> None:
    store, arguments = before_training
    seed = ("--set", "training.seed=3", "--set", f"training.ranks={NUM_RANKS}")
    run = ldm_started("train-ldm", "demo", "--store", str(store), *arguments, *ENDLESS, *seed)
    wait_for(lambda: is_training(store, run), run)
    family = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert len(family) > NUM_RANKS
    assert not psutil.wait_procs(family, timeout=5)[1]
