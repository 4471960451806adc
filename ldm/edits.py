"""What given pictures do to sampling: change one, paint a part of it, or draw towards one.

B batch, which may be 1 for one picture that all samples share; C channels of the latent, h w its height and
width, H W those of the picture.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditions import check_mask
from ldm.diffusion.editing import paste
from ldm.errors import ContractError
from ldm.range import from_uint8


@dataclass(frozen=True)
class Edit:
    """Pictures that samples start from, keep, or are drawn towards; all in [-1, 1].

    `image` with `strength` is SDEdit (`editing.start_from`), with `mask` inpainting by known latents
    (`editing.keep_known`), with both an inpainting that remembers what it paints over. `target` is image
    guiding (paper App. C; `guidance.guide_by_target`) and goes together with either.
    """

    image: Tensor | None = None
    """(B, 3, H, W): the picture to change."""
    strength: float | None = None
    """Share of the time steps to go, above 0, at most 1; None starts from noise alone."""
    mask: Tensor | None = None
    """(B, 1, H, W): 1 where the image is to be painted, 0 where it is kept."""
    target: Tensor | None = None
    """(B, 3, H', W'): the picture to be near to, at this size."""
    target_scale: float = 1.0
    """How hard the target pulls; 1 is the formula's."""

    def __post_init__(self) -> None:
        changes = self.strength is not None or self.mask is not None
        if (self.image is None) == changes:
            raise ContractError(
                f"an image is changed by a strength, a mask or both, and they need an image, got "
                f"image {'given' if self.image is not None else 'none'}, strength {self.strength}, "
                f"mask {'given' if self.mask is not None else 'none'}; give them together"
            )
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ContractError(
                f"strength ({self.strength}) must be above 0 and at most 1; 0.5 goes half of the way"
            )
        if self.mask is not None and self.image is not None:
            check_mask(self.mask, ("B", 1, *self.image.shape[2:]))

    def to(self, device: torch.device) -> "Edit":
        """This edit, its pictures on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The pictures that are there, by name."""
        named = {name: getattr(self, name) for name in ("image", "mask", "target")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def check_fits(self, count: int, size: tuple[int, int]) -> None:
        """Refuse pictures neither one for all samples nor one for each, and an image of another size.

        Args:
            count: samples.
            size: height and width of their pictures.

        Raises:
            ContractError: another number of pictures, or another size.
        """
        if self.image is not None and self.image.shape[2:] != size:
            raise ContractError(
                f"an image to edit must be as large as the samples, {size[0]}x{size[1]}, got "
                f"{'x'.join(map(str, self.image.shape[2:]))}; scale it"
            )
        for name, tensor in self.tensors().items():
            if len(tensor) not in (1, count):
                raise ContractError(
                    f"an edit's {name} must be one for all samples or one for each of {count}, got "
                    f"{len(tensor)}"
                )

    def pasted(self, pictures: Tensor) -> Tensor:
        """Samples (B, 3, H, W), the image put back exactly where its mask keeps it, as published."""
        if self.image is None or self.mask is None:
            return pictures
        return paste(pictures, self.image.to(pictures), 1.0 - self.mask.to(pictures))


@dataclass(frozen=True)
class LatentEdit:
    """An edit as samplers see it."""

    x_0: Tensor | None = None
    """(B, C, h, w): scaled latents of the image."""
    known: Tensor | None = None
    """(B, 1, h, w): 1 where latents are kept."""
    target: Tensor | None = None
    """As in `Edit`."""
    target_scale: float = 1.0
    strength: float | None = None

    def rows(self, chosen: Tensor) -> "LatentEdit":
        """What belongs to the samples at these places; what all of them share is repeated."""
        there = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value[chosen % len(value)] for name, value in there.items()})


def latent_edit(edit: Edit, encode: Callable[[Tensor], Tensor], factor: int) -> LatentEdit:
    """An edit in the latent space.

    Args:
        edit: in pictures.
        encode: (1, 3, H, W) -> scaled latents; called for each picture alone, whose latents therefore do not
            depend on the others.
        factor: f; a latent position is kept when no pixel of it is to be painted.
    """
    x_0 = None if edit.image is None else torch.cat([encode(one) for one in edit.image.split(1)])
    known = None
    if edit.mask is not None and x_0 is not None:
        known = 1.0 - F.max_pool2d(edit.mask.to(x_0), factor)
    return LatentEdit(x_0, known, edit.target, edit.target_scale, edit.strength)


def mask_of(pictures: np.ndarray) -> Tensor:
    """Masks (N, 1, H, W) in {0, 1} of pictures (N, H, W, 3) uint8: 1 where they are nearer to white."""
    return (from_uint8(pictures).mean(1, keepdim=True) > 0).float()
