import re
import shlex
from itertools import pairwise
from math import isclose

import pytest
import torch

from flows.preflight import check_condition, check_table
from ldm.errors import RecipeError
from ldm.model import build_denoising
from ldm.models.first_stage import IdentityModel, build_first_stage
from ldm.models.unet import build_unet
from ldm.recipe import FIRST_STAGES, RECIPES, load_recipe, read_yaml, recipe_names

OUR_OWN = ["cats-64", "demo"]
PUBLISHED_MODELS = [
    "bsr-sr",
    "celebahq",
    "cin256",
    "cin256-v2",
    "ffhq256",
    "inpainting-big",
    "layout2img-openimages256",
    "lsun-beds256",
    "lsun-churches256",
    "rdm768",
    "semantic-synthesis256",
    "semantic-synthesis512",
    "text2img256",
    "txt2img-1p4b",
]
FACTOR_STUDY = [f"{data}-f{f}" for data in ("celebahq", "imagenet") for f in (1, 2, 4, 8, 16, 32)]
LDM = sorted([*OUR_OWN, *PUBLISHED_MODELS, *FACTOR_STUDY])
# Kinds of condition that cannot be read from shards yet, and the recipes that need them.
NOT_YET = {
    "embeddings": ["rdm768"],
    "layout": ["layout2img-openimages256"],
    "low_res": ["bsr-sr"],
    "masked_image": ["inpainting-big"],
    "segmentation": ["semantic-synthesis256", "semantic-synthesis512"],
}
CATS = ["cats-64-vq-f4", "cats-kl-f4", "cats-vq-f16", "cats-vq-f2", "cats-vq-f4", "cats-vq-f8"]
# Autoencoders of the published configs, counted from the published code (paper Tab. 8).
PUBLISHED = {
    "kl-f4": 55_312_063,
    "kl-f8": 83_653_863,
    "kl-f16": 69_610_963,
    "kl-f32": 103_880_131,
    "vq-f4": 55_322_782,
    "vq-f4-noattn": 53_219_486,
    "vq-f8": 67_717_295,
    "vq-f8-n256": 67_652_783,
    "vq-f16": 69_593_371,
}
# The other rows of Tab. 8: no config was published, so these are counts of our own recipes.
COUNTED_HERE = {
    "kl-f2": 13_314_465,
    "kl-f16-c8": 69_499_371,
    "kl-f32-c16": 103_197_139,
    "vq-f2": 13_313_937,
    "vq-f2-n64": 13_309_969,
    "vq-f4-n256": 55_298_974,
    "vq-f32": 103_384_755,
}
SIZES = PUBLISHED | COUNTED_HERE
OF_THE_PAPER = sorted(SIZES)
BASE_LR = 4.5e-6
# `ldm reproduce celebahq --set dataset.root=FOLDER` with these, on 200 own pictures: minutes on two cores.
SMALL_CELEBAHQ = """
    --set dataset.image_size_px=32
    --set first_stage.model.channels=32 --set first_stage.model.num_codes=256
    --set first_stage.training.num_images=320
    --set unet.model_channels=32 --set unet.channel_mult=[1,2] --set unet.attention_factors=[2]
    --set training.num_images=960 --set sampling.steps=10
"""


def overrides_of(command: str) -> list[str]:
    """The values after --set in a command line."""
    words = shlex.split(command.replace("\\\n#", " "))
    return [word for flag, word in pairwise(words) if flag == "--set"]


def header_command(folder_and_name: str) -> str:
    """The first command in the comment at the head of a YAML."""
    header = re.match(r"(#.*\n)+", (RECIPES / f"{folder_and_name}.yaml").read_text("utf-8"))
    assert header is not None, folder_and_name
    command = re.match(r"#.*?(ldm [a-z-]+ [^\s()]+((?:\\\n#|[^\n()])*))", header.group())
    assert command is not None, folder_and_name
    return command.group(1)


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_recipes_are_those_of_these_lists() -> None:
    assert recipe_names() == LDM
    assert recipe_names(FIRST_STAGES) == sorted([*CATS, *OF_THE_PAPER, "identity"])


