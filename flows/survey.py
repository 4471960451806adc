"""Finds what in a store nothing leads to any more, and what cannot be told.

Kept is what a registered alias, a recipe, or an attempt leads to, with all it was made of; the scores of a
model with an alias; and models that another MLflow tracks, whose aliases cannot be seen. Without an answer
from MLflow, or with a damaged manifest in the store, nothing can be proved and nothing is done.
"""

import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from datasets import image_shards, url_list
from datasets.errors import DatasetsError
from datasets.keys import artifact_key
from datasets.manifest import Manifest
from datasets.store import Store
from flows.attempts import Attempt, attempts, is_alive
from flows.invocation import Invocation
from flows.models import TRAIN_FIRST_STAGE, TRAIN_LDM, asked_for, stored_recipe
from flows.preflight import planned_list
from flows.progress import status_folder
from flows.reach import Reach
from flows.staleness import code_versions, what_of, why_stale
from flows.tracking import open_tracker
from ldm.config import Recipe
from ldm.errors import LdmError
from ldm.recipe import RECIPES, is_path, load_recipe, recipe_names

DOWNLOADING = {image_shards.STAGE, url_list.STAGE}
"""Stages whose attempts have more work areas than the one that names them."""


class UnprovenError(LdmError):
    """Whether something is in use cannot be found out, so nothing is removed."""


