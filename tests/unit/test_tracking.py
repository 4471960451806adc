import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ldm import pictures
from ldm.tracking import TrackedRun, Tracker, tracking_uri, waiting

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

REPOSITORY = Path(__file__).resolve().parents[2]
DIGEST = "ab" * 32
PNG = pictures.png(np.zeros((8, 8, 3), dtype=np.uint8))

DIES_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from ldm.tracking import Tracker

tracker = Tracker(f"sqlite:///{sys.argv[1]}/mlflow.db", Path(sys.argv[1], "tracking"))
run = tracker.start("train-ldm", name="demo", params={"seed": 1}, tags={}, system_metrics=False)
for images_seen in range(0, 100, 10):
    run.metrics(images_seen, {"loss": 1.0 / (1 + images_seen)})
run.picture("samples", 0, Path(sys.argv[1], "picture.png").read_bytes())
assert run.flush(30)
run.metrics(100, {"loss": 1.0 / 101})
print(run.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

DIES_AT_ONCE = """
import os, signal, sys
from pathlib import Path
from ldm.tracking import Tracker

tracker = Tracker(f"sqlite:///{sys.argv[1]}/mlflow.db", Path(sys.argv[1], "tracking"))
run = tracker.start("train-ldm", name="demo", params={}, tags={}, system_metrics=False)
print(run.id, flush=True)
run.metrics(1, {"loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module")
def tracker(root: Path) -> Iterator[Tracker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield Tracker(tracking_uri(root), root / "tracking", artifact_root=root / "mlflow-artifacts")


def started(tracker: Tracker, *, run_id: str | None = None, stage: str = "train-ldm") -> TrackedRun:
    params = {"unet.width": 64, "seed": 1}
    return tracker.start(stage, name="demo", params=params, tags={}, run_id=run_id, system_metrics=False)


def history(root: Path, run_id: str | None, key: str = "loss") -> list[tuple[int, float]]:
    with sqlite3.connect(root / "mlflow.db") as database:
        question = "select step, value from metrics where run_uuid = ? and key = ? order by step, timestamp"
        return database.execute(question, (run_id, key)).fetchall()


def files_of(root: Path, run_id: str | None) -> list[str]:
    (folder,) = (root / "mlflow-artifacts").glob(f"*/{run_id}/artifacts")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pictures_of(root: Path, run_id: str | None) -> list[str]:
    full_size = [path for path in files_of(root, run_id) if "+timestamp+" in path and path.endswith(".png")]
    return sorted(path.partition("+timestamp+")[0] for path in full_size)


def row_of(tracker: Tracker, run: TrackedRun) -> dict:
    (row,) = [row for row in tracker.runs("train-ldm") if row["id"] == run.id]
    return dict(row)


def test_the_environment_names_the_server_and_the_store_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path("artifacts")) == f"sqlite:///{tmp_path}/artifacts/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://lab:5000")
    assert tracking_uri(tmp_path) == "http://lab:5000"


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = "import sys, ldm.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_a_run_keeps_all_that_it_was_told(root: Path, tracker: Tracker) -> None:
    parent = started(tracker, stage="reproduce")
    local = root / "log.txt"
    local.write_text("a line")
    with tracker.start(
        "train-ldm", name="demo", params={"seed": 1}, tags={"recipe": "cats"}, parent_run_id=parent.id
    ) as run:
        run.metrics(64, {"loss": 0.5, "rate (images/s)": 12})
        run.metrics(128, {"loss": 0.25})
        run.input("image-shards", digest=DIGEST, uri="/data/shards/manifest.json", context="training")
        run.output("model", digest="cd" * 32, uri="s3://lab/model/manifest.json")
        run.json("manifest.json", {"b": 1, "a": [1, 2]})
        run.text("notes/read me.txt", "hello")
        run.file("logs/stage.txt", local)
        run.figure("figures/loss.png", PNG)
        for images_seen in (0, 64, 128):
            run.picture("samples/guided", images_seen, PNG)
    parent.finish()

    row = row_of(tracker, run)
    assert row["status"] == "FINISHED"
    assert row["metrics"]["loss"] == 0.25
    assert row["metrics"]["rate _images/s_"] == 12
    expected_tags = {
        "recipe": "cats",
        "mlflow.parentRunId": parent.id,
        "input.image-shards": DIGEST,
        "output.model": "cd" * 32,
        "output.model.uri": "s3://lab/model/manifest.json",
        "mlflow.loggedImages": "True",
        "attempts": "1",
    }
    assert expected_tags.items() <= row["tags"].items()
    assert history(root, run.id) == [(64, 0.5), (128, 0.25)]
    kept = [path for path in files_of(root, run.id) if not path.startswith("images/")]
    assert kept == ["figures/loss.png", "logs/stage.txt", "manifest.json", "notes/read me.txt"]
    with sqlite3.connect(root / "mlflow.db") as database:
        question = (
            "select d.name, d.digest, d.dataset_source, t.value from inputs as i"
            " join datasets as d on d.dataset_uuid = i.source_id"
            " join input_tags as t on t.input_uuid = i.input_uuid"
            " where i.destination_id = ? order by t.value"
        )
        inputs = database.execute(question, (run.id,)).fetchall()
    source = json.dumps({"uri": "/data/shards/manifest.json"})
    assert inputs == [("image-shards", DIGEST[:36], source, value) for value in (DIGEST, "training")]


def test_pictures_are_listed_over_steps(root: Path, tracker: Tracker) -> None:
    with started(tracker) as run:
        for images_seen in (0, 1000, 2000):
            run.picture("samples", images_seen, PNG)
    assert pictures_of(root, run.id) == [f"images/samples+step+{step}" for step in (0, 1000, 2000)]


def test_a_resumed_run_records_nothing_twice(root: Path, tracker: Tracker) -> None:
    with started(tracker) as first:
        for images_seen in range(0, 50, 10):
            first.metrics(images_seen, {"loss": float(images_seen)})
        first.metrics(20, {"loss": float("nan")})
        first.picture("samples", 0, PNG)
    with started(tracker, run_id=first.id) as second:
        second.metrics(20, {"loss": float("nan")})
        for images_seen in range(20, 80, 10):
            second.metrics(images_seen, {"loss": float(images_seen), "new": 1.0})
        second.metrics(60, {"loss": float("-inf")})
        for images_seen in (0, 50):
            second.picture("samples", images_seen, PNG)
    assert second.id == first.id
    assert history(root, first.id) == [(step, float(step)) for step in range(0, 80, 10)]
    assert [step for step, _ in history(root, first.id, "new")] == list(range(20, 80, 10))
    assert pictures_of(root, first.id) == ["images/samples+step+0", "images/samples+step+50"]
    tags = row_of(tracker, second)["tags"]
    assert tags["attempts"] == "2"
    assert tags["non_finite.loss"] == "nan at 20, -inf at 60"


def test_a_killed_run_is_reopened_and_keeps_all_that_it_reported(root: Path, tracker: Tracker) -> None:
    started(tracker).finish()
    (root / "picture.png").write_bytes(PNG)
    command = [sys.executable, "-c", DIES_IN_THE_MIDDLE, str(root)]
    child = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    run_id = child.stdout.strip()

    (row,) = [row for row in tracker.runs("train-ldm") if row["id"] == run_id]
    assert row["status"] == "RUNNING"
    with started(tracker, run_id=run_id) as run:
        for images_seen in (50, *range(110, 150, 10)):
            run.metrics(images_seen, {"loss": 1.0 / (1 + images_seen)})
        run.picture("samples", 0, PNG)
    assert history(root, run_id) == [(step, 1.0 / (1 + step)) for step in range(0, 150, 10)]
    assert pictures_of(root, run_id) == ["images/samples+step+0"]
    assert run.id == run_id
    assert row_of(tracker, run)["status"] == "FINISHED"


def test_a_half_made_database_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.unfinished").write_bytes(b"SQLite format 3, cut short")
    (tmp_path / "mlflow.db.unfinished-journal").write_bytes(b"cut short")
    with started(Tracker(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "tracking")) as run:
        run.metrics(1, {"loss": 1.0})
    assert history(tmp_path, run.id) == [(1, 1.0)]
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_run_that_is_gone_is_begun_anew(tracker: Tracker, caplog: pytest.LogCaptureFixture) -> None:
    with started(tracker, run_id="0" * 32) as run:
        pass
    assert run.id not in {None, "0" * 32}
    assert "has no run" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_the_end_of_a_run_says_how_it_ended(
    tracker: Tracker, error: type[BaseException], status: str
) -> None:
    run = started(tracker)
    with pytest.raises(error), run:
        raise error
    assert row_of(tracker, run)["status"] == status


def test_equal_weights_are_registered_once(root: Path, tracker: Tracker) -> None:
    with started(tracker) as run:
        one = run.register("ldm-cats", uri="/data/a", digest="aa", tags={"recipe": "cats"}, alias="candidate")
        two = run.register("ldm-cats", uri="/data/b", digest="bb", tags={}, alias="candidate")
    with started(tracker) as other:
        again = other.register("ldm-cats", uri="/data/a", digest="aa", tags={}, alias="candidate")
    assert one is not None
    assert two is not None
    assert (one["version"], two["version"]) == ("1", "2")
    assert again == one
    assert one == {"name": "ldm-cats", "version": "1", "uri": "/data/a", "digest": "aa", "run_id": run.id}
    assert tracker.resolve_model("ldm-cats") == two
    assert tracker.resolve_model("ldm-cats@candidate") == one
    assert tracker.resolve_model("ldm-cats/2") == two
    assert "model/model.json" in files_of(root, run.id)


@pytest.mark.parametrize("spec", ["ldm-dogs", "ldm-dogs@champion", "ldm-dogs/3", "it's", ""])
def test_an_unknown_model_is_none(tracker: Tracker, spec: str) -> None:
    assert tracker.resolve_model(spec) is None


def test_an_unreachable_server_costs_a_warning_and_little_time(
    tracker: Tracker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.runs("train-ldm")  # imports MLflow, which is not what is measured here
    tracker = Tracker("http://127.0.0.1:9", tmp_path)
    begun = time.monotonic()
    with started(tracker) as run:
        name = run.id
        run.metrics(1, {"loss": 1.0})
        run.picture("samples", 1, PNG)
        assert not run.flush()
        assert run.register("ldm-cats", uri="u", digest="d", tags={}, alias="candidate") is None
    assert time.monotonic() - begun < 5
    away, registered, left = [record.message for record in caplog.records]
    assert "did not take begin demo; work goes on" in away
    assert "has not registered ldm-cats; that is tried again" in registered
    assert "wait for MLflow at http://127.0.0.1:9; they are sent when the next run there begins" in left
    assert tracker.resolve_model("ldm-cats") is None
    assert tracker.runs("train-ldm") == []
    assert tracker.deliver(1) is not None
    (still,) = waiting(tmp_path)
    assert (still.address, still.num_runs, still.num_points) == ("http://127.0.0.1:9", 1, 1)
    assert name is not None
    assert tracker.knows(name)


def test_points_reported_while_the_database_is_locked_arrive_later(root: Path, tracker: Tracker) -> None:
    run = started(tracker)
    blocker = sqlite3.connect(root / "mlflow.db")
    blocker.execute("begin exclusive")
    begun = time.monotonic()
    for step in range(300):
        run.metrics(step, {"loss": float(step)})
    assert time.monotonic() - begun < 2
    assert not run.flush(0.5)
    blocker.rollback()
    blocker.close()
    assert run.flush(30)
    run.finish()
    assert [step for step, _ in history(root, run.id)] == list(range(300))


def test_a_thousand_reports_cost_the_caller_less_than_a_tenth_of_a_second(tracker: Tracker) -> None:
    with started(tracker) as run:
        begun = time.thread_time()
        for step in range(1000):
            run.metrics(step, {"loss": 1.0, "grad_norm": 2.0})
        assert time.thread_time() - begun < 0.1


def test_a_run_without_parameters_and_with_many_is_described(tracker: Tracker) -> None:
    params = {f"block.{index}": index for index in range(250)}
    with tracker.start("train-ldm", name="many", params=params, tags={}, system_metrics=False) as run:
        assert run.id
    with tracker.start("train-ldm", name="none", params={}, tags={}, system_metrics=False) as run:
        assert run.id


def test_nothing_is_written_into_the_working_folder(
    root: Path, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        Tracker("sqlite:///store/mlflow.db", Path("journals")).uri == f"sqlite:///{tmp_path}/store/mlflow.db"
    )
    with started(tracker, stage="evaluate") as run:
        run.text("a.txt", "a")
        run.picture("samples", 0, PNG)
    assert not list(tmp_path.iterdir())
    assert "a.txt" in files_of(root, run.id)


def test_a_call_that_is_refused_is_dropped_and_holds_up_no_other(
    tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    with started(tracker) as run:
        run.tag("", "a tag needs a name")
        run.tag("note", "here")
    assert row_of(tracker, run)["tags"]["note"] == "here"
    assert "refused tag, which is dropped" in caplog.text


def test_a_file_without_room_waits_and_holds_up_no_other(
    root: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    run = started(tracker, stage="blocked")
    blocker = root / "mlflow-artifacts" / "blocked"
    blocker.parent.mkdir(exist_ok=True)
    blocker.write_text("in the way of the folder of that name")
    run.text("a.txt", "a")
    run.tag("note", "here")
    run.metrics(1, {"loss": 1.0})
    assert not run.flush(10)
    assert history(root, run.id) == [(1, 1.0)]
    assert "it is tried again" in caplog.text
    blocker.unlink()
    assert run.flush(10)
    run.finish()
    assert files_of(root, run.id) == ["a.txt"]


def test_a_run_that_a_stalled_server_created_twice_is_there_once(tracker: Tracker) -> None:
    from mlflow.tracking import MlflowClient

    run = started(tracker)
    name = run.id
    assert run.flush(30)
    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name("train-ldm")
    assert experiment is not None
    client.create_run(experiment.experiment_id, tags={"journal": name}, run_name="demo")
    run.finish()
    rows = [row for row in tracker.runs("train-ldm") if row["tags"].get("journal") == name]
    assert [row["id"] for row in rows] == [run.id]


def test_a_line_cut_short_by_a_kill_is_passed_over(root: Path, tracker: Tracker) -> None:
    run = started(tracker)
    assert run.flush(10)
    (journal,) = root.glob("tracking/*/*/journal.jsonl")
    with journal.open("ab") as file:
        file.write(b'{"do":"points","step":1,"val')
    with started(tracker, run_id=run.id) as second:
        second.metrics(2, {"loss": 2.0})
    run.finish()
    assert second.id == run.id
    assert history(root, run.id) == [(2, 2.0)]


def test_nothing_stays_of_a_journal_that_was_delivered(tracker: Tracker, root: Path) -> None:
    with started(tracker) as run:
        run.picture("samples", 1, PNG)
    assert [path for path in root.glob("tracking/*/*") if path.is_dir()] == []
    assert waiting(root / "tracking") == []


def test_what_a_killed_process_left_is_sent_by_another_run(root: Path, tracker: Tracker) -> None:
    started(tracker).finish()
    command = [sys.executable, "-c", DIES_AT_ONCE, str(root)]
    child = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    (left,) = waiting(root / "tracking")
    assert left.num_points == 1
    with started(tracker) as run:
        assert run.flush(30)
        for _ in range(300):
            if not waiting(root / "tracking"):
                break
            time.sleep(0.1)
    (row,) = [row for row in tracker.runs("train-ldm") if row["tags"].get("journal") == child.stdout.strip()]
    assert history(root, row["id"]) == [(1, 1.0)]


def test_a_run_that_began_while_nobody_listened_is_known_by_its_journal(root: Path, tracker: Tracker) -> None:
    run = started(tracker)
    name = run.id
    assert name is not None
    assert tracker.is_unfinished("train-ldm", name)
    run.finish()
    assert run.id != name
    assert tracker.knows(name)
    assert not tracker.is_unfinished("train-ldm", name)
    with started(tracker, run_id=name) as again:
        again.metrics(1, {"loss": 1.0})
    assert again.id == run.id
    assert history(root, run.id) == [(1, 1.0)]
