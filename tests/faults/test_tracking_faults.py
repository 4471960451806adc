"""An MLflow server that is dead, stalled or answers 500 for a whole run, and writers that are killed."""

import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from ldm import pictures
from ldm.tracking import Tracker, waiting

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.timeout(400),
]

ROOT = Path(__file__).parents[2]
PNG = pictures.png(np.zeros((8, 8, 3), dtype=np.uint8))
STEP_S = 0.05
NUM_STEPS = 60
DELIVER_S = 300
START_S = 240
"""A server takes 10 s to start, and minutes on a machine with other work."""
MEDIAN_MAX = 0.01
"""Of the time of a step, in calls that report, in the median step."""
WHOLE_MAX = 0.15
"""Of the time of all steps: about 0.6 % where disk and cores are free, more where a step waits for a core.
One call that waits for a stalled server, 5 s, takes more than all of it."""

WRITER = """
import sys, time
from pathlib import Path
from ldm.tracking import Tracker

address, folder, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
done = folder / "done"
first = int(done.read_text()) if done.exists() else 0
saved = folder / "run"
tracker = Tracker(address, folder / "tracking")
run = tracker.start(
    "killed", name=name, params={"seed": 1}, tags={}, system_metrics=False,
    run_id=saved.read_text() if saved.exists() else None,
)
if not saved.exists():
    saved.with_suffix(".new").write_text(run.id)
    saved.with_suffix(".new").replace(saved)
(folder / "started").touch()
for step in range(first, 100_000):
    run.metrics(step, {"loss": float(step), "rate": 2.0 * step})
    if step % 20 == 0:
        run.picture("samples", step, (folder / "picture.png").read_bytes())
        run.sync()
        (folder / "done.new").write_text(str(step))
        (folder / "done.new").replace(done)
    time.sleep(0.02)
"""


