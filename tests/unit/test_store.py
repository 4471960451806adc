"""Laws of the store, on a folder and on fsspec's memory store."""

from __future__ import annotations

import logging
import os
import time
import uuid
from pathlib import Path

import pytest

from datasets.errors import CorruptionError, SpaceError, StoreError
from datasets.keys import sha256_hex
from datasets.manifest import Content, FileRecord, Manifest, Parent
from datasets.store import Store

STAGE = "encode-latents"
KEY = sha256_hex(b"key")
OTHER_KEY = sha256_hex(b"other key")


@pytest.fixture(params=["folder", "file", "memory"])
def store(request, tmp_path, monkeypatch) -> Store:
    monkeypatch.chdir(tmp_path)  # a remote store keeps its cache in ./artifacts
    uris = {
        "folder": str(tmp_path / "store"),
        "file": f"file://{tmp_path}/store",
        "memory": f"memory://{uuid.uuid4().hex}/prefix",
    }
    return Store(uris[request.param])


def content_of(*files: FileRecord, key: str = KEY, **statistics) -> Content:
    return Content(
        stage=STAGE, key=key, code_version=1, what={"f": 4}, parents={}, files=files, statistics=statistics
    )


def committed(store: Store, *, key: str = KEY, data: bytes = b"data") -> Manifest:
    record = store.put(STAGE, key, "train-00000.tar", data, count=2)
    return store.commit(content_of(record, key=key), {"host": "a"})


def test_what_is_committed_is_found_and_read_back(store: Store) -> None:
    manifest = committed(store)
    assert store.find(STAGE, KEY) == manifest
    assert store.read(manifest, "train-00000.tar") == b"data"
    assert store.read_cached(manifest, "train-00000.tar") == b"data"
    assert manifest.file("train-00000.tar").count == 2


def test_a_store_opened_at_the_others_uri_sees_the_same(store: Store) -> None:
    manifest = committed(store)
    assert Store(store.uri).find(STAGE, KEY) == manifest
    assert store.uri_of(manifest) == f"{store.uri}/{STAGE}/{KEY[:16]}"


def test_files_without_a_manifest_are_no_artifact(store: Store) -> None:
    store.put(STAGE, KEY, "train-00000.tar", b"data")
    assert store.find(STAGE, KEY) is None
    assert store.manifests() == []


def test_a_file_is_named_by_its_content(store: Store) -> None:
    record = store.put(STAGE, KEY, "train-00000.tar", b"data")
    assert record == FileRecord(
        "train-00000.tar", f"train-00000-{sha256_hex(b'data')[:12]}.tar", 4, sha256_hex(b"data"), None
    )
    assert store.put(STAGE, KEY, "train-00000.tar", b"other").path != record.path


def test_putting_bytes_or_a_file_or_both_twice_is_one_record(store: Store, tmp_path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"data")
    records = [store.put(STAGE, KEY, "a.bin", b"data"), store.put_file(STAGE, KEY, "a.bin", source)]
    records += [store.put_file(STAGE, KEY, "b.bin", source), store.put(STAGE, KEY, "b.bin", b"data")]
    assert records[0] == records[1]
    assert records[2] == records[3]
    assert source.read_bytes() == b"data"


def test_the_same_content_committed_twice_is_one_artifact_with_the_first_provenance(store: Store) -> None:
    first = committed(store)
    assert store.commit(first.content, {"host": "b"}) == first
    assert store.find(STAGE, KEY) == first


def test_other_content_under_a_committed_key_is_refused_naming_both(store: Store) -> None:
    first = committed(store)
    other = content_of(loss=1.0)
    with pytest.raises(StoreError, match=f"{first.digest}.*{Manifest(other).digest}.*CODE_VERSION"):
        store.commit(other, {})
    assert store.find(STAGE, KEY) == first


def test_a_manifest_cannot_promise_files_that_are_not_stored(store: Store) -> None:
    record = FileRecord("a.bin", "a-000000000000.bin", 3, "0" * 64)
    with pytest.raises(StoreError, match="holds nothing instead of 3 bytes; put it first"):
        store.commit(content_of(record), {})
    assert store.find(STAGE, KEY) is None


def test_listings_are_sorted_and_can_be_of_one_stage(store: Store) -> None:
    second, first = sorted([KEY, OTHER_KEY], reverse=True)
    manifests = [committed(store, key=key) for key in (second, first)]
    record = store.put("download-shards", KEY, "a.bin", b"x")
    images = store.commit(
        Content(
            stage="download-shards",
            key=KEY,
            code_version=1,
            what={},
            parents={"url_list": Parent("url-list", KEY, KEY)},
            files=(record,),
        ),
        {},
    )
    assert store.manifests() == [images, *reversed(manifests)]
    assert store.manifests(STAGE) == list(reversed(manifests))
    assert store.manifests("train-ldm") == []


