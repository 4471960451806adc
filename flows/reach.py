"""Which artifacts of a store something still leads to: an alias, a recipe, or an attempt."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from datasets import image_shards, url_list
from datasets.config import DatasetConfig
from datasets.errors import MissingDataError
from datasets.manifest import Manifest
from flows.attempts import Attempt
from flows.preflight import planned_list
from flows.staleness import code_versions, difference
from ldm.config import Recipe
from ldm.stages import STAGES

SCORES = {"evaluate": "model", "evaluate-first-stage": "first_stage"}
"""Stages that say how good an artifact is, and the role in which they read it."""


@dataclass
class Reach:
    """Artifacts that must stay, by digest, with what leads to each; what they were made of stays with them.

    Args:
        manifests: All artifacts of a store, and those it knows to lie in another.
    """

    manifests: Sequence[Manifest]
    why: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_digest = {manifest.digest: manifest for manifest in self.manifests}

    def keep(self, digest: str, why: str) -> None:
        """Note that something leads to an artifact, and so to all it was made of."""
        manifest = self.by_digest.get(digest)
        if manifest is None or digest in self.why:
            return
        self.why[digest] = why
        for parent in manifest.content.parents.values():
            self.keep(parent.digest, f"made into {manifest.stage} {manifest.short}")

    def keep_named(self, aliases: Mapping[str, Sequence[str]]) -> None:
        """Note the models that aliases stand for, and their scores."""
        for digest, names in aliases.items():
            self.keep(digest, f"alias {', '.join(names)}")
        for manifest in self.manifests:
            parent = manifest.content.parents.get(SCORES.get(manifest.stage, ""))
            if parent is not None and parent.digest in aliases:
                self.keep(manifest.digest, f"scores of {', '.join(aliases[parent.digest])}")

    def keep_led_to(self, recipe: Recipe) -> None:
        """Note what a recipe would find if it ran now."""
        for manifest in led_to(recipe, self.manifests):
            self.keep(manifest.digest, f"recipe {recipe.name}")

    def keep_read(self, attempts: Iterable[Attempt]) -> None:
        """Note what attempts read."""
        for attempt in attempts:
            for parent in attempt.inputs.values():
                self.keep(parent.digest, f"read by {attempt.stage} {attempt.key[:12]}")


def led_to(recipe: Recipe, manifests: Sequence[Manifest]) -> list[Manifest]:
    """The artifacts that a recipe would find instead of making them, were it run now.

    Where its pictures cannot be looked at from here, every list of its data set counts as the one it makes.
    """
    versions = code_versions()
    found = {m.digest: m for m in _lists(recipe.dataset, manifests)}
    shards = {image_shards.image_shards_key(recipe.dataset, m) for m in found.values()}
    found |= {m.digest: m for m in manifests if m.stage == image_shards.STAGE and m.key in shards}
    for stage in STAGES:
        for m in manifests:
            is_current = m.stage == stage and m.content.code_version == versions[stage]
            has_parents = all(parent.digest in found for parent in m.content.parents.values())
            if is_current and has_parents and difference(m, recipe) is None:
                found[m.digest] = m
    return list(found.values())


def _lists(dataset: DatasetConfig, manifests: Sequence[Manifest]) -> list[Manifest]:
    """The lists of a data set."""
    lists = [m for m in manifests if m.stage == url_list.STAGE]
    if not lists:
        return []
    try:
        key = planned_list(dataset).key
    except MissingDataError:
        return [m for m in lists if m.provenance.get("dataset") == dataset.name]
    return [m for m in lists if m.key == key]
