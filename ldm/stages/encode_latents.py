"""The stage encode-latents: image shards and a first stage -> latent shards under a latent contract."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from datasets.errors import StoreError
from datasets.manifest import FileRecord, Manifest
from ldm.config import Encoding, Recipe
from ldm.encoding import (
    TRAIN,
    encode_parts,
    image_shards,
    is_committed,
    num_samples,
    stored_part,
    unfinished,
)
from ldm.encoding_workers import encode_in_workers
from ldm.errors import WorkerError
from ldm.latents import LatentContract, check_first_stage, expected, pooled, scale_of
from ldm.stages.stage import Job, Result, Stage

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SAMPLE_OVERHEAD = 4608
"""Bytes that the headers of a sample's latent and JSON, the JSON and padding take in a tar, about."""
TAR_OVERHEAD = 10240
"""Bytes to a multiple of which a tar is filled up."""
LATER = ("orientations", "picture")
"""Settings that joined when artifacts existed; at their default the key does not know them."""


def what(recipe: Recipe) -> dict[str, Any]:
    """Type, micro-batch of the encoder's passes, orientations and pictures."""
    encoding = recipe.encoding
    unset = {name for name in LATER if getattr(encoding, name) == Encoding.model_fields[name].default}
    return {
        "encoding": encoding.model_dump(mode="json", exclude={"workers", *unset}),
        "threads": recipe.threads,
    }


def need_bytes(recipe: Recipe, inputs: Mapping[str, Manifest]) -> int:
    """The latents, the pictures beside them, and their tars' overhead."""
    shards, encoding = inputs["shards"].content, recipe.encoding
    copies = len(encoding.orientations)
    samples = shards.statistics["num_train"] * copies + shards.statistics["num_held_out"]
    size = recipe.latent_size**2 * recipe.first_stage.model.stored_channels
    pictures = copies * inputs["shards"].num_bytes if encoding.picture else 0
    tars = TAR_OVERHEAD * len(shards.files)
    return samples * (size * BYTES[encoding.dtype] + SAMPLE_OVERHEAD) + pictures + tars


def build(job: Job) -> Result:
    """Encode every shard that is not encoded yet; a racing run that was faster is believed."""
    check_first_stage(job.recipe, job.inputs["first_stage"])
    try:
        cut_off = encode_all(job)
    except (StoreError, OSError):
        if not is_committed(job):  # else the work area was cleared in the midst of it
            raise
        cut_off = []
    parts = [stored_part(job, record) for record in image_shards(job)]
    done = [part for part in parts if part is not None]
    if len(done) == len(parts):
        files = tuple(FileRecord(**part["file"]) for part in done)
        return Result(files=files, statistics=statistics(job, done))
    made = job.stage.find(job.store, job.recipe, job.inputs)
    if made is None:
        raise WorkerError(
            f"all {len(parts)} shards must be encoded, but {len(parts) - len(done)} are not: workers ended "
            f"with exit codes {cut_off} (-9 is killed, perhaps for want of memory); run it again, it "
            "continues, with a lower encoding.workers if memory was short"
        )
    return Result(files=made.content.files, statistics=dict(made.content.statistics))


def encode_all(job: Job) -> list[int]:
    """Encode what is left, here or in workers, and show how far; exit codes of workers that were cut off."""
    encoding = job.recipe.encoding
    total = sum(num_samples(encoding, record) for record in image_shards(job))
    done = total - sum(num_samples(encoding, record) for record in unfinished(job).values())

    def encoded(count: int) -> None:
        nonlocal done
        done += count
        job.report.progress(done, total)

    encoded(0)
    if done == total:
        return []
    if encoding.workers > 1:
        return encode_in_workers(job, encoded)
    encode_parts(job, encoded)
    return []


def statistics(job: Job, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of samples, and the contract with the moments of the training latents."""
    train = [part for part in parts if part["file"]["name"].startswith(TRAIN)]
    mean, square = pooled([part["moments"] for part in train])
    contract = LatentContract(
        **expected(job.recipe, job.inputs["first_stage"]),
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(np.maximum(square - mean**2, 0.0)).tolist()),
        scale=scale_of(mean, square),
    )
    shards = job.inputs["shards"].content.statistics
    return {
        "contract": contract.model_dump(mode="json"),
        "num_train": sum(part["file"]["count"] for part in train),
        "num_held_out": shards["num_held_out"],
        "classes": shards["classes"],
    }


ENCODE_LATENTS = Stage(
    name="encode-latents",
    code_version=1,
    inputs={"shards": "download-shards", "first_stage": "train-first-stage"},
    what=what,
    build=build,
    need_bytes=need_bytes,
)
