"""Reads a recipe: one complete run, from YAML to typed values, checked before any work.

A recipe names its data set (`datasets/catalog/`) and its first stage (`ldm/recipes/first_stage/`); both are resolved
here, so that `--set first_stage.training.num_images=1000` reaches every value.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from datasets.config import load_dataset
from ldm.config import Recipe
from ldm.errors import RecipeError

RECIPES = Path(__file__).parent / "recipes"


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_yaml(name: str, folder: Path, kind: str) -> dict[str, Any]:
    """A YAML of the package by name, or the user's by path.

    Raises:
        RecipeError: when there is none, naming those there are.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = recipe_names(folder)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"unknown {kind} {name!r}: known are {', '.join(known)}, or give a path to a YAML.{hint}"
        )
    raw = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} must hold a mapping of settings, got {type(raw).__name__}")
    return raw


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on top, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as nested mappings, the value read as YAML.

    Raises:
        RecipeError: when the text is not of that form.
    """
    path, separator, value = text.partition("=")
    if not separator or not all(path.split(".")):
        raise RecipeError(
            f"--set takes key=value with a dotted key such as training.num_images=1000, got {text!r}"
        )
    nested: Any = yaml.safe_load(value)
    for part in reversed(path.split(".")):
        nested = {part: nested}
    return nested


def resolve_named(value: Any, load: Any) -> dict[str, Any]:
    """A section given as a name, or as a mapping with a `name` and values laid over the named one."""
    if isinstance(value, str):
        return load(value)
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return merge(load(value["name"]), {k: v for k, v in value.items() if k != "name"})
    raise RecipeError(f"`dataset` and `first_stage` take a name, or a mapping with one, got {value!r}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name (or YAML path) with `--set` overrides applied, checked.

    Raises:
        RecipeError: unknown recipe or key, or a value that breaks a rule; the message names the cure.
        ConfigError: unknown data set.
    """
    raw = read_yaml(name, RECIPES, "recipe")
    for override in overrides:
        nested = parse_override(override)
        for section in ("dataset", "first_stage"):
            if isinstance(nested.get(section), dict) and isinstance(raw.get(section), str):
                raw[section] = {"name": raw[section]}
        raw = merge(raw, nested)
    for section, load in (("dataset", named_dataset), ("first_stage", named_first_stage)):
        raw[section] = resolve_named(raw.get(section), load)
    raw.setdefault("name", Path(name).stem)
    return parse_recipe(raw, source=name)


def named_dataset(name: str) -> dict[str, Any]:
    """Values of a data set of the catalogue."""
    return load_dataset(name).model_dump(mode="json")


def named_first_stage(name: str) -> dict[str, Any]:
    """Values of a first stage's recipe."""
    return {"name": Path(name).stem} | read_yaml(name, RECIPES / "first_stage", "first stage")


def parse_recipe(raw: dict[str, Any], *, source: str) -> Recipe:
    """A recipe of plain values.

    Raises:
        RecipeError: one line per broken rule.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [describe(problem) for problem in error.errors()]
        raise RecipeError(f"recipe {source!r}: " + "; ".join(lines)) from None


def describe(problem: Any) -> str:
    """One validation error as a sentence: where, which rule, what was received, what to do."""
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = keys_at(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        return f"unknown key {path!r}; " + (
            f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def keys_at(location: Sequence[Any]) -> list[str]:
    """The keys a recipe knows at a place, for messages."""
    model: Any = Recipe
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((o for o in options if hasattr(o, "model_fields")), None)
    return sorted(getattr(model, "model_fields", {}))