def test_work_is_no_artifact_and_is_replaced_whole(store: Store) -> None:
    work = store.work(STAGE, KEY)
    assert work.read("part-0.json") is None
    assert work.names() == []
    work.write("part-0.json", b"old and longer")
    work.write("part-0.json", b"new")
    work.write("state", b"x")
    assert work.read("part-0.json") == b"new"
    assert work.names() == ["part-0.json", "state"]
    assert work.names("part-") == ["part-0.json"]
    work.remove("state")
    work.remove("state")
    assert work.names() == ["part-0.json"]
    assert store.manifests() == []


def test_work_is_of_one_key_and_can_be_cleared(store: Store) -> None:
    work, other = store.work(STAGE, KEY), store.work(STAGE, OTHER_KEY)
    other.write("state", b"other")
    work.write("state", b"x")
    work.path("scratch").write_bytes(b"x")
    work.clear()
    work.clear()
    assert work.names() == []
    assert not work.path("scratch").exists()
    assert other.read("state") == b"other"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".tmp-1", "/x"])
def test_a_name_cannot_leave_its_folder(store: Store, name: str) -> None:
    for attempt in (
        lambda: store.put(STAGE, KEY, name, b""),
        lambda: store.work(STAGE, KEY).write(name, b""),
        lambda: store.work(STAGE, KEY).path(name),
    ):
        with pytest.raises(ValueError, match="file name must be made of"):
            attempt()


def test_stage_and_key_must_be_what_they_are_called(store: Store) -> None:
    with pytest.raises(ValueError, match=r"stage must be lowercase words.*'\.\.'"):
        store.find("..", KEY)
    with pytest.raises(ValueError, match="key must be 64"):
        store.find(STAGE, KEY[:16])


def test_reading_a_name_the_artifact_does_not_have_is_a_key_error(store: Store) -> None:
    with pytest.raises(KeyError, match="it holds train-00000"):
        store.read(committed(store), "x")


def test_keys_that_share_their_first_16_digits_are_told_apart(store: Store) -> None:
    committed(store)
    with pytest.raises(CorruptionError, match="must be the manifest of"):
        store.find(STAGE, KEY[:16] + "0" * 48)


