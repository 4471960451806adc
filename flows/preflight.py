"""Checks that cost nothing and spare hours: what a run needs is there before it starts."""

from datasets.image_shards import plan_list
from ldm.config import Recipe
from ldm.weights import FID_INCEPTION, VGG16_LPIPS, locate


def preflight(recipe: Recipe) -> None:
    """Raise the error that a later stage would raise hours from now.

    Raises:
        MissingDataError: the pictures are not where the data set says.
        WeightsError: a package with weights is missing.
    """
    plan_list(recipe.dataset)
    if recipe.first_stage.loss.perceptual_weight > 0:
        locate(VGG16_LPIPS)
    locate(FID_INCEPTION)