class MlflowServer:
    """`mlflow server` on the loopback interface, in a process group of its own, beside its SQLite file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it answers."""
        options = {
            "backend-store-uri": f"sqlite:///{self.folder}/server.db",
            "artifacts-destination": f"{self.folder}/files",
            "host": "127.0.0.1",
            "port": str(self.port),
            "workers": "1",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *arguments],
                env=environ
                | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=2):
                return
            if self.process is None or self.process.poll() is not None:
                pytest.fail((self.folder / "server.log").read_text())
            time.sleep(0.2)
        self.kill()
        pytest.fail("the MLflow server did not answer")

    def signal(self, number: int) -> None:
        """Sends a signal to all of it."""
        if self.process is not None:
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """Ends it without a warning."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


class Proxy(ThreadingHTTPServer):
    """Passes requests on to a server; answers 500 while `is_broken`."""

    daemon_threads = True

    def __init__(self, server: MlflowServer) -> None:
        super().__init__(("127.0.0.1", 0), Forwarding)
        self.behind = server
        self.is_broken = True
        self.num_refused = 0
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Forwarding(BaseHTTPRequestHandler):
    """Handles a request of the proxy."""

    def forward(self) -> None:
        """Answers 500, or what the server answers."""
        proxy = cast(Proxy, self.server)
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        status, answer, kind = 500, b"<html>Internal Server Error</html>", "text/html"
        if proxy.is_broken:
            proxy.num_refused += 1
        else:
            hop = {"host", "connection", "content-length", "accept-encoding"}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
            url = proxy.behind.address + self.path
            request = urllib.request.Request(url, body or None, headers, method=self.command)
            try:
                with urllib.request.urlopen(request, timeout=30) as reply:
                    status, answer, kind = reply.status, reply.read(), reply.headers["content-type"]
            except urllib.error.HTTPError as reply:
                status, answer, kind = reply.code, reply.read(), reply.headers["content-type"]
        self.send_response(status)
        self.send_header("content-type", kind or "text/plain")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def __getattr__(self, name: str) -> Any:
        """The library looks for a method `do_GET` and so on."""
        return self.forward if name.startswith("do_") else self.__getattribute__(name)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def train(tracker: Tracker, *, name: str) -> tuple[float, float]:
    """A run that reports at every step; the median share of a step that reporting took, and the whole."""
    run = tracker.start(
        "faults", name=name, params={"seed": 1}, tags={"recipe": "cats"}, system_metrics=False
    )
    began, reporting_s = time.monotonic(), []
    for step in range(NUM_STEPS):
        time.sleep(STEP_S)
        before = time.monotonic()
        run.metrics(step, {"loss": float(step), "rate": 2.0 * step})
        if step % 20 == 0:
            run.picture("samples", step, PNG)
            run.sync()
        reporting_s.append(time.monotonic() - before)
    shares = statistics.median(reporting_s) / STEP_S, sum(reporting_s) / (time.monotonic() - began)
    run.finish()
    return shares


def assert_in_passing(shares: tuple[float, float]) -> None:
    """Reporting takes next to nothing of a step, and nothing waited for the server."""
    median, whole = shares
    assert median < MEDIAN_MAX
    assert whole < WHOLE_MAX


def points_of(client: Any, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """All points of a run, by series, in order of their steps."""
    keys = client.get_run(run_id).data.metrics
    history = {key: client.get_metric_history(run_id, key) for key in keys}
    return {key: sorted((point.step, point.value) for point in points) for key, points in history.items()}


def pictures_of(client: Any, run_id: str) -> Counter[str]:
    """How many files each picture of a run has: itself and a small copy."""
    files = client.list_artifacts(run_id, "images")
    return Counter(Path(file.path).name.partition("+timestamp+")[0] for file in files)


def assert_whole(address: str, *, stage: str, name: str, num_steps: int) -> None:
    """Each point and each picture of a run is there exactly once, and nothing else."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(address)
    experiment = client.get_experiment_by_name(stage)
    assert experiment is not None
    (run,) = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == name]
    assert points_of(client, run.info.run_id) == {
        "loss": [(step, float(step)) for step in range(num_steps)],
        "rate": [(step, 2.0 * step) for step in range(num_steps)],
    }
    expected = {f"samples+step+{step}": 2 for step in range(0, num_steps, 20)}
    assert pictures_of(client, run.info.run_id) == expected
    assert run.data.params == {"seed": "1"}
    assert run.info.status == "FINISHED"


def deliver(tracker: Tracker, journals: Path) -> None:
    """Sends what waits, as a later command does."""
    deadline = time.monotonic() + DELIVER_S
    while tracker.deliver(10) is not None and time.monotonic() < deadline:
        time.sleep(0.5)  # the thread of the run may still wait for the answer to its last call
    assert waiting(journals) == []
    assert [path for path in journals.glob("*/*") if path.is_dir()] == []


def test_with_the_server_alive_reporting_takes_no_time(server: MlflowServer, tmp_path: Path) -> None:
    tracker = Tracker(server.address, tmp_path)
    shares = train(tracker, name="alive")
    deliver(tracker, tmp_path)
    assert_whole(server.address, stage="faults", name="alive", num_steps=NUM_STEPS)
    assert_in_passing(shares)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_dead_for_a_whole_run_has_all_of_it_once_it_starts(tmp_path: Path) -> None:
    server = MlflowServer(tmp_path)
    tracker = Tracker(server.address, tmp_path / "tracking")
    shares = train(tracker, name="dead")
    (left,) = waiting(tmp_path / "tracking")
    assert (left.address, left.num_runs, left.num_points) == (server.address, 1, 2 * NUM_STEPS)
    server.start()
    try:
        deliver(tracker, tmp_path / "tracking")
        assert_whole(server.address, stage="faults", name="dead", num_steps=NUM_STEPS)
    finally:
        server.kill()
    assert_in_passing(shares)


def test_a_server_stalled_for_a_whole_run_has_all_of_it_once_it_goes_on(
    server: MlflowServer, tmp_path: Path
) -> None:
    tracker = Tracker(server.address, tmp_path)
    server.signal(signal.SIGSTOP)
    try:
        shares = train(tracker, name="stalled")
    finally:
        server.signal(signal.SIGCONT)
    deliver(tracker, tmp_path)
    assert_whole(server.address, stage="faults", name="stalled", num_steps=NUM_STEPS)
    assert_in_passing(shares)


