"""Shows what in a store nothing leads to any more, and removes it when told to.

Removal takes the manifest first and the files last (decision 0014). Files first would leave, after a kill, a
manifest that promises what is gone, and every run would take it for the artifact. Manifest first leaves files
that do not exist for any reader; the next removal finds them. A reader that holds the manifest already gets a
CorruptionError for a file that is gone, never other bytes. Between manifests and files the store is looked at
again: an attempt announces what it reads before it looks whether that is still there, so either it finds its
input gone and says so, or the second look finds the attempt and the manifest is put back.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from datasets.manifest import Manifest
from datasets.store import Store
from flows.listing import KEY_DIGITS, narrow
from flows.survey import Survey, folder_of, survey

MEGA = 1e6


def collect_garbage(uri: str, recipes: Sequence[str], *, delete: bool) -> None:
    """Print what can go and why, and remove it if `delete`.

    Raises:
        UnprovenError, TrackingError, CorruptionError, RecipeError: see `survey`; nothing is removed then.
    """
    store = Store(uri)
    manifests = in_order(store.manifests(strict=True))
    found = survey(store, recipes, manifests)
    num_bytes = print_survey(store, found, manifests)
    if found.is_empty:
        said = f"nothing in {store.uri} can go"
    elif delete:
        back = remove(store, recipes, manifests, found)
        kept = "".join(f"; {m.stage} {m.short} came into use and stays" for m in back)
        said = f"removed from {store.uri}{kept}"
    else:
        said = f"{num_bytes / MEGA:,.1f} MB can go; nothing was removed, --delete does it"
    Console().print(escape(said), soft_wrap=True)


def in_order(manifests: Sequence[Manifest]) -> list[Manifest]:
    """Artifacts sorted so that each comes after all it is made of."""
    known, depths = {manifest.digest: manifest for manifest in manifests}, dict[str, int]()

    def depth(manifest: Manifest) -> int:
        if manifest.digest not in depths:
            above = (known.get(parent.digest) for parent in manifest.content.parents.values())
            depths[manifest.digest] = 1 + max((depth(parent) for parent in above if parent), default=0)
        return depths[manifest.digest]

    return sorted(manifests, key=lambda manifest: (depth(manifest), manifest.stage, manifest.key))


def print_survey(store: Store, found: Survey, manifests: Sequence[Manifest]) -> int:
    """Print a line for each thing that can go and each that stays unproven; returns the bytes that can go."""
    areas = store.work_areas()
    table, total = narrow("what", "MB", wrapping="why it can go", title=store.uri), 0
    rows = [
        *((f"{m.stage} {m.key[:KEY_DIGITS]}", m.num_bytes, found.doomed.get(m.digest)) for m in manifests),
        *((f"work/{area}", areas[area].num_bytes(), why) for area, why in found.areas.items()),
        *((folder, store.num_bytes(folder), why) for folder, why in found.folders.items()),
    ]
    for what, num_bytes, why in rows:
        if why is not None:
            table.add_row(what, f"{num_bytes / MEGA:,.1f}", escape(why))
            total += num_bytes
    console = Console()
    if table.row_count:
        console.print(table)
    for line in found.unproven:
        console.print(f"stays, as nobody can tell: {escape(line)}", soft_wrap=True)
    return total


def remove(
    store: Store, recipes: Sequence[str], manifests: Sequence[Manifest], found: Survey
) -> list[Manifest]:
    """Remove what a survey found; returns the artifacts that came into use meanwhile and stay.

    Args:
        store: the store.
        recipes: as for the survey.
        manifests: as for the survey, parents before what was made of them.
        found: the survey.
    """
    doomed = [manifest for manifest in reversed(manifests) if manifest.digest in found.doomed]
    back = doomed
    try:
        for manifest in doomed:
            store.withdraw(manifest)
        again = survey(store, recipes, manifests)
        back = [manifest for manifest in doomed if manifest.digest not in again.doomed]
    finally:
        for manifest in reversed(back):
            store.commit(manifest.content, manifest.provenance)
    areas = store.work_areas()
    for area in found.areas.keys() & again.areas.keys() & areas.keys():
        areas[area].clear()
    gone = [folder_of(manifest) for manifest in doomed if manifest not in back]
    for folder in (*gone, *(found.folders.keys() & again.folders.keys())):
        store.discard(folder)
    return back
