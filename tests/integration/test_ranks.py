"""Training in several processes: the same bits for 1, 2 and 4 ranks, whatever happens to them on the way."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from datasets.manifest import Content, FileRecord, Manifest
from datasets.order import SampleOrder
from datasets.samples import LATENT_MEMBER
from datasets.shards import read_shard, write_shard
from datasets.store import Store
from ldm.config import Recipe
from ldm.errors import TrainingError, WorkerError
from ldm.launch.beacons import BEACON, cpu_seconds
from ldm.launch.supervisor import attempt, supervise, watch
from ldm.launch.task import task_of
from ldm.launch.telling import Telling, Told
from ldm.recipe import merge, parse_override, parse_recipe
from ldm.stages import STAGES
from ldm.stages.stage import Job
from ldm.training.checkpoint import saved
from ldm.training.loop import History, train
from ldm.training.ranks import ALONE
from ldm.training.report import Silent
from ldm.training.stopping import Stopping

SHARDED = ("training.virtual_shards=4", "first_stage.training.virtual_shards=4")


class Chain(Protocol):
    """What the fixtures of conftest.py give."""

    recipe: Recipe
    store: Store
    shards: Manifest
    first_stage: Manifest
    latents: Manifest


Made = tuple[dict[str, Tensor], History]
number = itertools.count()


def job(chain: Chain, stage: str, *overrides: str) -> Job:
    """Work on a chain's artifacts under a key of its own."""
    raw = chain.recipe.model_dump(mode="json")
    for text in (*SHARDED, *overrides):
        raw = merge(raw, parse_override(text))
    inputs = {
        "train-first-stage": {"shards": chain.shards},
        "train-ldm": {"latents": chain.latents, "first_stage": chain.first_stage},
    }[stage]
    recipe = parse_recipe(raw, source="test")
    return Job(STAGES[stage], chain.store, recipe, f"{next(number):016x}{0:048x}", inputs, Silent())


def ended(work: Job) -> Made:
    """State and history at the end of the work, which is continued here, and then cleared away."""
    make = work.stage.make_trainee
    assert make is not None
    trainee = make(work, ALONE)
    history = train(trainee, work.work, report=Silent(), of=work.configuration)
    work.work.clear()
    return {name: value.clone() for name, value in trainee.tensors().items()}, history


def assert_same(ours: Made, theirs: Made) -> None:
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    assert [name for name, value in ours[0].items() if not torch.equal(value, theirs[0][name])] == []


def live_ranks() -> list[psutil.Process]:
    """The ranks of this process: children of its fork server."""
    servers = psutil.Process().children()
    return [rank for server in servers for rank in server.children()]


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Do something in another thread."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    yield
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize("stage", ["train-ldm", "train-first-stage"])
def test_two_and_four_ranks_end_where_one_does(stage: str, kl_chain: Chain) -> None:
    alone = ended(job(kl_chain, stage))
    for num_ranks in (2, 4):
        work = job(kl_chain, stage)
        supervise(work, num_ranks)
        assert saved(work.work)[-1] == 12
        assert_same(ended(work), alone)


REVIVING = ("first_stage.loss.revive_after_images=4", "first_stage.training.mirror=true")


def test_codes_are_revived_from_the_latents_of_all_ranks(vq_chain: Chain) -> None:
    alone = ended(job(vq_chain, "train-first-stage", *REVIVING))
    work = job(vq_chain, "train-first-stage", *REVIVING)
    supervise(work, 2)
    assert_same(ended(work), alone)
    assert any(value for _, value in alone[1]["watch/codes_revived"])


def run_with_kills(work: Job, moments: random.Random, folder: Path, *, num_kills: int) -> int:
    """Train to the end, with another number of ranks after each kill; how often the first was saving."""
    folder.mkdir()
    task = task_of(work, folder=str(folder), checkpoint_every_s=0.0)
    told, num_done, in_save = Told(folder, Silent()), 0, 0
    with Stopping() as stopping:
        while True:
            num_ranks = moments.choice([1, 1, 2, 2, 4])
            with attempt(task, num_ranks) as ranks:
                if num_done < num_kills:
                    phase = kill_one(folder, moments, [rank.pid or 0 for rank in ranks])
                    in_save += phase == "save"
                    num_done += 1
                reason = watch(ranks, task, told, stopping)
            told.pass_on()
            assert cpu_seconds(folder) > 0
            assert not any(error["is_final"] for error in told.errors().values())
            if reason is None:
                return in_save


def kill_one(folder: Path, moments: random.Random, pids: list[int]) -> str:
    """Kill a random rank at a random moment after the group has begun; what the first rank was at."""
    beacon, in_save = folder / BEACON.format(rank=0), moments.random() < 0.25
    wait_until(lambda: phase_of(beacon) not in {"", "start"})
    if in_save:
        wait_until(lambda: phase_of(beacon) == "save")
    else:
        time.sleep(moments.random() * 0.3)
    phase = phase_of(beacon)
    os.kill(pids[0] if in_save else moments.choice(pids), signal.SIGKILL)
    return phase


def phase_of(beacon: Path) -> str:
    try:
        return json.loads(beacon.read_bytes())["phase"]
    except (OSError, ValueError):
        return ""


def wait_until(happened: Callable[[], bool], *, for_s: float = 60.0) -> None:
    end = time.monotonic() + for_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


LONG = ("training.num_images=160",)


def kill_series(chain: Chain, folder: Path, *, num_kills: int, seed: int) -> int:
    alone = ended(job(chain, "train-ldm", *LONG))
    work = job(chain, "train-ldm", *LONG)
    in_save = run_with_kills(work, random.Random(seed), folder, num_kills=num_kills)
    assert_same(ended(work), alone)
    return in_save


