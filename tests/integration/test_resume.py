"""A run killed at any moment and started again ends with the very bytes of a run left alone."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from datasets.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

# Long enough that both trainings pass a checkpoint, which comes every 20 seconds.
LONGER = ["first_stage.training.num_images=1600", "training.num_images=3200"]
MOMENTS = [
    ("download-shards", "mlflow.json"),
    ("train-first-stage", "mlflow.json"),
    ("train-first-stage", "checkpoint-*.json"),
    ("train-ldm", "checkpoint-*.json"),
    ("evaluate", "pictures-*.npy"),
]


def kill_at(run: subprocess.Popen[str], store: Path, moment: tuple[str, str]) -> None:
    """Kill a run with SIGKILL once a stage keeps a file of that name; nothing of it may live on."""
    stage, name = moment
    while not list(store.glob(f"work/{stage}/*/{name}")):
        assert run.poll() is None, f"the run ended before {moment}"
        time.sleep(0.05)
    family = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert not psutil.wait_procs(family, timeout=5)[1]


def digests(store: Path) -> dict[str, str]:
    """Content digest of every artifact by stage."""
    return {manifest.stage: manifest.digest for manifest in Store(store).manifests()}


def test_killed_run_continues_to_equal_bytes(
    tmp_path: Path,
    ldm: Callable[..., subprocess.CompletedProcess[str]],
    ldm_started: Callable[..., subprocess.Popen[str]],
    tiny: list[str],
    options: Callable[[list[str]], list[str]],
) -> None:
    arguments = options([*tiny, *LONGER])
    for moment in MOMENTS:
        run = ldm_started("reproduce", "demo", "--store", str(tmp_path / "killed"), *arguments)
        kill_at(run, tmp_path / "killed", moment)
    for store in ("killed", "undisturbed"):
        ended = ldm("reproduce", "demo", "--store", str(tmp_path / store), *arguments)
        assert ended.returncode == 0, ended.stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "undisturbed")
    assert len(digests(tmp_path / "killed")) == 6
    log = "".join(path.read_text("utf-8") for path in (tmp_path / "killed" / "logs").glob("train-*.log"))
    assert log.count("resuming at") >= 2
