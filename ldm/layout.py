"""Which tensors a model has: their names and shapes, and what a file brings compared with them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError
from ldm.first_stage_config import FirstStageModel
from ldm.model import Denoising
from ldm.model_config import LatentDiffusionModel
from ldm.models.conditioning import build_conditioner
from ldm.models.first_stage import build_first_stage
from ldm.models.unet import build_unet

Layout = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""

LISTED = 10
"""How many names of a kind a message lists before it counts the rest."""


def first_stage_layout(config: FirstStageModel) -> Layout:
    """The tensors of a first stage, under our names, which are the published ones; none for the identity."""
    with torch.device("meta"):
        model = build_first_stage(config)
    if not isinstance(model, nn.Module):
        return {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def networks_of(config: LatentDiffusionModel) -> Denoising:
    """The UNet and the conditioning encoder of a config, with PyTorch's initialisation."""
    conditioner = build_conditioner(config.conditioning, num_classes=config.num_classes)
    return Denoising(build_unet(config.unet), conditioner)


def networks_layout(config: LatentDiffusionModel) -> Layout:
    """The tensors of the UNet (`unet.*`) and of the conditioning encoder (`conditioner.*`)."""
    with torch.device("meta"):
        networks = networks_of(config)
    return {name: tuple(tensor.shape) for name, tensor in networks.state_dict().items()}


def require_layout(tensors: Mapping[str, Tensor], layout: Layout, *, what: str) -> None:
    """Refuse tensors that are not exactly those of a layout.

    Args:
        tensors: what a file brought.
        layout: what its config asks for.
        what: the file, for the message.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or of no floating type.
    """
    problems = {
        "missing": [f"{name} {shape}" for name, shape in layout.items() if name not in tensors],
        "unexpected": [f"{name} {tuple(t.shape)}" for name, t in tensors.items() if name not in layout],
        "misshapen": [
            f"{name} {tuple(tensors[name].shape)} instead of {shape}"
            for name, shape in layout.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
        "not floating": [
            f"{name} {t.dtype}" for name, t in tensors.items() if name in layout and not t.is_floating_point()
        ],
    }
    said = "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names)
    if said:
        raise CheckpointError(
            f"{what} must hold exactly the tensors its config asks for; {said}; "
            "give the config and the checkpoint that were published together"
        )


def listed(names: Iterable[str]) -> str:
    """Names in one line: the first ones, then how many more there are."""
    known = list(names)
    rest = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return ", ".join(known[:LISTED]) + rest
