"""Which tensors a model has: their names and shapes, and what a file brings compared with them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ldm.config import FirstStageModel
from ldm.errors import CheckpointError
from ldm.models.first_stage import build_first_stage

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