@pytest.mark.timeout(400)
def test_twenty_kills_with_other_numbers_of_ranks_change_no_bit(kl_chain: Chain, tmp_path: Path) -> None:
    kill_series(kl_chain, tmp_path / "told", num_kills=20, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hundred_kills_with_other_numbers_of_ranks_change_no_bit(kl_chain: Chain, tmp_path: Path) -> None:
    assert kill_series(kl_chain, tmp_path / "told", num_kills=200, seed=1) >= 30


def test_a_rank_that_stands_still_is_found_and_the_run_goes_on(kl_chain: Chain) -> None:
    alone, work = ended(job(kl_chain, "train-ldm", *LONG)), job(kl_chain, "train-ldm", *LONG)
    stopped_at: list[float] = []

    def stop_one() -> None:
        wait_until(lambda: len(saved(work.work)) == 2)
        stopped_at.append(time.monotonic())
        live_ranks()[0].suspend()

    with meanwhile(stop_one):
        supervise(work, 2, checkpoint_every_s=0.0)
    assert 10 < time.monotonic() - stopped_at[0] < 120
    assert_same(ended(work), alone)


def train_shards(chain: Chain) -> list[FileRecord]:
    """The training shards of a chain's latents, in their order."""
    files = chain.latents.content.files
    return sorted((r for r in files if r.name.startswith("train-")), key=lambda record: record.name)


def with_bad_samples(chain: Chain, bad: set[int]) -> Chain:
    """The chain with NaN in the training latents of these indices."""
    content, key, first = chain.latents.content, f"{next(number):016x}{0:048x}", 0
    files = {record.name: chain.store.read(chain.latents, record.name) for record in content.files}
    for record in train_shards(chain):
        samples = list(read_shard(files[record.name]))
        for index, sample in enumerate(samples, first):
            if index in bad:
                sample[LATENT_MEMBER] = sample[LATENT_MEMBER][:-4] + np.float32("nan").tobytes()
        files[record.name] = write_shard(samples)
        first += len(samples)
    put = [chain.store.put(content.stage, key, r.name, files[r.name], count=r.count) for r in content.files]
    poisoned = chain.store.commit(replace(content, key=key, files=tuple(put)), {})
    return replace(chain, latents=poisoned)  # pyright: ignore[reportArgumentType]


def steps_of(bad: set[int], chain: Chain) -> list[int]:
    """The steps of the first epoch, in batches of 4, that a sample of these indices is in."""
    sizes = [record.count or 0 for record in train_shards(chain)]
    order = SampleOrder(chain.recipe.training.seed, sizes).part(0, sum(sizes))
    return sorted({place // 4 for place, index in enumerate(order.tolist()) if index in bad})


def test_bad_numbers_leave_steps_out_as_if_they_had_been_listed(vq_chain: Chain) -> None:
    bad = {3, 14, 15, 37}
    poisoned, steps = with_bad_samples(vq_chain, bad), steps_of(bad, vq_chain)
    epoch = ("training.num_images=40",)
    assert len(steps) > 1
    listed = ended(job(vq_chain, "train-ldm", *epoch, f"training.skip_steps={steps}"))
    assert listed[1]["steps_left_out"] == [(4 * (step + 1), n + 1) for n, step in enumerate(steps)]
    for num_ranks in (1, 2):
        work = job(poisoned, "train-ldm", *epoch)
        if num_ranks > 1:
            supervise(work, num_ranks)
        assert_same(ended(work), listed)


def test_a_reason_to_stop_that_would_come_again_is_not_tried_again(vq_chain: Chain) -> None:
    work = job(with_bad_samples(vq_chain, set(range(38))), "train-ldm")
    with pytest.raises(TrainingError, match=r"loss and gradient must be finite, got loss nan"):
        supervise(work, 2)


def test_ranks_that_never_get_further_end_the_run(vq_chain: Chain) -> None:
    work = job(vq_chain, "train-ldm")
    gone = replace(work, inputs={**work.inputs, "latents": replace_key(vq_chain.latents)})
    with pytest.raises(TrainingError, match=r"the latents encode-latents .* is gone"):
        supervise(gone, 2)

    def kill_all() -> None:
        for _ in range(4):
            wait_until(lambda: len(live_ranks()) == 2)
            for rank in live_ranks():
                rank.kill()
            wait_until(lambda: not live_ranks())

    with meanwhile(kill_all), pytest.raises(WorkerError, match=r"saved nothing new .*killed by SIGKILL"):
        supervise(work, 2)


def replace_key(manifest: Manifest) -> Manifest:
    content: Content = replace(manifest.content, key="e" * 64)
    return replace(manifest, content=content)


def test_what_a_killed_rank_left_half_told_spoils_nothing(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float]]] = []

    class Seeing(Silent):
        def metrics(self, images_seen: int, values: Mapping[str, float]) -> None:
            seen.append((images_seen, dict(values)))

    told = Told(tmp_path, Seeing())
    (tmp_path / "told-0-1.jsonl").write_text('["metrics", 4, {"loss": 0.5}]\n["metrics", 8, {"lo')
    told.pass_on()
    again = Telling(tmp_path, 0)
    for images in (4, 8, 12):
        again.metrics(images, {"loss": 2.0 / images})
    told.pass_on()
    assert seen == [(4, {"loss": 0.5}), (8, {"loss": 0.25}), (12, {"loss": 2.0 / 12})]


def test_ranks_without_a_gpu_each_are_refused_once(vq_chain: Chain) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("there are GPUs for both")
    work = job(vq_chain, "train-ldm", "device=cuda")
    with pytest.raises(TrainingError, match=r"torch sees"):
        supervise(work, 2)
