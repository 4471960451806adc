"""Latent diffusion: batches in; weights, latents, samples and scores out.

The package knows no orchestrator and no download. Only `load` is called from here; its parts are imported by
name:

    ldm.models      networks: the first stage, the U-Net, the perceptual distance
    ldm.bridge      checkpoints of other programs, in and out
    ldm.evaluation  scores of finished models
    ldm.weights     pretrained weights that come inside installed packages
    ldm.errors      the error tree
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion
    from ldm.model import Autoencoder


def load(
    folder: str | Path, *, weights: Literal["ema", "raw"] | None = None
) -> "Autoencoder | LatentDiffusion":
    """The model in a folder that `ldm import` wrote, ready for use on the CPU.

        import ldm

        autoencoder = ldm.load("models/kl-f8")
        z = autoencoder.encode(x)               # x: (B, 3, H, W) in [-1, 1]; z: (B, 4, H / 8, W / 8)
        pictures = autoencoder.decode(z)        # (B, 3, H, W), nominally in [-1, 1]

        model = ldm.load("models/cin256-v2")
        cats = model.condition(class_label=torch.tensor([281, 282]))    # fields by kind: ldm/conditions.py
        eps = model.predict(x_t, t, cats)                               # x_t: (2, 3, 64, 64); t: (2,)
        pictures = model.sample(cats, steps=50, guidance=3.0, seed=0)   # (2, 3, 256, 256) in [-1, 1]

    A latent diffusion model is a `ldm.latent_diffusion.LatentDiffusion`, the object `ldm sample` uses too.

    Args:
        folder: the model folder.
        weights: of a latent diffusion model, the moving average or those of the last training step; by
            default the average, where there is one.

    Raises:
        CheckpointError: the folder is missing, damaged, no such folder, or has not the weights asked for.
    """
    from ldm.model_folder import load_model_folder

    return load_model_folder(Path(folder), weights=weights)
