"""Our networks have the published ones' parameters: name for name, shape for shape, number for number.

The layouts are `model.diffusion_model.*` and `cond_stage_model.*` of the published models, see
fixtures/layouts/README.md. Everything is built on the meta device: nothing is allocated.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.model import Denoising, build_denoising
from ldm.models.first_stage import IdentityModel, build_first_stage
from ldm.recipe import load_recipe

pytestmark = pytest.mark.parity

LAYOUTS = Path(__file__).parent / "fixtures" / "layouts"
# Recipe -> layout, and the parameters of UNet and conditioning encoder, counted from the published code.
PUBLISHED = {
    "celebahq": ("celeba256", 274_056_163, 0),
    "ffhq256": ("celeba256", 274_056_163, 0),
    "lsun-beds256": ("celeba256", 274_056_163, 0),
    "lsun-churches256": ("lsun_churches256", 294_966_916, 0),
    "cin256": ("cin256", 394_984_196, 512_000),
    "cin256-v2": ("cin256-v2", 400_920_579, 512_512),
    "text2img256": ("text2img256", 403_623_939, 186_154_682),
    "txt2img-1p4b": ("txt2img-1p4B", 872_300_484, 581_994_042),
    "layout2img-openimages256": ("layout2img-openimages256", 246_277_379, 58_858_496),
    "bsr-sr": ("bsr_sr", 113_622_563, 0),
    "inpainting-big": ("inpainting_big", 387_245_827, 0),
    "semantic-synthesis256": ("semantic_synthesis256", 215_229_315, 546),
    "semantic-synthesis512": ("semantic_synthesis256", 215_229_315, 546),
    "rdm768": ("rdm768x768", 1_335_480_400, 0),
}
# Recipe -> parameters of the UNet (paper Tab. 13, 14), counted from the published code at the tables' values.
FACTOR_STUDY = {
    "imagenet-f1": 396_835_971,
    "imagenet-f2": 390_888_578,
    "imagenet-f4": 400_920_579,
    "imagenet-f8": 394_984_196,
    "imagenet-f16": 395_002_632,
    "imagenet-f32": 395_113_248,
    "celebahq-f1": 270_458_115,
    "celebahq-f2": 264_510_722,
    "celebahq-f4": 274_056_163,
    "celebahq-f8": 257_733_124,
    "celebahq-f16": 257_751_560,
    "celebahq-f32": 257_862_176,
}
NUM_CLASSES = 1000


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """A nested layout as names and shapes."""
    names = {}
    for name, value in tree.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: tuple(value)}
        names |= inner
    return names


@cache
def networks_of(name: str) -> Denoising:
    with torch.device("meta"):
        return build_denoising(load_recipe(name), num_classes=NUM_CLASSES)


def shapes(module: torch.nn.Module | None, prefix: str) -> dict[str, tuple[int, ...]]:
    state = {} if module is None else module.state_dict()
    return {prefix + name: tuple(value.shape) for name, value in state.items()}


def num_parameters(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def test_every_layout_is_compared_and_all_are_small() -> None:
    names = {path.stem: path.stat().st_size for path in LAYOUTS.glob("*.json")}
    assert names.keys() >= {layout for layout, *_ in PUBLISHED.values()}
    assert sum(names.values()) < 1_000_000
    assert len(PUBLISHED) == 14
    assert len(FACTOR_STUDY) == 12


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_networks_have_the_published_names_and_shapes(name: str) -> None:
    layout, *_ = PUBLISHED[name]
    expected = flat(json.loads((LAYOUTS / f"{layout}.json").read_text("utf-8")))
    networks = networks_of(name)
    found = shapes(networks.unet, "model.diffusion_model.") | shapes(
        networks.conditioner, "cond_stage_model."
    )
    assert len(expected) > 200
    assert sorted(found.items() ^ expected.items()) == []


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_networks_have_the_published_size(name: str) -> None:
    _, unet, conditioner = PUBLISHED[name]
    networks = networks_of(name)
    assert (num_parameters(networks.unet), num_parameters(networks.conditioner)) == (unet, conditioner)


@pytest.mark.parametrize("name", list(FACTOR_STUDY))
def test_a_unet_of_the_factor_study_has_the_papers_size_and_fits_its_first_stage(name: str) -> None:
    recipe = load_recipe(name)
    assert num_parameters(networks_of(name).unet) == FACTOR_STUDY[name]
    assert recipe.first_stage.model.factor == int(name.rpartition("-f")[2])
    with torch.device("meta"):
        first_stage = build_first_stage(recipe.first_stage.model)
        size, side = recipe.dataset.image_size_px, recipe.latent_size
        z = torch.zeros(1, recipe.first_stage.model.embed_dim, side, side)
        assert first_stage.decode(z).shape == (1, 3, size, size)
    assert isinstance(first_stage, IdentityModel) == name.endswith("-f1")
