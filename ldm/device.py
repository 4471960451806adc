"""Where tensors are computed: on a CPU, or on a GPU where there is one.

Randomness is drawn on the CPU from keyed generators and moved, so another device changes last bits alone.
Networks are moved once; functions bring what they are given to where the network is (`home`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from ldm.config import Device
from ldm.errors import RecipeError

CPU = torch.device("cpu")
LOCAL_RANK = "LOCAL_RANK"
"""Environment variable in which a launcher of ranks tells each its number on this machine."""


def resolve(device: Device, *, worker: int | None = None) -> torch.device:
    """The device to compute on: of `auto` a GPU where torch sees one, else the CPU.

    A rank has the GPU of its number on this machine, a process without ranks the first one.

    Args:
        device: what is asked for.
        worker: number of a process that may share a GPU with others; they take the GPUs in turn.

    Raises:
        RecipeError: cuda is asked for and there is no GPU, or none for this rank.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise RecipeError(
            f"device must be one that is there, got {device} and torch sees no GPU; use device=cpu or auto"
        )
    count = torch.cuda.device_count()
    if worker is not None:
        return torch.device("cuda", worker % count)
    rank = int(os.environ.get(LOCAL_RANK, "0"))
    if rank >= count:
        raise RecipeError(
            f"each rank must have a GPU of its own, got {LOCAL_RANK}={rank} and torch sees {count}; start at "
            f"most {count} ranks on this machine, or use device=cpu"
        )
    return torch.device("cuda", rank)


def home(network: object, otherwise: torch.device = CPU) -> torch.device:
    """The device that a network's weights and buffers are on, `otherwise` for one without any."""
    if not isinstance(network, nn.Module):
        return otherwise
    weights = next(chain(network.parameters(), network.buffers()), None)
    return otherwise if weights is None else weights.device


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; on its way from the CPU to a GPU it is copied while others are computed."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it GPUs multiply in float32, not in TF32, whose 10 bits of mantissa move scores and VQ codes.

    torch lets convolutions use TF32 by default. Scores, latents and samples are made without it, so that they
    can be compared with those of a CPU; training decides for itself.
    """
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def facts(device: torch.device) -> dict[str, str]:
    """Class and name of a device, for the record: equal bits are claimed on one class alone."""
    if device.type == "cuda":
        return {"device": "cuda", "device_name": torch.cuda.get_device_name(device)}
    return {"device": device.type, "device_name": "CPU"}
