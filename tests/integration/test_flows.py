"""The chain of stages: what it leaves behind, what it reuses, and what MLflow can tell of it afterwards."""

import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

from datasets.store import Store
from flows import progress
from flows.listing import state_of
from flows.models import ancestry, find_model
from flows.produce import complete_run, produce, tracked
from flows.request import NotBuiltError, Request
from flows.tracking import open_tracker
from ldm.errors import RecipeError
from ldm.tracking import TrackedRun

pytestmark = [pytest.mark.xdist_group("tiny chain"), pytest.mark.timeout(300)]
CHAIN = ("download-shards", "train-first-stage", "encode-latents", "train-ldm", "evaluate")
KEY = "0" * 64

Cli = Callable[..., tuple[int, str, str]]
Ldm = Callable[..., subprocess.CompletedProcess[str]]
Options = Callable[[list[str]], list[str]]


@pytest.fixture
def again(tiny_store: Path, tiny: list[str]) -> Callable[..., Request]:
    """The request that made the tiny store once more; arguments are further overrides."""
    return lambda *overrides: Request.resolve("demo", [*tiny, *overrides], str(tiny_store))


def test_same_request_finds_every_artifact_again(again: Callable[..., Request]) -> None:
    receipts = [produce(again(), stage) for stage in CHAIN]
    assert [receipt.stage for receipt in receipts] == list(CHAIN)
    assert all(receipt.reused and receipt.mlflow_run and receipt.bytes for receipt in receipts)


@pytest.mark.parametrize(
    ("override", "reused"),
    [
        ("sampling.steps=3", 4),
        ("training.lr=0.1", 3),
        ("encoding.dtype=float16", 2),
        ("first_stage.training.lr=0.1", 1),
        ("dataset.source.train=41", 0),
        ("training.picture_every_images=5", 5),
    ],
)
def test_only_what_depends_on_a_change_is_made_again(
    again: Callable[..., Request], override: str, reused: int
) -> None:
    request = again(override)
    assert [request.find(stage) is not None for stage in CHAIN] == [i < reused for i in range(len(CHAIN))]


def test_no_build_refuses_when_an_input_is_missing(tiny: list[str], tmp_path: Path) -> None:
    request = Request.resolve("demo", tiny, str(tmp_path), build=False)
    with pytest.raises(
        NotBuiltError, match=r"needs the artifact of train-ldm .* run `ldm train-ldm demo` first"
    ):
        request.need("train-ldm", lambda: None)


def test_lineage_leads_from_scores_to_the_url_list(tiny_store: Path) -> None:
    store = Store(tiny_store)
    rows = [row for stage in CHAIN for row in open_tracker(store).runs(stage)]
    made_by = {
        row["tags"][f"output.{stage}"]: row
        for row in rows
        for stage in CHAIN
        if f"output.{stage}" in row["tags"]
    }
    (evaluation,) = store.manifests("evaluate")
    reached, unseen = set(), {evaluation.digest}
    while unseen:
        digest = unseen.pop()
        reached.add(digest)
        tags = made_by[digest]["tags"] if digest in made_by else {}
        unseen |= {value for name, value in tags.items() if name.startswith("input.")} - reached
    assert reached == {manifest.digest for manifest in store.manifests()}
    assert store.manifests("url-list")[0].digest in reached


def test_every_stage_is_one_finished_run_with_parameters_costs_and_manifest(tiny_store: Path) -> None:
    for stage in CHAIN:
        (row,) = open_tracker(Store(tiny_store)).runs(stage)
        assert row["status"] == "FINISHED"
        assert {"wall_s", "cpu_s", "artifact_bytes"} <= set(row["metrics"])
        assert list(tiny_store.glob(f"mlflow-artifacts/{stage}/{row['id']}/artifacts/manifest.json"))


@pytest.mark.parametrize(
    ("stage", "series", "count"),
    [
        ("train-first-stage", "reconstructions", 3),
        ("train-ldm", "samples", 3),
        ("train-ldm", "loss_curves", 1),
        ("evaluate", "samples", 1),
        ("evaluate", "reconstructions", 1),
        ("evaluate", "fid", 1),
    ],
)
def test_pictures_are_logged_by_images_seen(tiny_store: Path, stage: str, series: str, count: int) -> None:
    files = tiny_store.glob(f"mlflow-artifacts/{stage}/*/artifacts/images/{series}+step+*.png")
    steps = {re.search(r"\+step\+(\d+)\+", file.name)[1] for file in files}  # type: ignore[index]
    assert len(steps) == count, sorted(steps)


