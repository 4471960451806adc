"""Inception features of a set of pictures, kept on disk under what they were computed from.

N pictures, H W height and width, D = 2048 features. A set that several models are compared with is put
through the network once: the name of the kept file is a digest of the pictures, the network, the micro-batch,
the number of threads and the class of device, so other pictures never find it, and it ends in the digest of
its own bytes.
"""

import hashlib
import io
import logging
from pathlib import Path

import numpy as np
import torch

from datasets.progress import Progress, no_progress
from ldm.device import CPU
from ldm.evaluation.fidelity import extract_features, frechet_distance
from ldm.evaluation.sets import nchw
from ldm.weights import DIGEST_LETTERS, inception_state, intact, write_atomically

logger = logging.getLogger(__name__)


def kept_features(
    images: np.ndarray,
    *,
    cache_dir: Path,
    micro_batch: int,
    device: torch.device = CPU,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Features (N, D) float32 of pictures (N, H, W, 3) uint8: computed now, or read where they were kept.

    Args:
        images: the pictures.
        cache_dir: local folder for features and converted weights; made if it is not there.
        micro_batch: pictures per pass; it changes the last bits of the features.
        device: where the network runs; so does its class.
        progress: called with the pictures done and their number.
    """
    weights = inception_state(cache_dir)
    about = f"{weights.name} {micro_batch} {torch.get_num_threads()} {images.shape} {images.dtype}"
    about += "" if device.type == "cpu" else f" {device.type}"
    key = hashlib.sha256(about.encode() + np.ascontiguousarray(images).tobytes()).hexdigest()
    stem = f"features-{key[: 2 * DIGEST_LETTERS]}"
    for path in cache_dir.glob(f"{stem}-*.npy"):
        if intact(path):
            progress(len(images), len(images))
            return np.load(path, allow_pickle=False)
        logger.warning("kept features %s are not the bytes their name says; extracting them again", path)
    features = extract_features(
        [nchw(images)],
        weights_path=weights,
        micro_batch=micro_batch,
        num_images=len(images),
        device=device,
        progress=progress,
    )
    buffer = io.BytesIO()
    np.save(buffer, features, allow_pickle=False)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    write_atomically(cache_dir / f"{stem}-{digest[:DIGEST_LETTERS]}.npy", buffer.getvalue())
    return features


def distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of two sets of features, each (N, D)."""
    first, second = (torch.from_numpy(values).double() for values in (features, reference))
    return frechet_distance(first, second)
