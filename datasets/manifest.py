"""The manifest: the JSON, written last, that makes an artifact exist.

It has two parts. The *content* says what the artifact is (key, parents, files, statistics) and is hashed;
its digest is the artifact's identity. The *provenance* says how it came about (times, host, run ids) and is
not hashed: two runs that made the same thing at different times agree.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import field
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from datasets.errors import CorruptionError
from datasets.keys import canonical_json, sha256_hex

FORMAT = 1

STAGE_PATTERN = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
KEY_PATTERN = re.compile(r"[0-9a-f]{64}")
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*")


def _json_copy(value: Any) -> Any:
    """Return a value as JSON would give it back, detached from the caller's own."""
    return json.loads(canonical_json(value))


Stage = Annotated[str, Field(pattern=f"^{STAGE_PATTERN.pattern}$")]
Digest = Annotated[str, Field(pattern=f"^{KEY_PATTERN.pattern}$")]
FileName = Annotated[str, Field(pattern=f"^{NAME_PATTERN.pattern}$", max_length=200)]
JsonDict = Annotated[dict[str, Any], BeforeValidator(_json_copy)]

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class FileRecord:
    """One file of an artifact.

    Attributes:
        name: What the artifact calls it, e.g. ``train-00000.tar``.
        path: Where it lies, relative to the artifact's folder; holds the first 12 digits of its digest.
        bytes: Its size.
        sha256: Its digest.
        count: Samples or rows in it, where that means something.
    """

    name: FileName
    path: FileName
    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest
    count: Annotated[int, Field(ge=0)] | None = None


@dataclass(frozen=True, config=STRICT)
class Parent:
    """An artifact that was read to make another: its stage, its key and its content digest."""

    stage: Stage
    key: Digest
    digest: Digest


@dataclass(frozen=True, config=STRICT)
class Content:
    """The hashed part of a manifest.

    Attributes:
        stage: The stage that made the artifact.
        key: Its key, see ``keys.artifact_key``.
        code_version: The stage's ``CODE_VERSION``.
        what: The part of the configuration that went into the key.
        parents: What was read, by role.
        files: The files, in the order in which a reader should see them.
        statistics: Facts about the whole, e.g. counts and moments; JSON values with finite numbers.
    """

    stage: Stage
    key: Digest
    code_version: int
    what: JsonDict
    parents: dict[str, Parent]
    files: tuple[FileRecord, ...]
    statistics: JsonDict = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse two files of one name."""
        counts = Counter(record.name for record in self.files)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            message = f"file names of an artifact must be distinct, got {twice} more than once; rename one"
            raise ValueError(message)


CONTENT = TypeAdapter(Content)


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """A committed artifact: its content, which is its identity, and how it came about."""

    content: Content
    provenance: JsonDict = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The artifact's identity: SHA-256 of the canonical JSON of its content."""
        return sha256_hex(canonical_json(CONTENT.dump_python(self.content, mode="json")))

    @property
    def key(self) -> str:
        """The artifact's key."""
        return self.content.key

    @property
    def short(self) -> str:
        """The first 12 digits of the key, for people."""
        return self.content.key[:12]

    @property
    def stage(self) -> str:
        """The stage that made the artifact."""
        return self.content.stage

    @property
    def num_bytes(self) -> int:
        """The size of the artifact's files together."""
        return sum(record.bytes for record in self.content.files)

    def file(self, name: str) -> FileRecord:
        """Return the record of the file of that name.

        Raises:
            KeyError: When the artifact has no such file.
        """
        for record in self.content.files:
            if record.name == name:
                return record
        known = ", ".join(record.name for record in self.content.files) or "no files"
        message = f"artifact {self.stage} {self.short} has no file {name!r}; it holds {known}"
        raise KeyError(message)

    def to_json(self) -> bytes:
        """Return the manifest as it is stored: indented JSON with the content's digest beside it."""
        document = {
            "format": FORMAT,
            "digest": self.digest,
            "content": CONTENT.dump_python(self.content, mode="json"),
            "provenance": self.provenance,
        }
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()

    @classmethod
    def from_json(cls, data: bytes | str, *, source: str = "manifest") -> Manifest:
        """Return the manifest that ``to_json`` wrote, its digest verified.

        Args:
            data: The stored JSON.
            source: What to call it in a message, e.g. its address.

        Raises:
            CorruptionError: When it is no manifest of this format, or its content does not have the digest
                it states.
        """
        try:
            document = json.loads(data)
            if not isinstance(document, dict) or document.get("format") != FORMAT:
                raise ValueError(f"not a manifest of format {FORMAT}")  # noqa: TRY301 - one place words the message
            manifest = cls(CONTENT.validate_python(document["content"]), document["provenance"])
        except (ValueError, KeyError, RecursionError) as error:
            message = (
                f"{source} must be a manifest that was written whole, but cannot be read ({error}); "
                "delete its folder and run the stage again"
            )
            raise CorruptionError(message) from error
        if document.get("digest") != manifest.digest:
            message = (
                f"the content of {source} must have the digest it states, {document.get('digest')}, "
                f"but has {manifest.digest}; delete its folder and run the stage again"
            )
            raise CorruptionError(message)
        return manifest
