"""Which codes of a VQ codebook are used, and what becomes of those that are not.

N codes, B batch, C channels of a code, h w height and width of the latent.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.models.quantizer import VectorQuantizer

RECENT_STEPS = 20


class CodeUse:
    """When each code was last used, and how many were revived since that was last logged.

    Differs: the published models leave dead codes dead; here a code unused for `revive_after_images` moves
    onto a latent of the batch.

    Args:
        num_codes: N, 0 for a first stage without codebook.
        batch_size: pictures per step.
        revive_after_images: images after which an unused code is moved; 0 never moves one.
        device: where the codebook is.
    """

    def __init__(
        self,
        num_codes: int,
        *,
        batch_size: int,
        revive_after_images: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch_size, self.revive_after_images = batch_size, revive_after_images
        self.used_at = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.num_revived = torch.zeros((), dtype=torch.int64, device=device)

    def track(
        self,
        quantizer: VectorQuantizer,
        indices: Tensor,
        latents: Tensor,
        *,
        images: int,
        draws: torch.Generator,
    ) -> dict[str, Tensor]:
        """Remember which codes a batch used, and move dead ones onto its latents.

        Args:
            quantizer: the codebook, changed where codes are dead.
            indices: (B, h, w) int64, the codes of the batch.
            latents: (B, C, h, w) before quantisation.
            images: images seen after this batch.
            draws: source of the choice of latents.

        Returns:
            `code_usage`, the share of codes used lately, and `code_perplexity` of the batch: as many codes,
            used evenly, would be as unpredictable.
        """
        used = torch.bincount(indices.flatten(), minlength=len(self.used_at))
        self.used_at[used > 0] = images
        share = used.double() / used.sum()
        perplexity = torch.exp(-(share * share.clamp(min=1e-12).log()).sum())
        if self.revive_after_images:
            dead = images - self.used_at > self.revive_after_images
            if bool(dead.any()):
                quantizer.revive(dead, latents, draws)
                self.used_at[dead] = images
                self.num_revived += dead.sum()
        recent = images - self.used_at < max(self.revive_after_images, RECENT_STEPS * self.batch_size)
        return {"code_usage": recent.double().mean(), "code_perplexity": perplexity}

    def take_revived(self) -> Tensor:
        """How many codes were revived since this was last asked."""
        count = self.num_revived.clone()
        self.num_revived.zero_()
        return count

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on."""
        return {"used_at": self.used_at, "num_revived": self.num_revived}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        for name, value in self.tensors().items():
            value.copy_(tensors[name])
