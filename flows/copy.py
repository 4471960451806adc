"""Carries an artifact to another store, with the manifests of all it was made of."""

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from datasets.manifest import Manifest
from datasets.store import Store
from datasets.transfer import carry, pack
from flows.models import KEY_DIGITS, TRAIN_LDM
from flows.tracking import open_tracker
from ldm.errors import LdmError, ModelNotFoundError

NEEDED = {(TRAIN_LDM, "first_stage")}
"""Stage and role of parents without whose files an artifact is of no use: samples must be decoded."""


class CopyError(LdmError):
    """An artifact cannot be copied there."""


def find_artifact(store: Store, spec: str) -> Manifest:
    """The artifact of a key's first digits, or of a registered `name` or `name@alias`.

    Raises:
        ModelNotFoundError: there is none, or more than one.
    """
    manifests = store.manifests()
    found = [m for m in manifests if KEY_DIGITS.fullmatch(spec) and m.key.startswith(spec)]
    if not found and manifests and not KEY_DIGITS.fullmatch(spec):
        version = open_tracker(store).resolve_model(spec)
        found = [m for m in manifests if version is not None and m.digest == version["digest"]]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{m.stage} {m.short}" for m in found) or "none"
    raise ModelNotFoundError(
        f"one artifact of {store.uri} must have the key or name {spec!r}, but {listed} has; `ldm list` shows "
        "all, give at least 6 digits of a key"
    )


def copy_artifact(uri: str, spec: str, to: str, *, with_parents: bool) -> None:
    """Copy an artifact, and print what went where.

    Args:
        uri: the store it is in.
        spec: see `find_artifact`.
        to: URI of the other store.
        with_parents: whether the files of all it was made of go too, and not their manifests alone.

    Raises:
        ModelNotFoundError: there is no such artifact.
        CopyError: both stores are one.
        CorruptionError, SpaceError, StoreError: see `carry`.
    """
    source, target = Store(uri), Store(to)
    if source.uri == target.uri:
        raise CopyError(f"--to must name another store than {source.uri}, where the artifact is already")
    manifest = find_artifact(source, spec)
    cargo = pack(source, manifest, along=lambda child, role: with_parents or (child.stage, role) in NEEDED)
    columns = (TextColumn("copying"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("copying", total=cargo.num_bytes)
        carry(source, target, cargo, progress=lambda done, _total: bar.update(task, completed=done))
    console = Console()
    for m in cargo.whole.values():
        console.print(
            escape(f"{m.stage} {m.short}: {m.num_bytes / 1e6:,.1f} MB at {target.uri_of(m)}"), soft_wrap=True
        )
    if cargo.told:
        told = ", ".join(f"{m.stage} {m.short}" for m in cargo.told.values())
        console.print(f"manifests alone: {told}", soft_wrap=True)
    for parent in cargo.unknown.values():
        console.print(
            f"not in the source, so nothing of it went along: {parent.stage} {parent.key[:12]}",
            soft_wrap=True,
        )
