"""Conditions of every kind, from what a caller has to what the UNet gets; and the one that asks for nothing.

B batch, L tokens, D width of a token, K classes, C channels, H W height and width of a picture, h w those of
the latent.

    kind            fields of `condition`
    class_label     class_label: (B,) integers, 0 to K - 1; -1 or K for none, where there is a null class
    class_vector    class_label, as above
    caption         caption: B texts, or their word pieces (B, L) integers (datasets.conditions.text)
    layout          layout: (B, L) integers (datasets.conditions.layout)
    embeddings      embeddings: (B, L, D)
    segmentation    segmentation: (B, H, W) integers, -1 for no class; or shares of classes (B, K, H, W)
    low_res         low_res: (B, C, h, w), pictures in [-1, 1]
    masked_image    image: (B, 3, H, W) in [-1, 1], and mask: (B, 1, H, W), 1 where it is to be painted
    hybrid          the fields of its tokens and of its maps
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from datasets.conditions.text import caption_tokens
from ldm.device import home
from ldm.errors import ContractError
from ldm.model import Autoencoder, check_finite
from ldm.model_config import AnyConditioning
from ldm.models.conditioning import (
    AsGiven,
    ClassEmbedder,
    Conditioner,
    Hybrid,
    SpatialRescaler,
    TokenEncoder,
    masked_condition,
)
from ldm.network_config import (
    CaptionConditioning,
    ClassConditioning,
    ClassVectorConditioning,
    EmbeddingsConditioning,
    HybridConditioning,
    LayoutConditioning,
    LowResConditioning,
    MaskedImageConditioning,
    SegmentationConditioning,
)

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """A batch of conditions as the UNet gets them; what it does not take is None."""

    context: Tensor | None = None
    """Tokens (B, L, D)."""
    concat: Tensor | None = None
    """Maps (B, C, h, w)."""
    label: Tensor | None = None
    """Rows of the table of class vectors, (B,) int64."""

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def __len__(self) -> int:
        """B; 0 when nothing is there."""
        return next((len(tensor) for tensor in self.parts().values()), 0)

    def rows(self, chosen: Tensor) -> "Condition":
        """The conditions at these places of the batch."""
        return Condition(**{name: tensor[chosen] for name, tensor in self.parts().items()})

    def where(self, chosen: Tensor, other: "Condition") -> "Condition":
        """These conditions, and the other batch's at the chosen places (B,) bool."""
        theirs = other.parts()
        mixed = {
            name: torch.where(chosen.to(mine.device).reshape(-1, *[1] * (mine.ndim - 1)), theirs[name], mine)
            for name, mine in self.parts().items()
        }
        return Condition(**mixed)

    def followed_by(self, other: "Condition") -> "Condition":
        """Both batches as one."""
        theirs = other.parts()
        return Condition(**{name: torch.cat([tensor, theirs[name]]) for name, tensor in self.parts().items()})


FIELDS: dict[type, tuple[str, ...]] = {
    ClassConditioning: ("class_label",),
    ClassVectorConditioning: ("class_label",),
    CaptionConditioning: ("caption",),
    LayoutConditioning: ("layout",),
    EmbeddingsConditioning: ("embeddings",),
    SegmentationConditioning: ("segmentation",),
    LowResConditioning: ("low_res",),
    MaskedImageConditioning: ("image", "mask"),
}


def fields_of(config: AnyConditioning | None) -> tuple[str, ...]:
    """Names of what a condition of this kind is made of."""
    if config is None:
        return ()
    if isinstance(config, HybridConditioning):
        return fields_of(config.tokens) + fields_of(config.maps)
    return FIELDS[type(config)]


def reads_captions(config: AnyConditioning | None) -> bool:
    """Whether a model of this condition is asked by captions."""
    return "caption" in fields_of(config)


