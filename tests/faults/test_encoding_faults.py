"""Encoding under kills and races, on a disk and on a real S3 server: same bytes, and nothing done twice."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import random
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from datasets.keys import sha256_hex
from datasets.manifest import FileRecord, Manifest
from datasets.shards import KEY, read_shard, write_shard
from datasets.store import Store
from datasets.transfer import carry, pack

if TYPE_CHECKING:
    from ldm.config import Recipe
    from ldm.stages.stage import Job

NUM_PARTS = 24
PART_SAMPLES = 4
KILLS_A_TRIAL = 8

fork = multiprocessing.get_context("fork")  # one thread computes, so nothing is lost in a fork


class Chain(Protocol):
    """What the fixtures of conftest.py give."""

    recipe: Recipe
    store: Store
    shards: Manifest
    first_stage: Manifest


def many_shards(chain: Chain, target: Store) -> Manifest:
    """The cats again and again, in many small shards."""
    shards, key = chain.shards, sha256_hex(b"many shards")
    cats = itertools.cycle(list(read_shard(chain.store.read(shards, "train-00000.tar"))))
    files: list[FileRecord] = []
    for part in range(NUM_PARTS):
        name = f"held_out-{part:05d}.tar" if part == NUM_PARTS - 1 else f"train-{part:05d}.tar"
        samples = [next(cats) | {KEY: f"{part * PART_SAMPLES + i:09d}"} for i in range(PART_SAMPLES)]
        files.append(target.put(shards.stage, key, name, write_shard(samples), count=PART_SAMPLES))
    counts = {"num_train": (NUM_PARTS - 1) * PART_SAMPLES, "num_held_out": PART_SAMPLES}
    statistics = dict(shards.content.statistics) | counts
    return target.commit(replace(shards.content, key=key, files=tuple(files), statistics=statistics), {})


def job_in(target: Store, chain: Chain, recipe: Recipe) -> Job:
    """The encoding of many shards in a store."""
    from ldm.stages import STAGES
    from ldm.stages.stage import Job
    from ldm.training.report import Silent

    stage = STAGES["encode-latents"]
    carry(chain.store, target, pack(chain.store, chain.first_stage, along=lambda child, role: False))
    inputs = {"shards": many_shards(chain, target), "first_stage": chain.first_stage}
    return Job(stage, target, recipe, stage.key(recipe, inputs), inputs, Silent())


def run(job: Job, events: Path) -> None:
    """What the killed process does: encode everything, and tell which part is begun and stored when."""
    handler = logging.FileHandler(events)
    logger = logging.getLogger("ldm.encoding")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    job.stage.run(job, dict)


def start(job: Job, events: Path) -> BaseProcess:
    process = fork.Process(target=run, args=(job, events))
    process.start()
    return process


def race(job: Job, events: Path, *, kills: int, seed: int) -> int:
    """Have two runs encode side by side, kill either at random, until both end; return the kills done."""
    draws, done = random.Random(seed), 0
    runs = [start(job, events), start(job, events)]
    while runs:
        ended = wait([process.sentinel for process in runs], timeout=draws.uniform(0, 0.4))
        for process in [process for process in runs if process.sentinel in ended]:
            process.join()
            assert process.exitcode == 0
            runs.remove(process)
        if not ended and done < kills:
            victim = runs.pop(draws.randrange(len(runs)))
            victim.kill()
            victim.join()
            done += 1
            runs.append(start(job, events))
    return done


def encoded_twice(events: Path) -> list[str]:
    """Parts that somebody began to encode after they were stored."""
    stored: set[str] = set()
    again = []
    for line in events.read_text().splitlines():
        match line.split():
            case ["encodes", name] if name in stored:
                again.append(name)
            case ["stored", name]:
                stored.add(name)
    return again


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, vq_chain: Chain) -> str:
    """The digest of an undisturbed run."""
    job = job_in(Store(tmp_path_factory.mktemp("undisturbed")), vq_chain, vq_chain.recipe)
    return job.stage.run(job, dict).digest


@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_racing_runs_make_the_same_bytes_and_encode_nothing_twice(
    kills: int, tmp_path: Path, vq_chain: Chain, undisturbed: str
) -> None:
    done = trial = 0
    while done < kills:
        events, store = tmp_path / f"events-{trial}", Store(tmp_path / f"store-{trial}")
        job = job_in(store, vq_chain, vq_chain.recipe)
        done += race(job, events, kills=min(KILLS_A_TRIAL, kills - done), seed=1000 * kills + trial)
        manifest = store.find(job.stage.name, job.key)
        assert manifest is not None
        assert manifest.digest == undisturbed
        for record in manifest.content.files:
            store.read(manifest, record.name)
        assert encoded_twice(events) == []
        assert job.work.names() == []
        trial += 1


def test_runs_of_one_machine_share_the_parts_out(tmp_path: Path, vq_chain: Chain, undisturbed: str) -> None:
    events = tmp_path / "events"
    job = job_in(Store(tmp_path / "store"), vq_chain, vq_chain.recipe)
    race(job, events, kills=0, seed=0)
    lines = events.read_text().splitlines()
    assert sorted(line for line in lines if line.startswith("encodes")) == [
        f"encodes {record.name}"
        for record in sorted(job.inputs["shards"].content.files, key=lambda f: f.name)
    ]
    manifest = job.store.find(job.stage.name, job.key)
    assert manifest is not None
    assert manifest.digest == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_s3_server_gets_the_same_artifact_as_a_disk(
    workers: int,
    s3_server: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vq_chain: Chain,
    tiny_recipe: Callable[..., Recipe],
    undisturbed: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(f"s3://ldm/encoding-{workers}")
    job = job_in(store, vq_chain, tiny_recipe(f"encoding.workers={workers}"))
    manifest = job.stage.run(job, dict)
    assert manifest.digest == undisturbed
    for record in manifest.content.files:
        store.read(manifest, record.name)
    assert job.work.names() == []