@pytest.mark.parametrize("name", LDM)
def test_every_recipe_loads_and_builds(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    unet, side = recipe.unet, recipe.latent_size
    with torch.device("meta"):
        networks = build_denoising(recipe, num_classes=max(recipe.num_classes, 1))
        first_stage = build_first_stage(recipe.first_stage.model)
        z = torch.zeros(1, unet.out_channels, side, side)
        context = torch.zeros(1, 1, unet.context_dim) if unet.context_dim else None
        concat = torch.zeros(1, unet.in_channels - unet.out_channels, side, side)
        assert networks.unet(z, torch.zeros(1), context, concat=concat).shape == z.shape
        size = recipe.dataset.image_size_px
        assert first_stage.decode(z).shape == (1, 3, size, size)


@pytest.mark.parametrize("name", [*LDM, *(f"first_stage/{n}" for n in [*CATS, *OF_THE_PAPER, "identity"])])
def test_the_command_in_a_header_names_its_recipe_and_can_be_run(name: str) -> None:
    command = header_command(name)
    recipe = load_recipe(shlex.split(command)[2], overrides_of(command))
    assert (recipe.first_stage.name if "/" in name else recipe.name) == name.rpartition("/")[2]


@pytest.mark.parametrize("name", [*OF_THE_PAPER, "identity"])
def test_a_header_says_source_hardware_and_what_to_expect(name: str) -> None:
    text = (FIRST_STAGES / f"{name}.yaml").read_text("utf-8")
    for word in ("# Source: paper ", "# Hardware: ", "# Expected: "):
        assert text.count(word) == 1
    assert "Source: paper " in (RECIPES / "celebahq.yaml").read_text("utf-8")


@pytest.mark.parametrize("name", [*PUBLISHED_MODELS, *FACTOR_STUDY])
def test_a_header_of_the_papers_models_says_the_same(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    header = text[: text.index("\nname: ")]
    assert {line[:1] for line in header.splitlines()} == {"#"}
    for word in ("# Source: ", "# Hardware: ", "# Expected: "):
        assert header.count(word) == 1, word


def test_recipes_whose_condition_cannot_be_read_say_so_and_are_refused() -> None:
    for kind, names in NOT_YET.items():
        for name in names:
            assert "# Not yet: shards do not hold " in (RECIPES / f"{name}.yaml").read_text("utf-8")
            with pytest.raises(
                RecipeError, match=rf"kind class_label, class_vector, caption alone .*'{kind}'"
            ):
                check_condition(load_recipe(name))
    for name in sorted(set(LDM) - {name for names in NOT_YET.values() for name in names}):
        check_condition(load_recipe(name))
        assert "Not yet" not in (RECIPES / f"{name}.yaml").read_text("utf-8")


@pytest.mark.parametrize("name", FACTOR_STUDY)
def test_a_recipe_of_the_factor_study_trains_as_long_as_the_paper(name: str) -> None:
    training = load_recipe(name).training
    steps = 2_000_000 if name.startswith("imagenet") else 500_000
    assert training.num_steps * training.batch_size == training.num_images
    assert training.num_steps == steps


def test_every_row_of_the_papers_table_of_first_stages_has_a_recipe() -> None:
    assert len(OF_THE_PAPER) == 16


@pytest.mark.parametrize("name", list(SIZES))
def test_a_first_stage_has_the_published_size_or_the_one_counted_here(name: str) -> None:
    recipe = load_recipe("celebahq", overrides_of(header_command(f"first_stage/{name}")))
    with torch.device("meta"):
        model = build_first_stage(recipe.first_stage.model)
    assert not isinstance(model, IdentityModel)
    assert num_parameters(model) == SIZES[name]


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_a_first_stage_of_the_paper_has_the_factor_of_its_name_and_the_published_rate(name: str) -> None:
    raw = read_yaml(name, FIRST_STAGES, "first stage")
    recipe = load_recipe("celebahq", overrides_of(header_command(f"first_stage/{name}"))).first_stage
    assert recipe.name == name
    assert recipe.model.kind == name[:2]
    assert f"-f{recipe.model.factor}" in name
    assert recipe.training is not None
    assert isclose(recipe.training.lr, BASE_LR * recipe.training.batch_size, rel_tol=1e-9)
    assert recipe.loss.adversarial_start_images % recipe.training.batch_size == 0
    assert raw["training"]["num_images"] % recipe.training.batch_size == 0


def test_celebahq_is_the_papers() -> None:
    recipe = load_recipe("celebahq")
    with torch.device("meta"):
        unet = build_unet(recipe.unet)
    assert num_parameters(unet) == 274_056_163  # paper Tab. 12: 274M
    assert (recipe.latent_size, recipe.first_stage.name) == (64, "vq-f4")
    assert (recipe.training.num_steps, recipe.training.batch_size, recipe.training.lr) == (
        410_000,
        48,
        9.6e-5,
    )
    assert (recipe.diffusion.num_timesteps, recipe.diffusion.linear_start, recipe.diffusion.linear_end) == (
        1000,
        0.0015,
        0.0195,
    )
    assert (recipe.sampling.steps, recipe.sampling.eta, recipe.training.ema_decay) == (200, 0.0, 0.9999)
    assert recipe.conditioning is None


def test_the_demo_keeps_within_its_limit() -> None:
    with torch.device("meta"):
        assert num_parameters(build_unet(load_recipe("demo").unet)) <= 4_500_000


def test_celebahq_shrinks_to_what_two_cores_do_in_minutes() -> None:
    recipe = load_recipe("celebahq", overrides_of(SMALL_CELEBAHQ))
    assert (recipe.dataset.image_size_px, recipe.latent_size) == (32, 8)
    networks = build_denoising(recipe, num_classes=0)
    assert num_parameters(networks) < 2_000_000
    z = torch.zeros(1, 3, 8, 8)
    assert networks.unet(z, torch.zeros(1)).shape == z.shape
    model = build_first_stage(recipe.first_stage.model)
    assert model.decode(model.encode(torch.zeros(1, 3, 32, 32))).shape == (1, 3, 32, 32)


def test_a_table_of_class_vectors_needs_a_row_for_each_class_and_one_for_none() -> None:
    changes = ["conditioning={kind: class_vector}", "unet.context_dim=null"]
    check_table(load_recipe("demo", [*changes, "unet.num_classes=16"]), 15)
    with pytest.raises(
        RecipeError, match=r"unet.num_classes \(15\) must exceed the 15 classes .* set it to 16"
    ):
        check_table(load_recipe("demo", [*changes, "unet.num_classes=15"]), 15)
