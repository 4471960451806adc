"""Configs of the 14 published models, of our recipes' values: they are read, and ask for all their keys.

Everything is built on the meta device: nothing is allocated.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.bridge.compvis_ldm import EMA_STATE, checkpoint_layout
from ldm.bridge.compvis_ldm_config import latent_diffusion_config, may_have_one_head
from ldm.bridge.compvis_ldm_output import published_diffusion_config
from ldm.bridge.section import Section
from ldm.model_config import LatentDiffusionModel
from ldm.network_config import ClassConditioning
from ldm.recipe import load_recipe

pytestmark = pytest.mark.parity

LAYOUTS = Path(__file__).parent / "fixtures" / "layouts"
# Recipe -> its layout, keys of its checkpoint (all of its averages too), and what recipes do not say.
PUBLISHED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "celebahq": ("celeba256", 955, {}),
    "ffhq256": ("celeba256", 955, {}),
    "lsun-beds256": ("celeba256", 955, {}),
    "lsun-churches256": ("lsun_churches256", 1303, {"scale_by_std": True}),
    "cin256": ("cin256", 1566, {}),
    "cin256-v2": ("cin256-v2", 906, {"use_ema": False}),
    "text2img256": ("text2img256", 2017, {}),
    "txt2img-1p4b": ("txt2img-1p4B", 1368, {"use_ema": False, "scale_factor": 0.18215}),
    "layout2img-openimages256": ("layout2img-openimages256", 3089, {}),
    "bsr-sr": ("bsr_sr", 831, {}),
    "inpainting-big": ("inpainting_big", 1216, {}),
    "semantic-synthesis256": ("semantic_synthesis256", 652, {}),
    "semantic-synthesis512": ("semantic_synthesis256", 652, {}),
    "rdm768": ("rdm768x768", 1732, {"scale_factor": 0.22765929}),
}
ONE_HEAD = {"cin256", "text2img256", "layout2img-openimages256"}


def model_of(name: str) -> LatentDiffusionModel:
    """The networks and noise of a recipe, as an imported model has them."""
    recipe, (*_, more) = load_recipe(name), PUBLISHED[name]
    return LatentDiffusionModel(
        first_stage=recipe.first_stage.model.model_copy(update={"beta": 0.25}),
        unet=recipe.unet,
        conditioning=recipe.conditioning,
        num_classes=1000 if isinstance(recipe.conditioning, ClassConditioning) else 0,
        diffusion=recipe.diffusion,
        scale=more.get("scale_factor", 1.0),
        latent_size=recipe.latent_size,
    )


def published(name: str) -> Section:
    """The published YAML of a recipe, through its text; heads are said as the released configs do."""
    *_, more = PUBLISHED[name]
    by_std, use_ema = more.get("scale_by_std", False), more.get("use_ema", True)
    raw = published_diffusion_config(model_of(name), scale_in_checkpoint=by_std, use_ema=use_ema)
    if name in ONE_HEAD:
        unet = raw["model"]["params"]["unet_config"]["params"]
        del unet["num_heads"]
        unet["num_head_channels"] = 32
    return Section("config.yaml", "", yaml.safe_load(yaml.safe_dump(raw))).section("model")


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_published_config_is_read_as_the_recipe_has_it(name: str) -> None:
    read = latent_diffusion_config(published(name), one_head=name in ONE_HEAD)
    wanted = model_of(name)
    same = {
        field: getattr(read, field) == getattr(wanted, field) for field in LatentDiffusionModel.model_fields
    }
    rates = [None if m.conditioning is None else m.conditioning.drop_rate for m in (read, wanted)]
    if rates[0] != rates[1]:  # a config does not say how often conditions were left out
        same["conditioning"] = read.conditioning == wanted.conditioning.model_copy(  # pyright: ignore
            update={"drop_rate": rates[0]}
        )
    assert [field for field, equal in same.items() if not equal] == []


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """A nested layout as names and shapes."""
    names = {}
    for name, value in tree.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: tuple(value)}
        names |= inner
    return names


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_published_config_asks_for_every_key_of_its_checkpoint(name: str) -> None:
    layout, num_keys, more = PUBLISHED[name]
    use_ema = more.get("use_ema", True)
    config = latent_diffusion_config(published(name), one_head=False).model_copy(update={"has_ema": use_ema})
    found = checkpoint_layout(config, scale_in_checkpoint=more.get("scale_by_std", False))
    assert len(found) + len(EMA_STATE) * use_ema == num_keys
    expected = flat(json.loads((LAYOUTS / f"{layout}.json").read_text("utf-8")))
    assert {key: found.get(key) for key in expected} == expected


def test_the_models_whose_config_leaves_the_heads_open_are_known() -> None:
    assert {name for name in PUBLISHED if may_have_one_head(published(name))} == {*ONE_HEAD, "rdm768"}
