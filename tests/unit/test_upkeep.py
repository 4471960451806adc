"""What is stale, what can go and what must stay, on artifacts that stand in for the demo's."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from datasets import image_shards, url_list
from datasets.errors import CorruptionError
from datasets.manifest import Content, Manifest, Parent
from datasets.store import Store
from flows.attempts import Attempt, announce, attempt_here, attempts
from flows.gc import collect_garbage, in_order, remove
from flows.invocation import Invocation
from flows.listing import print_artifacts
from flows.preflight import planned_list
from flows.progress import status_folder
from flows.staleness import difference, what_of, why_stale
from flows.survey import Survey, UnprovenError, survey
from ldm.config import Recipe
from ldm.errors import RecipeError
from ldm.recipe import load_recipe
from ldm.stages import STAGES

CHAIN = ("url-list", "download-shards", "train-first-stage", "encode-latents", "train-ldm")
LR = "training.lr=0.5"


def stand_in(
    store: Store, stage: str, recipe: Recipe, asked: Invocation, made: dict[str, Manifest]
) -> Manifest:
    """An artifact with the key that a recipe gives it, and a file of a few bytes."""
    what, statistics, parents = what_of(stage, recipe) or {}, {}, {}
    if stage == "url-list":
        key, version = planned_list(recipe.dataset).key, url_list.CODE_VERSION
        statistics = {"identity": "0" * 64}
    elif stage == "download-shards":
        key, version = (
            image_shards.image_shards_key(recipe.dataset, made["url-list"]),
            image_shards.CODE_VERSION,
        )
        parents = {"url_list": made["url-list"]}
    else:
        parents = {role: made[of] for role, of in STAGES[stage].inputs.items()}
        key, version = STAGES[stage].key(recipe, parents), STAGES[stage].code_version
    record = store.put(stage, key, "data.bin", key.encode())
    made_of = {role: Parent(m.stage, m.key, m.digest) for role, m in parents.items()}
    content = Content(stage, key, version, what, made_of, (record,), statistics)
    provenance = {"asked": asked.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json")}
    return store.commit(content, provenance | {"host": socket.gethostname()})


def chain(store: Store, name: str = "demo", *overrides: str) -> dict[str, Manifest]:
    """Stand-ins of a recipe's stages up to the diffusion model."""
    asked, made = Invocation.of(name, overrides), dict[str, Manifest]()
    for stage in CHAIN:
        made[stage] = stand_in(store, stage, asked.resolve(), asked, made)
    return made


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Store(tmp_path / "store")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A recipe of the user's own."""
    path = tmp_path / "own.yaml"
    path.write_text("base: demo\ntraining: {lr: 0.25}\n")
    return path


