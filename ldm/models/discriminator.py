"""The patch discriminator of the first stage's adversarial loss (PatchGAN, Isola et al. 2017; paper App. G).

B batch, H W height and width of the picture.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """One logit per overlapping patch: (B, 3, H, W) -> (B, 1, ~H/2^n, ~W/2^n), n = num_layers.

    Weights start at N(0, 0.02), BatchNorm scales at N(1, 0.02), as published.

    Args:
        channels: width after the first convolution (64 in the paper).
        num_layers: stride-2 convolutions (3 in most of the paper's first stages).
    """

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for n in range(1, num_layers + 1):
            wider = channels * min(2**n, 8)
            stride = 2 if n < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of patches: high for real ones."""
        return self.main(x)


def hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """The discriminator's hinge loss: half of mean(relu(1 - real)) + mean(relu(1 + fake))."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())
