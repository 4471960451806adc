"""What a first stage is: network, objective, training and validation, with their limits."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ldm.network_config import Config
from ldm.training_config import Training

MIN_RFID_IMAGES = 4


class FirstStageModel(Config):
    """Network of a first stage (paper Tab. 8, App. G)."""

    kind: Literal["vq", "kl", "identity"]
    """Regularisation of the latent; `identity` is the pixel baseline, f = 1."""
    channels: int = Field(default=128, ge=1)
    """Width of the first level."""
    channel_mult: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    """Width of each level as a multiple of `channels`; each level but the first halves the resolution."""
    num_res_blocks: int = Field(default=2, ge=1)
    """Residual blocks per level (the decoder has one more)."""
    attention_factors: tuple[int, ...] = ()
    """Downsampling factors at which every block is followed by attention."""
    mid_attention: bool = True
    """Attention at the lowest resolution."""
    z_channels: int = Field(default=3, ge=1)
    """Channels between encoder and `quant_conv`."""
    embed_dim: int = Field(default=3, ge=1)
    """Channels of the latent."""
    num_codes: int | None = Field(default=None, ge=2)
    """Size of the codebook |Z|; VQ only."""
    beta: float = Field(default=0.25, ge=0)
    """Weight of the codebook term against the commitment term; VQ only."""
    norm_groups: int = Field(default=32, ge=1)
    """Groups of every GroupNorm."""
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def factor(self) -> int:
        """f: how many picture pixels make one latent position along each side."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def stored_channels(self) -> int:
        """Channels a latent shard holds: twice the latent's for KL (mean and log-variance)."""
        return 2 * self.embed_dim if self.kind == "kl" else self.embed_dim

    @model_validator(mode="after")
    def check(self) -> Self:
        """Reject what no network can be built from."""
        if self.kind == "vq" and self.num_codes is None:
            raise ValueError(
                "a VQ first stage needs num_codes, the size of its codebook; set model.num_codes"
            )
        if self.kind == "identity" and (self.factor != 1 or self.embed_dim != 3):
            raise ValueError(
                "an identity first stage has f = 1 and 3 channels; leave channel_mult and embed_dim out"
            )
        for mult in self.channel_mult if self.kind != "identity" else ():
            if self.channels * mult % self.norm_groups:
                raise ValueError(
                    f"channels * channel_mult ({self.channels} * {mult}) must be divisible by norm_groups "
                    f"({self.norm_groups}); choose widths that are multiples of it"
                )
        return self


class FirstStageLoss(Config):
    """Objective of a first stage (paper App. G)."""

    perceptual_weight: float = Field(default=1.0, ge=0)
    """Weight of LPIPS, added to every pixel's L1 distance."""
    perceptual_start_images: int = Field(default=0, ge=0)
    """Images seen before LPIPS joins in."""
    adversarial_weight: float = Field(default=0.75, ge=0)
    """Factor on the adaptive weight of the generator's adversarial term."""
    adversarial_start_images: int = Field(default=0, ge=0)
    """Images seen before the discriminator joins in."""
    kl_weight: float = Field(default=1e-6, ge=0)
    """Weight of the KL term, which like the reconstruction term is summed over a picture; KL only."""
    codebook_weight: float = Field(default=1.0, ge=0)
    """Weight of the codebook and commitment terms; VQ only."""
    discriminator_channels: int = Field(default=64, ge=1)
    discriminator_layers: int = Field(default=3, ge=1)
    discriminator_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the discriminator; by default the autoencoder's."""
    revive_after_images: int = Field(default=0, ge=0)
    """A code unused for so many images moves onto a latent of the batch; 0 leaves dead ones dead. VQ only."""


class Validation(Config):
    """Scores of held-out pictures while a first stage trains, and what follows from them."""

    every_images: int = Field(default=0, ge=0)
    """Images between validations; the end of training is validated too. 0 never validates."""
    num_images: int = Field(default=100, ge=1)
    """Held-out pictures that are scored, the last ones of the split; all of them where there are fewer."""
    rfid: bool = False
    """Also compute the Frechet distance of reconstructions to their own originals."""
    patience: int = Field(default=0, ge=0)
    """Training ends after so many validations in a row without a better rFID (PSNR without `rfid`).
    Validations before the last loss term has joined in do not count. 0 trains to the end."""
    keep_best: bool = False
    """The result is the averaged weights of the best validation, not of the last step."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """Nothing is asked of validations that never happen."""
        asked = [name for name in ("rfid", "patience", "keep_best") if getattr(self, name)]
        if asked and not self.every_images:
            raise ValueError(
                f"validation.{asked[0]} needs validations, got validation.every_images=0; set it to the "
                "images between two of them"
            )
        if self.rfid and self.num_images < MIN_RFID_IMAGES:
            raise ValueError(
                f"validation.rfid needs validation.num_images of at least {MIN_RFID_IMAGES}, got "
                f"{self.num_images}; set it higher"
            )
        return self


class FirstStageRecipe(Config):
    """One first stage: network, objective, training."""

    name: str
    description: str = ""
    model: FirstStageModel
    loss: FirstStageLoss = FirstStageLoss()
    training: Training | None = None
    """None for the identity, which has nothing to train."""
    gradient_checkpointing: bool = False
    """Train in less memory and more time; the bits are the same, so it is no part of the key."""
    validation: Validation = Validation()

    @model_validator(mode="after")
    def check(self) -> Self:
        """Whatever has weights must be trained."""
        if self.model.kind != "identity" and self.training is None:
            raise ValueError(f"first stage {self.name!r} has weights, so it needs a `training` section")
        return self
