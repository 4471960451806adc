"""WebDataset shards: tar files of samples, written with reproducible bytes and read without trust.

A sample is the run of members that share a name up to its dot: ``000000017.png``, ``000000017.json``. Any
WebDataset reader can stream the shards. This module's reader admits data alone (no pickle, no code, no
links), never extracts, and takes a shard as a whole or not at all.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets.errors import CorruptionError

EXTENSIONS = frozenset({"cls", "json", "npy", "png", "safetensors", "txt"})
KEY = "__key__"

Sample = dict[str, Any]
"""The sample's key under ``"__key__"``, and its members' bytes under their extensions."""

OWNER = "ldm"
MODE = 0o444
MTIME_S = 0.0

_BLOCK_BYTES = 512
_KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_=+-]*")
_CURE = "store the shard again from its source"


def write_shard(samples: Iterable[Mapping[str, Any]]) -> bytes:
    """Return a tar of the samples, in their order: equal samples give equal bytes, whenever and by whomever.

    Args:
        samples: Each with ``"__key__"`` and at least one member: a known extension with its bytes.

    Raises:
        ValueError: When a key is no plain word or comes twice, an extension is unknown, or a member is not
            bytes.
    """
    from webdataset.writer import TarWriter  # it imports torch: only those who write shards wait for that

    buffer = io.BytesIO()
    writer = TarWriter(buffer, user=OWNER, group=OWNER, mode=MODE, mtime=MTIME_S, encoder=False)
    seen: set[str] = set()
    for sample in samples:
        _require_writable(sample, seen)
        writer.write(dict(sample))
    writer.close()
    return buffer.getvalue()


def read_shard(data: bytes) -> Iterator[Sample]:
    """Yield the samples of a tar that ``write_shard`` wrote, in their order.

    The caller compares their number with the manifest's count.

    Raises:
        CorruptionError: When the tar is cut or damaged, holds something else than plain files of known
            extensions, or holds a sample twice. It may come after samples have been yielded.
    """
    seen: set[str] = set()
    sample: Sample = {}
    for key, extension, content in _members(data):
        if sample and sample[KEY] != key:
            yield sample
            sample = {}
        if not sample:
            if key in seen:
                raise CorruptionError(f"keys of a shard must be distinct, got {key!r} twice; {_CURE}")
            seen.add(key)
            sample = {KEY: key}
        if extension in sample:
            raise CorruptionError(
                f"members of a shard must be distinct, got {key}.{extension} twice; {_CURE}"
            )
        sample[extension] = content
    if sample:
        yield sample


def _require_writable(sample: Mapping[str, Any], seen: set[str]) -> None:
    key = sample.get(KEY)
    if not isinstance(key, str) or not _KEY_PATTERN.fullmatch(key):
        raise ValueError(f"a sample's key must be a word of letters, digits and _=+-, got {key!r}; rename it")
    if key in seen:
        raise ValueError(f"keys of a shard must be distinct, got {key!r} twice; rename one")
    seen.add(key)
    members = {extension: content for extension, content in sample.items() if extension != KEY}
    if not members or not members.keys() <= EXTENSIONS:
        raise ValueError(
            f"a sample must have members of the extensions {sorted(EXTENSIONS)}, "
            f"{key!r} has {sorted(members)}; encode what it holds as one of them"
        )
    for extension, content in members.items():
        if not isinstance(content, bytes):
            raise ValueError(  # noqa: TRY004 - the sample is at fault, not the argument's type
                f"members must be bytes, {key}.{extension} is {type(content).__name__}; encode it first"
            )


def _members(data: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Yield (key, extension, bytes) of each member, then check that the archive ends where the data does."""
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                key, extension = _split(member)
                content = data[member.offset_data : member.offset_data + member.size]
                if len(content) != member.size:
                    raise CorruptionError(
                        f"{member.name} must have {member.size} bytes, "
                        f"but the shard ends after {len(content)}; {_CURE}"
                    )
                end = member.offset_data + -(-member.size // _BLOCK_BYTES) * _BLOCK_BYTES
                yield key, extension, content
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise CorruptionError(
            f"a shard must be a plain tar, got {len(data)} bytes that are not ({error}); {_CURE}"
        ) from error
    # tarfile takes a damaged header for the end, and a cut between members too; the two zero blocks tell.
    if len(data) < end + 2 * _BLOCK_BYTES or any(data[end:]):
        raise CorruptionError(
            "a shard must end in zero blocks after its last member, "
            f"but is cut or damaged at byte {end} of {len(data)}; {_CURE}"
        )


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Return key and extension of a member that may be admitted."""
    key, _, extension = member.name.partition(".")
    if member.type != tarfile.REGTYPE or not _KEY_PATTERN.fullmatch(key) or extension not in EXTENSIONS:
        raise CorruptionError(
            f"a shard may hold plain files named key.extension with an extension of {sorted(EXTENSIONS)}, "
            f"got {member.name!r} of type {member.type!r}; {_CURE}"
        )
    return key, extension
