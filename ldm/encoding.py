"""Encodes image shards into latent shards, part by part: reading ahead and writing behind while it computes.

A part is an image shard. It counts as done when its record (size, digest, moments) is in the work area, which
is written after the latent shard. Processes of one machine, of one run or of several, share the parts out by
locks, so that none is encoded twice; two machines may begin the same part, but not once its record is there.
The bytes depend on none of it.

N samples, C' channels of a stored latent, h w its height and width.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from datasets.claims import Claims
from datasets.keys import canonical_json
from datasets.manifest import FileRecord
from datasets.samples import (
    IMAGE_MEMBER,
    decode_image,
    encode_latent,
    encode_png,
    from_bfloat16_bits,
    to_bfloat16_bits,
)
from datasets.shards import KEY, Sample, read_shard, write_shard
from ldm.config import Encoding
from ldm.device import full_float32, home, resolve
from ldm.errors import ContractError
from ldm.latents import STORED, moments
from ldm.model import load_first_stage, moved
from ldm.models.first_stage import FirstStage
from ldm.range import from_uint8

if TYPE_CHECKING:  # the stage imports this module
    from ldm.stages.stage import Job

logger = logging.getLogger(__name__)
CLAIMS = "claims"
PART = "part-"
MIRRORED = "-mirrored"
TRAIN = "train-"
POLL_S = 0.2
AHEAD = 4
"""Micro-batches that are read before they are encoded, at most."""

T = TypeVar("T")
Encoded = Callable[[int], object]
"""Told how many samples more are encoded."""


@dataclass(frozen=True)
class Entry:
    """One sample to be: its picture, (H, W, 3) uint8, and what is stored beside the latent."""

    key: str
    image: np.ndarray
    about: dict[str, Any]
    picture: bytes | None


@dataclass(frozen=True)
class Chunk:
    """The pictures of one forward pass, all of one part."""

    part: int
    entries: list[Entry]
    is_last: bool


@dataclass
class Part:
    """A part in the making."""

    entries: list[Entry] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


def image_shards(job: Job) -> list[FileRecord]:
    """The parts, by number."""
    return [record for record in job.inputs["shards"].content.files if record.name.endswith(".tar")]


def orientations(encoding: Encoding, record: FileRecord) -> tuple[str, ...]:
    """How the pictures of a shard are stored: mirrored ones are for training."""
    return encoding.orientations if record.name.startswith(TRAIN) else encoding.orientations[:1]


def num_samples(encoding: Encoding, record: FileRecord) -> int:
    """Samples that an image shard becomes."""
    return (record.count or 0) * len(orientations(encoding, record))


def part_name(record: FileRecord) -> str:
    """Where the record of a part is in the work area."""
    return f"{PART}{record.name}.json"


def unfinished(job: Job) -> dict[int, FileRecord]:
    """The parts that are not done, as far as one look at the work area tells."""
    done = set(job.work.names(PART))
    return {part: record for part, record in enumerate(image_shards(job)) if part_name(record) not in done}


def stored_part(job: Job, record: FileRecord) -> dict[str, Any] | None:
    """What is recorded of a part that is done: `file` and `moments`."""
    saved = job.work.read(part_name(record))
    return None if saved is None else json.loads(saved)


def is_committed(job: Job) -> bool:
    """Whether the result exists, and the work area is or will be cleared."""
    return job.stage.find(job.store, job.recipe, job.inputs) is not None


@full_float32()
def encode_parts(job: Job, encoded: Encoded, *, worker: int = 0) -> None:
    """Encode and store every part that is not done, until all are, by whomever, or the result is committed.

    Args:
        job: what is encoded; on the recipe's device.
        encoded: told how many samples more are done.
        worker: number of this process among those of the run, which take the GPUs in turn.

    Raises:
        StoreError: a shard cannot be read or written.
        ContractError: a latent does not fit the type it is to be stored in.
    """
    torch.set_num_threads(job.recipe.threads)
    device = resolve(job.recipe.device, worker=worker)
    first_stage = moved(load_first_stage(job.store, job.inputs["first_stage"]), device)
    micro_batch = job.recipe.encoding.micro_batch
    making: dict[int, Part] = {}
    with (
        Claims(job.work.path(CLAIMS)) as claims,
        ThreadPoolExecutor(1, "writer") as writer,
        closing(ahead(read_parts(job, claims), depth=AHEAD)) as chunks,
    ):
        writing: Future[None] | None = None
        for chunk in chunks:
            if chunk is None:
                continue
            part = making.setdefault(chunk.part, Part())
            part.entries += chunk.entries
            part.latents.append(encode(first_stage, stack(chunk.entries), micro_batch=micro_batch))
            encoded(len(chunk.entries))
            if chunk.is_last:
                del making[chunk.part]
                latents = as_stored(torch.cat(part.latents), job.recipe.encoding.dtype)
                seen = moments(first_stage, as_read(latents), STORED[job.recipe.first_stage.model.kind])
                if writing is not None:
                    writing.result()
                writing = writer.submit(store_part, job, claims, chunk.part, part.entries, latents, seen)
        if writing is not None:
            writing.result()


def ahead(items: Iterator[T], *, depth: int) -> Generator[T, None, None]:
    """Yield the items of an iterator that a thread advances, at most `depth` ahead."""
    end = object()
    thread = ThreadPoolExecutor(1, "reader")
    try:
        pending = deque(thread.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(thread.submit(next, items, end))
            yield item  # pyright: ignore[reportReturnType] - it is no end
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def read_parts(job: Job, claims: Claims) -> Iterator[Chunk | None]:
    """Claim the parts that are not done, one by one, and read them; None while others are waited for."""
    left = unfinished(job)
    while left:
        for part, record in list(left.items()):
            if not claims.take(part):
                continue
            if stored_part(job, record) is not None:
                claims.release(part)
            elif is_committed(job):
                return
            else:
                logger.info("encodes %s", record.name)
                yield from read_part(job, part, record)
            del left[part]
        if left:
            if is_committed(job):
                return
            yield None
            time.sleep(POLL_S)


def read_part(job: Job, part: int, record: FileRecord) -> Iterator[Chunk]:
    """The pictures of a shard in passes of one micro-batch, the last one as long as is left."""
    encoding = job.recipe.encoding
    entries: list[Entry] = []
    for sample in read_shard(job.store.read(job.inputs["shards"], record.name)):
        entries += oriented(sample, orientations(encoding, record), picture=encoding.picture)
        check_size(entries[-1], job.recipe.dataset.image_size_px)
        while len(entries) > encoding.micro_batch:  # not the last: more is to come
            yield Chunk(part, entries[: encoding.micro_batch], is_last=False)
            entries = entries[encoding.micro_batch :]
    yield Chunk(part, entries, is_last=True)


def check_size(entry: Entry, size_px: int) -> None:
    """Refuse a picture of another size than the contract will state.

    Raises:
        ContractError: naming both.
    """
    if entry.image.shape != (size_px, size_px, 3):
        raise ContractError(
            f"image_size_px: pictures must be {size_px} x {size_px}, but {entry.key} is "
            f"{entry.image.shape[0]} x {entry.image.shape[1]}; build the image shards for this recipe"
        )


def oriented(sample: Sample, orientations: tuple[str, ...], *, picture: bool) -> Iterator[Entry]:
    """A picture as it is, and mirrored left to right where that is asked for."""
    image, about = decode_image(sample)
    yield Entry(sample[KEY], image, about, sample[IMAGE_MEMBER] if picture else None)
    if "mirrored" in orientations:
        image = np.ascontiguousarray(image[:, ::-1])
        about = about | {"orientation": "mirrored"}
        yield Entry(f"{sample[KEY]}{MIRRORED}", image, about, encode_png(image) if picture else None)


def stack(entries: list[Entry]) -> np.ndarray:
    """Pictures (N, H, W, 3)."""
    return np.stack([entry.image for entry in entries])


@torch.no_grad()
def encode(first_stage: FirstStage, images: np.ndarray, *, micro_batch: int) -> Tensor:
    """Stored latents (N, C', h, w) of pictures (N, H, W, 3) uint8, in padded passes of a fixed size.

    They are computed where the first stage is, and come back on the CPU.
    """
    parts, device = [], home(first_stage)
    for start in range(0, len(images), micro_batch):
        x = from_uint8(images[start : start + micro_batch], device=device)
        padded = torch.cat([x, x.new_zeros(micro_batch - len(x), *x.shape[1:])])
        padded = padded.contiguous(memory_format=torch.channels_last)
        parts.append(first_stage.encode(padded)[: len(x)].contiguous().cpu())
    return torch.cat(parts)


def as_stored(latents: Tensor, dtype: str) -> np.ndarray:
    """Latents in the type they are stored in, bfloat16 as its bits.

    Raises:
        ContractError: a number is too large for float16.
    """
    values = latents.numpy()
    if dtype == "bfloat16":
        return to_bfloat16_bits(values)
    limit = np.finfo(dtype).max
    largest = np.abs(values).max()
    if largest > limit:
        raise ContractError(
            f"latents stored as {dtype} must lie within {limit:.6g}, got numbers up to {largest:.6g}; "
            "set encoding.dtype=bfloat16 or float32"
        )
    return values.astype(dtype)


def as_read(latents: np.ndarray) -> Tensor:
    """Latents as a reader gives them, float32, of `as_stored`."""
    bits = latents.dtype == np.uint16
    return torch.from_numpy(from_bfloat16_bits(latents) if bits else latents).float()


def store_part(
    job: Job, claims: Claims, part: int, entries: list[Entry], latents: np.ndarray, seen: dict[str, Any]
) -> None:
    """Store the latent shard of a part, then its record, and give up the claim on it."""
    record = image_shards(job)[part]
    tar = write_shard(
        encode_latent(entry.key, latent, about=entry.about, picture=entry.picture)
        for entry, latent in zip(entries, latents, strict=True)
    )
    written = job.put(record.name, tar, count=len(entries))
    job.work.write(part_name(record), canonical_json({"file": asdict(written), "moments": seen}))
    logger.info("stored %s", record.name)
    claims.release(part)
