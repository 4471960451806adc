"""The first stage: picture to latent and back, VQ- or KL-regularised, f = 1 ... 32 (paper Sec. 3.1, Tab. 8).

B batch, C channels of the latent, H W height and width of the picture in [-1, 1], h = H / f, w = W / f.
The *stored* latent is what latent shards hold: VQ: the latent before quantisation; KL: mean and log-variance
(2C channels); identity: the picture.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.device import home, placed
from ldm.first_stage_config import FirstStageModel
from ldm.models.autoencoder import Decoder, Encoder, ResnetBlock, to_channels_last
from ldm.models.gaussian import sample_posterior, split_moments
from ldm.models.quantizer import Quantized, VectorQuantizer


class FirstStage(Protocol):
    """What the second stage needs of a first stage."""

    def encode(self, x: Tensor) -> Tensor:
        """Stored latent of pictures (B, 3, H, W) in [-1, 1]."""
        ...

    def latent(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """Latent (B, C, h, w) of stored ones; `noise` draws from a KL posterior, None takes its mean."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of unscaled latents (B, C, h, w); VQ quantises first."""
        ...


class VQModel(nn.Module):
    """Autoencoder whose decoder sees the nearest codes of a learned codebook."""

    def __init__(self, config: FirstStageModel) -> None:
        super().__init__()
        if config.num_codes is None:
            raise ValueError("a VQ first stage needs num_codes")
        self.encoder, self.decoder = coders(config, encoder_channels=config.z_channels)
        self.quantize = VectorQuantizer(config.num_codes, config.embed_dim, beta=config.beta)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Latents before quantisation, (B, C, h, w)."""
        return self.quant_conv(self.encoder(x))

    def latent(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """The stored latent itself: nothing is drawn."""
        del noise
        return stored

    def decode(self, z: Tensor) -> Tensor:
        """Pictures of latents, quantised first (paper Sec. 4.1: the quantiser belongs to the decoder)."""
        return self.decoder(self.decoder_input(z))

    def decoder_input(self, z: Tensor) -> Tensor:
        """What the decoder sees of latents: (B, C, h, w) -> (B, z_channels, h, w), quantised first."""
        return self.post_quant_conv(self.quantize.lookup(self.quantize.nearest(z)))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Pictures of latents that are codes already."""
        return self.decoder(self.post_quant_conv(codes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Quantized]:
        """Reconstruction, latents before quantisation, and the quantiser's result."""
        z = self.encode(x)
        quantized = self.quantize(z)
        return self.decode_codes(quantized.latent), z, quantized


class KLModel(nn.Module):
    """Autoencoder whose encoder gives a diagonal Gaussian, held near N(0, I) by a small KL term."""

    def __init__(self, config: FirstStageModel) -> None:
        super().__init__()
        self.encoder, self.decoder = coders(config, encoder_channels=2 * config.z_channels)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Moments (B, 2C, h, w): mean, then log-variance."""
        return self.quant_conv(self.encoder(x))

    def latent(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """A draw of the posterior, or its mean without noise."""
        return split_moments(stored)[0] if noise is None else sample_posterior(stored, noise)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures of latents."""
        return self.decoder(self.decoder_input(z))

    def decoder_input(self, z: Tensor) -> Tensor:
        """What the decoder sees of latents: (B, C, h, w) -> (B, z_channels, h, w)."""
        return self.post_quant_conv(z)

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Reconstruction from a draw of the posterior, and the moments."""
        moments = self.encode(x)
        mean, _ = split_moments(moments)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return self.decode(sample_posterior(moments, noise)), moments


class IdentityModel(nn.Module):
    """f = 1: the latent is the picture (the paper's LDM-1, pixel-space baseline)."""

    def encode(self, x: Tensor) -> Tensor:
        """The picture."""
        return x

    def latent(self, stored: Tensor, noise: Tensor | None) -> Tensor:
        """The picture."""
        del noise
        return stored

    def decode(self, z: Tensor) -> Tensor:
        """The latent."""
        return z


def coders(config: FirstStageModel, *, encoder_channels: int) -> tuple[Encoder, Decoder]:
    """Encoder and decoder of a first stage."""
    encoder = Encoder(
        in_channels=3,
        out_channels=encoder_channels,
        channels=config.channels,
        channel_mult=config.channel_mult,
        num_res_blocks=config.num_res_blocks,
        attention_factors=config.attention_factors,
        mid_attention=config.mid_attention,
        groups=config.norm_groups,
        dropout=config.dropout,
    )
    decoder = Decoder(
        z_channels=config.z_channels,
        out_channels=3,
        channels=config.channels,
        channel_mult=config.channel_mult,
        num_res_blocks=config.num_res_blocks,
        attention_factors=config.attention_factors,
        mid_attention=config.mid_attention,
        groups=config.norm_groups,
        dropout=config.dropout,
    )
    return encoder, decoder


MODELS = {"vq": VQModel, "kl": KLModel}


def build_first_stage(
    config: FirstStageModel, *, checkpointing: bool = False
) -> VQModel | KLModel | IdentityModel:
    """The first stage of a config, channels-last, with PyTorch's default initialisation.

    With `checkpointing` the residual blocks compute their inside again in the backward pass: the same bits,
    less memory, more time.
    """
    if config.kind == "identity":
        return IdentityModel()
    model = MODELS[config.kind](config)
    to_channels_last(model)
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            module.checkpointing = checkpointing
    return model


@torch.no_grad()
def decode_in_micro_batches(first_stage: FirstStage, z: Tensor, *, micro_batch: int) -> Tensor:
    """Decode latents in padded passes of a fixed size, so that no picture depends on how many were asked for.

    Args:
        first_stage: the first stage.
        z: (N, C, h, w) unscaled latents.
        micro_batch: latents per forward pass; the last one is padded with zeros and cut.

    Returns:
        (N, 3, H, W) pictures, clamped to [-1, 1], on the CPU wherever the first stage computes.
    """
    pictures, device = [], home(first_stage, z.device)
    for start in range(0, len(z), micro_batch):
        part = placed(z[start : start + micro_batch], device)
        padded = torch.cat([part, part.new_zeros(micro_batch - len(part), *part.shape[1:])])
        pictures.append(first_stage.decode(padded)[: len(part)].clamp(-1.0, 1.0).cpu())
    return torch.cat(pictures)
