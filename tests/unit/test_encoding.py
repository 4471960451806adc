"""The stage encode-latents: what it stores with each setting, and by how many processes."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch

from datasets.errors import CorruptionError
from datasets.manifest import Manifest
from datasets.samples import decode_image
from datasets.shards import KEY, Sample, read_shard
from datasets.store import Store
from datasets.stream import SampleReader
from datasets.transfer import carry, pack
from ldm.config import Encoding, Recipe
from ldm.encoding import as_stored, encode
from ldm.errors import ContractError, WorkerError
from ldm.latents import contract_of
from ldm.model import load_first_stage
from ldm.stages import STAGES
from ldm.stages.encode_latents import what
from ldm.stages.stage import Job
from ldm.training.report import Silent

STAGE = STAGES["encode-latents"]
BOTH = "encoding.orientations=[as_is, mirrored]"


class Chain(Protocol):
    """What the fixtures of conftest.py give."""

    recipe: Recipe
    store: Store
    shards: Manifest
    first_stage: Manifest
    latents: Manifest


def job_in(target: Store, chain: Chain, recipe: Recipe) -> Job:
    """The encoding of a chain's pictures in another store."""
    inputs = {"shards": chain.shards, "first_stage": chain.first_stage}
    for manifest in inputs.values():
        carry(chain.store, target, pack(chain.store, manifest, along=lambda child, role: False))
    return Job(STAGE, target, recipe, STAGE.key(recipe, inputs), inputs, Silent())


def samples_of(store: Store, manifest: Manifest, name: str) -> list[Sample]:
    return list(read_shard(store.read(manifest, name)))


