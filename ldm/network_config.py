"""What the networks of the second stage are: the UNet, and the encoder of what is asked for.

A conditioning enters the UNet in one of three ways: as tokens that it attends to (`context_dim`), as maps
beside the noisy latent (`concat_channels`), or as a vector added to the time embedding (kind class_vector).
"""

from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from datasets.conditions.layout import NUM_TOKENS, VOCABULARY
from datasets.conditions.text import MAX_TOKENS, NUM_WORDS, SEP

MINILM_WIDTH = 384


class Config(BaseModel):
    """Base of all configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def is_unset(value: object) -> bool:
    """Whether a switch is off: such fields stay out of dumps, so that keys made before they existed hold."""
    return value is None or value is False


class UNetConfig(Config):
    """The denoising UNet (paper Tab. 12 to 15)."""

    in_channels: int = Field(ge=1)
    """Channels of the noisy latent, and of the maps concatenated to it."""
    out_channels: int = Field(ge=1)
    model_channels: int = Field(ge=1)
    channel_mult: tuple[int, ...]
    num_res_blocks: int = Field(default=2, ge=1)
    attention_factors: tuple[int, ...]
    """Downsampling factors of the latent at which attention follows each block."""
    head_channels: int | None = Field(default=None, ge=1)
    """Channels of a head; give this or num_heads."""
    num_heads: int | None = Field(default=None, ge=1)
    context_dim: int | None = Field(default=None, ge=1)
    """Width of the condition's tokens; None builds plain self-attention."""
    transformer_depth: int = Field(default=1, ge=1)
    one_head_transformers: bool = Field(default=False, exclude_if=is_unset)
    """Every transformer has one head, whatever head_channels says.

    So three published checkpoints must be read (cin256, text2img256, layout2img-openimages256): until April
    2022 the published code ignored head_channels in transformers. Their weights load either way, but with
    several heads they compute something else than was trained."""
    resblock_updown: bool = Field(default=False, exclude_if=is_unset)
    """Resolution changes inside a residual block (BigGAN) instead of by a convolution of its own."""
    scale_shift_norm: bool = Field(default=False, exclude_if=is_unset)
    """The time embedding scales and shifts a block's second normalisation; else it is added before it."""
    num_classes: int | None = Field(default=None, ge=1, exclude_if=is_unset)
    """Rows of a table of class vectors that are added to the time embedding (ADM); None builds no table."""
    checkpoint_activations: bool = Field(default=False, exclude_if=is_unset)
    """Recompute activations in the backward pass: less memory, more time, the same bits."""
    norm_groups: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def check(self) -> Self:
        """Heads are given one way, and widths divide into groups."""
        if (self.head_channels is None) == (self.num_heads is None):
            raise ValueError("give exactly one of head_channels and num_heads")
        if self.one_head_transformers and self.context_dim is None:
            raise ValueError(
                "one_head_transformers is for transformers, and without context_dim there are none; "
                "leave it out, or set num_heads: 1"
            )
        for mult in self.channel_mult:
            if self.model_channels * mult % self.norm_groups:
                raise ValueError(
                    f"model_channels * channel_mult ({self.model_channels} * {mult}) must be divisible by "
                    f"norm_groups ({self.norm_groups})"
                )
        return self


class TokenCondition(Config):
    """A condition that becomes tokens (B, L, context_dim), to which the UNet attends."""

    context_dim: int = Field(default=512, ge=1)
    """Width of a token."""
    drop_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of conditions replaced by the null condition in training, which guidance needs."""

    @property
    def has_null(self) -> bool:
        """Whether there is a condition that asks for nothing."""
        return True

    def concat_channels(self, latent: int) -> int:
        """Channels beside a latent of `latent` channels."""
        del latent
        return 0


class MapCondition(Config):
    """A condition that becomes maps (B, C, h, w), concatenated behind the noisy latent's channels."""

    drop_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of conditions replaced by the null condition in training; the published models have none."""
    context_dim: ClassVar[None] = None
    has_null: ClassVar[bool] = True


class ClassConditioning(TokenCondition):
    """One learned token per class (paper Sec. 4.3.1, Tab. 13)."""

    kind: Literal["class_label"]
    null_class: bool = Field(default=True, exclude_if=bool)
    """Whether the last row stands for "no class"; one published model (cin256) has no such row."""

    @property
    def has_null(self) -> bool:
        """Whether there is a null class."""
        return self.null_class

    @model_validator(mode="after")
    def check(self) -> Self:
        """Only what has a null class can be replaced by it."""
        if not self.null_class and self.drop_rate:
            raise ValueError(
                f"drop_rate ({self.drop_rate}) replaces labels by the null class; set it to 0, "
                "or null_class: true"
            )
        return self


class ClassVectorConditioning(Config):
    """One learned vector per class, added to the time embedding (Dhariwal & Nichol 2021, ADM).

    The table is the UNet's (`unet.num_classes` rows); its last row is the null class.
    """

    kind: Literal["class_vector"]
    drop_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of labels replaced by the null class in training."""
    context_dim: ClassVar[None] = None
    has_null: ClassVar[bool] = True

    def concat_channels(self, latent: int) -> int:
        """None: the vector goes into the time embedding."""
        del latent
        return 0


