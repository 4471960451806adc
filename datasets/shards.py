"""WebDataset shards: tar files of samples, written with reproducible bytes and read without trust.

A sample is the run of members that share a name up to its dot: ``000000017.png``, ``000000017.json``. Any
WebDataset reader can stream the shards. This module's reader admits data alone (no pickle, no code, no
links), never extracts, and takes a shard as a whole or not at all.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from datasets.errors import CorruptionError

EXTENSIONS = frozenset({"cls", "json", "npy", "png", "safetensors", "txt"})
KEY = "__key__"

Sample = dict[str, Any]
"""The sample's key under ``"__key__"``, and its members' bytes under their extensions."""

OWNER = "ldm"
MODE = 0o444
MTIME_S = 0.0

_BLOCK_BYTES = 512
_KIND = 156
_PLAIN = b"0\0"
_EXTENDED = ord("x")
_KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_=+-]*")
_MEMBER = re.compile(rb"(%s)\.(%s)" % (_KEY_PATTERN.pattern.encode(), "|".join(sorted(EXTENSIONS)).encode()))
_TIME = re.compile(rb"\d+ mtime=\d+(\.\d+)?\n")
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
    """Yield (key, extension, bytes) of each member of a tar that has been looked at as a whole."""
    places, end = _places(data)
    # A damaged header may look like the end, and so does a cut between members; the two zero blocks tell.
    if len(data) < end + 2 * _BLOCK_BYTES or data.count(0, end) != len(data) - end:
        raise CorruptionError(
            "a shard must end in zero blocks after its last member, "
            f"but is cut or damaged at byte {end} of {len(data)}; {_CURE}"
        )
    _require_checksums(data, [offset for offset, _ in places])
    for offset, num_bytes in places:
        start = offset + _BLOCK_BYTES
        if data[offset + _KIND] == _EXTENDED:
            _require_time_alone(data[start : start + num_bytes])
        else:
            key, extension = _split(data[offset:start])
            yield key, extension, data[start : start + num_bytes]


def _places(data: bytes) -> tuple[list[tuple[int, int]], int]:
    """Return (offset of the header, bytes of content) of each entry, and where the last one ends."""
    places: list[tuple[int, int]] = []
    offset = 0
    while offset < len(data) and data[offset]:
        digits = data[offset + 124 : offset + 135]
        if len(digits) < 11 or digits.strip(b"01234567"):
            raise CorruptionError(
                f"a shard must be a plain tar, got {len(data)} bytes that have no header at {offset}; {_CURE}"
            )
        places.append((offset, int(digits, 8)))
        offset += _BLOCK_BYTES * (1 + -(-places[-1][1] // _BLOCK_BYTES))
    if offset > len(data):
        raise CorruptionError(
            f"a member must be whole, but the shard needs {offset} bytes and ends after {len(data)}; {_CURE}"
        )
    return places, offset


def _require_checksums(data: bytes, offsets: list[int]) -> None:
    """Check each header against the sum of its bytes that it states, its own field counted as spaces."""
    blocks = np.frombuffer(data, np.uint8, len(data) // _BLOCK_BYTES * _BLOCK_BYTES)
    headers = blocks.reshape(-1, _BLOCK_BYTES)[np.asarray(offsets, np.int64) // _BLOCK_BYTES]
    stated = (headers[:, 148:154].astype(np.int64) - ord("0")) @ (8 ** np.arange(5, -1, -1))
    found = headers.sum(1, dtype=np.int64) - headers[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    for wrong in np.flatnonzero(stated != found):
        raise CorruptionError(
            f"a header must have the checksum it states, {stated[wrong]}, "
            f"but the one at byte {offsets[wrong]} has {found[wrong]}; {_CURE}"
        )


def _require_time_alone(records: bytes) -> None:
    """Check that an extended header says nothing but a time: names and sizes stand in plain headers."""
    if not _TIME.fullmatch(records):
        raise CorruptionError(
            f"an extended header of a shard may hold a time alone, got {records[:80]!r}; {_CURE}"
        )


def _split(header: bytes) -> tuple[str, str]:
    """Return key and extension of a member that may be admitted."""
    name = header[:100].rstrip(b"\0")
    found = _MEMBER.fullmatch(name)
    if found is None or header[_KIND] not in _PLAIN or header[345:500].strip(b"\0"):
        raise CorruptionError(
            f"a shard may hold plain files named key.extension with an extension of {sorted(EXTENSIONS)}, "
            f"got {(header[345:500].strip(bytes(1)) + name).decode('ascii', 'replace')!r} "
            f"of type {header[_KIND : _KIND + 1]!r}; {_CURE}"
        )
    key, extension = found.groups()
    return key.decode(), extension.decode()