def test_the_key_knows_new_settings_only_where_they_are_used(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    plain = what(tiny_recipe())
    assert plain == {"encoding": {"dtype": "float32", "micro_batch": 8}, "threads": 1}
    assert what(tiny_recipe("encoding.workers=3")) == plain
    assert what(tiny_recipe(BOTH))["encoding"]["orientations"] == ["as_is", "mirrored"]
    assert what(tiny_recipe("encoding.picture=true"))["encoding"]["picture"] is True


@pytest.mark.parametrize("orientations", [[], ["mirrored"], ["mirrored", "as_is"], ["as_is", "as_is"]])
def test_other_orientations_are_refused(orientations: list[str]) -> None:
    with pytest.raises(ValueError, match=r"must be \[as_is\] or \[as_is, mirrored\], got \["):
        Encoding.model_validate({"orientations": orientations})


def test_training_pictures_are_stored_in_both_orientations_each_a_sample(
    tmp_path: Path, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    store = Store(tmp_path)
    latents = STAGE.run(job_in(store, vq_chain, tiny_recipe(BOTH)), dict)
    facts = latents.content.statistics
    assert (facts["num_train"], facts["num_held_out"]) == (80, 12)
    assert contract_of(latents).orientations == ("as_is", "mirrored")
    assert [file.count for file in latents.content.files] == [48, 32, 12]
    plain = SampleReader(vq_chain.store, vq_chain.latents, split="train").fetch(range(40))
    both = SampleReader(store, latents, split="train").fetch(range(80))
    assert both["key"][::2] == plain["key"]
    assert both["key"][1::2] == [f"{key}-mirrored" for key in plain["key"]]
    np.testing.assert_array_equal(both["class_label"], np.repeat(plain["class_label"], 2))
    pictures = SampleReader(vq_chain.store, vq_chain.shards, split="train").fetch(range(40))["image"]
    first_stage = load_first_stage(vq_chain.store, vq_chain.first_stage)
    mirrored = encode(first_stage, pictures[:, :, ::-1], micro_batch=8).numpy()
    np.testing.assert_allclose(both["latent"][1::2], mirrored, atol=1e-5)
    np.testing.assert_allclose(both["latent"][::2], plain["latent"], atol=1e-5)


def test_an_epoch_has_each_picture_once_in_each_orientation(
    tmp_path: Path, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    store = Store(tmp_path)
    latents = STAGE.run(job_in(store, vq_chain, tiny_recipe(BOTH)), dict)
    reader = SampleReader(store, latents, split="train")
    epoch = reader.in_order(3, position=80, count=80)["key"]
    assert sorted(epoch) == sorted(reader.fetch(range(80))["key"])
    assert epoch == SampleReader(store, latents, split="train").in_order(3, position=80, count=80)["key"]


def test_pictures_lie_beside_their_latents(
    tmp_path: Path, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    store = Store(tmp_path)
    recipe = tiny_recipe(BOTH, "encoding.picture=true")
    latents = STAGE.run(job_in(store, vq_chain, recipe), dict)
    originals = samples_of(vq_chain.store, vq_chain.shards, "train-00001.tar")
    stored = samples_of(store, latents, "train-00001.tar")
    assert [sample["png"] for sample in stored[::2]] == [sample["png"] for sample in originals]
    for original, mirrored in zip(originals, stored[1::2], strict=True):
        np.testing.assert_array_equal(decode_image(mirrored)[0], decode_image(original)[0][:, ::-1])
        assert decode_image(mirrored)[1] == decode_image(original)[1] | {"orientation": "mirrored"}
    need_bytes = STAGE.need_bytes(recipe, job_in(store, vq_chain, recipe).inputs)
    assert latents.num_bytes < need_bytes < 1.5 * latents.num_bytes


def test_the_space_it_asks_for_is_the_space_it_takes(vq_chain: Chain) -> None:
    inputs = {"shards": vq_chain.shards, "first_stage": vq_chain.first_stage}
    taken = vq_chain.latents.num_bytes
    assert taken < STAGE.need_bytes(vq_chain.recipe, inputs) < 1.5 * taken


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_the_float32_latents_rounded(
    dtype: str, tmp_path: Path, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    store = Store(tmp_path)
    latents = STAGE.run(job_in(store, vq_chain, tiny_recipe(f"encoding.dtype={dtype}")), dict)
    assert contract_of(latents).dtype == dtype
    exact = SampleReader(vq_chain.store, vq_chain.latents, split="train").fetch(range(40))["latent"]
    found = SampleReader(store, latents, split="train").fetch(range(40))["latent"]
    rounded = torch.from_numpy(exact).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(found, rounded)


def test_a_first_stage_of_another_network_is_refused(
    tmp_path: Path, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    job = job_in(Store(tmp_path), vq_chain, tiny_recipe("first_stage.model.num_codes=64"))
    with pytest.raises(
        ContractError, match=r"does not fit this run: num_codes: it has 32, this run needs 64;"
    ):
        STAGE.run(job, dict)


def test_pictures_of_another_size_are_refused(
    tmp_path: Path, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    job = job_in(Store(tmp_path), vq_chain, tiny_recipe("dataset.image_size_px=64"))
    with pytest.raises(ContractError, match=r"image_size_px: pictures must be 64 x 64, but \d+ is 32 x 32"):
        STAGE.run(job, dict)


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(ContractError, match=r"float16 must lie within 65504, got numbers up to 70000"):
        as_stored(torch.full((1, 1, 1, 1), -7e4), "float16")
    assert as_stored(torch.full((1, 1, 1, 1), -7e4), "bfloat16").dtype == np.uint16


@contextmanager
def killing(count: int) -> Iterator[None]:
    """Kills so many workers as soon as they are there, which is before they have done anything."""

    def kill() -> None:
        killed: set[int | None] = set()
        while len(killed) < count and not ended.wait(0.02):
            for process in multiprocessing.active_children():
                if process.pid not in killed and len(killed) < count:
                    process.kill()
                    killed.add(process.pid)

    ended = threading.Event()
    thread = threading.Thread(target=kill)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_bytes_are_the_same_for_any_number_of_workers(
    workers: int, tmp_path: Path, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    job = job_in(Store(tmp_path), vq_chain, tiny_recipe(f"encoding.workers={workers}"))
    assert STAGE.run(job, dict).digest == vq_chain.latents.digest
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_killed_worker_is_survived(
    tmp_path: Path, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    job = job_in(Store(tmp_path), vq_chain, tiny_recipe("encoding.workers=2"))
    with killing(1):
        assert STAGE.run(job, dict).digest == vq_chain.latents.digest


@pytest.mark.slow
def test_when_all_workers_are_killed_it_is_told_and_the_next_run_continues(
    tmp_path: Path, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    job = job_in(Store(tmp_path), vq_chain, tiny_recipe("encoding.workers=2"))
    message = r"all 3 shards must be encoded, but 3 are not: .* exit codes \[-9, -9\]"
    with killing(2), pytest.raises(WorkerError, match=message):
        STAGE.run(job, dict)
    assert STAGE.run(job, dict).digest == vq_chain.latents.digest


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_shard_is_told_by_whoever_reads_it(
    workers: int, tmp_path: Path, vq_chain: Chain, tiny_recipe: Callable[..., Recipe]
) -> None:
    job = job_in(Store(tmp_path), vq_chain, tiny_recipe(f"encoding.workers={workers}"))
    [damaged] = tmp_path.glob("download-shards/*/train-00001-*.tar")
    damaged.chmod(0o644)
    data = bytearray(damaged.read_bytes())
    data[5000] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CorruptionError, match="train-00001"):
        STAGE.run(job, dict)
    assert job.store.find(STAGE.name, job.key) is None
    assert not multiprocessing.active_children()


def test_an_encoded_part_is_not_encoded_again(
    tmp_path: Path, vq_chain: Chain, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_in(Store(tmp_path), vq_chain, vq_chain.recipe)
    with caplog.at_level("INFO", logger="ldm.encoding"):
        STAGE.build(job)
        STAGE.build(job)
    assert [record.getMessage() for record in caplog.records].count("encodes train-00000.tar") == 1
    assert len([record for record in caplog.records if record.getMessage().startswith("encodes")]) == 3


def test_samples_keep_their_shards_order(tmp_path: Path, vq_chain: Chain) -> None:
    job = job_in(Store(tmp_path), vq_chain, vq_chain.recipe)
    latents = STAGE.run(job, dict)
    for record in vq_chain.shards.content.files:
        names = [
            [sample[KEY] for sample in samples_of(*of, record.name)]
            for of in ((vq_chain.store, vq_chain.shards), (job.store, latents))
        ]
        assert names[0] == names[1]
