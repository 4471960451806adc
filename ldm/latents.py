"""The latent contract: what cached latents are, checked wherever they are used (paper Sec. 3.1, App. G).

N samples, C channels of the latent, h w its height and width. Latents are stored unscaled; the scale is a
statistic of the corpus, kept in the manifest and applied at read time, exactly once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from datasets.manifest import Manifest
from ldm.config import Recipe
from ldm.errors import ContractError
from ldm.models.first_stage import FirstStage

MOMENT_TOLERANCE = 0.2
"""How far the first batches' deviation may stray from the recorded one, as a share of it."""


class LatentContract(BaseModel):
    """What a latent artifact holds. `scale` maps latents to unit deviation; what is stored is not scaled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_stage: str
    """Content digest of the first stage."""
    weights_sha256: str
    """Digest of its weights."""
    factor: int
    image_size_px: int
    crop: str
    pixel_range: tuple[float, float]
    stored: str
    """`moments` (KL), `pre_quantisation` (VQ) or `pixels` (identity)."""
    shape: tuple[int, int, int]
    """Of a stored latent: channels, height, width."""
    dtype: str
    orientations: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel of the latent, over the training corpus."""
    std: tuple[float, ...]
    """Per channel of the latent, over the training corpus."""
    scale: float
    """1 / standard deviation over all channels and positions of the training corpus."""
    scale_applied: bool


STORED = {"vq": "pre_quantisation", "kl": "moments", "identity": "pixels"}


def expected(recipe: Recipe, first_stage: Manifest) -> dict[str, Any]:
    """The part of the contract that a recipe and its first stage fix."""
    model, size = recipe.first_stage.model, recipe.latent_size
    return {
        "first_stage": first_stage.digest,
        "weights_sha256": weights_sha256(first_stage),
        "factor": model.factor,
        "image_size_px": recipe.dataset.image_size_px,
        "crop": recipe.dataset.crop,
        "pixel_range": (-1.0, 1.0),
        "stored": STORED[model.kind],
        "shape": (model.stored_channels, size, size),
        "dtype": recipe.encoding.dtype,
        "orientations": ("as_is",),
        "scale_applied": False,
    }


def weights_sha256(first_stage: Manifest) -> str:
    """Digest of a first stage's weights, "none" for the identity."""
    return next((f.sha256 for f in first_stage.content.files if f.name == "weights.safetensors"), "none")


def contract_of(latents: Manifest) -> LatentContract:
    """The contract a latent artifact states.

    Raises:
        ContractError: when it states none.
    """
    stated = latents.content.statistics.get("contract")
    if not isinstance(stated, Mapping):
        raise ContractError(
            f"latents must state their contract, but {latents.stage} {latents.short} has none; encode again"
        )
    return LatentContract.model_validate(dict(stated))


def check_contract(latents: Manifest, recipe: Recipe, first_stage: Manifest) -> LatentContract:
    """The contract, if it is the one that this recipe and first stage need.

    Raises:
        ContractError: naming every field that differs, with both sides.
    """
    contract = contract_of(latents)
    differences = [
        f"{name}: latents have {getattr(contract, name)!r}, this run needs {value!r}"
        for name, value in expected(recipe, first_stage).items()
        if getattr(contract, name) != value
    ]
    if differences:
        raise ContractError(
            f"latents {latents.short} do not fit this run: {'; '.join(differences)}; "
            "encode the corpus again with this first stage and recipe"
        )
    return contract


def check_moments(stored: Tensor, first_stage: FirstStage, contract: LatentContract) -> None:
    """Compare a batch of stored latents with the recorded moments.

    Args:
        stored: (N, C', h, w) as read.
        first_stage: turns stored latents into latents.
        contract: what was recorded.

    Raises:
        ContractError: when their deviation is not the recorded one, as when a scale was applied twice.
    """
    std = float(first_stage.latent(stored, None).std())
    recorded = 1.0 / contract.scale
    if abs(std - recorded) > MOMENT_TOLERANCE * recorded:
        raise ContractError(
            f"the latents' standard deviation must be near the recorded {recorded:.4g}, but the first "
            f"{len(stored)} samples have {std:.4g}; a scale may have been applied already: encode again"
        )


def scaled_latent(
    first_stage: FirstStage, stored: Tensor, contract: LatentContract, *, generator: torch.Generator | None
) -> Tensor:
    """What the UNet is trained on: stored latents, drawn from their posterior (KL), times the scale.

    Args:
        first_stage: turns stored latents into latents.
        stored: (N, C', h, w) as read.
        contract: holds the scale.
        generator: source of the posterior's noise; None takes the mean.

    Returns:
        (N, C, h, w) of about unit standard deviation.
    """
    noise = None
    if generator is not None and contract.stored == "moments":
        shape = (len(stored), stored.shape[1] // 2, *stored.shape[2:])
        noise = torch.randn(shape, generator=generator)
    return first_stage.latent(stored, noise) * contract.scale
