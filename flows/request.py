"""What a flow was asked for, resolved and checked before any work; and where its stages' artifacts are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from datasets.manifest import Manifest
from datasets.store import Store
from flows.invocation import Invocation
from flows.models import ancestry, asked_for, find_model_of, recipe_of
from flows.preflight import check_data, check_machine, find_shards
from ldm.config import Recipe
from ldm.errors import LdmError
from ldm.recipe import load_recipe
from ldm.stages import STAGES

DOWNLOAD_SHARDS = "download-shards"


class NotBuiltError(LdmError):
    """An input is missing and building it was forbidden."""


@dataclass
class Request:
    """One recipe over one store."""

    recipe: Recipe
    store: Store
    build: bool = True
    """Whether missing inputs may be built."""
    found: dict[str, Manifest] = field(default_factory=dict)
    """Artifacts looked up or made so far, by stage."""
    asked: Invocation | None = None
    """How it was asked for, when it can be asked for again."""

    @classmethod
    def resolve(
        cls,
        recipe: str,
        overrides: Sequence[str],
        store: str,
        *,
        build: bool = True,
        model: str | None = None,
    ) -> "Request":
        """Read and check everything that can be checked before any work.

        Args:
            recipe: name or YAML path; with `model`, the recipe that model was trained by is used instead.
            overrides: `key=value` each.
            store: URI of the artifact store.
            build: whether missing inputs may be built.
            model: a registered model (`name`, `name@alias`), an alias of this recipe's model, or a key. What
                it was made of is taken from the store, wherever its pictures may be by now; nothing is built.

        Raises:
            LdmError, DatasetsError: naming the rule, the value and the cure.
        """
        opened = Store(store)
        if model is None:
            resolved = load_recipe(recipe, overrides)
            check_data(resolved)
            check_machine(resolved)
            return cls(resolved, opened, build, asked=Invocation.of(recipe, overrides))
        manifest = find_model_of(opened, recipe, model)
        resolved = recipe_of(manifest, overrides)
        check_machine(resolved)
        made = asked_for(manifest)
        asked = made and Invocation.of(made.recipe, [*made.set, *overrides])
        return cls(resolved, opened, build=False, found=ancestry(opened, manifest), asked=asked)

    def find(self, stage: str) -> Manifest | None:
        """The artifact of a stage, when the store has it and everything it is made of."""
        if stage not in self.found:
            manifest = self.look_up(stage)
            if manifest is None:
                return None
            self.found[stage] = manifest
        return self.found[stage]

    def look_up(self, stage: str) -> Manifest | None:
        """`find` without memory."""
        if stage == DOWNLOAD_SHARDS:
            return find_shards(self.store, self.recipe.dataset)
        inputs = {role: self.find(parent) for role, parent in STAGES[stage].inputs.items()}
        present = {role: manifest for role, manifest in inputs.items() if manifest is not None}
        if len(present) < len(inputs):
            return None
        return STAGES[stage].find(self.store, self.recipe, present)

    def need(self, stage: str, make: Callable[[], object]) -> Manifest:
        """The artifact of an input's stage; `make` runs that stage's flow when it is missing.

        Raises:
            NotBuiltError: it is missing and building is forbidden.
        """
        if self.find(stage) is None:
            if not self.build:
                raise NotBuiltError(
                    f"this flow needs the artifact of {stage} for recipe {self.recipe.name!r}, which is not "
                    f"in {self.store.uri}; run `ldm {stage} {self.recipe.name}` first, or drop --no-build"
                )
            make()
        manifest = self.find(stage)
        if manifest is None:
            raise LdmError(
                f"{stage} ended, but its artifact is not in {self.store.uri}; see `ldm logs {stage}`"
            )
        return manifest
