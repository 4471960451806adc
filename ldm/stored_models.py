"""Models of a store as what a model folder holds: those trained there, and those imported into it."""

from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from datasets.keys import artifact_key
from datasets.manifest import Content, Manifest
from datasets.store import Store
from ldm.config import Recipe
from ldm.errors import CheckpointError, ContractError, ModelNotFoundError
from ldm.first_stage_config import FirstStageModel
from ldm.latent_diffusion import LatentDiffusion
from ldm.model import WEIGHTS, first_stage_weights
from ldm.model_config import Weights, model_config_of
from ldm.model_folder import (
    CARD,
    AnyStored,
    Origin,
    StoredDiffusion,
    StoredModel,
    latent_diffusion_of,
    model_of_card,
    parse_card,
    read_model_folder,
)

RAW = "raw.safetensors"
"""File of the weights of the last training step, beside the averaged ones."""
IMPORT_MODEL = "import-model"
"""Stage of what `register_folder` makes."""
IMPORT_VERSION = 1


def stored_first_stage(store: Store, manifest: Manifest) -> StoredModel:
    """The first stage that training left in a store, with its averaged weights.

    Raises:
        CheckpointError: it is the identity, which has no weights.
    """
    config = FirstStageModel.model_validate(manifest.content.what["model"])
    if config.kind == "identity":
        raise CheckpointError("an exported first stage must have weights, and kind identity has none")
    return StoredModel(config, load(store.read(manifest, WEIGHTS)), origin_of(manifest, WEIGHTS))


def stored_diffusion(
    store: Store, manifest: Manifest, recipe: Recipe, *, weights: Weights | None = None
) -> StoredDiffusion:
    """The latent diffusion model that training left in a store, with one set of weights.

    Args:
        store: where it lies.
        manifest: of its artifact.
        recipe: by which it was trained.
        weights: averaged by default, the conditioning encoder with the UNet; or those of the last step.

    Raises:
        ModelNotFoundError: its first stage is not in the store.
        ContractError: another first stage is in its place.
    """
    parent = manifest.content.parents["first_stage"]
    first_stage = store.find(parent.stage, parent.key)
    if first_stage is None:
        raise ModelNotFoundError(
            f"the first stage {parent.key[:12]} of model {manifest.short} is not in {store.uri}; "
            "train the model again"
        )
    require_first_stage(manifest, first_stage)
    facts = manifest.content.statistics
    config = model_config_of(recipe, scale=facts["scale"], classes=facts["classes"])
    # what weighed the loss stays in training, and sampling has no use for it
    diffusion = config.diffusion.model_copy(update={"learn_log_variance": False})
    name = RAW if weights == "raw" else WEIGHTS
    return StoredDiffusion(
        config=config.model_copy(update={"diffusion": diffusion}),
        weights=load(store.read(manifest, name)),
        first_stage=first_stage_weights(store, first_stage),
        ema={},
        origin=origin_of(manifest, name),
    )


def require_first_stage(manifest: Manifest, first_stage: Manifest) -> None:
    """Refuse to decode with another first stage than the one whose latents a model was trained on.

    Raises:
        ContractError: naming both.
    """
    needed = manifest.content.parents["first_stage"].digest
    if first_stage.digest != needed:
        raise ContractError(
            f"first_stage: model {manifest.short} was trained on latents of {needed[:12]}, but is to be "
            f"decoded by {first_stage.digest[:12]}; train it again on latents of this first stage"
        )


def load_model(
    store: Store, manifest: Manifest, recipe: Recipe, *, weights: Weights | None = None
) -> LatentDiffusion:
    """`stored_diffusion` ready for use."""
    return latent_diffusion_of(stored_diffusion(store, manifest, recipe, weights=weights))


def origin_of(manifest: Manifest, name: str) -> Origin:
    """Where the weights in a file of an artifact come from."""
    return Origin(format="artifact", file=manifest.key, sha256=manifest.file(name).sha256)


def store_folder(store: Store, folder: Path, *, name: str) -> Manifest:
    """The artifact of a model folder; storing the same model again gives the same one.

    Args:
        store: where to.
        folder: of the model.
        name: what it is called in listings.

    Raises:
        CheckpointError: see `read_model_folder`.
    """
    read_model_folder(folder)
    card = parse_card((folder / CARD).read_bytes(), source=str(folder / CARD))
    what = card.model_dump(mode="json")
    key = artifact_key(IMPORT_MODEL, IMPORT_VERSION, what=what, parents={})
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    store.require_free(num_bytes, purpose=IMPORT_MODEL)
    files = [store.put_file(IMPORT_MODEL, key, file, folder / file) for file in (CARD, *card.files)]
    content = Content(
        IMPORT_MODEL, key, IMPORT_VERSION, what=what, parents={}, files=tuple(files), statistics={}
    )
    return store.commit(content, {"name": name})


def imported_model(store: Store, manifest: Manifest) -> AnyStored:
    """What `store_folder` stored.

    Raises:
        CheckpointError: another version of this program wrote it.
    """
    card = parse_card(store.read(manifest, CARD), source=f"{CARD} of {manifest.short}")
    parts: dict[str, dict[str, Tensor]] = {name: load(store.read(manifest, name)) for name in card.files}
    return model_of_card(card, parts, what=f"{IMPORT_MODEL} {manifest.short}")