@dataclass
class Survey:
    """What can go, and why: artifacts (by digest), work areas and folders without a manifest (by folder).

    `unproven` says what stays only because nobody can tell.
    """

    reach: Reach
    doomed: dict[str, str] = field(default_factory=dict)
    areas: dict[str, str] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    unproven: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing can go."""
        return not (self.doomed or self.areas or self.folders)


def survey(store: Store, recipes: Sequence[str], manifests: Sequence[Manifest]) -> Survey:
    """Look at a store and at all that can lead to its artifacts.

    Args:
        store: the store.
        recipes: the user's own YAMLs, beside the recipes of the package.
        manifests: its artifacts, parents before what was made of them.

    Raises:
        UnprovenError: a run is at work that does not say what it reads, or whose recipe cannot be read.
        TrackingError: MLflow does not answer.
        CorruptionError: something in the store is damaged.
        RecipeError: one of the recipes is not valid.
    """
    found = Survey(Reach([*manifests, *store.remembered()]))
    known = attempts(store)
    require_announced(store, known)
    keep_models(found, store, manifests)
    given = [load_recipe(name) for name in recipes]
    for recipe in (*given, *known_recipes(manifests)):
        found.reach.keep_led_to(recipe)
    keep_lost(found, manifests, {recipe.name for recipe in given})
    staying = [attempt for attempt in known if attempt.state != "cut off" or goes_on(attempt)]
    for attempt in staying:
        keep_attempt(found, store, attempt)
        for manifest in (m for m in manifests if folder_of(m) == attempt.folder):
            found.reach.keep(manifest.digest, "made again just now")
    stale = why_stale(manifests, elsewhere=store.remembered())
    for manifest in manifests:
        if manifest.digest not in found.reach.why:
            found.doomed[manifest.digest] = why_doomed(manifest, stale)
    judge_areas(found, store, manifests, known, staying)
    judge_folders(found, store, manifests, staying)
    return found


def require_announced(store: Store, known: Sequence[Attempt]) -> None:
    """Refuse while a run is at work, by its status file, that does not say what it reads."""
    announced = {(attempt.stage, attempt.key) for attempt in known}
    for path in status_folder(store).glob("*.json"):
        status = json.loads(path.read_text("utf-8"))
        at_work = status["state"] == "running" and is_alive(status)
        if at_work and (status["stage"], status["key"]) not in announced:
            raise UnprovenError(
                f"what a run reads must be known, but {status['stage']} {status['key'][:12]} (process "
                f"{status['pid']}, {path}) does not say; try again when it has ended"
            )


@cache
def package_recipes() -> tuple[Recipe, ...]:
    """The recipes that come with the package."""
    return tuple(load_recipe(name) for name in recipe_names(RECIPES))


def known_recipes(manifests: Sequence[Manifest]) -> list[Recipe]:
    """The recipes of the package, and the YAMLs that artifacts were made by and that are still there."""
    made_by = {asked.recipe for m in manifests if (asked := asked_for(m)) and not asked.is_lost}
    own = sorted(name for name in made_by if is_path(name))
    return [*package_recipes(), *(load_recipe(name) for name in own)]


def keep_models(found: Survey, store: Store, manifests: Sequence[Manifest]) -> None:
    """Keep models with an alias, and models of which another MLflow would know the alias."""
    tracker = open_tracker(store)
    found.reach.keep_named(tracker.aliases())
    for manifest in manifests:
        run = manifest.provenance.get("mlflow_run")
        is_model = manifest.stage in {TRAIN_FIRST_STAGE, TRAIN_LDM}
        if is_model and run and manifest.digest not in found.reach.why and not tracker.knows(run):
            found.reach.keep(manifest.digest, "tracked elsewhere")
            found.unproven.append(
                f"{manifest.stage} {manifest.short}: tracked by an MLflow that is not {tracker.uri}, where "
                "it may have an alias; name that one with MLFLOW_TRACKING_URI"
            )


def keep_lost(found: Survey, manifests: Sequence[Manifest], names: set[str]) -> None:
    """Keep what was made by a YAML on another machine, unless a recipe of that name was given."""
    for manifest in manifests:
        asked, host = asked_for(manifest), manifest.provenance.get("host")
        is_out_of_sight = asked is not None and asked.is_lost and host != socket.gethostname()
        if not is_out_of_sight or manifest.digest in found.reach.why:
            continue
        if stored_recipe(manifest).get("name") not in names:
            found.reach.keep(manifest.digest, "recipe elsewhere")
            found.unproven.append(
                f"{manifest.stage} {manifest.short}: made by {asked and asked.recipe} on {host}, which "
                "cannot be read here; give that recipe with --recipe"
            )


def keep_attempt(found: Survey, store: Store, attempt: Attempt) -> None:
    """Keep what an attempt reads, and what the runs it is a part of have made so far."""
    area = store.work(attempt.stage, attempt.key).uri
    found.reach.keep_read([attempt])
    if attempt.state == "on another machine":
        found.unproven.append(
            f"{area}: of process {attempt.pid} on {attempt.host}, which cannot be asked from here; remove "
            "that folder if the run is over"
        )
    for asked in attempt.asked if attempt.state != "cut off" else ():
        try:
            found.reach.keep_led_to(asked.resolve())
        except (LdmError, DatasetsError) as error:
            raise UnprovenError(
                f"what a run needs must be known, but process {attempt.pid} on {attempt.host} was asked for "
                f"{asked.recipe}, which cannot be read ({error}); wait for it, or remove {area} if it is over"
            ) from error


def goes_on(attempt: Attempt) -> bool:
    """Whether the command of an attempt that was cut off would go on with it."""
    return any(_leads_to(asked, attempt) for asked in attempt.asked)


def _leads_to(asked: Invocation, attempt: Attempt) -> bool:
    try:
        recipe = asked.resolve()
        if attempt.stage == image_shards.STAGE:
            return planned_list(recipe.dataset).key == attempt.key
    except (LdmError, DatasetsError):
        return asked.is_lost  # perhaps it is there when it is asked for again
    what, version = what_of(attempt.stage, recipe), code_versions().get(attempt.stage)
    if what is None or version is None:
        return False
    parents = {role: parent.digest for role, parent in attempt.inputs.items()}
    return artifact_key(attempt.stage, version, what=what, parents=parents) == attempt.key


def why_doomed(manifest: Manifest, stale: Mapping[str, str]) -> str:
    """Why nothing leads to an artifact, as far as its own record tells."""
    asked = asked_for(manifest)
    if manifest.digest in stale:
        return f"stale: {stale[manifest.digest]}"
    if asked is not None and asked.set:
        return f"of a run with {' '.join(f'--set {text}' for text in asked.set)}, without an alias"
    return "no alias, recipe or attempt leads to it"


def judge_areas(
    found: Survey,
    store: Store,
    manifests: Sequence[Manifest],
    known: Sequence[Attempt],
    staying: Sequence[Attempt],
) -> None:
    """Find work areas with which nobody will go on."""
    kept = {attempt.folder for attempt in staying}
    committed = {folder_of(manifest) for manifest in manifests}
    running = {attempt.folder for attempt in staying if attempt.state != "cut off"}
    is_downloading = any(attempt.stage in DOWNLOADING for attempt in staying)
    cut_off = {attempt.folder for attempt in known} - kept
    for folder in store.work_areas():
        stage = folder.partition("/")[0]
        if folder in running or (stage in DOWNLOADING and is_downloading):
            continue
        if folder in committed:
            found.areas[folder] = "of an artifact that is finished"
        elif folder in cut_off:
            found.areas[folder] = "cut off, and its command does something else now"
        elif folder not in kept:
            found.areas[folder] = "nobody is at work there"


def judge_folders(
    found: Survey, store: Store, manifests: Sequence[Manifest], staying: Sequence[Attempt]
) -> None:
    """Find folders without a manifest that no attempt fills; none while a run is at work."""
    if any(attempt.state != "cut off" for attempt in staying):
        return
    resumed = store.work_areas().keys() - found.areas.keys()
    taken = {folder_of(manifest) for manifest in manifests} | resumed
    for folder in store.folders():
        if folder not in taken and folder.partition("/")[0] in code_versions():
            found.folders[folder] = "files without a manifest"


def folder_of(manifest: Manifest) -> str:
    """Folder of an artifact, as the store names it."""
    return f"{manifest.stage}/{manifest.key[:16]}"
