"""Carries artifacts from one store to another: files verified by digest on both ends, manifests last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from datasets.errors import StoreError
from datasets.manifest import Manifest, Parent
from datasets.progress import Progress, no_progress
from datasets.store import Store


@dataclass(frozen=True)
class Cargo:
    """What goes to another store.

    Attributes:
        whole: Artifacts that go with their files, parents before what was made of them.
        told: Artifacts of which the manifest goes, to tell what the others were made of.
        unknown: Ancestors whose manifest the source does not have.
    """

    whole: dict[str, Manifest] = field(default_factory=dict)
    told: dict[str, Manifest] = field(default_factory=dict)
    unknown: dict[str, Parent] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """The size of the files."""
        return sum(manifest.num_bytes for manifest in self.whole.values())


def pack(source: Store, manifest: Manifest, *, along: Callable[[Manifest, str], bool]) -> Cargo:
    """Return what goes when an artifact is copied.

    Args:
        source: Where it is.
        manifest: The artifact.
        along: Called with an artifact whose files go and the role of one of its parents; returns whether that
            parent's files go too. Manifests of parents always go.

    Raises:
        StoreError: When a parent whose files should go is not in the source.
    """
    cargo = Cargo()
    remembered = {told.digest: told for told in source.remembered()}
    _pack(source, manifest, cargo, along=along, remembered=remembered)
    for key in cargo.whole:
        cargo.told.pop(key, None)
    return cargo


def carry(source: Store, target: Store, cargo: Cargo, *, progress: Progress = no_progress) -> None:
    """Put a cargo into a store; what is there already is verified and not written again.

    A manifest is written when all files of its artifact have been read back with their digests, so a carrier
    may be killed and started again.

    Args:
        source: Where the files are.
        target: Where they go.
        cargo: What goes.
        progress: Called with (bytes done, bytes in all).

    Raises:
        CorruptionError: When a file, on either end, does not have the digest its manifest records.
        SpaceError: When the target is too full to start.
        StoreError: When the target holds something else under the key of an artifact or of its parent.
    """
    done = 0
    target.require_free(cargo.num_bytes, purpose="a copy")
    for told in cargo.told.values():
        if target.find(told.stage, told.key) is None:
            target.remember(told)
    for manifest in cargo.whole.values():
        for record in manifest.content.files:
            _carry_file(source, target, manifest, record.name)
            done += record.bytes
            progress(done, cargo.num_bytes)
        target.commit(manifest.content, manifest.provenance)


def _carry_file(source: Store, target: Store, manifest: Manifest, name: str) -> None:
    if target.has(manifest, name):
        return
    data = source.read(manifest, name)
    target.put(manifest.stage, manifest.key, name, data, count=manifest.file(name).count)
    if not target.has(manifest, name):
        raise StoreError(
            f"what was written must be there, but {target.uri_of(manifest)} does not have {name}; copy again"
        )


def _pack(
    source: Store,
    manifest: Manifest,
    cargo: Cargo,
    *,
    along: Callable[[Manifest, str], bool] | None,
    remembered: dict[str, Manifest],
) -> None:
    """Add an artifact after its ancestors; ``along`` is None when only its manifest goes."""
    for role, parent in manifest.content.parents.items():
        goes = along is not None and along(manifest, role)
        found = source.find(parent.stage, parent.key)
        if found is None or found.digest != parent.digest:
            if goes:
                raise StoreError(
                    f"the {role} of {manifest.stage} {manifest.short}, {parent.stage} {parent.key[:12]}, "
                    f"must go along, but is not in {source.uri}; copy from a store that has it"
                )
            found = remembered.get(parent.digest)
        if found is None:
            cargo.unknown[parent.key] = parent
        else:
            _pack(source, found, cargo, along=along if goes else None, remembered=remembered)
    (cargo.told if along is None else cargo.whole)[manifest.key] = manifest
