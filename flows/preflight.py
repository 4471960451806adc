"""Checks that cost little and spare hours: what a run needs is there before it starts."""

from functools import lru_cache
from pathlib import Path

from datasets.config import DatasetConfig, Folder, UserUrlList
from datasets.image_shards import STAGE as DOWNLOAD_SHARDS
from datasets.image_shards import image_shards_key
from datasets.manifest import Manifest
from datasets.store import Store
from datasets.url_list import ListPlan, UrlList, plan_list
from ldm.conditions import fields_of, reads_captions
from ldm.config import Recipe
from ldm.device import resolve
from ldm.errors import RecipeError
from ldm.evaluation.sets import MIN_SCORED
from ldm.network_config import CaptionConditioning
from ldm.weights import FID_INCEPTION, MINILM, VGG16_LPIPS, locate

READABLE_CONDITIONS = ("class_label", "class_vector", "caption")
"""Kinds of condition that image and latent shards hold."""


@lru_cache(maxsize=4)
def list_of(dataset_json: str) -> ListPlan:
    """The plan of the list of a data set, given as JSON; a folder's pictures are read once in a process."""
    return plan_list(DatasetConfig.model_validate_json(dataset_json))


def planned_list(dataset: DatasetConfig) -> ListPlan:
    """The plan of a data set's list, the same for every stage of a run.

    Raises:
        MissingDataError: the pictures are not where the data set says.
        ConfigError: the classes named do not fit the pictures.
    """
    return list_of(dataset.model_dump_json())


def find_shards(store: Store, dataset: DatasetConfig) -> Manifest | None:
    """The image shards of a data set, when the store has them; nothing is painted, served or fetched."""
    url_list = planned_list(dataset).find(store)
    return store.find(DOWNLOAD_SHARDS, image_shards_key(dataset, url_list)) if url_list else None


def check_data(recipe: Recipe) -> None:
    """Refuse a recipe whose pictures are missing or do not suit it.

    Raises:
        MissingDataError: the pictures are not where the data set says.
        ConfigError: the classes named do not fit the pictures.
        RecipeError: a condition that cannot be read yet, pictures without the classes or captions that it is
            made of, or too few pictures to score with.
    """
    check_condition(recipe)
    check_table(recipe, recipe.num_classes)
    source = recipe.dataset.source
    if reads_captions(recipe.conditioning) and isinstance(source, UserUrlList) and not source.caption_column:
        raise RecipeError(
            f"conditioning 'caption' needs captions, but the list of {recipe.dataset.name} names no column "
            "of them; set dataset.source.caption_column"
        )
    plan = planned_list(recipe.dataset)
    if isinstance(source, Folder):
        check_pictures(recipe, plan.make(Path()))  # a folder's list is in its plan; nothing is made


def check_condition(recipe: Recipe) -> None:
    """Refuse a kind of condition for which no data are read yet; its networks can be built all the same."""
    if recipe.conditioning is not None and recipe.conditioning.kind not in READABLE_CONDITIONS:
        raise RecipeError(
            f"training can read conditions of the kind {', '.join(READABLE_CONDITIONS)} alone so far, got "
            f"{recipe.conditioning.kind!r}, which shards do not hold; choose another recipe (`ldm recipes`), "
            "or set conditioning: null with a UNet to match"
        )


def check_table(recipe: Recipe, num_classes: int) -> None:
    """Refuse a table of class vectors without a row for each class and one for none."""
    rows = recipe.unet.num_classes
    if rows is not None and rows <= num_classes:
        raise RecipeError(
            f"unet.num_classes ({rows}) must exceed the {num_classes} classes of {recipe.dataset.name}, for "
            f"the last row is the null class; set it to {num_classes + 1}"
        )


def check_pictures(recipe: Recipe, pictures: UrlList) -> None:
    """Refuse pictures that training or scoring would refuse hours later."""
    if reads_captions(recipe.conditioning) and not any(row.caption for row in pictures.rows):
        raise RecipeError(
            f"conditioning 'caption' needs captions, but the pictures of {recipe.dataset.name} have none; "
            "put name.txt beside name.png, or set another conditioning"
        )
    if "class_label" in fields_of(recipe.conditioning) and not pictures.classes:
        assert recipe.conditioning is not None
        raise RecipeError(
            f"conditioning {recipe.conditioning.kind!r} needs classes, but the pictures of "
            f"{recipe.dataset.name} have none; put them into one folder per class, or set "
            "conditioning: null, unet: {context_dim: null} and sampling: {guidance: 1}"
        )
    check_table(recipe, len(pictures.classes))
    held_out = sum(row.split == "held_out" for row in pictures.rows)
    if held_out < 2 * MIN_SCORED:
        raise RecipeError(
            f"scores need at least {2 * MIN_SCORED} held-out pictures, but of the {len(pictures.rows)} of "
            f"{recipe.dataset.name} {held_out} are held out; bring more, or raise held_out_share "
            "(--set dataset.source.held_out_share=0.2)"
        )


def check_machine(recipe: Recipe) -> None:
    """Refuse to start without the device, or the packages whose weights a recipe uses.

    Raises:
        RecipeError: the device is not there.
        WeightsError: such a package is missing.
    """
    resolve(recipe.device)
    if recipe.first_stage.training is not None and recipe.first_stage.loss.perceptual_weight > 0:
        locate(VGG16_LPIPS)
    locate(FID_INCEPTION)
    if isinstance(recipe.conditioning, CaptionConditioning) and recipe.conditioning.encoder == "minilm":
        locate(MINILM)
