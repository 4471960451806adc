"""The latent contract: what cached latents are, checked wherever they are used (paper Sec. 3.1, App. G).

N samples, C channels of the latent, h w its height and width. Latents are stored unscaled; the scale is a
statistic of the corpus, kept in the manifest and applied at read time, exactly once.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from datasets.manifest import Manifest
from ldm.config import Recipe
from ldm.errors import ContractError
from ldm.first_stage_config import FirstStageModel
from ldm.models.first_stage import FirstStage
from ldm.models.gaussian import split_moments

MOMENT_TOLERANCE = 0.2
"""How far the first batches' deviation may stray from the recorded one, as a share of it."""

SCALE_TOLERANCE = 1e-6
"""How far the scale may be from that of the recorded moments, which is a matter of rounding."""


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
    """Of the training pictures, each a sample of its own; held-out pictures are stored as they are."""
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
        "orientations": recipe.encoding.orientations,
        "scale_applied": False,
    }


def check_first_stage(recipe: Recipe, first_stage: Manifest) -> None:
    """Refuse to encode with a first stage of another network than the recipe's.

    Raises:
        ContractError: naming every setting that differs, with both sides.
    """
    has = FirstStageModel.model_validate(first_stage.content.what["model"])
    differences = [
        f"{name}: it has {getattr(has, name)!r}, this run needs {value!r}"
        for name, value in recipe.first_stage.model
        if getattr(has, name) != value
    ]
    if differences:
        raise ContractError(
            f"first stage {first_stage.short} does not fit this run: {'; '.join(differences)}; "
            "train the recipe's own, or name its recipe"
        )


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


def scale_of(mean: np.ndarray, square: np.ndarray) -> float:
    """1 / standard deviation over all channels, of mean and mean square of each."""
    return float(1.0 / np.sqrt(square.mean() - mean.mean() ** 2))


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
    mean, std = np.asarray(contract.mean), np.asarray(contract.std)
    scale = scale_of(mean, std**2 + mean**2)
    if not math.isclose(contract.scale, scale, rel_tol=SCALE_TOLERANCE):
        differences.append(
            f"scale: latents have {contract.scale:.6g}, this run needs {scale:.6g}, by their mean and std"
        )
    if differences:
        raise ContractError(
            f"latents {latents.short} do not fit this run: {'; '.join(differences)}; "
            "encode the corpus again with this first stage and recipe"
        )
    return contract


def moments(first_stage: FirstStage, stored: Tensor, kind: str) -> dict[str, Any]:
    """Count, sum and sum of squares per channel of what the UNet will see, in float64.

    For KL the squares are those expected over draws of the posterior: mean^2 + variance.

    Args:
        first_stage: turns stored latents into latents.
        stored: (N, C', h, w), float32.
        kind: what is stored, as the contract names it.
    """
    z = first_stage.latent(stored, None).double()
    squares = z.square()
    if kind == STORED["kl"]:
        squares = squares + split_moments(stored)[1].double().exp()
    over = (0, 2, 3)
    return {
        "count": z.numel() // z.shape[1],
        "sum": z.sum(over).tolist(),
        "squares": squares.sum(over).tolist(),
    }


def pooled(parts: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and mean square per channel over all parts, each as `moments` gives it."""
    count = sum(part["count"] for part in parts)
    mean, square = (np.sum([part[name] for part in parts], axis=0) / count for name in ("sum", "squares"))
    return mean, square


def check_moments(stored: Tensor, first_stage: FirstStage, contract: LatentContract) -> None:
    """Compare a batch of stored latents with the recorded moments.

    Args:
        stored: (N, C', h, w) as read.
        first_stage: turns stored latents into latents.
        contract: what was recorded.

    Raises:
        ContractError: when their deviation is not the recorded one, as when a scale was applied before they
            were stored, or the recorded one is none that was ever theirs.
    """
    std = 1.0 / scale_of(*pooled([moments(first_stage, stored, contract.stored)]))
    recorded = 1.0 / contract.scale
    if not abs(std - recorded) <= MOMENT_TOLERANCE * recorded:
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
