"""From a list to shards over the loopback interface, with img2dataset doing the fetching."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datasets.config import DatasetConfig, load_dataset, parse_dataset
from datasets.curate import Outcome
from datasets.download import address_refusal, download_parts, is_global, outcome_of
from datasets.errors import DownloadError, MissingDataError, SpaceError
from datasets.image_shards import OUTCOMES_FILE, STAGE, build_image_shards, find_image_shards
from datasets.manifest import Manifest
from datasets.origin import serve_folder
from datasets.shards import read_shard
from datasets.store import Store
from datasets.stream import SampleReader
from datasets.url_list import STAGE as LIST_STAGE
from datasets.url_list import plan_list, read_url_list

pytestmark = pytest.mark.timeout(120)

OVERRIDES: dict[str, Any] = {
    "image_size_px": 16,
    "source": {"train": 24, "held_out": 6, "dead": 10},
    "max_bad_share": 0.3,
}
CATS = load_dataset("cats", overrides=OVERRIDES)

# Builds with parts of 10 rows. Told to die, it kills itself once 20 rows are curated, and says who fetched.
BUILD = """
import json, os, signal, sys
from pathlib import Path
from datasets import image_shards
from datasets.config import load_dataset
from datasets.store import Store

image_shards.PART_ROWS = 10

