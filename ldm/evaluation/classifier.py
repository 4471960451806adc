"""A small classifier that judges whether generated pictures show the class that was asked for.

It is trained on the real training pictures, in seconds on a CPU. Its accuracy on held-out real pictures says
how far its verdict on generated ones can be trusted: report the two together.

Shapes: N pictures, B batch, C channels, H height, W width, K classes.
"""

import logging
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.progress import Progress, no_progress
from ldm.device import CPU, placed

logger = logging.getLogger(__name__)

INPUT_PX = 32  # larger pictures are averaged down to this, which bounds the cost
WIDTHS = (32, 64, 128)
CHANNELS_PER_GROUP = 8
BATCH_IMAGES = 64
PEAK_LEARNING_RATE = 2e-3
WARMUP_SHARE = 0.1
WEIGHT_DECAY = 0.01


def normalised(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) uint8 as float32 in [-1, 1], channels last, with sides of at most 32 px."""
    pixels = images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
    height, width = images.shape[2:]
    if max(height, width) <= INPUT_PX:
        return pixels
    return F.adaptive_avg_pool2d(pixels, (min(height, INPUT_PX), min(width, INPUT_PX)))


def learning_rate(images_seen: int, *, num_images: int) -> float:
    """The step width after so many pictures: a linear rise over a tenth, then half a cosine to zero."""
    share = images_seen / num_images
    if share < WARMUP_SHARE:
        return PEAK_LEARNING_RATE * share / WARMUP_SHARE
    rest = (share - WARMUP_SHARE) / (1 - WARMUP_SHARE)
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))


def shuffled_batches(num_samples: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of samples, 64 at a time (all, if there are fewer), epoch after epoch, without end."""
    while True:
        order = torch.randperm(num_samples, generator=generator)
        yield from (part for part in order.split(BATCH_IMAGES) if len(part) == min(num_samples, BATCH_IMAGES))


class Classifier(nn.Module):
    """Three convolutions with GroupNorm, each level half as large as the one before, and a linear readout."""

    def __init__(self, *, num_classes: int, generator: torch.Generator) -> None:
        """Draw the first weights.

        Args:
            num_classes: K, the number of logits.
            generator: source of the weights; the global one is not touched.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for level, (inputs, outputs) in enumerate(zip((3, *WIDTHS), WIDTHS, strict=False)):
            # Built on "meta", where nothing is drawn from the global random state.
            convolution = nn.Conv2d(
                inputs, outputs, kernel_size=3, stride=2 if level else 1, padding=1, bias=False, device="meta"
            ).to_empty(device="cpu")
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu", generator=generator)
            layers += [
                convolution,
                nn.GroupNorm(outputs // CHANNELS_PER_GROUP, outputs),
                nn.ReLU(inplace=True),
            ]
        self.body = nn.Sequential(*layers)
        self.readout = nn.Linear(WIDTHS[-1], num_classes, device="meta").to_empty(device="cpu")
        nn.init.normal_(self.readout.weight, std=WIDTHS[-1] ** -0.5, generator=generator)
        nn.init.zeros_(self.readout.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of pictures (B, 3, H, W), uint8."""
        hidden = self.body(normalised(images))  # (B, 128, H / 4, W / 4)
        return self.readout(hidden.mean(dim=(2, 3)))  # (B, K)


def check_samples(images: Tensor, labels: Tensor, *, num_classes: int) -> None:
    """Refuse pictures and labels that do not fit each other, with a ValueError."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"pictures must be uint8 of shape (N, 3, H, W), received {images.dtype} {tuple(images.shape)}; "
            f"bring them to 0..255 in RGB, channels before places"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"labels must be int64, one for each of at least one picture, received {labels.dtype} "
            f"{tuple(labels.shape)} for {len(images)} pictures; give both from the same samples"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}, received {low}..{high}; -1 means that a picture has "
            f"no class: leave such pictures out"
        )


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    seed: int,
    num_images: int = 20_000,
    device: torch.device = CPU,
    progress: Progress = no_progress,
) -> Classifier:
    """A classifier of the pictures' classes, trained from nothing; a pure function of its arguments.

    AdamW on the cross-entropy in batches of 64. Two calls with the same arguments and as many torch threads
    give the same weights; the global random state and the number of threads are left alone.

    Args:
        images: (N, 3, H, W), uint8 RGB; sides over 32 px are averaged down to 32.
        labels: (N,), int64 in 0..K-1; -1, "no class", is refused.
        num_classes: K.
        seed: of the first weights and of the order of samples.
        num_images: pictures to train on, counting repeats.
        device: where it is trained; first weights and the order of samples are drawn on the CPU.
        progress: called with the pictures seen and `num_images`.

    Raises:
        ValueError: pictures or labels of another form, or a label out of range.
    """
    check_samples(images, labels, num_classes=num_classes)
    generator = torch.Generator().manual_seed(seed)
    model = Classifier(num_classes=num_classes, generator=generator).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=WEIGHT_DECAY)
    seen = 0
    for positions in shuffled_batches(len(images), generator=generator):
        if seen >= num_images:
            break
        seen += len(positions)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(seen, num_images=num_images)
        loss = F.cross_entropy(model(placed(images[positions], device)), placed(labels[positions], device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        progress(min(seen, num_images), num_images)
    logger.info("trained the class judge on %d pictures of %d classes", seen, num_classes)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of pictures, in [0, 1], that the classifier puts into the class of their label.

    Args:
        model: from `train_classifier`.
        images: (N, 3, H, W), uint8 RGB.
        labels: (N,), int64 in 0..K-1.

    Raises:
        ValueError: pictures or labels of another form, or a label out of range.
    """
    check_samples(images, labels, num_classes=model.readout.out_features)
    device, parts = model.readout.weight.device, images.split(BATCH_IMAGES)
    guesses = torch.cat([model(placed(part, device)).argmax(dim=1).cpu() for part in parts])  # (N,)
    return (guesses == labels).double().mean().item()
