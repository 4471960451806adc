"""Fidelity of generated pictures: FID, KID, precision and recall on the features of the FID Inception.

The only module that knows torch-fidelity, which does the mathematics; here are the weights, the batching
that makes features reproducible, and the order of arguments. Results are the same bit for bit as long as the
device, the micro-batch and the numbers of threads (torch's and, for the scores, BLAS's) are the same.

Shapes: N pictures, B batch, H height, W width, D = 2048 features.
"""

import io
import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from datasets.progress import Progress, no_progress
from ldm.device import CPU, placed

logger = logging.getLogger(__name__)

NUM_FEATURES = 2048
NUM_LOGITS = 1008

# KID: subsets drawn with this seed, Binkowski et al. 2018; torch-fidelity's own default is larger (1000).
KID_NUM_SUBSETS = 100
KID_SUBSET_SIZE = 100
KID_SEED = 2020

# Precision and recall: the neighbour whose distance is a picture's radius, Kynkaanniemi et al. 2019.
NUM_NEIGHBOURS = 3

# From here on FID is what papers report; the bias falls with 1/N and is small against differences of models.
NUM_FOR_FULL_FID = 10_000


def load_extractor(weights_path: Path) -> FeatureExtractorInceptionV3:
    """torch-fidelity's InceptionV3, giving the 2048 pooled features, with weights from `ldm.weights`.

    Its constructor takes weights only as something for `torch.load`; it gets a buffer that was written here a
    line before, so nothing from outside is unpickled. The packaged network ends at the pool: the layer behind
    it is filled with zeros and never run. Random numbers that its layers draw at first leave no trace.

    Args:
        weights_path: the safetensors file of `ldm.weights.inception_state`.
    """
    state = load_file(weights_path)
    state |= {"fc.weight": torch.zeros(NUM_LOGITS, NUM_FEATURES), "fc.bias": torch.zeros(NUM_LOGITS)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    with torch.random.fork_rng(devices=[]):
        extractor = FeatureExtractorInceptionV3(
            "inception-v3-compat", [str(NUM_FEATURES)], feature_extractor_weights_path=buffer
        )
    return extractor.to(memory_format=torch.channels_last)  # a fifth faster on a CPU


def check_images(images: Tensor) -> Tensor:
    """The pictures given, if they are uint8 (B, 3, H, W); else a ValueError."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"pictures must be uint8 of shape (B, 3, H, W), received {images.dtype} {tuple(images.shape)}; "
            f"bring them to 0..255 in RGB, channels before places"
        )
    return images


def micro_batches(images: Iterable[Tensor], size: int) -> Iterator[tuple[Tensor, int]]:
    """Batches of any sizes cut anew into batches of one size; each with its number of true pictures.

    The last batch is filled up with black pictures, so that the network always sees one shape.

    Args:
        images: pictures (B, 3, H, W), uint8, all of one height and width.
        size: pictures per batch given back.

    Raises:
        ValueError: a batch is not of that form, or differs from the first in height or width.
    """
    if size < 1:
        raise ValueError(f"micro_batch must be at least 1, received {size}; 16 is a good value on a CPU")
    kept: list[Tensor] = []
    for batch in images:
        kept.append(check_images(batch))
        if kept[0].shape[2:] != batch.shape[2:]:
            raise ValueError(
                f"all pictures must have one size, received {tuple(kept[0].shape[2:])} and "
                f"{tuple(batch.shape[2:])}; extract the features of each size in a call of its own"
            )
        if sum(map(len, kept)) >= size:
            *full, rest = torch.cat(kept).split(size)
            yield from ((part, size) for part in full)
            kept = [rest]
    if kept and (left := torch.cat(kept)).shape[0]:
        yield F.pad(left, (0, 0, 0, 0, 0, 0, 0, size - len(left))), len(left)


@torch.inference_mode()
def extract_features(
    images: Iterable[Tensor],
    *,
    weights_path: Path,
    micro_batch: int = 16,
    num_images: int | None = None,
    device: torch.device = CPU,
    progress: Progress = no_progress,
) -> np.ndarray:
    """Pooled Inception features of pictures, (N, 2048) float32, in the order given.

    Pictures of any size are brought to 299 px by torch-fidelity's copy of TensorFlow's bilinear resize, on
    which published FIDs rest. Every pass has `micro_batch` pictures, so a picture's features do not depend on
    how the pictures came in batches, nor on the other pictures.

    Args:
        images: batches (B, 3, H, W), uint8 RGB, all of one height and width.
        weights_path: the safetensors file of `ldm.weights.inception_state`.
        micro_batch: pictures per pass; it changes the last bits of the features.
        num_images: how many pictures are to come, if that is known; a different number is an error.
        device: where the network runs.
        progress: called with the pictures done and `num_images` (the pictures done, if that is not known).

    Raises:
        ValueError: pictures of another form, of several sizes, or not `num_images` of them.
    """
    extractor = load_extractor(weights_path).to(device)
    features: list[np.ndarray] = []
    done = 0
    for batch, count in micro_batches(images, micro_batch):
        (pooled,) = extractor(placed(batch, device))  # (micro_batch, D)
        features.append(pooled[:count].cpu().numpy())
        done += count
        progress(done, done if num_images is None else num_images)
    if num_images is not None and done != num_images:
        raise ValueError(
            f"num_images ({num_images}) pictures were announced, received {done}; give all of them"
        )
    return np.concatenate(features) if features else np.zeros((0, NUM_FEATURES), dtype=np.float32)


def check_features(features: np.ndarray, *, name: str) -> Tensor:
    """The features as a float64 tensor, if scores can be computed from them; else a ValueError."""
    if features.ndim != 2 or len(features) <= NUM_NEIGHBOURS:
        raise ValueError(
            f"{name} must be (N, D) with N > {NUM_NEIGHBOURS} (each picture has that many neighbours), "
            f"received {features.shape}; score more pictures"
        )
    if not np.isfinite(features).all():
        raise ValueError(
            f"{name} must be finite, received NaN or infinity; look at the pictures they come from"
        )
    return torch.from_numpy(features.astype(np.float64))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (N, D), float64.

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)), Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update
    Rule", equation 6.
    """
    metric = fid_statistics_to_metric(
        fid_features_to_statistics(features), fid_features_to_statistics(reference), verbose=False
    )
    return metric[KEY_METRIC_FID]


def scores(features: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """`fid`, `kid`, `kid_std`, `precision` and `recall` of generated pictures against real ones.

    fid        Heusel et al. 2017, equation 6; see `bias_warning` for few pictures.
    kid        Binkowski et al. 2018, "Demystifying MMD GANs": unbiased squared MMD with the kernel
               (x.y / D + 1)^3; mean over 100 subsets of 100 pictures (of all, if there are fewer), and
               kid_std the deviation between them. It may be slightly negative.
    precision  share of generated pictures inside the manifold of the real ones;
    recall     share of real pictures inside the manifold of the generated ones: Kynkaanniemi et al. 2019,
               "Improved Precision and Recall Metric for Assessing Generative Models", with k = 3.
               Differs: on Inception features, as in Dhariwal and Nichol 2021, where the paper has VGG16.

    Args:
        features: of generated pictures, (N, D).
        reference: of real pictures, (M, D).

    Raises:
        ValueError: fewer than four pictures on a side, widths that differ, or a number that is not finite.
    """
    generated = check_features(features, name="features")
    real = check_features(reference, name="reference")
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"features and reference must come from one network, received widths {generated.shape[1]} and "
            f"{real.shape[1]}; extract both with extract_features"
        )
    kid = kid_features_to_metric(
        generated,
        real,
        kid_subsets=KID_NUM_SUBSETS,
        kid_subset_size=min(KID_SUBSET_SIZE, len(generated), len(real)),
        rng_seed=KID_SEED,
        verbose=False,
    )
    # torch-fidelity takes the generated pictures first here; the other order swaps the two results.
    prc = prc_features_to_metric(generated, real, prc_neighborhood=NUM_NEIGHBOURS, verbose=False)
    found = {
        "fid": frechet_distance(generated, real),
        "kid": kid[KEY_METRIC_KID_MEAN],
        "kid_std": kid[KEY_METRIC_KID_STD],
        "precision": prc[KEY_METRIC_PRECISION],
        "recall": prc[KEY_METRIC_RECALL],
    }
    assert all(math.isfinite(value) for value in found.values()), found
    logger.info("scores of %d against %d pictures: %s", len(generated), len(real), found)
    return found


def bias_warning(num_images: int) -> str | None:
    """What to say beside a FID that was computed from so few pictures, or None when there are enough.

    FID of a finite sample is biased upward, by an amount that falls with 1/N and differs between models:
    Chong and Forsyth 2020, "Effectively Unbiased FID and Inception Score and Where to Find Them".

    Args:
        num_images: the smaller of the numbers of generated and of real pictures.
    """
    if num_images <= NUM_FEATURES:
        return (
            f"FID from n={num_images} pictures is biased upward, strongly: up to n={NUM_FEATURES} the "
            f"covariance of {NUM_FEATURES} features is rank-deficient; "
            f"compare it only with numbers from equal n"
        )
    if num_images < NUM_FOR_FULL_FID:
        return (
            f"FID from n={num_images} pictures is biased upward (less than {NUM_FOR_FULL_FID}); "
            f"compare it only with numbers from equal n"
        )
    return None
