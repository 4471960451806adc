"""A trained model as one object."""

import torch

from ldm.model import assemble, build_denoising, load_first_stage


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
        found[objective] = model.predict(x_t, t, model.condition(torch.tensor([0, 1])))
    assert not found["eps"].any()  # an untrained UNet gives zeros
    alpha_bar = model.schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(found["v"], (1 - alpha_bar).sqrt() * x_t)
