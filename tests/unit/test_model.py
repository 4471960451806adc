"""A trained model as one object."""

import pytest
import torch

from ldm.errors import ContractError
from ldm.latent_diffusion import assemble
from ldm.model import Autoencoder, build_denoising, load_first_stage
from ldm.models.first_stage import VQModel


def test_predict_gives_the_noise_whatever_the_unet_was_trained_to_give(vq_chain, tiny_recipe) -> None:
    draws = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 4, 8, 8, generator=draws), torch.tensor([300, 900])
    found = {}
    for objective in ("eps", "v"):
        recipe = tiny_recipe(f"diffusion.objective={objective}")
        torch.manual_seed(0)
        networks = build_denoising(recipe, num_classes=15)
        first_stage = load_first_stage(vq_chain.store, vq_chain.first_stage)
        model = assemble(recipe, networks, first_stage, scale=1.0, classes=recipe.dataset.classes)
        found[objective] = model.predict(x_t, t, model.condition(class_label=torch.tensor([0, 1])))
    assert not found["eps"].any()  # an untrained UNet gives zeros
    alpha_bar = model.schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(found["v"], (1 - alpha_bar).sqrt() * x_t)


def test_codes_decode_to_what_their_latents_decode_to(vq_chain) -> None:
    config = vq_chain.recipe.first_stage.model
    model = Autoencoder(load_first_stage(vq_chain.store, vq_chain.first_stage), config)
    assert isinstance(model.first_stage, VQModel)
    indices = torch.randint(config.num_codes, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    pictures = model.decode_codes(indices)
    assert pictures.shape == (2, 3, 16, 24)
    torch.testing.assert_close(pictures, model.decode(model.first_stage.quantize.lookup(indices)))


def test_codes_that_the_codebook_lacks_are_refused(vq_chain, kl_chain) -> None:
    vq, kl = (
        Autoencoder(load_first_stage(chain.store, chain.first_stage), chain.recipe.first_stage.model)
        for chain in (vq_chain, kl_chain)
    )
    for wrong in (32, -1):
        indices = torch.tensor([[[0, 31], [wrong, 99]]])
        with pytest.raises(ContractError, match=f"must be 0 to 31, got {wrong} and 1 others"):
            vq.decode_codes(indices)
    with pytest.raises(ContractError, match=r"\(B, h, w\) int64, got \(1, 2\) torch.float32"):
        vq.decode_codes(torch.zeros(1, 2))
    with pytest.raises(ContractError, match="only a VQ first stage has codes, this one is of kind kl"):
        kl.decode_codes(torch.zeros(1, 2, 2, dtype=torch.int64))