def test_a_remote_file_is_fetched_once_and_again_when_its_copy_is_damaged(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(f"memory://{uuid.uuid4().hex}")
    manifest = committed(store)
    asked = []
    read = Store.read
    monkeypatch.setattr(Store, "read", lambda *args: asked.append(args) or read(*args))
    assert [store.read_cached(manifest, "train-00000.tar") for _ in range(3)] == [b"data"] * 3
    assert len(asked) == 1
    [copy] = (tmp_path / "artifacts" / "cache" / "files").iterdir()
    copy.write_bytes(b"dbta")
    assert store.read_cached(manifest, "train-00000.tar") == b"data"
    assert (len(asked), copy.read_bytes()) == (2, b"data")


def test_the_cache_of_a_remote_store_is_bounded_and_a_local_store_has_none(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    remote = Store(f"memory://{uuid.uuid4().hex}", cache_bytes=3)
    assert remote.read_cached(committed(remote), "train-00000.tar") == b"data"
    local = Store("here")
    assert local.read_cached(committed(local), "train-00000.tar") == b"data"
    assert not list(tmp_path.rglob("cache"))


def test_only_a_local_store_has_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    remote, local = Store(f"memory://{uuid.uuid4().hex}"), Store("here")
    assert local.root == local.local_root == tmp_path / "here"
    assert remote.local_root == tmp_path / "artifacts"
    with pytest.raises(StoreError, match=r"only a local store has a folder.*--store"):
        _ = remote.root


def test_the_default_store_lies_in_the_current_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store().root == tmp_path / "artifacts"


def test_a_store_that_cannot_be_written_says_so_at_once(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"must be writable, but .*/file/store is not.*--store"):
        Store(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match=r"/file is not \(NotADirectoryError"):
        Store(tmp_path / "file")


def test_an_unknown_protocol_is_refused_with_examples() -> None:
    with pytest.raises(StoreError, match=r"got 'nosuch://x'.*--store s3://bucket/prefix"):
        Store("nosuch://x")


def test_too_little_room_is_told_with_need_have_and_cure(store: Store) -> None:
    store.require_free(1, purpose="encode-latents")
    if store.is_local:
        with pytest.raises(
            SpaceError, match=r"encode-latents needs 1048576\.0 GiB free.* has .*iB; free space"
        ):
            store.require_free(1 << 50, purpose="encode-latents")
    else:
        store.require_free(1 << 50, purpose="encode-latents")


def test_a_damaged_manifest_is_left_out_of_listings_with_a_warning(tmp_path, caplog) -> None:
    store = Store(tmp_path)
    committed(store)
    other = committed(store, key=OTHER_KEY)
    (tmp_path / STAGE / KEY[:16] / "manifest.json").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="datasets.store"):
        assert store.manifests() == [other]
    assert KEY[:16] in caplog.text
    with pytest.raises(CorruptionError, match="delete its folder"):
        store.find(STAGE, KEY)


def test_committing_leaves_no_temporary_file_and_removes_those_of_killed_writers(tmp_path) -> None:
    store = Store(tmp_path)
    record = store.put(STAGE, KEY, "a.bin", b"x")
    folder = tmp_path / STAGE / KEY[:16]
    old, young = folder / ".tmp-old", folder / ".tmp-young"
    for path in (old, young):
        path.write_bytes(b"half")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    store.commit(content_of(record), {})
    assert sorted(path.name for path in folder.iterdir()) == [".tmp-young", record.path, "manifest.json"]


def test_work_names_leave_out_temporary_files(tmp_path) -> None:
    work = Store(tmp_path).work(STAGE, KEY)
    work.write("state", b"x")
    work.path("state").with_name(".tmp-1").write_bytes(b"half")
    assert work.names() == ["state"]


def test_in_a_local_store_scratch_and_work_are_one_file(tmp_path: Path) -> None:
    work = Store(tmp_path).work(STAGE, KEY)
    work.write("state", b"x")
    assert work.path("state").read_bytes() == b"x"


def test_a_withdrawn_artifact_does_not_exist_and_comes_back_when_committed_again(store: Store) -> None:
    manifest = committed(store)
    store.withdraw(manifest)
    assert store.find(STAGE, KEY) is None
    assert store.folders() == [f"{STAGE}/{KEY[:16]}"]
    assert store.commit(manifest.content, manifest.provenance) == manifest
    assert store.read(manifest, "train-00000.tar") == b"data"


def test_only_a_folder_without_a_manifest_is_discarded(store: Store) -> None:
    manifest, other = committed(store), committed(store, key=OTHER_KEY)
    folder = f"{STAGE}/{KEY[:16]}"
    assert store.num_bytes(folder) > 4
    store.discard(folder)
    assert store.find(STAGE, KEY) == manifest
    store.withdraw(manifest)
    store.discard(folder)
    store.discard(folder)  # removing what is gone is no error
    assert store.folders() == [f"{STAGE}/{OTHER_KEY[:16]}"]
    assert store.read(other, "train-00000.tar") == b"data"
    with pytest.raises(CorruptionError, match="nothing is there"):
        store.read(manifest, "train-00000.tar")


@pytest.mark.parametrize(
    "path", ["work/x", "encode-latents", f"work/{KEY[:16]}", f"cache/{KEY[:16]}/x", "../x"]
)
def test_nothing_else_is_discarded(store: Store, path: str) -> None:
    with pytest.raises(ValueError, match="only the folder of an artifact can be discarded"):
        store.discard(path)


def test_a_strict_listing_refuses_what_a_lenient_one_leaves_out(tmp_path, caplog) -> None:
    store = Store(tmp_path)
    committed(store)
    moved = tmp_path / STAGE / ("0" * 16) / "manifest.json"
    moved.parent.mkdir()
    moved.write_bytes((tmp_path / STAGE / KEY[:16] / "manifest.json").read_bytes())
    assert len(store.manifests()) == 1
    assert "must lie in the folder of its stage and key" in caplog.text
    with pytest.raises(CorruptionError, match=r"0000/manifest.json must lie in the folder"):
        store.manifests(strict=True)


def test_work_areas_are_listed_with_their_size(store: Store) -> None:
    assert store.work_areas() == {}
    store.work(STAGE, KEY).write("state", b"12345")
    (area,) = store.work_areas().values()
    assert (list(store.work_areas()), area.num_bytes()) == ([f"{STAGE}/{KEY[:16]}"], 5)
    assert area.read("state") == b"12345"
    area.clear()
    assert store.work_areas() == {}


def test_manifests_from_elsewhere_are_remembered_and_are_no_artifacts(store: Store) -> None:
    manifest = Manifest(content_of(), {"host": "a"})
    store.remember(manifest)
    store.remember(manifest)
    assert store.remembered() == [manifest]
    assert store.manifests() == []
    assert store.find(STAGE, KEY) is None
    with pytest.raises(StoreError, match="one key must name one content"):
        store.remember(Manifest(content_of(a=1)))