def encode_condition(
    given: Fields,
    config: AnyConditioning | None,
    encoder: Conditioner | Hybrid | None,
    *,
    num_classes: int,
    autoencoder: Autoencoder,
) -> Condition:
    """What the UNet gets of the fields that a caller gives.

    Args:
        given: field name -> batch, see the head of this module.
        config: the kind of condition; None for an unconditional model, which takes no fields.
        encoder: the encoder of that kind.
        num_classes: K of class labels.
        autoencoder: encodes the picture of a masked image.

    Raises:
        ContractError: a field is missing, unknown, of another shape or out of its range.
    """
    wanted, kind = fields_of(config), "no condition" if config is None else f"a condition {config.kind!r}"
    if set(given) != set(wanted):
        raise ContractError(
            f"this model takes {kind}, made of the fields {', '.join(wanted) or '(none)'}; got "
            f"{', '.join(given) or 'none'}; see ldm/conditions.py for their shapes"
        )
    match config, encoder:
        case HybridConditioning(), Hybrid():
            inner = {"num_classes": num_classes, "autoencoder": autoencoder}
            tokens = {name: given[name] for name in fields_of(config.tokens)}
            maps = {name: given[name] for name in fields_of(config.maps)}
            context = encode_condition(tokens, config.tokens, encoder.tokens, **inner).context
            concat = encode_condition(maps, config.maps, encoder.maps, **inner).concat
            made = Condition(context=context, concat=concat)
        case ClassConditioning() | ClassVectorConditioning(), _:
            labels = class_labels(given["class_label"], num_classes, has_null=config.has_null)
            labelled = isinstance(encoder, ClassEmbedder)
            made = Condition(context=encoder(labels)) if labelled else Condition(label=labels)
        case CaptionConditioning() | LayoutConditioning(), TokenEncoder():
            tokens = tokens_of(given[wanted[0]], wanted[0], config)
            made = Condition(context=encoder(tokens.to(home(encoder, tokens.device))))
        case EmbeddingsConditioning(), _:
            shape = ("B", "L", config.context_dim)
            made = Condition(context=checked(given["embeddings"], "embeddings", shape))
        case SegmentationConditioning(), SpatialRescaler():
            made = Condition(concat=rescaled(given["segmentation"], config, encoder))
        case LowResConditioning(), _:
            made = Condition(concat=checked(given["low_res"], "low_res", ("B", config.channels, "h", "w")))
        case MaskedImageConditioning(), _:
            made = Condition(concat=masked(given["image"], given["mask"], autoencoder))
        case _:
            made = Condition()
    if len({len(tensor) for tensor in made.parts().values()}) > 1:
        sizes = {name: len(tensor) for name, tensor in made.parts().items()}
        raise ContractError(f"the fields of a condition must have one batch size, got {sizes}")
    return made


def null_condition(
    like: Condition, config: AnyConditioning | None, encoder: Conditioner | Hybrid | None, *, num_classes: int
) -> Condition:
    """As many conditions as `like` that ask for nothing; of a hybrid, the maps stay.

    Raises:
        ContractError: this kind has none.
    """
    match config, encoder:
        case HybridConditioning(), Hybrid():
            alone = replace(like, concat=None)
            nothing = null_condition(alone, config.tokens, encoder.tokens, num_classes=num_classes)
            return replace(nothing, concat=like.concat)
        case ClassConditioning(null_class=True), ClassEmbedder():
            null = torch.full((len(like),), num_classes, device=encoder.embedding.weight.device)
            return Condition(context=encoder(null))
        case ClassVectorConditioning(), AsGiven():
            assert like.label is not None
            return Condition(label=encoder.null(like.label))
        case CaptionConditioning() | LayoutConditioning(), TokenEncoder():
            assert like.context is not None
            empty = torch.from_numpy(encoder.empty).to(like.context.device)[None]
            return Condition(context=encoder(empty).expand(len(like), -1, -1))
        case EmbeddingsConditioning(), AsGiven():
            assert like.context is not None
            return Condition(context=encoder.null(like.context))
        case LowResConditioning() | MaskedImageConditioning(), AsGiven():
            assert like.concat is not None
            return Condition(concat=encoder.null(like.concat))
        case SegmentationConditioning(), _:  # no class anywhere, of which the encoder makes zeros
            assert like.concat is not None
            return Condition(concat=torch.zeros_like(like.concat))
        case _:
            what = "unconditional" if config is None else f"one of {config.kind!r} without a null condition"
            raise ContractError(f"only a condition can be left out, and this model is {what}")


