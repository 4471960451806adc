"""A Prefect server that is killed, three times, while a flow trains."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

NUM_IMAGES = 8000
START_S = 240
"""A server takes 10 s to start, and minutes on a machine with other work."""
KILLED_AT = (0.1, 0.3, 0.5)
"""How far training is when the server is killed; it is started again a tenth later."""

Started = Callable[..., subprocess.Popen[str]]


class PrefectServer:
    """`prefect server` on the loopback interface, in a process group of its own; its database survives it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", *address, "--no-ui"],
            env=environ | {"PREFECT_HOME": str(self.folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return
            assert self.process.poll() is None
            time.sleep(0.2)
        self.kill()
        pytest.fail("the Prefect server did not answer")

    def kill(self) -> None:
        """Ends all of it without a warning."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def states(self, kind: str) -> dict[str, str]:
        """The state of each flow run or task run, by name."""
        request = urllib.request.Request(
            f"{self.url}/{kind}/filter", b"{}", {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            return {run["name"]: run["state_type"] for run in json.load(reply)}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path / "prefect-server")
    server.start()
    yield server
    server.kill()


def share_trained(store: Path) -> float:
    """How much of the training of the diffusion model is done."""
    for path in store.glob("status/train-ldm-*.json"):
        status: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if status["total"]:
            return status["done"] / status["total"]
    return 0.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_goes_on_while_the_server_of_prefect_is_killed(
    server: PrefectServer,
    tmp_path: Path,
    tiny: list[str],
    options: Callable[[list[str]], list[str]],
    ldm_started: Started,
) -> None:
    store = tmp_path / "store"
    wanted = [*tiny, f"training.num_images={NUM_IMAGES}", f"training.picture_every_images={NUM_IMAGES}"]
    run = ldm_started(
        "train-ldm", "demo", "--store", str(store), *options(wanted), environ={"PREFECT_API_URL": server.url}
    )

    def train_until(share: float) -> None:
        while share_trained(store) < share:
            assert run.poll() is None
            time.sleep(0.2)

    try:
        for share in KILLED_AT:
            train_until(share)
            server.kill()
            train_until(share + 0.1)
            server.start()
        assert run.wait() == 0
    finally:
        run.kill()
        run.wait()
    assert server.states("flow_runs")["train-ldm demo"] == "COMPLETED"
    assert server.states("task_runs")["make train-ldm"] == "COMPLETED"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_flow_that_ends_while_the_server_is_gone_waits_for_it(
    server: PrefectServer,
    tmp_path: Path,
    tiny: list[str],
    options: Callable[[list[str]], list[str]],
    ldm_started: Started,
) -> None:
    store = tmp_path / "store"
    wanted = [*tiny, "training.num_images=2000", "training.picture_every_images=2000"]
    run = ldm_started(
        "train-ldm", "demo", "--store", str(store), *options(wanted), environ={"PREFECT_API_URL": server.url}
    )
    try:
        while share_trained(store) < 0.5:
            assert run.poll() is None
            time.sleep(0.2)
        server.kill()
        while not list(store.glob("train-ldm/*/manifest.json")):
            assert run.poll() is None
            time.sleep(0.2)
        time.sleep(60)
        assert run.poll() is None
        server.start()
        assert run.wait() == 0
    finally:
        run.kill()
        run.wait()
    assert server.states("flow_runs")["train-ldm demo"] == "COMPLETED"
