"""Reads a recipe: one complete run, from YAML to typed values, checked before any work.

A recipe names its data set (`datasets/catalog/`) and its first stage (`ldm/recipes/first_stage/`); both are
resolved here, so that `--set first_stage.training.num_images=1000` reaches every value. A YAML of one's own
may build on another recipe (`base: demo`) and say only what differs.
"""

import difflib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from datasets.config import anchor_paths, load_dataset
from ldm.config import Recipe
from ldm.errors import RecipeError

RECIPES = Path(__file__).parent / "recipes"
FIRST_STAGES = RECIPES / "first_stage"
SECTIONS = ("dataset", "first_stage")
"""Sections that name a YAML of their own."""
UNIONS = frozenset({"source", "conditioning"})
"""Sections of several kinds; pydantic adds the kind to the place of an error inside one."""


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_yaml(name: str, folder: Path, kind: str) -> dict[str, Any]:
    """A YAML of the package by name, or the user's by path.

    Raises:
        RecipeError: when there is none, naming those there are.
    """
    path = Path(name) if is_path(name) else folder / f"{name}.yaml"
    if not path.is_file():
        known = recipe_names(folder)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"unknown {kind} {name!r}: known are {', '.join(known)}, or give a path to a YAML.{hint}"
        )
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise RecipeError(f"{path} must be a readable YAML ({problem}); correct it and try again") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} must hold a mapping of settings, got {type(raw).__name__}")
    return raw


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe as plain values: its own laid over those of the recipe it names as its `base`, if any.

    In a YAML of the user's, relative paths (of base, data set, first stage, pictures) start at the YAML.

    Raises:
        RecipeError: there is no such recipe or base, or the base has a base itself.
    """
    raw = anchored(read_yaml(name, RECIPES, "recipe"), name)
    base = raw.pop("base", None)
    if base is None:
        return raw
    below = anchored(read_yaml(str(base), RECIPES, "base recipe"), str(base))
    if "base" in below:
        raise RecipeError(
            f"a base must be a complete recipe, but {base} has the base {below['base']!r} itself; "
            f"set base: {below['base']} in {name} and copy what {base} adds"
        )
    own = {"name", "description"}
    return lay_over({key: value for key, value in below.items() if key not in own}, raw)


def anchored(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A recipe's values with its relative paths made absolute, when it is a YAML of the user's."""
    if not is_path(name):
        return raw
    folder = Path(name).parent

    def absolute(value: Any) -> Any:
        return str((folder / value).absolute()) if isinstance(value, str) and is_path(value) else value

    raw = raw | {key: absolute(raw[key]) for key in ("base", *SECTIONS) if key in raw}
    for section in SECTIONS:
        if isinstance(raw.get(section), dict) and "name" in raw[section]:
            raw[section] = raw[section] | {"name": absolute(raw[section]["name"])}
    if isinstance(raw.get("dataset"), dict):
        anchor_paths(raw["dataset"], folder)
    return raw


def is_path(name: str) -> bool:
    """Whether a name is that of a YAML file, and not one of the package's."""
    return name.endswith((".yaml", ".yml"))


def lay_over(raw: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Values of a recipe with others on top.

    A data set or first stage of another name, and a conditioning of another kind, replaces all of it.
    """
    raw = dict(raw)
    below, above = raw.get("conditioning"), over.get("conditioning")
    if (
        isinstance(below, dict)
        and isinstance(above, dict)
        and "kind" in above
        and above["kind"] != below.get("kind")
    ):
        raw.pop("conditioning")
    for section in SECTIONS:
        upper = over.get(section)
        if isinstance(upper, dict) and "name" in upper:
            raw.pop(section, None)
        elif isinstance(upper, dict) and isinstance(raw.get(section), str):
            raw[section] = {"name": raw[section]}
    return merge(raw, over)


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
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"the value of --set {path}= must be YAML, got {value!r}; quote it") from None
    for part in reversed(path.split(".")):
        nested = {part: nested}
    return nested


def resolve_named(value: Any, load: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """A section given as a name, as a mapping with a `name` and values over the named one, or in full."""
    if isinstance(value, str):
        return load(value)
    if isinstance(value, dict) and is_complete(value):
        return value
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return merge(load(value["name"]), {k: v for k, v in value.items() if k != "name"})
    raise RecipeError(f"`dataset` and `first_stage` take a name, or a mapping with one, got {value!r}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name (or YAML path) with `--set` overrides applied, checked.

    Raises:
        RecipeError: unknown recipe or key, or a value that breaks a rule; the message names the cure.
        ConfigError: unknown data set.
    """
    raw = read_recipe(name)
    for override in overrides:
        raw = lay_over(raw, parse_override(override))
    for section, load in zip(SECTIONS, (named_dataset, named_first_stage), strict=True):
        raw[section] = resolve_named(raw.get(section), load)
    raw.setdefault("name", Path(name).stem)
    return parse_recipe(raw, source=name)


def is_complete(section: dict[str, Any]) -> bool:
    """Whether a data set has a source, or a first stage of a new name a network: it needs none below it."""
    source, name = section.get("source"), str(section.get("name"))
    has_source = isinstance(source, dict) and "kind" in source
    return has_source or ("model" in section and not is_path(name) and name not in recipe_names(FIRST_STAGES))


def named_dataset(name: str) -> dict[str, Any]:
    """Values of a data set of the catalogue."""
    return load_dataset(name).model_dump(mode="json")


def named_first_stage(name: str) -> dict[str, Any]:
    """Values of a first stage's recipe."""
    return {"name": Path(name).stem} | read_yaml(name, FIRST_STAGES, "first stage")


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
    location = [part for above, part in pairwise((None, *problem["loc"])) if above not in UNIONS]
    path = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = keys_at(problem["loc"][:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"unknown key {path!r}; " + (
            f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        )
    message = problem["msg"].removeprefix("Value error, ")
    received = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    return f"{path}: {message}{received}" if path else message


def keys_at(location: Sequence[Any]) -> list[str]:
    """The keys a recipe knows at a place, for messages."""
    models: list[Any] = [Recipe]
    for above, part in pairwise((None, *location)):
        if above in UNIONS:
            models = [model for model in models if part in get_args(model.model_fields["kind"].annotation)]
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        options = [o for field in fields for o in (field.annotation, *get_args(field.annotation))]
        models = [option for option in options if hasattr(option, "model_fields")]
    return sorted({key for model in models for key in model.model_fields})
