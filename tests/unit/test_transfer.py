"""Copies of artifacts: the same bytes under the same key, or an error and no artifact."""

import uuid

import pytest

from datasets.errors import CorruptionError, StoreError
from datasets.keys import artifact_key
from datasets.manifest import Content, Manifest, Parent
from datasets.store import Store
from datasets.transfer import Cargo, carry, pack

STAGES = ("download-shards", "train-first-stage", "encode-latents")


@pytest.fixture(params=["folder", "memory"])
def stores(request, tmp_path, monkeypatch) -> tuple[Store, Store]:
    """Where artifacts are and where they go."""
    monkeypatch.chdir(tmp_path)  # a remote store keeps its cache in ./artifacts
    to = {"folder": str(tmp_path / "to"), "memory": f"memory://{uuid.uuid4().hex}/to"}
    return Store(tmp_path / "from"), Store(to[request.param])


def artifact(store: Store, stage: str, **parents: Manifest) -> Manifest:
    key = artifact_key(stage, 1, what={}, parents={role: m.digest for role, m in parents.items()})
    files = [store.put(stage, key, f"train-{i:05d}.tar", f"{stage} {i}".encode(), count=2) for i in range(3)]
    made_of = {role: Parent(m.stage, m.key, m.digest) for role, m in parents.items()}
    return store.commit(Content(stage, key, 1, {}, made_of, tuple(files)), {"host": "a"})


@pytest.fixture
def chain(stores) -> tuple[Manifest, ...]:
    shards = artifact(stores[0], STAGES[0])
    first_stage = artifact(stores[0], STAGES[1], shards=shards)
    return shards, first_stage, artifact(stores[0], STAGES[2], shards=shards, first_stage=first_stage)


def packed(source: Store, manifest: Manifest, *roles: str) -> Cargo:
    return pack(source, manifest, along=lambda _, role: role in roles)


def test_a_copy_is_the_artifact_and_its_parents_are_told_of(stores, chain) -> None:
    source, target = stores
    shards, first_stage, latents = chain
    seen = []
    carry(source, target, packed(source, latents), progress=lambda done, total: seen.append((done, total)))
    assert target.manifests() == [latents]
    assert target.read(latents, "train-00001.tar") == b"encode-latents 1"
    assert target.find(STAGES[1], first_stage.key) is None
    assert {m.digest for m in target.remembered()} == {shards.digest, first_stage.digest}
    assert seen[-1] == (latents.num_bytes, latents.num_bytes)


def test_a_parent_goes_along_with_its_files_when_asked(stores, chain) -> None:
    source, target = stores
    shards, first_stage, latents = chain
    carry(source, target, packed(source, latents, "first_stage"))
    assert target.manifests() == [latents, first_stage]
    assert [m.digest for m in target.remembered()] == [shards.digest]
    carry(source, target, packed(source, latents, "first_stage", "shards"))
    assert target.manifests() == sorted(chain, key=lambda m: m.stage)


def test_lineage_survives_a_copy_of_a_copy(stores, chain, tmp_path) -> None:
    source, target = stores
    carry(source, target, packed(source, chain[2]))
    third = Store(tmp_path / "third")
    carry(target, third, packed(target, chain[2]))
    assert {m.digest for m in third.remembered()} == {m.digest for m in chain[:2]}


def test_copying_again_writes_nothing_and_goes_on_where_it_was_cut_off(stores, chain, tmp_path) -> None:
    source, target = stores
    latents, cargo = chain[2], packed(stores[0], chain[2])
    for record in latents.content.files[:2]:  # a copy that was cut off before the last file
        target.put(latents.stage, latents.key, record.name, source.read(latents, record.name))
    carry(source, target, cargo)
    for record in latents.content.files:  # what is there already is not read from the source again
        (tmp_path / "from" / STAGES[2] / latents.key[:16] / record.path).unlink()
    carry(source, target, cargo)
    assert [target.has(latents, record.name) for record in latents.content.files] == [True] * 3


def test_a_damaged_source_leaves_no_artifact(stores, chain, tmp_path) -> None:
    source, target = stores
    latents = chain[2]
    record = latents.content.files[1]
    (tmp_path / "from" / STAGES[2] / latents.key[:16] / record.path).write_bytes(b"encode-latents 9")
    with pytest.raises(CorruptionError, match=r"train-00001.tar at .* must have sha256"):
        carry(source, target, packed(source, latents))
    assert target.manifests() == []


def test_a_damaged_copy_is_found_when_copied_again(stores, chain) -> None:
    source, target = stores
    latents, cargo = chain[2], packed(stores[0], chain[2])
    carry(source, target, cargo)
    blobs, record = target._blobs, latents.content.files[2]
    blobs.replace(f"{STAGES[2]}/{latents.key[:16]}/{record.path}", b"encode-latents 9")
    with pytest.raises(CorruptionError, match=r"train-00002.tar at .* must have sha256"):
        carry(source, target, cargo)


def test_a_parent_that_is_gone_is_named(stores, chain) -> None:
    source = stores[0]
    shards, first_stage, latents = chain
    source.withdraw(shards)
    assert list(packed(source, latents, "first_stage").unknown) == [shards.key]
    with pytest.raises(StoreError, match=rf"shards of encode-latents .* {shards.short}, must go along"):
        packed(source, latents, "shards")
    assert list(packed(source, first_stage).whole) == [first_stage.key]


def test_another_content_under_the_key_is_refused(stores, chain) -> None:
    source, target = stores
    latents = chain[2]
    other = target.put(latents.stage, latents.key, "train-00000.tar", b"other")
    target.commit(Content(latents.stage, latents.key, 1, {}, {}, (other,)), {})
    with pytest.raises(StoreError, match="one key must name one content"):
        carry(source, target, packed(source, latents))
