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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.model import Autoencoder


def load(folder: str | Path) -> "Autoencoder":
    """The model in a folder that `ldm import` wrote, ready for use on the CPU.

        import ldm

        autoencoder = ldm.load("models/kl-f8")
        z = autoencoder.encode(x)               # x: (B, 3, H, W) in [-1, 1]; z: (B, 4, H / 8, W / 8)
        pictures = autoencoder.decode(z)        # (B, 3, H, W), nominally in [-1, 1]

    Raises:
        CheckpointError: the folder is missing, damaged, or no such folder.
    """
    from ldm.model_folder import load_model_folder

    return load_model_folder(Path(folder))