def progress(done, total):
    print(done, flush=True)
    if sys.argv[3] == "die" and done == 20:
        print("fetching", Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

config = load_dataset("cats", overrides=json.loads(sys.argv[2]))
print("digest", image_shards.build_image_shards(Store(sys.argv[1]), config, progress=progress).digest)
"""


def members(store: Store, manifest: Manifest, split: str) -> list[dict[str, Any]]:
    names = [record.name for record in manifest.content.files if record.name.startswith(split)]
    return [sample for name in names for sample in read_shard(store.read(manifest, name))]


def outcomes_of(store: Store, manifest: Manifest) -> list[str]:
    table = pq.read_table(io.BytesIO(store.read(manifest, OUTCOMES_FILE)))
    assert table.column("position").to_pylist() == list(range(table.num_rows))
    return table.column("outcome").to_pylist()


def files_below(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()
    }


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Version and train shard of CATS: raise the version when its bytes change on purpose (decision 0007). They
# also change with Pillow and zlib, which the list's key includes.
GOLDEN = (1, "afac2f6d94ea8e84982907006596d032275d7a9e7749b0e2cb83253002af8b67")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def shards(store: Store) -> Manifest:
    assert find_image_shards(store, CATS) is None
    return build_image_shards(store, CATS, provenance=lambda: {"run": "first"})


def test_the_bytes_of_a_shard_are_those_written_down_for_this_version(shards: Manifest) -> None:
    assert (shards.content.code_version, shards.file("train-00000.tar").sha256) == GOLDEN


def test_every_row_ends_in_one_outcome(store: Store, shards: Manifest):
    expected = {"success": 30, "not_found": 6, "not_an_image": 2, "truncated": 1, "hash_mismatch": 1}
    assert shards.content.statistics["outcomes"] == expected
    assert Counter(outcomes_of(store, shards)) == expected


def test_the_statistics_count_what_is_in_the_shards(store: Store, shards: Manifest):
    statistics = shards.content.statistics
    for split, count in (("train", 24), ("held_out", 6)):
        samples = members(store, shards, split)
        assert len(samples) == count == statistics[f"num_{split}"]
        assert sum(file.count or 0 for file in shards.content.files if file.name.startswith(split)) == count
    labels = Counter(json.loads(sample["json"])["class_label"] for sample in members(store, shards, "train"))
    assert statistics["class_counts"] == {name: labels[label] for label, name in enumerate(CATS.classes)}
    assert statistics["classes"] == list(CATS.classes)
    assert statistics["image_size_px"] == 16


def test_shards_are_in_list_order_and_samples_are_the_listed_pictures(store: Store, shards: Manifest):
    list_manifest = store.find(LIST_STAGE, shards.content.parents["url_list"].key)
    assert list_manifest is not None
    assert list_manifest.digest == shards.content.parents["url_list"].digest
    rows = read_url_list(store, list_manifest).rows
    for split in ("train", "held_out"):
        keys = [sample["__key__"] for sample in members(store, shards, split)]
        assert keys == sorted(keys)
        for sample in members(store, shards, split):
            row = rows[int(sample["__key__"])]
            assert row.split == split
            assert json.loads(sample["json"]) == {
                "caption": row.caption,
                "class_label": row.class_label,
                "url": row.url,
                "sha256": row.sha256,
            }
            with Image.open(io.BytesIO(sample["png"])) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (16, 16))


def test_train_and_held_out_share_no_picture(store: Store, shards: Manifest):
    pictures = {
        split: {sample["png"] for sample in members(store, shards, split)} for split in ("train", "held_out")
    }
    assert len(pictures["train"]) == 24
    assert not pictures["train"] & pictures["held_out"]


def test_batches_come_out_of_the_shards(store: Store, shards: Manifest):
    reader = SampleReader(store, shards, split="train")
    batch = reader.fetch([23, 0])
    assert len(reader) == 24
    assert batch["image"].shape == (2, 16, 16, 3)
    assert batch["image"].dtype == np.uint8


def test_a_second_build_serves_paints_and_writes_nothing(
    store: Store, shards: Manifest, caplog: pytest.LogCaptureFixture
):
    before = files_below(store.root)
    with caplog.at_level(logging.DEBUG, "datasets"):
        assert find_image_shards(store, CATS) == shards
        assert build_image_shards(store, CATS, provenance=lambda: {"run": "second"}) == shards
    assert files_below(store.root) == before
    assert not caplog.records
    assert shards.provenance["run"] == "first"
    assert shards.provenance["attribution"] == "cats by David Revoy, CC-BY 4.0, via robohash"


def test_nothing_but_artifacts_is_left(store: Store, shards: Manifest):
    left = [name for name in files_below(store.root) if not name.startswith((STAGE, LIST_STAGE, "locks"))]
    assert left == []


def test_a_killed_build_leaves_no_process_and_ends_in_the_same_shards(shards: Manifest, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", BUILD, str(tmp_path), json.dumps(OVERRIDES)]
    killed = subprocess.run([*command, "die"], env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert STAGE not in {name.split("/")[0] for name in files_below(tmp_path)}
    children = [int(pid) for pid in killed.stdout.split("fetching", 1)[1].split()]
    assert len(children) == 1
    deadline = time.monotonic() + 5
    while is_alive(children[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(children[0])

    resumed = subprocess.run([*command, "live"], env=environment, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split() == ["30", "40", "digest", shards.digest]


def test_a_list_of_dead_rows_is_refused_with_its_reasons(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "offered").mkdir()
    (tmp_path / "offered" / "page.png").write_text("<html>")
    with serve_folder(tmp_path / "offered") as origin:
        urls = [f"{origin}/{name}.png" for name in ("gone", "page", "lost")] + ["file:///etc/hostname"]
        pq.write_table(pa.table({"url": urls}), tmp_path / "list.parquet")
        config = url_list_config(tmp_path / "list.parquet", allow_private_addresses=True)
        store = Store(tmp_path / "store")
        with pytest.raises(
            DownloadError, match="none does; outcomes: 2 not_found, 1 not_an_image, 1 refused_scheme"
        ):
            build_image_shards(store, config)
    assert find_image_shards(store, config) is None
    assert not (store.root / STAGE).exists()


def url_list_config(path: Path, **more: Any) -> DatasetConfig:
    source = {"kind": "url_list", "uri": str(path), "held_out_share": 0.25}
    return parse_dataset({"name": "mine", "source": source, "image_size_px": 16, **more})


def test_private_addresses_are_not_asked_unless_allowed(tmp_path: Path):
    pq.write_table(
        pa.table({"url": ["http://127.0.0.1:9/a.png", "http://10.1.2.3/b.png"]}), tmp_path / "list.parquet"
    )
    with pytest.raises(DownloadError, match="outcomes: 2 refused_address"):
        build_image_shards(Store(tmp_path / "store"), url_list_config(tmp_path / "list.parquet"))


@pytest.mark.parametrize(
    ("url", "outcome"),
    [
        ("file:///etc/passwd", Outcome.REFUSED_SCHEME),
        ("ftp://127.0.0.1/x", Outcome.REFUSED_SCHEME),
        ("data:image/png;base64,AAAA", Outcome.REFUSED_SCHEME),
        ("", Outcome.REFUSED_SCHEME),
        ("http:///x.png", Outcome.REFUSED_ADDRESS),
        ("http://[::1", Outcome.REFUSED_ADDRESS),
        ("http://127.0.0.1/x", Outcome.REFUSED_ADDRESS),
        ("http://2130706433/x", Outcome.REFUSED_ADDRESS),
        ("http://0x7f.1/x", Outcome.REFUSED_ADDRESS),
        ("http://169.254.169.254/latest", Outcome.REFUSED_ADDRESS),
        ("http://[::ffff:127.0.0.1]/x", Outcome.REFUSED_ADDRESS),
        ("http://127.0.0.1:99999/x", Outcome.REFUSED_ADDRESS),
    ],
)
def test_addresses_that_lead_inside_are_refused(url: str, outcome: Outcome):
    assert address_refusal(url, allow_private_addresses=False) == outcome


@pytest.mark.parametrize(
    "address",
    [
        "224.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "fec0::1",
        "::ffff:10.0.0.1",
        "fe80::1%eth0",
        "0.0.0.0",
    ],
)
def test_addresses_of_no_single_public_host_are_not_global(address: str):
    assert not is_global(address)
    assert is_global("93.184.215.14")
    assert is_global("2606:2800:21f:cb07:6820:80da:af6b:8b2c")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("HTTP Error 404: Not Found", Outcome.NOT_FOUND),
        ("HTTP Error 410: Gone", Outcome.NOT_FOUND),
        ("HTTP Error 503: Service Unavailable", Outcome.HTTP_ERROR),
        ("Use of image disallowed by X-Robots-Tag directive", Outcome.OPTED_OUT),
        ("<urlopen error timed out>", Outcome.TIMEOUT),
        ("<urlopen error [Errno 111] Connection refused>", Outcome.CONNECTION_ERROR),
        ("<urlopen error [Errno -2] Name or service not known>", Outcome.UNRESOLVED_HOST),
        ("IncompleteRead(10 bytes read, 90 more expected)", Outcome.CONNECTION_ERROR),
    ],
)
def test_every_message_has_its_outcome(error: str, outcome: Outcome):
    assert outcome_of(error) == outcome


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "none": lambda marker, file: None,
    "empty marker": lambda marker, file: marker.write_bytes(b""),
    "cut marker": lambda marker, file: marker.write_bytes(marker.read_bytes()[:-3]),
    "marker of other rows": lambda marker, file: marker.write_text('{"count": 2}'),
    "cut file": lambda marker, file: file.write_bytes(file.read_bytes()[:-10]),
    "no file": lambda marker, file: file.unlink(),
}


def test_finished_parts_are_kept_and_damaged_ones_fetched_again(tmp_path: Path):
    offered, folder = tmp_path / "offered", tmp_path / "folder"
    offered.mkdir()
    folder.mkdir()
    for part, damage in enumerate(DAMAGES.values()):
        (offered / str(part)).write_bytes(b"fresh")
        marker, file = folder / f"{part:05d}_stats.json", folder / f"{part:05d}.parquet"
        marker.write_text('{"count": 1}')
        columns = {"position": [part], "error_message": pa.array([None], pa.string()), "bin": [b"kept"]}
        pq.write_table(pa.table(columns), file)
        damage(marker, file)
    with serve_folder(offered) as origin:
        urls = [f"{origin}/{part}" for part in range(len(DAMAGES))]
        parts = download_parts(
            urls, folder, parts=range(len(urls)), rows_per_part=1, allow_private_addresses=True
        )
        got = {name: list(rows) for name, (_, rows) in zip(DAMAGES, parts, strict=True)}
    fresh = {name: [(part, b"fresh")] for part, name in enumerate(DAMAGES)}
    assert got == fresh | {"none": [(0, b"kept")]}


def folder_config(root: Path, **more: Any) -> DatasetConfig:
    document = {"name": "mine", "source": {"kind": "folder", "root": str(root), "held_out_share": 0.25}}
    return parse_dataset({**document, "image_size_px": 16, **more})


def write_pictures(root: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (20 + index, 24, 3), np.uint8)
        Image.fromarray(pixels).save(root / name)


def test_a_folder_of_classes_becomes_shards_with_labels(tmp_path: Path):
    write_pictures(
        tmp_path / "pictures", [f"{kind}/{index}.jpg" for kind in ("dog", "ant") for index in range(4)]
    )
    (tmp_path / "pictures" / "ant" / "0.txt").write_text("a small ant")
    store = Store(tmp_path / "store")
    manifest = build_image_shards(store, folder_config(tmp_path / "pictures"))
    statistics = manifest.content.statistics
    assert statistics["classes"] == ["ant", "dog"]
    assert (statistics["num_train"], statistics["num_held_out"]) == (6, 2)
    assert statistics["outcomes"] == {"success": 8}
    about = [
        json.loads(sample["json"])
        for split in ("train", "held_out")
        for sample in members(store, manifest, split)
    ]
    assert {(entry["url"].split("/")[0], entry["class_label"]) for entry in about} == {("ant", 0), ("dog", 1)}
    assert {entry["caption"] for entry in about} == {"", "a small ant"}
    assert find_image_shards(store, folder_config(tmp_path / "pictures")) == manifest


def test_a_flat_folder_becomes_shards_without_labels(tmp_path: Path):
    write_pictures(tmp_path / "pictures", [f"{index}.png" for index in range(8)])
    (tmp_path / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    store = Store(tmp_path / "store")
    config = folder_config(tmp_path / "pictures", max_bad_share=0.2)
    statistics = build_image_shards(store, config).content.statistics
    assert statistics["classes"] == []
    assert statistics["class_counts"] == {}
    assert statistics["outcomes"] == {"success": 8, "truncated": 1}
    strict = folder_config(tmp_path / "pictures", max_bad_share=0.1)
    with pytest.raises(
        DownloadError, match=r"at most 10\.0% .*max_bad_share.* 1 of 9 \(11\.1%\).*8 success, 1 truncated"
    ):
        build_image_shards(store, strict)


def test_200_faces_of_the_right_layout_are_enough(tmp_path: Path):
    write_pictures(tmp_path / "faces", [f"{index:05d}.png" for index in range(200)])
    config = load_dataset("celebahq", overrides={"root": str(tmp_path / "faces"), "image_size_px": 16})
    manifest = build_image_shards(Store(tmp_path / "store"), config)
    assert manifest.content.statistics["outcomes"] == {"success": 200}
    assert manifest.content.statistics["num_held_out"] == 33
    assert manifest.provenance["expected_count"] == 30000


def test_missing_data_is_found_before_any_work(tmp_path: Path):
    store = Store(tmp_path / "store")
    before = files_below(store.root)
    with pytest.raises(MissingDataError, match=r"--set dataset\.root="):
        build_image_shards(store, load_dataset("celebahq"))
    assert files_below(store.root) == before


def test_a_store_without_room_is_refused_before_painting(tmp_path: Path):
    huge = {"image_size_px": 4096, "source": {"train": 300_000}}
    with pytest.raises(SpaceError, match="download-shards needs"):
        build_image_shards(Store(tmp_path / "store"), load_dataset("cats", overrides=huge))
    assert not (tmp_path / "store" / "work").exists()


def test_the_list_stays_when_only_the_cut_changes(tmp_path: Path):
    write_pictures(tmp_path / "pictures", [f"{index}.png" for index in range(4)])
    config = folder_config(tmp_path / "pictures")
    store = Store(tmp_path / "store")
    first = build_image_shards(store, config)
    second = build_image_shards(store, config.model_copy(update={"image_size_px": 8}))
    assert first.key != second.key
    assert first.content.parents == second.content.parents
    assert plan_list(config).find(store) is not None
