"""How much an exported model differs from its source when it is read back: a report of numbers.

B batch, C channels of the latent, h w its height and width, H W those of pictures in [-1, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.conditions import Condition
from ldm.latent_diffusion import LatentDiffusion
from ldm.model import Autoencoder

SIDE_PX = 64
"""Least side of the picture that parity is measured on."""
BATCH, TOKENS, STEPS = 2, 7, 4
SEED = 0


def parity(model: Autoencoder | LatentDiffusion, exported: Autoencoder | LatentDiffusion) -> dict[str, Any]:
    """Largest differences between two models that ought to be one, on fixed random inputs."""
    outputs = [outputs_of(each) for each in (model, exported)]
    return {
        "inputs": f"random, seed {SEED}",
        "largest_difference": {
            name: float((outputs[0][name] - outputs[1][name]).abs().amax()) for name in outputs[0]
        },
        "largest_value": {name: float(tensor.abs().amax()) for name, tensor in outputs[0].items()},
    }


def outputs_of(model: Autoencoder | LatentDiffusion) -> dict[str, Tensor]:
    """What is compared of a model."""
    if isinstance(model, LatentDiffusion):
        return noise_and_sample(model) | latent_and_reconstruction(model.autoencoder)
    return latent_and_reconstruction(model)


def latent_and_reconstruction(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """What an autoencoder makes of a random picture (1, 3, H, W): both its outputs."""
    side = max(SIDE_PX, autoencoder.config.factor)
    x = torch.rand(1, 3, side, side, generator=draws()) * 2.0 - 1.0
    latent = autoencoder.encode(x)
    return {"latent": latent, "reconstruction": autoencoder.decode(latent)}


def noise_and_sample(model: LatentDiffusion) -> dict[str, Tensor]:
    """What a diffusion model makes of random latents (B, C, h, w): its noise, and a few steps of DDIM."""
    config, condition = model.config, random_condition(model)
    generator = draws()
    x = torch.randn(
        BATCH, config.latent_channels, config.latent_size, config.latent_size, generator=generator
    )
    t = torch.randint(config.diffusion.num_timesteps, (BATCH,), generator=generator)
    return {
        "eps": model.predict(x, t, condition),
        "sample": model.sample_latents(condition, steps=STEPS, start=x),
    }


def random_condition(model: LatentDiffusion) -> Condition:
    """Random conditions (B, ...) as the UNet gets them, whatever their kind."""
    unet, size, generator = model.config.unet, model.config.latent_size, draws()
    beside = unet.in_channels - model.config.latent_channels
    return Condition(
        context=None
        if unet.context_dim is None
        else torch.randn(BATCH, TOKENS, unet.context_dim, generator=generator),
        concat=torch.randn(BATCH, beside, size, size, generator=generator) if beside else None,
        label=None
        if unet.num_classes is None
        else torch.randint(unet.num_classes, (BATCH,), generator=generator),
    )


def draws() -> torch.Generator:
    """The same random numbers at every call."""
    return torch.Generator().manual_seed(SEED)


def said(report: Mapping[str, Any]) -> Sequence[str]:
    """A parity report for people, a line per output."""
    return [
        f"read back, largest difference of the {name}: {difference:g} "
        f"(values up to {report['largest_value'][name]:.3g})"
        for name, difference in report["largest_difference"].items()
    ]
