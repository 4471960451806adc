"""Which artifacts their own command would make anew today, and why."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import image_shards, url_list
from datasets.errors import DatasetsError
from datasets.keys import canonical_json
from datasets.manifest import Manifest
from flows.invocation import Invocation
from flows.models import asked_for
from ldm.config import Recipe
from ldm.errors import LdmError
from ldm.stages import STAGES

SECTION = {
    "download-shards": "dataset.",
    "train-first-stage": "first_stage.",
    "evaluate-first-stage": "evaluation.",
}
"""Where a recipe has the settings of a stage, when not at its top."""
DIGITS = 8


def code_versions() -> dict[str, int]:
    """The code version of every stage."""
    versions = {stage.name: stage.code_version for stage in STAGES.values()}
    return versions | {m.STAGE: m.CODE_VERSION for m in (url_list, image_shards)}


def what_of(stage: str, recipe: Recipe) -> dict[str, Any] | None:
    """The part of a recipe that decides a stage's result; None for a list, which its pictures decide."""
    if stage == image_shards.STAGE:
        return image_shards.image_shards_what(recipe.dataset)
    return STAGES[stage].what(recipe) if stage in STAGES else None


def flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def difference(manifest: Manifest, recipe: Recipe) -> str | None:
    """The first setting in which a recipe differs from what made an artifact, in words; None for none."""
    now = what_of(manifest.stage, recipe)
    if now is None:
        return None
    before, after = _worded(manifest.content.what), _worded(now)
    name = next((n for n in (*after, *before) if after.get(n) != before.get(n)), None)
    if name is None:
        return None
    in_section = SECTION.get(manifest.stage, "") + name
    shown = in_section if in_section in _worded(recipe.model_dump(mode="json")) else name
    return f"{shown} = {after.get(name, 'unknown')} instead of {before.get(name, 'unknown')}"


def _worded(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings by dotted name, as the JSON that keys are made of."""
    return {name: canonical_json(value).decode() for name, value in flat("", values)}


def why_stale(manifests: Sequence[Manifest], *, elsewhere: Sequence[Manifest] = ()) -> dict[str, str]:
    """Digest of each stale artifact, and the reasons.

    An artifact is stale when the code of its stage has another version, when its recipe, with the overrides
    of its run, says something else than it was made by, or when something it is made of is gone or stale.
    Whether the pictures of a folder or the rows of a list have changed is found by a run, not here.

    Args:
        manifests: The artifacts of a store.
        elsewhere: Artifacts that it knows to lie in another store; they count as there.
    """
    known = {manifest.digest: manifest for manifest in (*elsewhere, *manifests)}
    reasons: dict[str, str] = {}
    recipes: dict[Invocation, Recipe | str] = {}

    def judge(manifest: Manifest) -> str:
        if manifest.digest not in reasons:
            above = [(role, p, known.get(p.digest)) for role, p in manifest.content.parents.items()]
            parents = [
                f"its {role} {parent.key[:DIGITS]} is {'missing' if found is None else 'stale'}"
                for role, parent, found in above
                if found is None or judge(found)
            ]
            reasons[manifest.digest] = "; ".join((*_own_reasons(manifest, recipes), *parents))
        return reasons[manifest.digest]

    return {manifest.digest: why for manifest in manifests if (why := judge(manifest))}


def _own_reasons(manifest: Manifest, recipes: dict[Invocation, Recipe | str]) -> Iterator[str]:
    """What is stale about an artifact itself; `recipes` keeps those read so far, or why one cannot be."""
    version = code_versions().get(manifest.stage)
    if version is None:
        yield f"there is no stage {manifest.stage} any more"
    elif version != manifest.content.code_version:
        yield f"code version {manifest.content.code_version} is now {version}"
    asked = asked_for(manifest)
    if asked is None or asked.is_lost:
        return
    if asked not in recipes:
        recipes[asked] = _read(asked)
    recipe = recipes[asked]
    if isinstance(recipe, str):
        yield f"recipe {asked.recipe} can no longer be read: {recipe}"
    elif differs := difference(manifest, recipe):
        yield f"recipe {asked.recipe} now says {differs}"


def _read(asked: Invocation) -> Recipe | str:
    """A recipe as it stands now, or why it cannot be read."""
    try:
        return asked.resolve()
    except (LdmError, DatasetsError) as error:
        return str(error)
