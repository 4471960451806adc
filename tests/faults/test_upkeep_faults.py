"""Copies and removals under SIGKILL: what exists has all its files, and a later run ends the work."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from datasets.keys import artifact_key
from datasets.manifest import Content, Manifest, Parent
from datasets.store import Store
from datasets.transfer import carry, pack

NUM_FILES = 6
NUM_ARTIFACTS = 4
NUM_KILLS = 10
STAGE = "encode-latents"

fork = multiprocessing.get_context("fork")


def fill(store: Store) -> list[Manifest]:
    """A chain of artifacts, each made of the one before."""
    made: list[Manifest] = []
    for number in range(NUM_ARTIFACTS):
        parents = {f"artifact {number - 1}": Parent(m.stage, m.key, m.digest) for m in made[-1:]}
        key = artifact_key(STAGE, 1, what={}, parents={role: p.digest for role, p in parents.items()})
        files = tuple(
            store.put(STAGE, key, f"train-{i:05d}.tar", random.Random(f"{number} {i}").randbytes(50_000))
            for i in range(NUM_FILES)
        )
        made.append(store.commit(Content(STAGE, key, 1, {}, parents, files), {}))
    return made


def copy_all(source: Path, target: Path) -> None:
    store = Store(source)
    for manifest in store.manifests():
        carry(store, Store(target), pack(store, manifest, along=lambda *_: False))


def remove_all(source: Path, _target: Path) -> None:
    """Children first, manifests first: as `ldm gc` does it."""
    store = Store(source)
    parents = {p.key for m in store.manifests() for p in m.content.parents.values()}
    while manifests := [m for m in store.manifests() if m.key not in parents]:
        store.withdraw(manifests[0])
        parents = {p.key for m in store.manifests() for p in m.content.parents.values()}
    for folder in store.folders():
        store.discard(folder)


def killed(work: Callable[[Path, Path], None], source: Path, target: Path, *, after_s: float) -> None:
    process = fork.Process(target=work, args=(source, target))
    process.start()
    process.join(timeout=after_s)
    process.kill()
    process.join()


def require_whole(store: Store) -> int:
    """Every artifact that exists has all its files; returns how many exist."""
    manifests = store.manifests(strict=True)
    assert all(store.has(m, record.name) for m in manifests for record in m.content.files)
    return len(manifests)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A store with the chain."""
    root = tmp_path_factory.mktemp("filled")
    fill(Store(root))
    return root


@pytest.fixture(scope="module", params=[copy_all, remove_all])
def timed(request, filled, tmp_path_factory) -> tuple[Callable[[Path, Path], None], float]:
    """A piece of work and the seconds it takes undisturbed."""
    root = tmp_path_factory.mktemp("timed")
    shutil.copytree(filled, root / "from")
    started = time.perf_counter()
    request.param(root / "from", root / "to")
    return request.param, time.perf_counter() - started


@pytest.mark.parametrize("kill", range(NUM_KILLS))
def test_what_exists_is_whole_after_a_kill_and_the_work_can_be_ended(
    kill: int, timed, filled, tmp_path
) -> None:
    work, undisturbed_s = timed
    source, target = tmp_path / "from", tmp_path / "to"
    shutil.copytree(filled, source)
    made = Store(source).manifests()
    after_s = (kill + random.Random(kill).random()) / NUM_KILLS * undisturbed_s
    killed(work, source, target, after_s=after_s)
    for store in (Store(source), Store(target)):
        require_whole(store)
        there = {m.digest for m in (*store.manifests(), *store.remembered())}
        assert all(p.digest in there for m in store.manifests() for p in m.content.parents.values())
    work(source, target)
    if work is copy_all:
        assert {m.digest for m in Store(target).manifests()} == {m.digest for m in made}
        assert require_whole(Store(target)) == NUM_ARTIFACTS
    else:
        assert Store(source).manifests() == []
        assert list((source / STAGE).iterdir()) == []
