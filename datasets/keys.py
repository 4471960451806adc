"""Canonical bytes, digests, and the key that names an artifact before it exists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _require_string_keys(value: Any) -> None:
    """Refuse keys that JSON would turn into strings: {1: x} and {"1": x} would share a digest."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                received = f"{key!r} ({type(key).__name__})"
                message = f"keys of a hashed mapping must be strings, got {received}; use {str(key)!r}"
                raise ValueError(message)  # noqa: TRY004 - the value is at fault, not an argument's type
            _require_string_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_string_keys(item)


def canonical_json(value: Any) -> bytes:
    """Return the one JSON encoding of a value: keys sorted, no spaces, UTF-8.

    Lists and tuples encode alike; 1 and 1.0 do not, since a reader would get different types back.

    Raises:
        ValueError: For NaN and infinities, for mappings with keys that are not strings, and for values
            that JSON has no form for.
    """
    try:
        _require_string_keys(value)
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        message = (
            f"a hashed value must be made of JSON types with finite numbers ({error}); "
            "convert it to str, int, float, bool, None, list or dict first"
        )
        raise ValueError(message) from error


def sha256_hex(data: bytes | bytearray) -> str:
    """Return the SHA-256 of bytes as 64 lowercase hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content as 64 lowercase hex digits, in constant memory."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def artifact_key(
    stage: str, code_version: int, *, what: Mapping[str, Any], parents: Mapping[str, str]
) -> str:
    """Return the key of an artifact: 64 hex digits that depend on all that its bytes depend on, and no more.

    Args:
        stage: The stage that makes the artifact.
        code_version: The stage's ``CODE_VERSION``, raised whenever the same input gives other bytes.
        what: The part of the resolved configuration that changes the artifact's bytes. Where and how it
            is made (store, engine, workers, device, ports) stays out of it.
        parents: The content digest of each artifact that is read, by the role it plays.

    Raises:
        ValueError: When ``what`` has no canonical JSON form.
    """
    named = {"stage": stage, "code_version": code_version, "what": dict(what), "parents": dict(parents)}
    return sha256_hex(canonical_json(named))
