from pathlib import Path

import pytest
from pydantic import ValidationError

from datasets.errors import ConfigError
from ldm.config import Evaluation, Recipe, require_divisible
from ldm.errors import RecipeError
from ldm.network_config import CaptionConditioning, ClassConditioning
from ldm.recipe import load_recipe, recipe_names
from ldm.training_config import Training

BROKEN = {
    "unequal shards": (
        ["first_stage.training.virtual_shards=3"],
        r"virtual_shards \(3\) must divide batch_size \(16\); use one of 1, 2, 4, 8, 16",
    ),
    "ranks without shards": (
        ["training.virtual_shards=4", "training.ranks=3"],
        r"ranks \(3\) must be a power of two .*; use ranks of 1, 2, 4, or virtual_shards=4",
    ),
    "more ranks than shards": (["training.ranks=2"], r"use ranks of 1, or virtual_shards=2, which trains to"),
    "patience without validation": (
        ["first_stage.validation.every_images=0", "first_stage.validation.patience=2"],
        r"validation\.patience needs validations, got validation\.every_images=0; set it",
    ),
    "rFID of three": (
        ["first_stage.validation.rfid=true", "first_stage.validation.num_images=3"],
        r"validation\.rfid needs validation\.num_images of at least 4, got 3; set it higher",
    ),
    "no codebook": (
        ["first_stage.model.num_codes=null"],
        r"first_stage\.model: a VQ first stage needs num_codes, .*; set model\.num_codes",
    ),
    "identity with levels": (
        ["first_stage.model.kind=identity"],
        r"first_stage\.model: an identity first stage has f = 1 and 3 channels; leave .* out",
    ),
    "first stage's groups": (
        ["first_stage.model.norm_groups=5"],
        r"channels \* channel_mult \(32 \* 1\) must be divisible by norm_groups \(5\); choose widths",
    ),
    "first stage without training": (
        ["first_stage.training=null"],
        r"first stage 'cats-vq-f4' has weights, so it needs a `training` section",
    ),
    "no whole batch": (
        ["training.num_images=10"],
        r"training: num_images \(10\) must reach one batch \(32\); set it higher",
    ),
    "heads twice": (["unet.num_heads=4"], r"unet: give exactly one of head_channels and num_heads"),
    "heads never": (["unet.head_channels=null"], r"unet: give exactly one of head_channels and num_heads"),
    "unet's groups": (
        ["unet.norm_groups=48"],
        r"model_channels \* channel_mult \(64 \* 1\) must be divisible by norm_groups \(48\)",
    ),
    "size and f": (
        ["dataset.image_size_px=34"],
        r"dataset\.image_size_px \(34\) must be divisible by 4 \(the first stage's f\); use 32 or 36",
    ),
    "latent and levels": (
        ["dataset.image_size_px=36"],
        r"the latent's side \(9\) must be divisible by 2 \(the UNet's levels\); use 8 or 10",
    ),
    "unet's channels": (
        ["unet.in_channels=3"],
        r"unet\.out_channels \(3, 4\) must equal the latent's channels, .*embed_dim \(4\)",
    ),
    "condition's width": (
        ["conditioning.context_dim=64"],
        r"unet\.context_dim \(128\) must equal conditioning\.context_dim \(64\)",
    ),
    "head count without transformers": (
        [
            "conditioning=null",
            "sampling.guidance=1",
            "unet.context_dim=null",
            "unet.one_head_transformers=true",
        ],
        r"unet: one_head_transformers is for transformers, and without context_dim there are none",
    ),
    "concatenated channels": (
        ["conditioning={kind: masked_image}", "unet.context_dim=null", "sampling.guidance=1"],
        r"must equal the latent's channels, .*embed_dim \(4\), in_channels with the condition's 5 on top",
    ),
    "condition of another size": (
        ["conditioning={kind: low_res, factor: 8}", "unet.context_dim=null", "unet.in_channels=7"],
        r"a low_res condition comes at 1/8 of the picture's side, .*1/4; choose a first stage of f = 8",
    ),
    "class vectors without a table": (
        ["conditioning={kind: class_vector}", "unet.context_dim=null"],
        r"unet\.num_classes \(None\) belongs to `conditioning: \{kind: class_vector\}`; set both or neither",
    ),
    "a table of class vectors alone": (
        ["unet.num_classes=16"],
        r"unet\.num_classes \(16\) belongs to `conditioning: \{kind: class_vector\}`; set both or neither",
    ),
    "guidance without a null class": (
        ["conditioning.null_class=false", "conditioning.drop_rate=0"],
        r"sampling\.guidance \(1\.5\) needs `conditioning` with a null condition and a drop_rate above 0",
    ),
    "guidance with a null class that is never trained": (
        ["conditioning.drop_rate=0"],
        r"sampling\.guidance \(1\.5\) needs `conditioning` with a null .* which trains it; use 1 without",
    ),
    "dropping without a null class": (
        ["conditioning.null_class=false"],
        r"conditioning: drop_rate \(0\.1\) replaces labels by the null class; set it to 0, or null_class",
    ),
    "unknown kind of condition": (
        ["conditioning.kind=depth"],
        r"conditioning: .*'depth' .*expected tags: 'class_label', 'class_vector', 'caption', 'layout'",
    ),
    "unknown key of a condition": (
        ["conditioning.drop=0"],
        r"unknown key 'conditioning\.drop'; did you mean 'drop_rate'\?",
    ),
    "key of another kind of condition": (
        ["conditioning={kind: low_res, context_dim: 3}"],
        r"unknown key 'conditioning\.context_dim'; known: channels, drop_rate, factor, kind",
    ),
    "width of the frozen encoder": (
        ["conditioning={kind: caption, encoder: minilm}"],
        r"conditioning: the encoder minilm has context_dim 384 and vocab_size 30522, got 1280 and 30522",
    ),
    "condition without attention": (
        ["unet.context_dim=null"],
        r"unet\.context_dim \(None\) must equal conditioning\.context_dim \(128\)",
    ),
    "out of range": (["training.lr=-1"], r"training\.lr: Input should be greater than 0, got -1"),
    "wrong type": (["training.batch_size=many"], r"training\.batch_size: .*integer.*, got 'many'"),
    "unknown key": (
        ["training.num_image=9"],
        r"unknown key 'training\.num_image'; did you mean 'num_images'\?",
    ),
    "unknown section": (["trainign.num_images=9"], r"unknown key 'trainign'; did you mean 'training'\?"),
    "unknown key of the data": (
        ["dataset.source.trains=9"],
        r"unknown key 'dataset\.source\.trains'; did you mean 'train'\?",
    ),
    "unknown key, none like it": (["encoding.xyz=1"], r"'encoding\.xyz'; known: dtype, micro_batch"),
    "unknown choice": (
        ["sampling.sampler=ddimm"],
        r"sampling\.sampler: Input should be 'ddim', .*got 'ddimm'",
    ),
    "eta of a sampler without": (
        ["sampling.sampler=plms", "sampling.eta=0.5"],
        r"eta \(0\.5\) is the noise of sampler ddim, and plms has none to set; use eta=0",
    ),
    "ancestral sampling with steps left out": (
        ["sampling.sampler=ddpm"],
        r"sampling\.steps \(30\) must be diffusion\.num_timesteps \(1000\) for sampler ddpm, .*; use",
    ),
    "as many steps as time steps": (
        ["sampling.steps=1000"],
        r"sampling\.steps \(1000\) must be below diffusion\.num_timesteps \(1000\) .*; use at most 999",
    ),
    "guidance without guidance": (
        ["sampling.guidance=1", "sampling.guidance_rescale=0.5"],
        r"guidance_rescale \(0\.5\) need guidance, and a guidance of 1 is none; set guidance",
    ),
    "falling interval": (
        ["sampling.guidance_interval=[800, 200]"],
        r"guidance_interval \(800, 200\) must rise; give the lower",
    ),
    "falling betas": (
        ["diffusion.linear_start=0.5"],
        r"linear_start \(0\.5\) must not exceed linear_end \(0\.0195\)",
    ),
    "two ways to weigh": (
        ["diffusion.weighting=min_snr", "diffusion.loss=l1"],
        r"min_snr is made for squared errors .* got loss=l1, .*; use loss=l2",
    ),
    "end of a fall that there is not": (
        ["training.decay_images=100"],
        r"decay_images \(100\) belongs to lr_schedule warmup_cosine, got cosine; leave it out",
    ),
    "warm-up after the fall": (
        ["training.lr_schedule=warmup_cosine", "training.decay_images=100"],
        r"warmup_images \(2000\) must end before the learning rate has fallen, at 100 images",
    ),
    "mirrored latents": (
        ["training.mirror=true"],
        r"training\.mirror is for pictures, .*; .* set encoding\.orientations=\[as_is, mirrored\]",
    ),
    "no assignment": (["training.num_images"], r"--set takes key=value .*, got 'training\.num_images'"),
    "empty key": (["training..num_images=1"], r"--set takes key=value .*, got 'training\.\.num_images=1'"),
    "no YAML": (
        ["unet.channel_mult=[1,2"],
        r"the value of --set unet\.channel_mult= must be YAML, got '\[1,2'",
    ),
    "unknown first stage": (
        ["first_stage=cats-vq-f44"],
        r"unknown first stage 'cats-vq-f44': known are .*Did you mean 'cats-vq-f4'\?",
    ),
    "no name": (["dataset=[cats]"], r"`dataset` and `first_stage` take a name, or a mapping with one"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_recipe_is_refused_with_rule_value_and_cure(case: str) -> None:
    overrides, message = BROKEN[case]
    with pytest.raises(RecipeError, match=message):
        load_recipe("demo", overrides)


def test_all_broken_rules_are_told_at_once() -> None:
    with pytest.raises(RecipeError, match=r"training\.lr: .*; sampling\.steps: .*"):
        load_recipe("demo", ["training.lr=0", "sampling.steps=0"])


def test_an_unknown_recipe_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'dmeo': known are .*demo.* Did you mean 'demo'\?"):
        load_recipe("dmeo")


def test_an_unknown_data_set_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"got 'dogs'; known names: cats, celebahq"):
        load_recipe("demo", ["dataset=dogs"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", r"must hold a mapping of settings, got list"), ("a: [", r"must be a readable YAML")],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


def test_overrides_reach_the_data_set_and_the_first_stage() -> None:
    recipe = load_recipe(
        "demo",
        ["dataset.source.train=7", "first_stage.training.lr=0.5", "training.betas=[0.1, 0.2]", "threads=1"],
    )
    plain = load_recipe("demo")
    assert recipe.dataset.source.train == 7  # pyright: ignore[reportAttributeAccessIssue]
    assert recipe.first_stage.training is not None
    assert recipe.first_stage.training.lr == 0.5
    assert recipe.training.betas == (0.1, 0.2)
    assert recipe.first_stage.model == plain.first_stage.model
    assert recipe.unet == plain.unet


def test_a_condition_of_another_kind_replaces_the_whole_one() -> None:
    changes = ["conditioning={kind: caption, encoder: minilm, context_dim: 384}", "unet.context_dim=384"]
    conditioning = load_recipe("demo", changes).conditioning
    assert conditioning == CaptionConditioning(kind="caption", encoder="minilm", context_dim=384)
    same_kind = load_recipe("demo", ["conditioning={kind: class_label, drop_rate: 0.5}"]).conditioning
    assert same_kind == ClassConditioning(kind="class_label", context_dim=128, drop_rate=0.5)


def test_a_field_named_like_a_kind_keeps_its_place_in_messages() -> None:
    with pytest.raises(RecipeError, match=r"dataset\.source\.layout: Input should be a valid string, got 3"):
        load_recipe("demo", ["dataset={name: own, source: {kind: folder, layout: 3}, image_size_px: 32}"])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_comes_back_from_its_own_values(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("demo").training.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_recipe_comes_back_from_its_own_values() -> None:
    recipe = load_recipe("demo")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_steps_are_whole_batches() -> None:
    assert Training(num_images=100, batch_size=32, lr=1.0).num_steps == 3


def test_neighbours_that_would_do_are_named() -> None:
    require_divisible("size", 64, 8, "why")
    with pytest.raises(ValueError, match=r"size \(3\) must be divisible by 8 \(why\); use 8$"):
        require_divisible("size", 3, 8, "why")


def test_scores_need_some_pictures() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to"):
        Evaluation(num_images=1)
