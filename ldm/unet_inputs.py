"""What the UNet of a model takes: everything else is refused with its shape.

B batch, L tokens, D width of a token, C channels of the latent, h w its height and width.
"""

from torch import Tensor

from ldm.conditions import Condition, fields_of
from ldm.config import require_divisible
from ldm.errors import ContractError
from ldm.model import check_finite
from ldm.model_config import LatentDiffusionModel


def check_inputs(config: LatentDiffusionModel, x_t: Tensor, t: Tensor, condition: Condition) -> None:
    """Refuse noisy latents (B, C, h, w), time steps (B,) and conditions that the UNet does not take.

    Raises:
        ContractError: one of them has another shape or leaves its range.
    """
    channels, unet = config.latent_channels, config.unet
    if x_t.ndim != 4 or x_t.shape[1] != channels:
        raise ContractError(
            f"noisy latents of this model must have the shape (B, {channels}, h, w), got {tuple(x_t.shape)}"
        )
    for side in x_t.shape[2:]:
        levels = 2 ** (len(unet.channel_mult) - 1)
        require_divisible("the side of a latent", side, levels, "the UNet's levels", error=ContractError)
    check_finite("noisy latents", x_t)
    if t.shape != (len(x_t),) or t.is_floating_point():
        raise ContractError(
            f"time steps must be integers of shape ({len(x_t)},), got {t.dtype} {tuple(t.shape)}"
        )
    last = config.diffusion.num_timesteps - 1
    if len(t) and not 0 <= int(t.min()) <= int(t.max()) <= last:
        raise ContractError(f"time steps must be 0 to {last}, got {int(t.min())} to {int(t.max())}")
    check_condition(config, x_t, condition)


def check_condition(config: LatentDiffusionModel, x_t: Tensor, condition: Condition) -> None:
    """Refuse a condition that is not what the UNet needs beside these latents.

    Raises:
        ContractError: a part is missing, unknown or of another shape.
    """
    unet, wanted = config.unet, dict[str, str]()
    if unet.context_dim is not None:
        wanted["context"] = f"({len(x_t)}, L, {unet.context_dim})"
    if unet.in_channels > config.latent_channels:
        wanted["concat"] = str((len(x_t), unet.in_channels - config.latent_channels, *x_t.shape[2:]))
    if unet.num_classes is not None:
        wanted["label"] = f"({len(x_t)},)"
    given = condition.parts()
    fits = given.keys() == wanted.keys() and all(
        wanted[name] == shape_like(wanted[name], tensor) for name, tensor in given.items()
    )
    if not fits:
        told = {name: tuple(tensor.shape) for name, tensor in given.items()}
        made = ", ".join(fields_of(config.conditioning))
        raise ContractError(
            f"the UNet takes {wanted or 'no condition'} beside these latents, got {told or 'none'}; make "
            f"it by model.condition({made})"
        )


def shape_like(wanted: str, tensor: Tensor) -> str:
    """The shape of a tensor, its number of tokens written as L where the wanted shape has it so."""
    shape = [str(size) for size in tensor.shape]
    if "L" in wanted and len(shape) == 3:
        shape[1] = "L"
    return f"({', '.join(shape)}{',' if len(shape) == 1 else ''})"
