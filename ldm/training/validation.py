"""Held-out scores of a first stage in training, and what its history of scores says.

Best score and patience are read off the history, which checkpoints hold, so a resumed run decides as an
undisturbed one.

N pictures, H W height and width; pictures are uint8 (N, H, W, 3).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.stream import SampleReader
from ldm.device import home
from ldm.errors import TrainingError
from ldm.evaluation.reconstruction import psnr, ssim
from ldm.evaluation.sets import nchw, reconstruct
from ldm.first_stage_config import MIN_RFID_IMAGES, FirstStageLoss, Validation
from ldm.models.first_stage import FirstStage
from ldm.models.lpips import LPIPS
from ldm.range import from_uint8
from ldm.training.loop import History
from ldm.training_config import Training

PSNR = "validation/psnr_db"
SSIM = "validation/ssim"
LPIPS_DISTANCE = "validation/lpips"
RFID = "validation/rfid_same_pictures"
EXACT_DB = 100.0
"""What a picture counts that comes back exactly, whose PSNR is infinite."""


class HeldOut:
    """Fixed held-out pictures, and how near a first stage comes to them.

    They are the last ones of the split: the stage evaluate takes the first ones.

    Args:
        config: how many, and whether with rFID.
        reader: the held-out split.
        micro_batch: pictures per pass, the last one padded; part of the bits.
        lpips: the perceptual metric.
        inception: where the weights of the FID Inception are; asked for only with rFID.

    Raises:
        TrainingError: rFID of too few pictures.
    """

    def __init__(
        self,
        config: Validation,
        reader: SampleReader,
        *,
        micro_batch: int,
        lpips: LPIPS,
        inception: Callable[[], Path] | None,
    ) -> None:
        count = min(config.num_images, len(reader))
        if config.rfid and count < MIN_RFID_IMAGES:
            raise TrainingError(
                f"validation.rfid needs at least {MIN_RFID_IMAGES} held-out pictures, the data set has "
                f"{count}; hold out more, or set validation.rfid=false"
            )
        self.images: np.ndarray = reader.fetch(range(len(reader) - count, len(reader)))["image"]
        self.micro_batch, self.lpips = micro_batch, lpips
        if config.rfid and inception is None:
            raise ValueError("validation with rFID needs the weights of the Inception; give `inception`")
        self.inception = inception if config.rfid else None
        self.real_features: Tensor | None = None

    def scores(self, first_stage: FirstStage) -> dict[str, float]:
        """Mean PSNR, SSIM and LPIPS of reconstructions, and their rFID where asked."""
        rebuilt = reconstruct(first_stage, self.images, micro_batch=self.micro_batch)
        pair = nchw(rebuilt), nchw(self.images)
        found = {
            PSNR: psnr(*pair).clamp(max=EXACT_DB).mean().item(),
            SSIM: ssim(*pair).mean().item(),
            LPIPS_DISTANCE: self.perceptual(rebuilt),
        }
        return found | ({} if self.inception is None else {RFID: self.rfid(pair, self.inception())})

    @torch.no_grad()
    def perceptual(self, rebuilt: np.ndarray) -> float:
        """Mean LPIPS of pictures and their originals, both as 8-bit pictures."""
        size, distances = self.micro_batch, []
        for start in range(0, len(rebuilt), size):
            parts = (images[start : start + size] for images in (rebuilt, self.images))
            distances.append(self.lpips(*(from_uint8(part).to(home(self.lpips)) for part in parts)))
        return torch.cat(distances).double().mean().item()

    def rfid(self, pair: tuple[Tensor, Tensor], weights: Path) -> float:
        """Frechet distance of reconstructions to the same pictures, as published tables have it."""
        from ldm.evaluation import fidelity  # takes seconds to import

        def features(images: Tensor) -> Tensor:
            found = fidelity.extract_features([images], weights_path=weights, num_images=len(images))
            return torch.from_numpy(found).double()

        if self.real_features is None:
            self.real_features = features(pair[1])
        return fidelity.frechet_distance(features(pair[0]), self.real_features)


def judged_after(loss: FirstStageLoss, training: Training) -> int:
    """Images seen when the last loss term has joined in: scores from before it are of another objective.

    PSNR falls when LPIPS or the discriminator joins in; the best score ever would be that of the blurry
    pictures before it.
    """
    starts = [
        start
        for weight, start in (
            (loss.perceptual_weight, loss.perceptual_start_images),
            (loss.adversarial_weight, loss.adversarial_start_images),
        )
        if weight and start < training.num_steps * training.batch_size
    ]
    return max(starts, default=0)


def judged(history: History, config: Validation, *, after: int) -> list[tuple[int, float]]:
    """The scores that decide, higher is better: PSNR, or rFID with its sign turned; (images seen, score)."""
    if config.rfid:
        return [(images, -value) for images, value in history.get(RFID, []) if images > after]
    return [(images, value) for images, value in history.get(PSNR, []) if images > after]


def best(points: list[tuple[int, float]]) -> tuple[int, float] | None:
    """The first of the highest scores, None without any."""
    return max(points, key=lambda point: point[1], default=None)


def num_without_better(points: list[tuple[int, float]]) -> int:
    """Scores since the best one."""
    found = best(points)
    return 0 if found is None else len(points) - 1 - points.index(found)
