"""Where networks compute, and in what precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, TypeVar

from ldm.errors import RecipeError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]
ModelT = TypeVar("ModelT")
Precision = Literal["float32", "tf32", "bfloat16"]


def device_of(wanted: Device, *, rank: int = 0, is_shared: bool = False) -> torch.device:
    """The device of a process on this machine; processes take its GPUs in turn.

    Args:
        wanted: by the recipe.
        rank: which process.
        is_shared: whether several processes may have one GPU.

    Raises:
        RecipeError: a GPU is asked for and torch sees none, or not one for each rank.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return torch.device("cpu")
    if is_shared and count:
        rank %= count
    if rank >= count:
        cure = f"use training.ranks of at most {count}, or device=cpu" if count else "use device=cpu or auto"
        raise RecipeError(
            f"device must be a GPU for each rank, got {wanted} for rank {rank} and torch sees {count}; {cure}"
        )
    return torch.device("cuda", rank)


def home(model: object) -> torch.device:
    """The device of a model's weights; the CPU for one without any."""
    import torch

    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def placed(model: ModelT, device: torch.device) -> ModelT:
    """The model, its weights moved to a device if it has some."""
    import torch

    return model.to(device) if isinstance(model, torch.nn.Module) else model


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context in which a network's forward pass computes in that precision."""
    import torch

    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def set_products(precision: Precision) -> None:
    """Let GPUs round the factors of products to TF32, or not; by default torch does in convolutions alone."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
