"""The stages that make an artifact out of others: what decides their result, and how it is made.

Each module holds one `Stage`. Chaining them, and deciding what to reuse, is the business of `flows`.
"""

from ldm.stages.encode_latents import ENCODE_LATENTS
from ldm.stages.evaluate import EVALUATE
from ldm.stages.evaluate_first_stage import EVALUATE_FIRST_STAGE
from ldm.stages.stage import Stage
from ldm.stages.train_first_stage import TRAIN_FIRST_STAGE
from ldm.stages.train_ldm import TRAIN_LDM

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (TRAIN_FIRST_STAGE, EVALUATE_FIRST_STAGE, ENCODE_LATENTS, TRAIN_LDM, EVALUATE)
}
"""Every stage that needs a recipe's models, by name."""
