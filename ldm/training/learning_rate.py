"""The learning rate of each step, as the published runs have it."""

import math

from ldm.training_config import Training


def learning_rate(training: Training, step: int) -> float:
    """Learning rate of the step-th step: linear warm-up, then constant or a cosine down to its floor.

    The published schedules are `constant` with `warmup_start` (LambdaLinear: lsun_churches) and
    `warmup_cosine` (LambdaWarmUpCosine: inpainting_big), each with multipliers as shares of their largest.
    """
    images, floor = step * training.batch_size, training.lr_floor
    warmup = warmup_share(training, images)
    if training.lr_schedule == "constant":
        return training.lr * warmup
    if training.lr_schedule == "cosine":
        fall = 0.5 * (1.0 + math.cos(math.pi * images / training.num_images))
        return training.lr * warmup * (floor + (1.0 - floor) * fall)
    since, end = images - training.warmup_images, training.decay_images or training.num_images
    done = min(max(since / (end - training.warmup_images), 0.0), 1.0)
    return training.lr * warmup * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done)))


def warmup_share(training: Training, images: int) -> float:
    """Share of the learning rate that warm-up allows after so many images, 1 when it is over."""
    if images >= training.warmup_images:
        return 1.0
    if training.warmup_start is not None:
        return training.warmup_start + (1.0 - training.warmup_start) * images / training.warmup_images
    return min(1.0, (images + training.batch_size) / training.warmup_images)