class CaptionConditioning(TokenCondition):
    """Text, as BERT's word pieces, through a transformer (paper Sec. 4.3.1, Tab. 17)."""

    kind: Literal["caption"]
    encoder: Literal["transformer", "minilm"] = "transformer"
    """`transformer` is trained with the UNet, as in the paper; `minilm` is pretrained, frozen, 384 wide."""
    context_dim: int = Field(default=1280, ge=1)
    depth: int = Field(default=32, ge=1)
    """Blocks of the transformer; `minilm` has its own six."""
    vocab_size: int = Field(default=NUM_WORDS, gt=SEP)
    """Rows of the table of words: BERT's."""
    num_tokens: int = Field(default=MAX_TOKENS, ge=2)
    """L, to which captions are cut or padded."""

    @model_validator(mode="after")
    def check(self) -> Self:
        """The pretrained encoder is as wide and knows as many words as it does."""
        if self.encoder == "minilm" and (self.context_dim, self.vocab_size) != (MINILM_WIDTH, NUM_WORDS):
            raise ValueError(
                f"the encoder minilm has context_dim {MINILM_WIDTH} and vocab_size {NUM_WORDS}, got "
                f"{self.context_dim} and {self.vocab_size}; set them, and unet.context_dim, so"
            )
        return self


class LayoutConditioning(TokenCondition):
    """Boxes with classes, as tokens, through a transformer (paper Sec. 4.3.2, D.3, Tab. 17)."""

    kind: Literal["layout"]
    drop_rate: float = Field(default=0.0, ge=0, le=1)
    depth: int = Field(default=16, ge=1)
    """Blocks of the transformer."""
    vocab_size: int = Field(default=VOCABULARY, ge=4)
    """Layout tokens; the last one marks an empty slot."""
    num_tokens: int = Field(default=NUM_TOKENS, ge=1)
    """L: three for each object, and two for the crop."""


class EmbeddingsConditioning(TokenCondition):
    """Vectors of some encoder, attended to as they are: the neighbours of retrieval-augmented models."""

    kind: Literal["embeddings"]
    context_dim: int = Field(default=768, ge=1)


class SegmentationConditioning(MapCondition):
    """A class per pixel, halved and mapped to few channels (paper Sec. 4.3.2)."""

    kind: Literal["segmentation"]
    num_classes: int = Field(default=182, ge=1)
    num_stages: int = Field(default=2, ge=0)
    """How many times the map is halved; f must be 2 ** num_stages."""
    channels: int = Field(default=3, ge=1)
    """Channels that the UNet sees."""

    def concat_channels(self, latent: int) -> int:
        """The channels that classes are mapped to."""
        del latent
        return self.channels

    @property
    def factor(self) -> int:
        """How much smaller than the picture the maps are."""
        return 2**self.num_stages


class LowResConditioning(MapCondition):
    """A small picture as it is, as large as the latent: super-resolution (paper Sec. 4.4)."""

    kind: Literal["low_res"]
    channels: int = Field(default=3, ge=1)
    factor: int = Field(default=4, ge=1)
    """How much smaller than the picture it is; must be f."""

    def concat_channels(self, latent: int) -> int:
        """The small picture's."""
        del latent
        return self.channels


class MaskedImageConditioning(MapCondition):
    """The picture without what is to be painted, encoded, and the mask: inpainting (paper Sec. 4.5)."""

    kind: Literal["masked_image"]

    def concat_channels(self, latent: int) -> int:
        """The encoded picture's and the mask's."""
        return latent + 1


Conditioning = (
    ClassConditioning
    | ClassVectorConditioning
    | CaptionConditioning
    | LayoutConditioning
    | EmbeddingsConditioning
    | SegmentationConditioning
    | LowResConditioning
    | MaskedImageConditioning
)
"""All kinds that are one condition, told apart by `kind`."""


class HybridConditioning(Config):
    """Tokens to attend to and maps beside the latent, both at once.

    The published code calls it `hybrid` and encodes one of the two; the other comes as the UNet is given it.
    """

    kind: Literal["hybrid"] = "hybrid"
    tokens: ClassConditioning | CaptionConditioning | LayoutConditioning | EmbeddingsConditioning = Field(
        discriminator="kind"
    )
    maps: SegmentationConditioning | LowResConditioning | MaskedImageConditioning = Field(
        discriminator="kind"
    )

    @property
    def context_dim(self) -> int:
        """Width of a token."""
        return self.tokens.context_dim

    @property
    def drop_rate(self) -> float:
        """Share of token conditions replaced by the null condition in training."""
        return self.tokens.drop_rate

    @property
    def has_null(self) -> bool:
        """Whether there are tokens that ask for nothing; maps are kept as they are."""
        return self.tokens.has_null

    def concat_channels(self, latent: int) -> int:
        """Channels of the maps beside a latent of `latent` channels."""
        return self.maps.concat_channels(latent)