def class_labels(given: Tensor, num_classes: int, *, has_null: bool) -> Tensor:
    """Labels (B,) int64, -1 replaced by the null class, `num_classes`."""
    labels = whole(given, "class_label", ("B",)).long()
    lowest, highest = (-1, num_classes) if has_null else (0, num_classes - 1)
    check_range("class_label", labels, lowest, highest)
    return torch.where(labels < 0, num_classes, labels)


def tokens_of(
    given: Tensor | Sequence[str], name: str, config: CaptionConditioning | LayoutConditioning
) -> Tensor:
    """Tokens (B, L) int64 of texts, or the tokens given."""
    if isinstance(config, CaptionConditioning) and not isinstance(given, Tensor):
        if isinstance(given, str) or not all(isinstance(text, str) for text in given):
            raise ContractError(f"captions must be a list of texts, or tokens (B, L), got {given!r:.80}")
        return torch.from_numpy(caption_tokens(given, num_tokens=config.num_tokens))
    tokens = whole(given, name, ("B", config.num_tokens)).long()
    check_range(name, tokens, 0, config.vocab_size - 1)
    return tokens


def rescaled(given: Tensor, config: SegmentationConditioning, encoder: SpatialRescaler) -> Tensor:
    """Maps (B, C, h, w) of a class per pixel, or of shares of classes."""
    if isinstance(given, Tensor) and given.ndim == 4:
        return encoder.rescale(checked(given, "segmentation", ("B", config.num_classes, "H", "W")))
    labels = whole(given, "segmentation", ("B", "H", "W")).long()
    check_range("segmentation", labels, -1, config.num_classes - 1)
    return encoder(labels)


def masked(image: Tensor, mask: Tensor, autoencoder: Autoencoder) -> Tensor:
    """Maps (B, C + 1, h, w) of pictures with holes."""
    autoencoder.check_pictures(image)
    check_mask(mask, (len(image), 1, *image.shape[2:]))
    known = torch.where(mask > 0, -1.0, image)
    return masked_condition(autoencoder.encode(known), mask)


def check_mask(mask: object, shape: tuple[int | str, ...]) -> None:
    """Refuse what does not say of each pixel of pictures whether it is to be painted.

    Raises:
        ContractError: another shape, or other numbers than 0 and 1.
    """
    given = checked(mask, "mask", shape)
    if bool(((given != 0) & (given != 1)).any()):
        raise ContractError(
            "a mask must be 1 where a picture is to be painted and 0 elsewhere, got other numbers; "
            "compare it with 0.5"
        )


def whole(given: object, name: str, shape: tuple[int | str, ...]) -> Tensor:
    """The tensor given, which must be of integers and of this shape."""
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
        found = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise ContractError(f"{name} must be a tensor of integers {described(shape)}, got {found}")
    return of_shape(given, name, shape)


def checked(given: object, name: str, shape: tuple[int | str, ...]) -> Tensor:
    """The tensor given, which must be of finite numbers and of this shape."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        found = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise ContractError(f"{name} must be a tensor of floats {described(shape)}, got {found}")
    check_finite(name, of_shape(given, name, shape))
    return given


def of_shape(given: Tensor, name: str, shape: tuple[int | str, ...]) -> Tensor:
    """The tensor given; letters in `shape` stand for any size."""
    fits = given.ndim == len(shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(given.shape, shape, strict=True)
    )
    if not fits:
        raise ContractError(f"{name} must have the shape {described(shape)}, got {tuple(given.shape)}")
    return given


def described(shape: tuple[int | str, ...]) -> str:
    """A shape for a message."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def check_range(name: str, values: Tensor, lowest: int, highest: int) -> None:
    """Refuse integers outside a range."""
    wrong = values[(values < lowest) | (values > highest)].unique().tolist()
    if wrong:
        raise ContractError(f"{name} must be {lowest} to {highest} for this model, got {wrong[:10]}")
