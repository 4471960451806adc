"""A mapping of somebody else's config, read value by value: nothing in it is imported, called or guessed."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from ldm.config import Config
from ldm.errors import CheckpointError
from ldm.first_stage_config import FirstStageModel
from ldm.layout import listed

T = TypeVar("T", bool, int, float, str)
C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Section:
    """One mapping of a config, and where it stands, for messages."""

    source: str
    """The file."""
    path: str
    """Dotted path of this mapping inside the file; empty for the whole."""
    values: Mapping[str, Any]

    def place(self, key: str) -> str:
        """Where a key stands."""
        return f"{self.source}, {f'{self.path}.' if self.path else ''}{key}"

    def section(self, key: str) -> "Section":
        """The mapping under a key.

        Raises:
            CheckpointError: there is none.
        """
        found = self.values.get(key)
        if not isinstance(found, Mapping):
            raise CheckpointError(
                f"{self.place(key)} must be a mapping, got {found!r}; give the config published with "
                "the weights"
            )
        return Section(self.source, f"{self.path}.{key}".lstrip("."), found)

    def value(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value under a key, or the default where the key is absent.

        Raises:
            CheckpointError: it is of another type, or absent and without a default.
        """
        found = self.values.get(key, default)
        if kind is float and type(found) is int:
            found = float(found)
        if not isinstance(found, kind) or isinstance(found, bool) != (kind is bool):
            raise CheckpointError(
                f"{self.place(key)} must be of type {kind.__name__}, got {found!r}; "
                "give the config published with the weights"
            )
        return found

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value under a key; None where it is absent or null.

        Raises:
            CheckpointError: it is of another type.
        """
        return None if self.values.get(key) is None else self.value(key, kind)

    def one_of(self, key: str, choices: Iterable[str], default: str | None = None) -> str:
        """The text under a key, which must be one of these.

        Raises:
            CheckpointError: it is another one, or absent and without a default.
        """
        found, known = self.value(key, str, default), list(choices)
        if found not in known:
            raise CheckpointError(
                f"{self.place(key)} must be one of {', '.join(known)}, got {found!r}; our models have no "
                "other form"
            )
        return found

    def empty(self, key: str) -> "Section":
        """A mapping without values under a key, where it may be left out."""
        return Section(self.source, f"{self.path}.{key}".lstrip("."), {})

    def many(self, key: str, kind: type[T], default: tuple[T, ...] | None = None) -> tuple[T, ...]:
        """The list under a key, or the default where the key is absent.

        Raises:
            CheckpointError: it is no list, or one of its values is of another type.
        """
        found = self.values.get(key, default)
        if not isinstance(found, list | tuple):
            raise CheckpointError(
                f"{self.place(key)} must be a list, got {found!r}; give the config published with the weights"
            )
        items = Section(self.source, self.path, {f"{key}[{i}]": item for i, item in enumerate(found)})
        return tuple(items.value(name, kind) for name in items.values)

    def require_known(self, known: Collection[str]) -> None:
        """Refuse keys that nobody here knows the meaning of.

        Raises:
            CheckpointError: there are some; the message lists them.
        """
        unknown = [str(key) for key in self.values if key not in known]
        if unknown:
            raise CheckpointError(
                f"{self.source}: unknown in {self.path or 'the file'}: {listed(unknown)}; known are "
                f"{', '.join(sorted(known))}; a setting that is not understood may change what the model does"
            )

    def require_equal(self, fixed: Mapping[str, object]) -> None:
        """Refuse settings whose value our models cannot take; an absent key has the value asked for.

        Raises:
            CheckpointError: a key has another value.
        """
        for key, wanted in fixed.items():
            found = self.values.get(key, wanted)
            if found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
                raise CheckpointError(
                    f"{self.place(key)} must be {wanted!r}, got {found!r}; our models have no other form"
                )


def validated(kind: type[C], source: str, /, **values: object) -> C:
    """A config of translated values.

    Raises:
        CheckpointError: no model can be built from them.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        said = "; ".join(
            ": ".join(filter(None, [".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")]))
            for e in error.errors()
        )
        raise CheckpointError(f"{source} must describe a model that can be built; {said}") from None


def first_stage_model(source: str, **values: object) -> FirstStageModel:
    """A first stage's config of translated values.

    Raises:
        CheckpointError: no first stage can be built from them.
    """
    return validated(FirstStageModel, source, **values)
