"""Finds a trained model by what people call it, and the recipe it was trained by."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from datasets.manifest import Manifest
from datasets.store import Store
from flows.invocation import Invocation
from flows.tracking import open_tracker
from ldm.config import Recipe
from ldm.errors import ModelNotFoundError, RecipeError
from ldm.recipe import load_recipe, merge, parse_override, parse_recipe
from ldm.stored_models import IMPORT_MODEL

TRAIN_FIRST_STAGE = "train-first-stage"
TRAIN_LDM = "train-ldm"
MAKES = {
    TRAIN_FIRST_STAGE: "`ldm train-first-stage RECIPE`",
    TRAIN_LDM: "`ldm train-ldm RECIPE`",
    IMPORT_MODEL: "`ldm import --register NAME`",
}
"""Stages that leave models, and the commands that run them."""
KEY_DIGITS = re.compile(r"[0-9a-f]{6,64}")
AFTER_TRAINING = {"evaluation", "sampling"}
"""Sections of a recipe that say nothing about how a model was made."""


def find_model(store: Store, spec: str) -> Manifest:
    """The trained model of a registered `name` or `name@alias`, or of a key's first digits.

    Raises:
        ModelNotFoundError: there is none; the message names those there are.
    """
    return find_registered(store, spec, TRAIN_LDM)


def find_registered(store: Store, spec: str, *stages: str) -> Manifest:
    """The artifact of one of these stages by registered `name` or `name@alias`, or by a key's first digits.

    Raises:
        ModelNotFoundError: there is none; the message names those there are.
    """
    models = [manifest for stage in stages for manifest in store.manifests(stage)]
    by_key = [m for m in models if KEY_DIGITS.fullmatch(spec) and m.key.startswith(spec)]
    if len(by_key) == 1:
        return by_key[0]
    version = open_tracker(store).resolve_model(spec) if models else None
    for manifest in models:
        if version is not None and manifest.digest == version["digest"]:
            return manifest
    known = ", ".join(sorted(f"{name_of(m)} (key {m.short})" for m in models))
    cures = " or ".join(MAKES[stage] for stage in stages)
    raise ModelNotFoundError(
        f"no model {spec!r} in {store.uri}; known: {known or 'none'}; make one with {cures}"
    )


def name_of(manifest: Manifest) -> str:
    """What a model is registered as."""
    recipe = stored_recipe(manifest)
    if manifest.stage == TRAIN_FIRST_STAGE:
        return f"first-stage-{recipe.get('first_stage', {}).get('name')}"
    return f"ldm-{recipe.get('name')}" if manifest.stage == TRAIN_LDM else manifest.provenance["name"]


def find_model_of(store: Store, recipe: str, spec: str) -> Manifest:
    """Like `find_model`; `spec` may also be a bare alias such as `candidate`, of that recipe's own model.

    Raises:
        ModelNotFoundError: there is none; the message names those there are.
    """
    is_alias = "@" not in spec and not spec.startswith("ldm-") and not KEY_DIGITS.fullmatch(spec)
    return find_model(store, f"ldm-{load_recipe(recipe).name}@{spec}" if is_alias else spec)


def ancestry(store: Store, manifest: Manifest) -> dict[str, Manifest]:
    """An artifact and all it was made of, by stage.

    Raises:
        ModelNotFoundError: one of them is no longer in the store.
    """
    found = {manifest.stage: manifest}
    for role, parent in manifest.content.parents.items():
        above = store.find(parent.stage, parent.key)
        if above is None:
            raise ModelNotFoundError(
                f"a model needs all it was made of, but the {role} of {manifest.stage} {manifest.short}, "
                f"{parent.stage} {parent.key[:12]}, is not in {store.uri}; train the model again"
            )
        found |= ancestry(store, above)
    return found


def stored_recipe(model: Manifest) -> Mapping[str, Any]:
    """The resolved recipe that a model was made by, as plain values."""
    return model.provenance.get("recipe", {})


def asked_for(manifest: Manifest) -> Invocation | None:
    """What the run that made an artifact was asked for; None when it does not say."""
    try:
        return Invocation.model_validate(manifest.provenance.get("asked"))
    except ValidationError:
        return None


def recipe_of(model: Manifest, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe a model was made by, with overrides for what comes after training.

    Raises:
        RecipeError: an override of what training has fixed, or a value that breaks a rule.
    """
    raw = dict(stored_recipe(model))
    for override in overrides:
        value = parse_override(override)
        if not set(value) <= AFTER_TRAINING:
            raise RecipeError(
                f"of a trained model only {' and '.join(sorted(AFTER_TRAINING))} can be set, "
                f"got {override!r}; leave it out, or train another model"
            )
        raw = merge(raw, value)
    return parse_recipe(raw, source=f"of model {model.short}")
