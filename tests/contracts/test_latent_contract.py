"""Latents are used only with the first stage and recipe they were made for, and scaled exactly once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from datasets.keys import sha256_hex
from datasets.manifest import Manifest
from datasets.samples import decode_latent, encode_latent
from datasets.shards import KEY, read_shard, write_shard
from datasets.store import Store
from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.errors import ContractError
from ldm.latents import LatentContract, contract_of
from ldm.model import WEIGHTS, load_first_stage
from ldm.stages import STAGES
from ldm.stages.stage import Job
from ldm.stored_models import stored_diffusion
from ldm.training.diffusion import DiffusionTrainee
from ldm.training.report import Silent

USES = {"training": "train-ldm", "decoding": "evaluate"}
RECORDED = {"mean": 2.0, "std": 2.0, "scale": 2.0}
"""What is measured; the other fields are what the recipe and the first stage say."""


class Chain(Protocol):
    """What the fixtures of conftest.py give."""

    recipe: Recipe
    store: Store
    shards: Manifest
    first_stage: Manifest
    latents: Manifest


def use(stage_name: str, chain: Chain, **roles: Manifest) -> None:
    """Begin what a stage does, with some of its inputs exchanged."""
    stage = STAGES[stage_name]
    inputs = {
        "shards": chain.shards,
        "first_stage": chain.first_stage,
        "latents": chain.latents,
        "model": chain.latents,  # never reached
    }
    stage.build(Job(stage, chain.store, chain.recipe, "0" * 64, inputs | roles, Silent()))


def other_than(value: Any) -> object:
    """A value of the same type that is not the same."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case _:
            return [other_than(value[0]), *value[1:]]


@pytest.mark.parametrize("stage", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("name", list(LatentContract.model_fields))
def test_a_field_that_differs_refuses_by_its_name(
    name: str, stage: str, vq_chain: Chain, with_contract: Callable[..., Manifest]
) -> None:
    value = getattr(contract_of(vq_chain.latents), name)
    altered = with_contract(vq_chain.latents, **{name: other_than(value)})
    named = "scale" if name in RECORDED else name
    with pytest.raises(ContractError, match=rf"do not fit this run: {named}: latents have .* needs "):
        use(stage, vq_chain, latents=altered)


@pytest.fixture
def swapped(vq_chain: Chain) -> Manifest:
    """A first stage of the same kind with other weights, in the store."""
    store, first_stage = vq_chain.store, vq_chain.first_stage
    key = sha256_hex(b"swapped")
    weights = {name: value + 1e-3 for name, value in load(store.read(first_stage, WEIGHTS)).items()}
    file = store.put(first_stage.stage, key, WEIGHTS, save(weights))
    return store.commit(replace(first_stage.content, key=key, files=(file,)), {})


@pytest.mark.parametrize("stage", USES.values(), ids=USES.keys())
def test_a_swapped_first_stage_is_refused(stage: str, vq_chain: Chain, swapped: Manifest) -> None:
    made_with, given = vq_chain.first_stage.digest, swapped.digest
    message = rf"first_stage: latents have '{made_with}', this run needs '{given}'; weights_sha256: latents"
    with pytest.raises(ContractError, match=message):
        use(stage, vq_chain, first_stage=swapped)


def test_a_model_is_not_decoded_by_a_swapped_first_stage(vq_chain: Chain, swapped: Manifest) -> None:
    parents = {"first_stage": replace(vq_chain.latents.content.parents["first_stage"], key=swapped.key)}
    model = Manifest(replace(vq_chain.latents.content, stage="train-ldm", parents=parents), {})
    with pytest.raises(
        ContractError, match=rf"first_stage: model .* but is to be decoded by {swapped.digest[:12]}"
    ):
        stored_diffusion(vq_chain.store, model, vq_chain.recipe)


def restored(chain: Chain, factor: float) -> Manifest:
    """The latents, all multiplied by a factor, under the same contract."""
    key, files = sha256_hex(f"{factor}".encode()), []
    for record in chain.latents.content.files:
        samples = []
        for sample in read_shard(chain.store.read(chain.latents, record.name)):
            latent, about = decode_latent(sample)
            samples.append(encode_latent(sample[KEY], latent * np.float32(factor), about=about))
        data = write_shard(samples)
        files.append(chain.store.put("encode-latents", key, record.name, data, count=record.count))
    return chain.store.commit(replace(chain.latents.content, key=key, files=tuple(files)), {})


def test_a_scale_applied_before_storing_and_again_when_read_is_refused(vq_chain: Chain) -> None:
    scale = contract_of(vq_chain.latents).scale
    assert abs(scale - 1) > 1  # else twice is hardly more than once
    with pytest.raises(
        ContractError, match=r"near the recorded .* have 1\.?\d*; a scale may have been applied"
    ):
        use("train-ldm", vq_chain, latents=restored(vq_chain, scale))


def test_a_scale_that_is_none_is_refused(vq_chain: Chain, with_contract: Callable[..., Manifest]) -> None:
    channels = len(contract_of(vq_chain.latents).mean)
    unscaled = with_contract(vq_chain.latents, mean=[0.0] * channels, std=[1.0] * channels, scale=1.0)
    with pytest.raises(ContractError, match=r"standard deviation must be near the recorded 1, but"):
        use("train-ldm", vq_chain, latents=unscaled)


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_what_is_trained_on_is_scaled_once(kind: str, request: pytest.FixtureRequest) -> None:
    chain: Chain = request.getfixturevalue(f"{kind}_chain")
    first_stage, contract = load_first_stage(chain.store, chain.first_stage), contract_of(chain.latents)
    assert abs(contract.scale - 1) > 0.1
    reader = SampleReader(chain.store, chain.latents, split="train")
    trainee = DiffusionTrainee(chain.recipe, reader, contract, first_stage, num_classes=15, look=no_look)
    seen = torch.cat([trainee.prepared(trainee.batches.at(step), step)[0] for step in range(10)])
    assert seen.std(correction=0).item() == pytest.approx(1.0, rel=1e-4 if kind == "vq" else 0.05)


def no_look(_networks: object) -> dict[str, bytes]:
    return {}
