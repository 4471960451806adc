"""Conditions as training gives them to the UNet: with gradients, some left out for guidance."""

import torch
from torch import Tensor

from ldm.conditions import Condition, Fields, encode_condition, fields_of, null_condition
from ldm.model import Autoencoder
from ldm.model_config import AnyConditioning
from ldm.models.conditioning import Conditioner, Hybrid


def encode_some(
    given: Fields,
    config: AnyConditioning | None,
    encoder: Conditioner | Hybrid | None,
    dropped: Tensor,
    *,
    num_classes: int,
    autoencoder: Autoencoder,
) -> Condition:
    """What the UNet gets of a batch, the null condition in place of what is dropped (Ho & Salimans 2022).

    Args:
        given: fields of B conditions, see `ldm.conditions`; an unlabelled picture has the null class always.
        config: the kind of condition; None for an unconditional model.
        encoder: the encoder of that kind, which gradients reach unless it is frozen.
        dropped: (B,) bool, whose condition is left out as a whole; of a hybrid, its tokens.
        num_classes: of class labels, without the null class.
        autoencoder: encodes the picture of a masked image.

    Raises:
        ContractError: a field does not fit, or something is dropped where there is no null condition.
    """
    parts = {"num_classes": num_classes, "autoencoder": autoencoder}
    if not dropped.any():
        return encode_condition(given, config, encoder, **parts)
    if "class_label" in fields_of(config):  # as a label, so that the null class gets its gradient as one sum
        labels = torch.where(dropped, -1, given["class_label"])
        return encode_condition({**given, "class_label": labels}, config, encoder, **parts)
    whole = encode_condition(given, config, encoder, **parts)
    return whole.where(dropped, null_condition(whole, config, encoder, num_classes=num_classes))