@pytest.mark.parametrize(
    ("model", "stage"), [("ldm-demo", "train-ldm"), ("first-stage-cats-vq-f4", "train-first-stage")]
)
def test_models_are_registered_as_candidates(tiny_store: Path, model: str, stage: str) -> None:
    store = Store(tiny_store)
    version = open_tracker(store).resolve_model(f"{model}@candidate")
    (manifest,) = store.manifests(stage)
    assert version is not None
    assert (version["digest"], version["uri"]) == (manifest.digest, store.uri_of(manifest))


@pytest.mark.parametrize("spec", ["ldm-demo", "ldm-demo@candidate", "ldm-demo/1", "key"])
def test_a_model_is_found_by_name_alias_version_and_key(tiny_store: Path, spec: str) -> None:
    store = Store(tiny_store)
    (manifest,) = store.manifests("train-ldm")
    assert find_model(store, manifest.short if spec == "key" else spec).digest == manifest.digest


def test_a_candidate_scored_already_is_not_scored_again(tiny_store: Path) -> None:
    request = Request.resolve("demo", [], str(tiny_store), model="candidate")
    assert produce(request, "evaluate").reused


def test_a_candidate_keeps_its_own_training_and_takes_other_sampling(tiny_store: Path) -> None:
    request = Request.resolve("demo", ["sampling.steps=3"], str(tiny_store), model="candidate")
    assert request.find("train-ldm") is not None
    assert request.find("evaluate") is None
    assert request.recipe.sampling.steps == 3
    assert not request.build
    with pytest.raises(RecipeError, match=r"only evaluation and sampling can be set, got 'training\.lr=1'"):
        Request.resolve("demo", ["training.lr=1"], str(tiny_store), model="candidate")


def test_ancestry_of_a_model_is_all_it_was_made_of(tiny_store: Path) -> None:
    store = Store(tiny_store)
    assert set(ancestry(store, find_model(store, "ldm-demo"))) == {"url-list", *CHAIN[:-1]}


def test_an_attempt_that_was_cut_off_goes_on_in_the_same_run(tiny: list[str], tmp_path: Path) -> None:
    request = Request.resolve("demo", tiny, str(tmp_path))
    with pytest.raises(OSError, match="cut"), tracked(request, "train-ldm", KEY, {"a": 1}) as first:
        raise OSError("cut")
    with tracked(request, "train-ldm", KEY, {"a": 1}) as second:
        assert second.flush(30)  # until then it is known by its journal
        assert second.id == first.id
    (row,) = open_tracker(request.store).runs("train-ldm")
    assert row["status"] == "FINISHED"
    assert row["tags"]["attempts"] == "2"


def test_a_run_cut_off_after_its_artifact_was_stored_is_completed(again: Callable[..., Request]) -> None:
    request = again()
    manifest, tracker = request.find("train-ldm"), open_tracker(request.store)
    assert manifest is not None
    run_id = manifest.provenance["mlflow_run"]
    cut_off = tracker.start("train-ldm", name="x", params={}, tags={}, run_id=run_id)
    assert cut_off.flush(10)
    assert tracker.runs("train-ldm")[0]["status"] == "RUNNING"
    complete_run(request, manifest)
    assert [row["status"] for row in tracker.runs("train-ldm")] == ["FINISHED"]


def test_progress_is_on_the_console_and_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    store = Store(tmp_path)
    with (
        caplog.at_level(logging.INFO, logger="flows"),
        progress.StageReport(store, "train-ldm", KEY, TrackedRun(None)) as report,
    ):
        report.progress(10, 100)
        time.sleep(0.01)
        report.progress(20, 100)
    said = r"train-ldm: 20 of 100 images, [\d.]+ images/s, [\d,]+ s left"
    assert re.search(said, caplog.text)
    assert re.search(said, progress.log_file(store, "train-ldm", KEY).read_text("utf-8"))


def test_costs_of_an_attempt_that_was_cut_off_are_carried_over(tmp_path: Path) -> None:
    store, costs = Store(tmp_path), {"wall_s": 100.0, "cpu_s": 50.0}
    folder = progress.status_folder(store)
    folder.mkdir()
    (folder / f"train-ldm-{KEY[:12]}.json").write_text(json.dumps({"state": "running", **costs}))
    with progress.StageReport(store, "train-ldm", KEY, TrackedRun(None)) as report:
        assert report.costs()["wall_s"] >= 100.0
        assert report.costs()["cpu_s"] >= 50.0


def test_status_tells_running_from_cut_off() -> None:
    process = psutil.Process()
    status = {"state": "running", "pid": process.pid, "process_started": process.create_time()}
    assert state_of(status) == "running"
    assert "cut off" in state_of(status | {"process_started": process.create_time() - 100})
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert "cut off" in state_of(status | {"pid": dead.pid})
    assert state_of(status | {"state": "failed"}) == "failed"