def raised(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Raise the code version of a stage."""
    version = STAGES[stage].code_version + 1
    monkeypatch.setitem(STAGES, stage, dataclasses.replace(STAGES[stage], code_version=version))


def survey_of(store: Store, *recipes: str) -> Survey:
    return survey(store, recipes, in_order(store.manifests(strict=True)))


def doomed(store: Store, *recipes: str) -> set[str]:
    """Stages of the artifacts that can go."""
    found = survey_of(store, *recipes)
    return {m.stage for m in store.manifests() if m.digest in found.doomed}


# Staleness


def stale(store: Store) -> dict[str, str]:
    manifests = store.manifests()
    why = why_stale(manifests, elsewhere=store.remembered())
    return {m.stage: why[m.digest] for m in manifests if m.digest in why}


@pytest.mark.parametrize("overrides", [(), (LR,)])
def test_what_the_same_command_would_find_is_fresh(store: Store, overrides: tuple[str, ...]) -> None:
    chain(store, "demo", *overrides)
    assert stale(store) == {}


def test_another_code_version_is_stale_with_all_made_of_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chain(store)
    raised(monkeypatch, "encode-latents")
    assert stale(store) == {
        "encode-latents": "code version 1 is now 2",
        "train-ldm": f"its latents {made['encode-latents'].key[:8]} is stale",
    }


def test_a_recipe_that_says_something_else_is_named_with_the_setting(store: Store, own: Path) -> None:
    chain(store, str(own))
    own.write_text("base: demo\ntraining: {lr: 0.125}\nfirst_stage: {training: {lr: 0.5}}\n")
    why = stale(store)
    assert list(why) == ["encode-latents", "train-first-stage", "train-ldm"]
    says = f"recipe {own} now says"
    assert why["train-first-stage"].startswith(f"{says} first_stage.training.lr = 0.5 instead of")
    assert why["train-ldm"].startswith(f"{says} training.lr = 0.125 instead of 0.25; its first_stage")
    own.write_text("base: demo\ntraining: {lr: fast}\n")
    assert "can no longer be read: recipe" in stale(store)["train-ldm"]
    own.unlink()
    assert stale(store) == {}


def test_a_missing_parent_is_stale_unless_it_is_known_to_lie_elsewhere(store: Store) -> None:
    made = chain(store)
    first_stage = made["train-first-stage"]
    store.withdraw(first_stage)
    missing = f"its first_stage {first_stage.key[:8]} is missing"
    assert stale(store)["encode-latents"] == missing
    assert stale(store)["train-ldm"].startswith(missing)
    store.remember(first_stage)
    assert stale(store) == {}


def test_the_listing_marks_what_is_stale_and_says_why(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = chain(store)
    print_artifacts(store.uri)
    assert "stale" not in capsys.readouterr().out
    raised(monkeypatch, "train-ldm")
    print_artifacts(store.uri)
    listed = capsys.readouterr().out
    assert f"{made['train-ldm'].key[:8]}*" in listed
    assert f"{made['encode-latents'].key[:8]}*" not in listed
    version = made["train-ldm"].content.code_version
    assert f"code version {version} is now {version + 1}" in listed


@pytest.mark.parametrize(
    ("change", "encoded_again"),
    [
        ("encoding.dtype=float16", True),
        ("encoding.micro_batch=7", True),
        ("threads=7", True),
        ("first_stage.training.lr=0.5", True),
        ("first_stage.model.channels=16", True),
        ("training.lr=0.5", False),
        ("unet.model_channels=64", False),
        ("sampling.steps=3", False),
        ("evaluation.num_images=16", False),
        ("first_stage.training.picture_every_images=7", False),
        ("description=other", False),
    ],
)
def test_latents_are_encoded_again_exactly_when_their_recipe_changed(
    store: Store, change: str, encoded_again: bool
) -> None:
    before, after = chain(store), chain(store, "demo", change)
    assert (before["encode-latents"].key != after["encode-latents"].key) == encoded_again
    own_setting = difference(before["encode-latents"], load_recipe("demo", [change])) is not None
    assert own_setting == change.startswith(("encoding", "threads"))


def test_latents_are_encoded_again_exactly_when_weights_or_code_changed(store: Store) -> None:
    recipe, made, stage = load_recipe("demo"), chain(store), STAGES["encode-latents"]
    inputs = {role: made[of] for role, of in stage.inputs.items()}
    assert stage.find(store, recipe, inputs) == made["encode-latents"]
    assert dataclasses.replace(stage, code_version=2).find(store, recipe, inputs) is None
    first_stage = made["train-first-stage"]
    elsewhere = dataclasses.replace(first_stage, provenance={"host": "another", "made": "later"})
    assert stage.find(store, recipe, inputs | {"first_stage": elsewhere}) == made["encode-latents"]
    weights = store.put(first_stage.stage, first_stage.key, "data.bin", b"other weights")
    trained_again = dataclasses.replace(first_stage.content, files=(weights,))
    assert stage.find(store, recipe, inputs | {"first_stage": Manifest(trained_again)}) is None


# What can go


def test_what_a_recipe_leads_to_stays(store: Store) -> None:
    chain(store)
    assert survey_of(store).is_empty


def test_a_run_with_overrides_goes_and_what_it_shares_stays(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, tried = chain(store), chain(store, "demo", LR)
    assert doomed(store) == {"train-ldm"}
    collect_garbage(store.uri, [], delete=False)
    said = " ".join(capsys.readouterr().out.split())
    assert f"train-ldm {tried['train-ldm'].key[:8]}" in said
    assert "of a run with --set training.lr=0.5" in said
    assert "nothing was removed" in said
    assert len(store.manifests("train-ldm")) == 2
    collect_garbage(store.uri, [], delete=True)
    assert store.manifests() == sorted(kept.values(), key=lambda m: m.stage)
    assert all(store.has(m, "data.bin") for m in kept.values())
    assert store.folders() == sorted(f"{m.stage}/{m.key[:16]}" for m in kept.values())


def test_what_is_stale_goes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    chain(store)
    raised(monkeypatch, "train-first-stage")
    assert doomed(store) == {"train-first-stage", "encode-latents", "train-ldm"}


def test_a_recipe_of_ones_own_counts_where_artifacts_name_it_or_when_it_is_given(
    store: Store, own: Path, tmp_path: Path
) -> None:
    chain(store, str(own))
    assert doomed(store) == set()
    moved = own.rename(tmp_path / "moved.yaml")
    assert doomed(store) == {"train-ldm"}
    assert doomed(store, str(moved)) == set()
    with pytest.raises(RecipeError, match="unknown recipe"):
        survey_of(store, str(own))


def test_what_a_yaml_on_another_machine_made_stays(store: Store, own: Path) -> None:
    made = chain(store, "demo", LR)["train-ldm"]
    store.withdraw(made)
    asked = {"recipe": "/elsewhere/own.yaml", "set": []}
    there = {"host": "elsewhere", "asked": asked, "recipe": {"name": "own"}}
    store.commit(made.content, made.provenance | there)
    found = survey_of(store)
    assert found.is_empty
    assert "made by /elsewhere/own.yaml on elsewhere" in found.unproven[0]
    own.write_text("base: demo\n")
    assert doomed(store, str(own)) == {"train-ldm"}


def attempt_at(made: dict[str, Manifest], *, dead: bool = False, **changes: object) -> Attempt:
    """An attempt to train on the latents once more."""
    asked = Invocation.of("demo", [LR])
    inputs = {role: made[of] for role, of in STAGES["train-ldm"].inputs.items()}
    key = STAGES["train-ldm"].key(asked.resolve(), inputs)
    attempt = attempt_here("train-ldm", key, asked=[asked], inputs=inputs)
    return attempt.model_copy(update=changes | ({"process_started": 1.0} if dead else {}))


@pytest.mark.parametrize("dead", [False, True])
def test_what_an_attempt_reads_stays_while_it_runs_or_can_go_on(store: Store, dead: bool) -> None:
    made = chain(store, "demo", "encoding.dtype=float16")
    announce(store, attempt_at(made, dead=dead))
    assert [attempt.state for attempt in attempts(store)] == ["cut off" if dead else "running"]
    found = survey_of(store)
    assert doomed(store) == {"train-ldm"}
    assert found.areas == {}


def test_an_attempt_that_cannot_go_on_is_abandoned(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(store, attempt_at(chain(store), dead=True))
    raised(monkeypatch, "train-ldm")
    (why,) = survey_of(store).areas.values()
    assert why == "cut off, and its command does something else now"
    collect_garbage(store.uri, [], delete=True)
    assert store.work_areas() == {}


def test_an_attempt_on_another_machine_stays_as_nobody_can_tell(store: Store) -> None:
    made = chain(store, "demo", "encoding.dtype=float16")
    announce(store, attempt_at(made, host="elsewhere"))
    found = survey_of(store)
    assert found.areas == {}
    assert f"of process {os.getpid()} on elsewhere, which cannot be asked from here" in found.unproven[0]
    assert doomed(store) == {"train-ldm"}


def test_files_of_an_attempt_stay_and_those_of_nobody_go(store: Store) -> None:
    made = chain(store)
    attempt = attempt_at(made, dead=True)
    store.put("train-ldm", attempt.key, "weights.bin", b"weights")
    announce(store, attempt)
    assert survey_of(store).is_empty
    store.work("train-ldm", attempt.key).clear()
    assert list(survey_of(store).folders) == [attempt.folder]
    announce(store, attempt_at(made, stage="reproduce", key="0" * 64))  # while any runs, none is judged
    assert survey_of(store).folders == {}


def test_an_attempt_that_begins_between_manifests_and_files_keeps_what_it_reads(store: Store) -> None:
    made, manifests = chain(store, "demo", "encoding.dtype=float16"), in_order(store.manifests())
    found = survey(store, [], manifests)
    assert {m.stage for m in manifests if m.digest in found.doomed} == {"encode-latents", "train-ldm"}
    announce(store, attempt_at(made))
    assert remove(store, [], manifests, found) == [made["encode-latents"]]
    assert store.find("encode-latents", made["encode-latents"].key) == made["encode-latents"]
    assert store.has(made["encode-latents"], "data.bin")
    assert store.manifests("train-ldm") == []


def test_a_removal_that_was_cut_off_is_finished_by_the_next(store: Store) -> None:
    chain(store)
    tried = chain(store, "demo", LR)["train-ldm"]
    store.withdraw(tried)  # and killed
    assert store.find("train-ldm", tried.key) is None
    collect_garbage(store.uri, [], delete=True)
    assert f"train-ldm/{tried.key[:16]}" not in store.folders()
    assert len(store.manifests()) == len(CHAIN)


# What refuses


def test_a_damaged_manifest_refuses_and_is_named(store: Store) -> None:
    tried = [chain(store, "demo", LR), chain(store, "demo", "training.lr=0.75")]
    path = Path(store.uri_of(tried[0]["train-ldm"])) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"bytes": 64', b'"bytes": 65'))
    with pytest.raises(CorruptionError, match=f"the content of {path} must have the digest it states"):
        collect_garbage(store.uri, [], delete=True)
    assert store.find("train-ldm", tried[1]["train-ldm"].key) is not None


def test_a_damaged_attempt_refuses_and_is_named(store: Store) -> None:
    attempt = attempt_at(chain(store))
    store.work(attempt.stage, attempt.key).write(attempt.file_name, b"{}")
    with pytest.raises(CorruptionError, match=rf"{attempt.file_name} must say who works there"):
        survey_of(store)


def test_a_run_that_does_not_say_what_it_reads_refuses(store: Store) -> None:
    attempt = attempt_at(chain(store))
    status = {"stage": "train-ldm", "key": attempt.key, "state": "running", "pid": os.getpid()}
    folder = status_folder(store)
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(status | {"process_started": psutil.Process().create_time()}))
    with pytest.raises(UnprovenError, match=rf"train-ldm {attempt.key[:12]} .* does not say"):
        survey_of(store)
    announce(store, attempt)
    assert survey_of(store).areas == {}


def test_a_run_whose_recipe_is_gone_refuses(store: Store) -> None:
    attempt = attempt_at(chain(store), asked=(Invocation(recipe="/nowhere/own.yaml"),))
    announce(store, attempt)
    with pytest.raises(UnprovenError, match=r"was asked for /nowhere/own.yaml, which cannot be read"):
        survey_of(store)


def test_two_processes_at_one_artifact_both_count(store: Store) -> None:
    made = chain(store, "demo", "encoding.dtype=float16")
    announce(store, attempt_at(made))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    announce(store, attempt_at(made, pid=ended.pid))
    assert sorted(attempt.state for attempt in attempts(store)) == ["cut off", "running"]
    assert survey_of(store).areas == {}
