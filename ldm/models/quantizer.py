"""Vector quantisation of the latent (paper Sec. 3.1, VQ regularisation; van den Oord et al. 2017).

B batch, C channels of a code, h w height and width of the latent, N codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

MAX_DISTANCES = 2**20
"""Distances held at once: 4 MiB stay in a core's cache, and all of a large picture's would take gigabytes."""


@dataclass(frozen=True)
class Quantized:
    """What quantisation returns."""

    latent: Tensor
    """(B, C, h, w): the nearest codes; its gradient passes straight to the input."""
    loss: Tensor
    """Scalar codebook and commitment loss."""
    indices: Tensor
    """(B, h, w) int64: which code each position took."""


class VectorQuantizer(nn.Module):
    """Nearest code of a learned codebook, with the straight-through gradient.

    The loss is mean((z - sg[e])^2) + beta * mean((sg[z] - e)^2): as in the published models, beta weighs the
    term that moves the codes.

    Args:
        num_codes: size of the codebook |Z|.
        channels: channels of a code.
        beta: weight of the codebook term.
    """

    def __init__(self, num_codes: int, channels: int, *, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(num_codes, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / num_codes, 1.0 / num_codes)

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code at each position: (B, C, h, w) -> (B, h, w) int64."""
        with torch.no_grad():
            codes = self.embedding.weight
            lengths = codes.square().sum(1)  # (N,)
            flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (B*h*w, C)
            found = []
            for part in flat.split(max(1, MAX_DISTANCES // len(codes))):
                distance = 2.0 * part @ codes.t()  # |z|^2 is the same for all codes
                # On a CPU `min` is several times faster than `argmin`.
                found.append(torch.sub(lengths, distance, out=distance).min(1).indices)
            return torch.cat(found).view(z.shape[0], *z.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes at `indices`: (B, h, w) -> (B, C, h, w)."""
        return self.embedding(indices).permute(0, 3, 1, 2)

    def forward(self, z: Tensor) -> Quantized:
        """The nearest codes of latents (B, C, h, w), and the loss; in float32 whatever networks use."""
        if z.dtype == torch.float32:
            return self.quantized(z)
        with torch.autocast(z.device.type, enabled=False):
            return self.quantized(z.float())

    def quantized(self, z: Tensor) -> Quantized:
        """`forward` of float32 latents."""
        indices = self.nearest(z)
        codes = self.lookup(indices)
        loss = (codes.detach() - z).square().mean() + self.beta * (codes - z.detach()).square().mean()
        return Quantized(latent=z + (codes - z).detach(), loss=loss, indices=indices)

    @torch.no_grad()
    def revive(self, dead: Tensor, z: Tensor, generator: torch.Generator) -> None:
        """Move codes that nobody uses onto latents of the batch, where they will be used.

        Args:
            dead: (N,) bool, the codes to move.
            z: (B, C, h, w) latents of the current batch.
            generator: source of the choice of latents.
        """
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        chosen = torch.randint(flat.shape[0], (int(dead.sum()),), generator=generator)
        self.embedding.weight[dead] = flat[chosen]
