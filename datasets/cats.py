"""Cats composed from the painted parts of the package ``robohash``, set 4: 360,000 combinations.

A combination is five numbers, one per layer, drawn over each other in this order: body, fur, eyes, mouth,
accessory. The file name of a cat holds its combination, so any picture of a list can be painted again from
its name alone.

The parts are by David Revoy, CC-BY 4.0.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, features

from datasets.errors import ConfigError, MissingDataError
from datasets.keys import canonical_json, sha256_file, sha256_hex

TRAIN, HELD_OUT = "train", "held_out"
DEAD = ("gone", "gone", "gone", "page", "gone", "cut", "gone", "changed", "gone", "page")
"""Folders of rows without a usable picture, in turn: gone, a web page, cut short, or another picture."""

SUPERSAMPLING = 2  # parts are composed at this many times the final side, then averaged down

FUR = (
    "a striped",
    "a tiger-striped",
    "a plain",
    "a swirly",
    "a dark-patched",
    "a star-faced",
    "a sleek",
    "a white-nosed",
    "a blotched",
    "a spotted",
)
EYES = (
    "round eyes",
    "sidelong eyes",
    "dots for eyes",
    "worried eyes",
    "a magnifying glass",
    "square eyes",
    "closed eyes",
    "wide eyes",
    "half-open eyes",
    "tall eyes",
    "long lashes",
    "narrow eyes",
    "glasses",
    "oval eyes",
    "sleepy eyes",
)
MOUTH = (
    "a smile",
    "a wavy mouth",
    "a small mouth",
    "a roar",
    "a grin",
    "an open mouth",
    "a shy mouth",
    "a pout",
    "bared teeth",
    "a laugh",
)
ACCESSORY = (
    "wearing a red scarf",
    "wearing a collar with a bell",
    "wearing a red collar",
    "wearing a red headband",
    "wearing a pink bow",
    "wearing a black hat",
    "wearing red headphones",
    "wearing a teal scarf",
    "wearing a collar with a medal",
    "with a smoking shoe",
    "wearing a beaded collar",
    "wearing a bandana",
    "wearing a blue bow",
    "wearing a red hat",
    "wearing white headphones",
    "",
)
NUM_BODIES = 15
NUM_PARTS = (NUM_BODIES, len(FUR), len(EYES), len(MOUTH), len(ACCESSORY))
NUM_COMBINATIONS = math.prod(NUM_PARTS)

_FILE_NAME = re.compile(r"b(\d\d)-f(\d\d)-e(\d\d)-m(\d\d)-a(\d\d)\.png")


class Combination(NamedTuple):
    """Which part each layer shows, counted from 0."""

    body: int
    fur: int
    eyes: int
    mouth: int
    accessory: int

    @property
    def file_name(self) -> str:
        """The name of its picture, e.g. ``b08-f03-e11-m02-a15.png``."""
        letters = zip("bfema", self, strict=True)
        return "-".join(f"{letter}{part:02d}" for letter, part in letters) + ".png"

    @classmethod
    def from_file_name(cls, name: str) -> Combination:
        """Return the combination that a file name holds.

        Raises:
            ValueError: When the name holds none.
        """
        match = _FILE_NAME.fullmatch(name)
        parts = tuple(int(digits) for digits in match.groups()) if match else ()
        if not parts or any(part >= count for part, count in zip(parts, NUM_PARTS, strict=True)):
            raise ValueError(
                f"a cat's file name is like b08-f03-e11-m02-a15.png, parts below {NUM_PARTS}, got {name!r}"
            )
        return cls(*parts)

    def caption(self, body_words: Sequence[str]) -> str:
        """Return the cat in words; ``body_words`` names the 15 body colours."""
        words = f"{FUR[self.fur]} {body_words[self.body]} cat with {EYES[self.eyes]} and {MOUTH[self.mouth]}"
        accessory = ACCESSORY[self.accessory]
        return f"{words}, {accessory}" if accessory else words


def draw_combinations(count: int, *, seed: int) -> list[Combination]:
    """Return distinct combinations in random order, every one as likely as any other.

    Raises:
        ConfigError: When more are asked for than exist.
    """
    if count > NUM_COMBINATIONS:
        raise ConfigError(
            f"train + held_out + dead must be at most {NUM_COMBINATIONS} (the combinations that exist), "
            f"got {count}; ask for fewer"
        )
    flat = np.random.default_rng(seed).choice(NUM_COMBINATIONS, count, replace=False)
    columns = (column.tolist() for column in np.unravel_index(flat, NUM_PARTS))
    return [Combination(*parts) for parts in zip(*columns, strict=True)]


def offered_paths(*, train: int, held_out: int, dead: int, seed: int) -> list[str]:
    """Return the relative paths of a list of cats, in list order, e.g. ``train/b08-f03-e11-m02-a15.png``.

    The folder is ``train``, ``held_out`` or one of ``DEAD``.     No combination occurs twice, so train and
    held-out share none. Usable and dead rows are mixed at random.

    Raises:
        ConfigError: When more are asked for than exist.
    """
    folders = [TRAIN] * train + [HELD_OUT] * held_out + [DEAD[index % len(DEAD)] for index in range(dead)]
    combinations = draw_combinations(len(folders), seed=seed)
    order = np.random.default_rng([seed, 1]).permutation(len(folders)).tolist()
    return [f"{folders[index]}/{combinations[index].file_name}" for index in order]


def parts_digest() -> str:
    """Return a digest of what decides a painted picture's bytes besides our code: parts and PNG encoder.

    Raises:
        MissingDataError: When the package ``robohash`` or a part of it is missing.
    """
    parts = [[(path.name, path.stat().st_size) for path in layer] for layer in _part_files()]
    encoder = {name: features.version(name) for name in ("pil", "zlib")}
    return sha256_hex(canonical_json({"parts": parts, "encoder": encoder}))


class CatPainter:
    """Paints combinations at one size; the parts are read and resized once, when first needed."""

    def __init__(self, size_px: int) -> None:
        self.size_px = size_px

    @cached_property
    def _layers(self) -> list[list[Image.Image]]:
        side = self.size_px * SUPERSAMPLING
        layers = []
        for files in _part_files():
            layer = []
            for path in files:
                with Image.open(path) as part:
                    layer.append(part.convert("RGBA").resize((side, side), Image.Resampling.BOX))
            layers.append(layer)
        return layers

    def paint(self, combination: Combination) -> Image.Image:
        """Return the cat on white: RGB, ``size_px`` square."""
        side = self.size_px * SUPERSAMPLING
        canvas = Image.new("RGBA", (side, side), "white")
        for layer, part in zip(self._layers, combination, strict=True):
            canvas.alpha_composite(layer[part])
        return canvas.convert("RGB").reduce(SUPERSAMPLING)

    def png(self, combination: Combination) -> bytes:
        """Return the cat as PNG; the same combination gives the same bytes."""
        buffer = io.BytesIO()
        self.paint(combination).save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()

    def served(self, path: str) -> bytes | None:
        """Return what a server offers at a path of ``offered_paths``, or None when it has nothing there."""
        folder, name = path.split("/")
        cat = Combination.from_file_name(name)
        match folder:
            case "gone":
                return None
            case "page":
                return b"<!doctype html><html><title>Moved</title><p>This picture has moved.</p></html>\n"
            case "cut":
                whole = self.png(cat)
                return whole[: len(whole) // 2]
            case "changed":
                return self.png(cat._replace(body=(cat.body + 1) % NUM_BODIES))
            case _:
                return self.png(cat)


def paint_folder(folder: Path, digests: Mapping[str, str], *, painter: CatPainter) -> None:
    """Put into a folder what a server offers at the paths of a list; pictures that are there are kept.

    Args:
        folder: Where the files go; created when missing.
        digests: For each path of the list, the SHA-256 of the picture listed there, or "" when unknown.
        painter: Paints at the size of the list.
    """
    for name in {path.split("/")[0] for path in digests}:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path, digest in digests.items():
        target = folder / path
        is_changed = path.startswith("changed/")  # what is offered there never had the listed digest
        if digest and target.is_file() and (is_changed or sha256_file(target) == digest):
            continue
        data = painter.served(path)
        if data is not None:
            unfinished = target.with_suffix(".tmp")
            unfinished.write_bytes(data)
            unfinished.replace(target)


def listed_digest(folder: Path, path: str, *, painter: CatPainter) -> str:
    """Return the digest a list gives for a path that ``paint_folder`` filled, "" for a picture that is gone.

    It is that of the file in the folder, except for pictures that were changed since they were listed.
    """
    kind, name = path.split("/")
    if kind == "gone":
        return ""
    if kind == "changed":
        return sha256_hex(painter.png(Combination.from_file_name(name)))
    return sha256_file(folder / path)


def _part_files() -> list[list[Path]]:
    """Return the files of each layer in the order of their numbers."""
    spec = find_spec("robohash")
    if spec is None or spec.origin is None:
        raise MissingDataError(
            "the cats are painted from parts in the package robohash, which is missing; run `make setup`"
        )
    root = Path(spec.origin).parent / "sets" / "set4"
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    layers = [sorted(folder.glob("*.png"), key=_part_number) for folder in folders]
    found = tuple(len(layer) for layer in layers)
    if found != NUM_PARTS:
        raise MissingDataError(
            f"{root} must hold layers of {NUM_PARTS} parts, found {found}; "
            "the package robohash is damaged, run `make setup`"
        )
    return layers


def _part_number(path: Path) -> int:
    """Return the number a part's name starts with: ``004#eyes4.png`` is 4."""
    return int(path.name.split("#", 1)[0])
