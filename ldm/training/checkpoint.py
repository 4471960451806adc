"""Checkpoints of a training run: safetensors with a JSON beside it that names its digest and the position.

The JSON is written last and makes the checkpoint exist. Two are kept; when the newest is damaged the one
before it is used, and that is reported.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from datasets.keys import canonical_json, sha256_hex
from datasets.store import WorkArea

logger = logging.getLogger(__name__)
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after `step` optimiser steps."""

    step: int
    tensors: dict[str, Tensor]
    history: dict[str, list[tuple[int, float]]]
    """Logged metrics so far: name -> (images seen, value)."""
    skipped: tuple[int, ...] = ()
    """Steps that were left out because their numbers were not finite."""


def save_checkpoint(work: WorkArea, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into the work area, then drop all but the newest two."""
    data = save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()})
    name = f"checkpoint-{checkpoint.step:09d}"
    record = {
        "step": checkpoint.step,
        "sha256": sha256_hex(data),
        "history": checkpoint.history,
        "skipped": checkpoint.skipped,
    }
    work.write(f"{name}.safetensors", data)
    work.write(f"{name}.json", canonical_json(record))
    for old in saved(work)[:-KEPT]:
        work.remove(f"{old}.json")
        work.remove(f"{old}.safetensors")


def saved(work: WorkArea) -> list[str]:
    """Names of the checkpoints in a work area, oldest first."""
    return sorted(name.removesuffix(".json") for name in work.names("checkpoint-") if name.endswith(".json"))


def load_checkpoint(work: WorkArea) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None where there is none."""
    for name in reversed(saved(work)):
        record, data = work.read(f"{name}.json"), work.read(f"{name}.safetensors")
        checkpoint = parse(record, data)
        if checkpoint is not None:
            return checkpoint
        logger.warning("checkpoint %s is damaged and is not used; falling back to the one before it", name)
    return None


def parse(record: bytes | None, data: bytes | None) -> Checkpoint | None:
    """A checkpoint from its two files, None unless both are whole; the digest is verified before parsing."""
    if record is None or data is None:
        return None
    try:
        meta = json.loads(record)
    except ValueError:
        return None
    if not isinstance(meta, dict) or meta.get("sha256") != sha256_hex(data):
        return None
    history = {name: [(int(n), float(v)) for n, v in points] for name, points in meta["history"].items()}
    return Checkpoint(step=meta["step"], tensors=load(data), history=history, skipped=tuple(meta["skipped"]))


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimiser's state as named tensors."""
    return {
        f"{prefix}.{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Put `optimizer_tensors` back, each in its parameter's memory layout, as fused optimisers need it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
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
