"""Scores a first stage on held-out pictures, beside what bicubic interpolation by the same factor reaches.

N pictures, H W height and width. All sets are (N, H, W, 3) uint8. The first n held-out pictures are
reconstructed; where 2n are held out, the second n are the reference of `rfid`, as in `evaluate` (ADR 0010).
"""

import logging
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets.keys import canonical_json
from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.device import CPU, full_float32, home, resolve
from ldm.errors import ContractError
from ldm.evaluation import fidelity, reconstruction
from ldm.evaluation.features import distance, kept_features
from ldm.evaluation.sets import MIN_SCORED, nchw, reconstruct
from ldm.model import load_first_stage, moved
from ldm.models.lpips import LPIPS, build_lpips
from ldm.pictures import png, side_by_side
from ldm.range import from_uint8
from ldm.stages.stage import Job, Result
from ldm.weights import FID_INCEPTION

logger = logging.getLogger(__name__)
NUM_SHOWN = 24


def bicubic(images: np.ndarray, factor: int) -> np.ndarray:
    """Pictures made smaller by `factor` and as large again, both by bicubic interpolation (antialiased)."""
    height, width = images.shape[1:3]
    small = (width // factor, height // factor)
    resample = Image.Resampling.BICUBIC
    shrunk = [Image.fromarray(image).resize(small, resample) for image in images]
    return np.stack([np.asarray(image.resize((width, height), resample)) for image in shrunk])


@torch.no_grad()
def perceptual(lpips: LPIPS, images: np.ndarray, originals: np.ndarray, *, micro_batch: int) -> float:
    """Mean LPIPS between pictures and their originals, computed where the network is."""
    device = home(lpips)
    parts = [
        lpips(
            *(from_uint8(of[start : start + micro_batch], device=device) for of in (images, originals))
        ).cpu()
        for start in range(0, len(images), micro_batch)
    ]
    return torch.cat(parts).double().mean().item()


def made_sets(job: Job, held_out: SampleReader, count: int) -> dict[str, np.ndarray]:
    """The sets that are compared; `reference` where enough pictures are held out, `bicubic` where f > 1."""
    recipe = job.recipe
    first_stage = moved(load_first_stage(job.store, job.inputs["first_stage"]), resolve(recipe.device))
    real = held_out.fetch(range(count))["image"]
    sets = {
        "real": real,
        "reconstruction": reconstruct(first_stage, real, micro_batch=recipe.encoding.micro_batch),
    }
    if recipe.first_stage.model.factor > 1:
        sets["bicubic"] = bicubic(real, recipe.first_stage.model.factor)
    if len(held_out) >= 2 * count:
        sets["reference"] = held_out.fetch(range(count, 2 * count))["image"]
    return sets


def compare(
    sets: dict[str, np.ndarray],
    features: dict[str, np.ndarray],
    *,
    micro_batch: int,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """The scores of every set that stands for the real pictures; a prefix names the set."""
    lpips = build_lpips().to(device)
    scores: dict[str, Any] = {}
    for name, prefix in {"reconstruction": "", "bicubic": "bicubic_"}.items():
        if name not in sets:
            continue
        found = reconstruction.scores([(nchw(sets[name]), nchw(sets["real"]))])
        found["lpips"] = perceptual(lpips, sets[name], sets["real"], micro_batch=micro_batch)
        found["rfid_same_pictures"] = distance(features[name], features["real"])
        if "reference" in features:
            found["rfid"] = distance(features[name], features["reference"])
        scores |= {f"{prefix}{key}": value for key, value in found.items() if np.isfinite(value)}
    if "reference" in features:
        scores["floor_fid"] = distance(features["real"], features["reference"])
    return scores


@full_float32()
def score(job: Job) -> Result:
    """Reconstruct, extract features, compare, and show the first pictures.

    Raises:
        ContractError: too few held-out pictures.
    """
    evaluation, device = job.recipe.evaluation, resolve(job.recipe.device)
    held_out = SampleReader(job.store, job.inputs["shards"], split="held_out")
    count = min(evaluation.num_images, len(held_out))
    if count < MIN_SCORED:
        raise ContractError(
            f"scores need at least {MIN_SCORED} held-out pictures, the data set has {len(held_out)}; "
            "raise the held-out share (for a folder: --set dataset.source.held_out_share=0.2)"
        )
    sets = made_sets(job, held_out, count)
    features = {}
    for index, (name, images) in enumerate(sets.items()):
        features[name] = kept_features(
            images,
            cache_dir=job.store.local_root / "cache",
            micro_batch=evaluation.micro_batch,
            device=device,
            progress=lambda done, total, index=index: job.report.progress(
                index * total + done, len(sets) * total
            ),
        )
    scores = compare(sets, features, micro_batch=evaluation.micro_batch, device=device) | {
        "num_images": count
    }
    job.report.metrics(0, {name: value for name, value in scores.items() if isinstance(value, float)})
    document: dict[str, Any] = {"scores": scores, "protocol": protocol(job.recipe, job, count)}
    warning = fidelity.bias_warning(count)
    if warning:
        logger.warning("%s", warning)
        document["warning"] = warning
    picture = png(
        side_by_side(
            sets["real"][:NUM_SHOWN],
            sets["reconstruction"][:NUM_SHOWN],
            columns=12,
            scale=max(1, 128 // job.recipe.dataset.image_size_px),
        )
    )
    job.report.picture("reconstructions", 0, picture)
    files = (job.put("scores.json", canonical_json(document)), job.put("reconstructions.png", picture))
    return Result(files=files, statistics=document)


def protocol(recipe: Recipe, job: Job, count: int) -> dict[str, Any]:
    """What a score depends on besides the first stage; scores of other protocols are not comparable."""
    return {
        "extractor_sha256": FID_INCEPTION.sha256,
        "resize": "torch-fidelity, TensorFlow 1 bilinear to 299",
        "codec": "none",
        "num_images": count,
        "weights": "ema",
        "posterior": "mean" if recipe.first_stage.model.kind == "kl" else "none",
        "reference": {"key": job.inputs["shards"].key, "split": "held_out"},
    }
