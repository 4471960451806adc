from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets.manifest import Manifest
from datasets.store import Store
from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.errors import ContractError
from ldm.latent_diffusion import assemble
from ldm.latents import check_contract, check_moments, contract_of, scaled_latent
from ldm.model import build_denoising, load_first_stage
from ldm.models.first_stage import IdentityModel
from ldm.training.randomness import generator

Altered = Callable[..., Manifest]


class Chain(Protocol):
    """What the fixtures of conftest.py give."""

    recipe: Recipe
    store: Store
    first_stage: Manifest
    latents: Manifest

    def reader(self, *, split: str = "train") -> SampleReader: ...


def corpus(chain: Chain) -> Tensor:
    return torch.from_numpy(chain.reader().fetch(range(40))["latent"])


@pytest.fixture(params=["vq", "kl"])
def chain(request: pytest.FixtureRequest) -> Chain:
    return request.getfixturevalue(f"{request.param}_chain")


def test_the_contract_that_was_written_is_the_one_that_is_needed(chain: Chain) -> None:
    contract = check_contract(chain.latents, chain.recipe, chain.first_stage)
    assert contract.first_stage == chain.first_stage.digest
    kl = chain.recipe.first_stage.model.kind == "kl"
    assert contract.stored == ("moments" if kl else "pre_quantisation")
    assert contract.shape == (8 if kl else 4, 8, 8)
    assert not contract.scale_applied


def test_all_differences_are_named_at_once(vq_chain: Chain, with_contract: Altered) -> None:
    latents = with_contract(vq_chain.latents, factor=8, dtype="float16")
    with pytest.raises(ContractError, match=r"factor: latents have 8.*dtype: latents have 'float16'"):
        check_contract(latents, vq_chain.recipe, vq_chain.first_stage)


def test_latents_without_a_contract_are_refused(vq_chain: Chain) -> None:
    bare = Manifest(replace(vq_chain.latents.content, statistics={}), {})
    with pytest.raises(ContractError, match="must state their contract"):
        contract_of(bare)


def test_scaled_latents_have_unit_deviation_over_the_corpus(chain: Chain) -> None:
    first_stage, contract = load_first_stage(chain.store, chain.first_stage), contract_of(chain.latents)
    draws = generator(0, "posterior")
    scaled = torch.cat(
        [scaled_latent(first_stage, corpus(chain), contract, generator=draws) for _ in range(20)]
    )
    exact = contract.stored != "moments"  # a posterior's draws only come near
    assert scaled.std(correction=0).item() == pytest.approx(1.0, rel=1e-5 if exact else 0.01)


def test_moments_of_each_channel_are_those_of_the_corpus(vq_chain: Chain) -> None:
    stored, contract = corpus(vq_chain).double(), contract_of(vq_chain.latents)
    assert contract.mean == pytest.approx(stored.mean(dim=(0, 2, 3)).tolist(), rel=1e-5, abs=1e-7)
    assert contract.std == pytest.approx(stored.std(dim=(0, 2, 3), correction=0).tolist(), rel=1e-5)
    assert contract.scale == pytest.approx(1.0 / stored.std(correction=0).item(), rel=1e-6)


def test_stored_latents_are_those_of_the_encoder_unscaled(
    chain: Chain, cats: Callable[[str], SampleReader]
) -> None:
    from ldm.range import from_uint8

    first_stage = load_first_stage(chain.store, chain.first_stage)
    with torch.no_grad():
        encoded = first_stage.encode(from_uint8(cats("train").fetch(range(40))["image"]))
    torch.testing.assert_close(corpus(chain), encoded.contiguous(), atol=1e-5, rtol=1e-4)


def test_recorded_moments_are_found_in_what_is_read(chain: Chain) -> None:
    first_stage, contract = load_first_stage(chain.store, chain.first_stage), contract_of(chain.latents)
    check_moments(corpus(chain), first_stage, contract)


@pytest.mark.parametrize("deviation", [0.18, 4.0])
def test_a_scale_that_was_applied_already_is_noticed(
    vq_chain: Chain, with_contract: Altered, deviation: float
) -> None:
    stored = deviation * torch.randn(64, 4, 8, 8, generator=generator(0))
    contract = contract_of(with_contract(vq_chain.latents, scale=1.0 / deviation))
    check_moments(stored, IdentityModel(), contract)
    once = scaled_latent(IdentityModel(), stored, contract, generator=None)
    with pytest.raises(ContractError, match="a scale may have been applied already: encode again"):
        check_moments(once, IdentityModel(), contract)


def test_decoding_takes_the_scale_off_again(chain: Chain) -> None:
    first_stage, contract = load_first_stage(chain.store, chain.first_stage), contract_of(chain.latents)
    networks = build_denoising(chain.recipe, num_classes=15)
    classes = chain.recipe.dataset.classes
    model = assemble(chain.recipe, networks, first_stage, scale=contract.scale, classes=classes)
    stored = corpus(chain)[:4]
    scaled = scaled_latent(first_stage, stored, contract, generator=None)
    with torch.no_grad():
        plain = first_stage.decode(first_stage.latent(stored, None)).clamp(-1, 1)
    torch.testing.assert_close(model.decode(scaled).clamp(-1, 1), plain, atol=1e-4, rtol=1e-3)


def test_latents_keep_the_pictures_order_and_classes(
    chain: Chain, cats: Callable[[str], SampleReader]
) -> None:
    pictures, latents = (reader.fetch(range(40)) for reader in (cats("train"), chain.reader()))
    assert latents["key"] == pictures["key"]
    assert np.array_equal(latents["class_label"], pictures["class_label"])