def test_list_status_logs_and_recipes_show_what_there_is(tiny_store: Path, cli: Cli) -> None:
    status, listed, _ = cli("list", "--store", str(tiny_store))
    assert status == 0
    assert all(manifest.key[:8] in listed for manifest in Store(tiny_store).manifests())
    status, work, _ = cli("status", "--store", str(tiny_store))
    assert status == 0
    assert all(stage in work for stage in CHAIN)
    status, log, _ = cli("logs", "train-ldm", "--store", str(tiny_store), "--lines", "1")
    assert status == 0
    assert "finished" in log
    assert len(log.splitlines()) == 2
    status, recipes, _ = cli("recipes")
    assert status == 0
    assert {"demo", "celebahq", "cats-64"} <= set(recipes.split())


def test_listings_of_an_empty_store_say_so(tmp_path: Path, cli: Cli) -> None:
    assert "no artifacts in" in cli("list", "--store", str(tmp_path))[1]
    assert "nothing was started in" in cli("status", "--store", str(tmp_path))[1]


def test_sample_writes_a_grid_of_the_classes_asked_for(tiny_store: Path, tmp_path: Path, cli: Cli) -> None:
    output = tmp_path / "grid.png"
    options = [
        "--store",
        str(tiny_store),
        "--output",
        str(output),
        "--num",
        "2",
        "--classes",
        "red",
        "3",
        "--sampler",
        "dpmpp_2m",
        "--seed",
        "5",
    ]
    status, said, err = cli("sample", "ldm-demo@candidate", *options)
    assert status == 0, err
    assert "4 pictures of model" in " ".join(said.split())
    with Image.open(output) as grid:
        assert grid.format == "PNG"
        said_inside = grid.info
    assert (said_inside["recipe"], said_inside["seed"]) == ("demo", "5")
    assert json.loads(said_inside["sampling"])["sampler"] == "dpmpp_2m"
    assert Store(tiny_store).manifests("train-ldm")[0].key == said_inside["model"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reproduce_from_the_command_line_and_again(
    tmp_path: Path, tiny: list[str], ldm: Ldm, options: Options
) -> None:
    store = tmp_path / "store"
    command = ["reproduce", "demo", "--store", str(store), *options(tiny)]
    first = ldm(*command)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count(" made ") == len(CHAIN)
    assert "Look at" in first.stdout
    assert re.search(r"train-ldm \w+ finished: 96 images in [\d.]+ s, [\d.]+ images/s", first.stderr)
    started = time.monotonic()
    second = ldm(*command)
    assert time.monotonic() - started < 60
    assert second.returncode == 0, second.stderr
    assert second.stdout.count(" reused ") == len(CHAIN)
    tracker = open_tracker(Store(store))
    children = [tracker.runs(stage) for stage in CHAIN]
    assert [len(rows) for rows in children] == [1] * len(CHAIN)
    newest, oldest = tracker.runs("reproduce")
    assert {rows[0]["tags"]["mlflow.parentRunId"] for rows in children} == {oldest["id"]}
    assert {newest["status"], oldest["status"]} == {"FINISHED"}
    assert (store / "prefect" / "prefect.db").is_file()
    nightly = ldm("evaluate", "demo", "--model", "candidate", "--store", str(store))
    assert nightly.returncode == 0, nightly.stderr
    assert nightly.stdout.count(" reused ") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_error_inside_a_flow_is_one_message(tmp_path: Path, ldm: Ldm) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"url": [f"http://127.0.0.1:9/{i}.png" for i in range(100)]})
    pq.write_table(table, tmp_path / "list.parquet")
    recipe = tmp_path / "dead-links.yaml"
    recipe.write_text(
        "base: demo\n"
        "dataset: {name: dead, source: {kind: url_list, uri: list.parquet}, image_size_px: 32}\n"
        "conditioning: null\nunet: {context_dim: null}\nsampling: {guidance: 1}\n"
    )
    ended = ldm("reproduce", str(recipe), "--store", str(tmp_path / "store"))
    assert ended.returncode == 2
    assert ended.stderr.count("must lead to usable pictures") == 1
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "store" / "train-first-stage").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_of_a_killed_run_stays(
    tmp_path: Path, tiny: list[str], ldm_started: Callable[..., subprocess.Popen[str]], options: Options
) -> None:
    run = ldm_started("download-shards", "demo", "--store", str(tmp_path), *options(tiny))
    top = psutil.Process(run.pid)
    while not any("uvicorn" in child.cmdline() for child in top.children(recursive=True)):
        assert run.poll() is None
        time.sleep(0.2)
    family = top.children(recursive=True)
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