def test_a_server_that_answers_500_for_a_whole_run_has_all_of_it_once_it_does_not(
    server: MlflowServer, proxy: Proxy, tmp_path: Path
) -> None:
    tracker = Tracker(proxy.address, tmp_path)
    shares = train(tracker, name="broken")
    assert proxy.num_refused
    assert waiting(tmp_path)[0].num_points == 2 * NUM_STEPS
    proxy.is_broken = False
    deliver(tracker, tmp_path)
    assert_whole(server.address, stage="faults", name="broken", num_steps=NUM_STEPS)
    assert_in_passing(shares)


def killed_after(command: list[str], folder: Path, seconds: float, between: Callable[[], None]) -> None:
    """Starts a writer and kills it after some seconds of writing; `between` is called half-way."""
    started = folder / "started"
    started.unlink(missing_ok=True)
    writer = subprocess.Popen(command, cwd=ROOT)
    while not started.exists():
        assert writer.poll() is None
        time.sleep(0.05)
    for act in (between, writer.kill):
        time.sleep(seconds / 2)
        act()
    assert writer.wait() == -signal.SIGKILL


def finish(tracker: Tracker, folder: Path, *, name: str) -> int:
    """Takes the last steps and ends the run; returns how many steps there were in all."""
    first = int((folder / "done").read_text())
    num_steps = first + 20
    saved = (folder / "run").read_text()
    with tracker.start("killed", name=name, params={}, tags={}, run_id=saved, system_metrics=False) as run:
        reported = Counter(
            step for journal in folder.glob("tracking/*/*/journal.jsonl") for step in steps_in(journal)
        )
        num_steps = max(num_steps, max(reported, default=0) + 1)
        for step in range(first, num_steps):
            run.metrics(step, {"loss": float(step), "rate": 2.0 * step})
            if step % 20 == 0:
                run.picture("samples", step, PNG)
    return num_steps


def steps_in(journal: Path) -> Iterator[int]:
    """The steps of the points in a journal, but for a line that was cut short."""
    for line in journal.read_bytes().splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if entry["do"] == "points":
                yield entry["step"]


@pytest.fixture
def writing(tmp_path: Path) -> Callable[[str, str], list[str]]:
    (tmp_path / "picture.png").write_bytes(PNG)
    return lambda address, name: [sys.executable, "-c", WRITER, address, str(tmp_path), name]


def test_a_writer_killed_while_the_server_answers_500_loses_nothing(
    server: MlflowServer, proxy: Proxy, tmp_path: Path, writing: Callable[[str, str], list[str]]
) -> None:
    killed_after(writing(proxy.address, "killed once"), tmp_path, 1, lambda: None)
    proxy.is_broken = False
    tracker = Tracker(proxy.address, tmp_path / "tracking")
    num_steps = finish(tracker, tmp_path, name="killed once")
    deliver(tracker, tmp_path / "tracking")
    assert_whole(server.address, stage="killed", name="killed once", num_steps=num_steps)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_ten_kills_with_a_server_that_comes_and_goes_each_point_is_there_once(
    tmp_path: Path, writing: Callable[[str, str], list[str]]
) -> None:
    """The server is dead, alive, killed while it is written to, and so on: calls are taken, not answered."""
    server, chance = MlflowServer(tmp_path), random.Random(0)
    for number in range(10):
        if number % 3 == 1:
            server.start()
        between = server.kill if number % 3 == 2 else lambda: None
        killed_after(writing(server.address, "killed"), tmp_path, chance.uniform(0.5, 4), between)
    server.start()
    try:
        tracker = Tracker(server.address, tmp_path / "tracking")
        num_steps = finish(tracker, tmp_path, name="killed")
        deliver(tracker, tmp_path / "tracking")
        assert_whole(server.address, stage="killed", name="killed", num_steps=num_steps)
    finally:
        server.kill()
