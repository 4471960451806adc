"""What the JSON of a checkpoint says: sealed by its digest, and compared with the run that it continues."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from datasets.errors import CorruptionError
from datasets.keys import canonical_json, sha256_hex
from ldm.errors import TrainingError

SEAL = b'{"content":%b,"sha256":"%b"}'
START, END = len(b'{"content":'), len(b',"sha256":"') + 64 + len(b'"}')


class Record(BaseModel):
    """A checkpoint but for its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    step: int = Field(ge=0, lt=10**18)
    sha256: str
    """Of the tensors' file."""
    num_bytes: int = Field(ge=0, lt=2**63)
    """Of the tensors' file."""
    history: dict[str, list[tuple[int, float]]]
    """Logged metrics so far: name -> (images seen, value)."""
    skipped: tuple[int, ...]
    """Steps that were left out because their numbers were bad."""
    of: dict[str, Any] | None
    """Configuration of the run, where it was given."""


def sealed(record: Record) -> bytes:
    """A record together with its digest, as JSON."""
    return seal(canonical_json(record.model_dump(mode="json")))


def seal(content: bytes) -> bytes:
    """A JSON value together with its digest, as a JSON object."""
    return SEAL % (content, sha256_hex(content).encode())


def parsed(line: bytes, *, name: str) -> Record:
    """A record whose digest was verified before any of it was parsed.

    Raises:
        CorruptionError: it is not as it was sealed, or it is none of ours.
    """
    content = line[START:-END]
    if line != seal(content):
        raise CorruptionError(f"{name} must be sealed by its own digest")
    try:
        return Record.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptionError(f"{name} must be a checkpoint's record ({where}: {first['msg']})") from error


def check_configuration(
    saved_with: Mapping[str, Any] | None, of: Mapping[str, Any] | None, *, where: str
) -> None:
    """Refuse a checkpoint of another configuration; None of the run's own compares nothing.

    Raises:
        TrainingError: naming every field that differs, with both sides.
    """
    if of is None:
        return
    theirs, ours = fields(saved_with or {}), fields(of)
    differences = [
        f"{name}: the checkpoint has {side(theirs, name)}, this run needs {side(ours, name)}"
        for name in sorted(theirs.keys() | ours.keys())
        if side(theirs, name) != side(ours, name)
    ]
    if differences:
        raise TrainingError(
            f"a run continues from a checkpoint of its own configuration, but {where} is of another; "
            f"{'; '.join(differences)}; run the recipe it was made by, or remove it to start over"
        )


def side(values: Mapping[str, Any], name: str) -> str:
    """A field as a message shows it."""
    return repr(values[name]) if name in values else "none"


def fields(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted names."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= fields(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return found
