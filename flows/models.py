"""Finds a trained model by what people call it, and the recipe it was trained by."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets.manifest import Manifest
from datasets.store import Store
from ldm.config import Recipe
from ldm.errors import ModelNotFoundError
from ldm.recipe import merge, parse_override, parse_recipe
from ldm.tracking import Tracker, tracking_uri

TRAIN_LDM = "train-ldm"


def open_tracker(store: Store) -> Tracker:
    """The tracker beside a store, or the one that MLFLOW_TRACKING_URI names."""
    return Tracker(tracking_uri(store.local_root))


def find_model(store: Store, spec: str) -> Manifest:
    """The model artifact of a registered `name` or `name@alias`, or of a key's first digits.

    Raises:
        ModelNotFoundError: there is none; the message names those there are.
    """
    models = store.manifests(TRAIN_LDM)
    by_key = [m for m in models if len(spec) >= 6 and m.key.startswith(spec)]
    if len(by_key) == 1:
        return by_key[0]
    version = open_tracker(store).resolve_model(spec)
    for manifest in models:
        if version is not None and manifest.digest == version["digest"]:
            return manifest
    known = ", ".join(sorted(f"ldm-{stored_recipe(m).get('name')} (key {m.short})" for m in models))
    raise ModelNotFoundError(
        f"no model {spec!r} in {store.uri}; known: {known or 'none'}; train one with `ldm train-ldm RECIPE`"
    )


def stored_recipe(model: Manifest) -> Mapping[str, Any]:
    """The resolved recipe that a model was made by, as plain values."""
    return model.provenance.get("recipe", {})


def recipe_of(model: Manifest, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe a model was made by, with overrides for what comes after training."""
    raw = dict(stored_recipe(model))
    for override in overrides:
        raw = merge(raw, parse_override(override))
    return parse_recipe(raw, source=f"of model {model.short}")


def recipe_of_model(store: Store, recipe: str, model: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of `model`, which may be just an alias such as `candidate` of the recipe's own model."""
    spec = model if "@" in model or model.startswith("ldm-") else f"ldm-{recipe}@{model}"
    return recipe_of(find_model(store, spec), overrides)
