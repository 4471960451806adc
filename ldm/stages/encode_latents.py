"""The stage encode-latents: image shards and a first stage -> latent shards under a latent contract.

N samples, C channels of the latent, h w its height and width.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.keys import canonical_json
from datasets.manifest import FileRecord, Manifest
from datasets.samples import decode_image, encode_latent
from datasets.shards import read_shard, write_shard
from ldm.config import Recipe
from ldm.latents import LatentContract, expected
from ldm.model import load_first_stage
from ldm.models.first_stage import FirstStage
from ldm.models.gaussian import split_moments
from ldm.range import from_uint8
from ldm.stages.stage import Job, Result, Stage


def what(recipe: Recipe) -> dict[str, Any]:
    """Type and micro-batch of the encoder's passes."""
    return {"encoding": recipe.encoding.model_dump(mode="json"), "threads": recipe.threads}


def need_bytes(recipe: Recipe, inputs: Mapping[str, Manifest]) -> int:
    """The latents, and their tars' overhead of some 2 KiB a sample."""
    statistics = inputs["shards"].content.statistics
    samples = statistics["num_train"] + statistics["num_held_out"]
    size = recipe.latent_size**2 * recipe.first_stage.model.stored_channels
    return samples * (size * np.dtype(recipe.encoding.dtype).itemsize + 2048)


@torch.no_grad()
def encode(first_stage: FirstStage, images: np.ndarray, *, micro_batch: int) -> Tensor:
    """Stored latents (N, C', h, w) of pictures (N, H, W, 3) uint8, in padded passes of a fixed size."""
    parts = []
    for start in range(0, len(images), micro_batch):
        x = from_uint8(images[start : start + micro_batch])
        padded = torch.cat([x, x.new_zeros(micro_batch - len(x), *x.shape[1:])])
        padded = padded.contiguous(memory_format=torch.channels_last)
        parts.append(first_stage.encode(padded)[: len(x)].contiguous())
    return torch.cat(parts)


def moments(first_stage: FirstStage, stored: Tensor, kind: str) -> dict[str, Any]:
    """Count, sum and sum of squares per channel of what the UNet will see, in float64.

    For KL the squares are those expected over draws of the posterior: mean^2 + variance.
    """
    z = first_stage.latent(stored, None).double()
    squares = z.square()
    if kind == "kl":
        squares = squares + split_moments(stored)[1].double().exp()
    over = (0, 2, 3)
    return {
        "count": z.numel() // z.shape[1],
        "sum": z.sum(over).tolist(),
        "squares": squares.sum(over).tolist(),
    }


def encode_part(job: Job, first_stage: FirstStage, record: FileRecord) -> dict[str, Any]:
    """Encode one image shard, store the latent shard, and describe it."""
    samples = list(read_shard(job.store.read(job.inputs["shards"], record.name)))
    decoded = [decode_image(sample) for sample in samples]
    images = np.stack([image for image, _ in decoded])
    stored = encode(first_stage, images, micro_batch=job.recipe.encoding.micro_batch)
    latents = stored.numpy().astype(job.recipe.encoding.dtype)
    tar = write_shard(
        encode_latent(sample["__key__"], latent, about=about)
        for sample, (_, about), latent in zip(samples, decoded, latents, strict=True)
    )
    written = job.put(record.name, tar, count=len(samples))
    seen = moments(first_stage, torch.from_numpy(latents).float(), job.recipe.first_stage.model.kind)
    return {"file": written.__dict__, "moments": seen}


def build(job: Job) -> Result:
    """Encode shard by shard; a shard whose record is written is not encoded again."""
    first_stage = load_first_stage(job.store, job.inputs["first_stage"])
    records = [f for f in job.inputs["shards"].content.files if f.name.endswith(".tar")]
    total, done, parts = sum(f.count or 0 for f in records), 0, []
    for record in records:
        name = f"part-{record.name}.json"
        saved = job.work.read(name)
        if saved is None:
            saved = canonical_json(encode_part(job, first_stage, record))
            job.work.write(name, saved)
        parts.append(json.loads(saved))
        done += record.count or 0
        job.report.progress(done, total)
    files = tuple(FileRecord(**part["file"]) for part in parts)
    return Result(files=files, statistics=statistics(job, parts))


def statistics(job: Job, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the contract with the moments of the training latents."""
    train = [part["moments"] for part in parts if part["file"]["name"].startswith("train-")]
    count = sum(m["count"] for m in train)
    mean = np.sum([m["sum"] for m in train], axis=0) / count
    square = np.sum([m["squares"] for m in train], axis=0) / count
    variance = square.mean() - mean.mean() ** 2
    contract = LatentContract(
        **expected(job.recipe, job.inputs["first_stage"]),
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(np.maximum(square - mean**2, 0.0)).tolist()),
        scale=float(1.0 / np.sqrt(variance)),
    )
    shards = job.inputs["shards"].content.statistics
    return {
        "contract": contract.model_dump(mode="json"),
        "num_train": shards["num_train"],
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
