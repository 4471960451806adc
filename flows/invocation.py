"""What a run was asked for, as it can be asked for again."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ldm.config import Recipe
from ldm.recipe import is_path, load_recipe


class Invocation(BaseModel):
    """A recipe and the values set over it; kept with what came of it, as provenance.

    Attributes:
        recipe: Name of a recipe, or the absolute path of a YAML.
        set: Overrides, `key=value` each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    set: tuple[str, ...] = ()

    @classmethod
    def of(cls, recipe: str, overrides: Sequence[str]) -> "Invocation":
        """What the command line or a flow was given."""
        name = str(Path(recipe).absolute()) if is_path(recipe) else recipe
        return cls(recipe=name, set=tuple(overrides))

    @property
    def is_lost(self) -> bool:
        """Whether it names a YAML that is not there, or not on this machine."""
        return is_path(self.recipe) and not Path(self.recipe).is_file()

    def resolve(self) -> Recipe:
        """The recipe as it stands now.

        Raises:
            RecipeError: it is gone, or no longer takes the overrides.
            ConfigError: its data set is unknown.
        """
        return load_recipe(self.recipe, self.set)
