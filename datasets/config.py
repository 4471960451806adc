"""What a data set is: where its pictures come from, how they are cut, what conditions them, whose they are.

One YAML in ``datasets/catalog/`` (or anywhere, named by its path) is one data set::

    name: my-pictures
    source: {kind: folder, root: /path/to/pictures}
    image_size_px: 64
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from datasets.errors import ConfigError

CATALOG = Path(__file__).parent / "catalog"

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Strict(BaseModel):
    """A piece of configuration: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RobohashCats(_Strict):
    """Pictures painted from the cat parts of the package ``robohash``, offered by a server on this machine.

    Attributes:
        train: Pictures to train on.
        held_out: Pictures kept apart; no combination of parts is in both.
        dead: Rows of the list that lead to no usable picture, on purpose: as in every list of the web.
        seed: Which combinations are drawn, and in which order the list has them.
    """

    kind: Literal["robohash_cats"]
    train: Annotated[int, Field(ge=1)]
    held_out: Annotated[int, Field(ge=1)]
    dead: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0


class Folder(_Strict):
    """Pictures in a folder of one's own.

    Attributes:
        root: The folder: a path, or any address that fsspec opens. In a YAML, relative to the YAML.
        classes_from_folders: Whether the first folder below ``root`` is a picture's class.
        held_out_share: Share of the pictures kept apart, drawn by the hash of their relative paths.
        seed: Changes which pictures are kept apart.
        expected_count: How many pictures a complete copy has; another number is warned about and recorded.
        layout: What belongs in the folder, in words, for the message when it is missing.
    """

    kind: Literal["folder"]
    root: str | None = None
    classes_from_folders: bool = True
    held_out_share: Share = 0.1
    seed: Annotated[int, Field(ge=0)] = 0
    expected_count: Annotated[int, Field(ge=1)] | None = None
    layout: str = (
        "PNG, JPEG or WebP pictures, flat or in one folder per class; the caption of name.png in name.txt"
    )


class UserUrlList(_Strict):
    """A list of addresses of one's own, as LAION publishes them.

    Attributes:
        uri: The Parquet file: a path, or any address that fsspec opens.
        url_column: Its column of addresses (http or https).
        caption_column: Its column of captions, if any.
        class_column: Its column of classes, if any: class names, or numbers from 0.
        sha256_column: Its column of digests, if any; a picture that no longer has its digest is refused.
        held_out_share: Share of the rows kept apart, drawn by the hash of their addresses.
        seed: Changes which rows are kept apart.
    """

    kind: Literal["url_list"]
    uri: str
    url_column: str = "url"
    caption_column: str | None = None
    class_column: str | None = None
    sha256_column: str | None = None
    held_out_share: Share = 0.1
    seed: Annotated[int, Field(ge=0)] = 0


Source = Annotated[RobohashCats | Folder | UserUrlList, Field(discriminator="kind")]


class DatasetConfig(_Strict):
    """One data set.

    Attributes:
        name: What people call it.
        description: One sentence on what is in it.
        licence: The licence of the pictures.
        attribution: The credit that has to be shown with the pictures.
        source: Where the pictures come from.
        root: The folder of pictures, over the one in ``source``; the key to set from a command line.
        image_size_px: Side of the square pictures in the shards.
        crop: ``centre`` cuts the largest square from the middle; ``none`` refuses what is not square.
        classes: Names of the classes in the order of their labels; empty means none, or the folders' names.
        max_bad_share: Share of rows that may yield no usable picture before the stage fails.
        allow_private_addresses: Whether loopback, private and other non-global addresses may be asked.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*$")]
    description: str = ""
    licence: str = ""
    attribution: str = ""
    source: Source
    root: str | None = None
    image_size_px: Annotated[int, Field(ge=8, le=4096)]
    crop: Literal["none", "centre"] = "centre"
    classes: tuple[str, ...] = ()
    max_bad_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    allow_private_addresses: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> DatasetConfig:
        if len(set(self.classes)) != len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ValueError(f"classes must be distinct, got {twice} more than once; name each class once")
        if self.root is not None and not isinstance(self.source, Folder):
            raise ValueError(
                f"root is for sources of kind folder, this one is of kind {self.source.kind}; leave root out"
            )
        return self

    @property
    def folder(self) -> str | None:
        """The folder of pictures of a ``folder`` source: ``root`` when set, else the source's own."""
        if self.root is not None:
            return self.root
        return self.source.root if isinstance(self.source, Folder) else None


def known_datasets() -> tuple[str, ...]:
    """Return the names in the catalog, sorted."""
    return tuple(sorted(path.stem for path in CATALOG.glob("*.yaml")))


def load_dataset(name_or_path: str, *, overrides: Mapping[str, Any] | None = None) -> DatasetConfig:
    """Return the data set of that name in the catalog, or the one in that YAML file.

    Args:
        name_or_path: ``cats``, or the path of a YAML (anything with a separator or the suffix .yaml or .yml).
        overrides: Values over those of the file, nested as in the file: ``{"source": {"train": 100}}``.

    Raises:
        ConfigError: For an unknown name, an unknown key, or a value out of its range.
    """
    is_path = Path(name_or_path).suffix in {".yaml", ".yml"} or "/" in name_or_path
    path = Path(name_or_path) if is_path else CATALOG / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"a data set is a name in the catalog or a path of a YAML file, got {name_or_path!r}; "
            f"known names: {', '.join(known_datasets())}"
        )
    document = _read_yaml(path)
    if is_path:
        anchor_paths(document, path.parent)
    return parse_dataset(_merged(document, overrides or {}), where=str(name_or_path))


def parse_dataset(document: Mapping[str, Any], *, where: str = "dataset") -> DatasetConfig:
    """Return the data set that a mapping describes.

    Args:
        document: The keys of ``DatasetConfig``.
        where: What to call it in a message.

    Raises:
        ConfigError: For an unknown key or a value out of its range, each named.
    """
    try:
        return DatasetConfig.model_validate(document)
    except ValidationError as error:
        kinds = {"robohash_cats", "folder", "url_list"}
        problems = []
        for item in error.errors(include_url=False, include_context=False):
            place = ".".join(str(part) for part in item["loc"] if part not in kinds) or "the whole"
            received = "" if isinstance(item["input"], dict) else f", got {item['input']!r}"
            problems.append(f"{place}: {item['msg'].removeprefix('Value error, ')}{received}")
        raise ConfigError(f"data set {where} is not valid: {'; '.join(problems)}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} must be a readable YAML file ({error}); correct it and try again"
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"{path} must hold keys and values, got {type(document).__name__}; see {CATALOG}/cats.yaml"
        )
    return document


def anchor_paths(document: dict[str, Any], base: Path) -> None:
    """Make relative paths in a user's YAML start at the YAML, so that they mean the same from anywhere."""
    source = document.get("source")
    places = [(document, "root")]
    if isinstance(source, dict):
        places += [(source, "root"), (source, "uri")]
    for holder, key in places:
        value = holder.get(key)
        if isinstance(value, str) and "://" not in value and not value.startswith("~"):
            holder[key] = str((base / value).absolute())


def _merged(document: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with overrides laid over it; a mapping of another ``kind`` is replaced as a whole."""
    result = dict(document)
    for key, value in overrides.items():
        below = result.get(key)
        if (
            isinstance(below, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", below.get("kind")) == below.get("kind")
        ):
            result[key] = _merged(below, value)
        else:
            result[key] = value
    return result
