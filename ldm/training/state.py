"""The state of modules and optimisers as named tensors, and back; what does not fit is named beforehand."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.errors import TrainingError

NUM_NAMED = 5
"""So many tensors of each kind of mismatch are named; the others are counted."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimiser's state as named tensors."""
    return {
        f"{prefix}.{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Put `optimizer_tensors` back, each in its parameter's memory layout, as fused optimisers need it."""
    parameters = parameters_of(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            index, name = key.removeprefix(f"{prefix}.").split(".")
            like = parameters[int(index)]
            placed = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            state.setdefault(int(index), {})[name] = placed
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def module_tensors(module: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """A module's parameters and buffers as named tensors."""
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def load_module(module: torch.nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Put `module_tensors` back; every key must match."""
    module.load_state_dict(
        {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
    )


def check_state(
    found: Mapping[str, Tensor],
    has: Mapping[str, Tensor],
    *,
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> None:
    """Refuse a saved state that is not one of the run it is about to continue.

    Args:
        found: the saved tensors.
        has: the run's own tensors, before any of the saved ones is put into their place.
        optimizers: by the prefix of their tensors; what they keep of a parameter is there from its first
            step on.

    Raises:
        TrainingError: naming what is missing, what nobody asked for, and what has another shape or type.
    """
    expected = {name: value for name, value in has.items() if name.partition(".")[0] not in optimizers}
    for prefix, optimizer in optimizers.items():
        expected |= moments(optimizer, prefix, found)
    others = [
        f"{name} is {described(found[name])} instead of {described(value)}"
        for name, value in expected.items()
        if name in found and described(found[name]) != described(value)
    ]
    problems = [
        *listed("missing", sorted(expected.keys() - found.keys())),
        *listed("unknown to this run", sorted(found.keys() - expected.keys())),
        *listed("of another shape or type", others),
    ]
    if problems:
        raise TrainingError(
            f"a checkpoint must hold the state of the run that it continues; {'; '.join(problems)}; run the "
            "recipe it was made by, or remove the run's work area to start over"
        )


def moments(optimizer: torch.optim.Optimizer, prefix: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What Adam keeps, in shape and type, of each parameter of which anything was found."""
    counter = torch.tensor(0.0)
    expected: dict[str, Tensor] = {}
    for index, parameter in enumerate(parameters_of(optimizer)):
        kept = {"step": counter, "exp_avg": parameter, "exp_avg_sq": parameter}
        named = {f"{prefix}.{index}.{name}": value for name, value in kept.items()}
        if not found.keys().isdisjoint(named):
            expected |= named
    return expected


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters in the order of an optimiser's state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def described(tensor: Tensor) -> str:
    """Type and shape of a tensor."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def listed(what: str, names: Iterable[str]) -> list[str]:
    """A line that names the first of what does not fit, or nothing."""
    names = list(names)
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return [f"{what}: {', '.join(names[:NUM_NAMED])}{more}"] if names else []
