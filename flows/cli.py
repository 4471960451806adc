"""The console script `ldm`: every stage as a verb, and what one does with what they leave behind.

Imports inside the commands keep `ldm --help` instant.
"""

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.validators import Number

from flows.asked import ASKED, GIVEN, SETTINGS, Asked, Given, Settings, Weights

EXIT_REFUSED = 2

commands = App(
    name="ldm",
    help=(
        "Train latent diffusion models: download, first stage, latents, UNet, scores.\n\n"
        "`ldm reproduce demo` runs everything on real pictures; each stage is also a verb of its own "
        "and reuses what the store already has. `ldm recipes` lists the runs that come with the package; "
        "a recipe is a YAML, and any value of it can be set from here: "
        "`ldm train-ldm demo --set training.num_images=20000`."
    ),
    version_flags=[],
)

RecipeName = Annotated[str, Parameter(help="Name of a recipe (see `ldm recipes`) or path of your own YAML.")]
Overrides = Annotated[
    list[str] | None,
    Parameter(
        name="--set", help="Set one value of the recipe: a dotted key, `=`, a YAML value. May be repeated."
    ),
]
StoreUri = Annotated[str, Parameter(name="--store", help="Root of all artifacts: a folder or an fsspec URI.")]
Build = Annotated[
    bool,
    Parameter(
        name="--build", negative="--no-build", help="Build missing inputs, or refuse to run without them."
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    Parameter(help="Where networks compute; by default on a GPU where there is one."),
]
DEFAULT_STORE = "./artifacts"


def run_flow(name: str, recipe: str, overrides: list[str] | None, store: str, **more: object) -> None:
    """Check the request, then run a flow and print what it made.

    What is slow to import comes after the checks: torch after the recipe's, Prefect after all of them.
    """
    from datasets.store import Store
    from flows.local import use_local_services
    from ldm.recipe import load_recipe

    model, build = more.get("model"), bool(more.get("build", True))
    load_recipe(recipe, overrides or [])
    use_local_services(Store(store).local_root)
    from flows.request import Request

    request = Request.resolve(
        recipe, overrides or [], store, build=build, model=model if isinstance(model, str) else None
    )
    from flows.console import tell_errors_once
    from flows.guardian import guard_this_run
    from flows.registry import FLOWS
    from flows.summary import print_summary
    from flows.tracking import deliver_waiting

    guard_this_run()
    tell_errors_once()
    outcome = FLOWS[name](recipe, overrides, store, **more)
    print_summary(request, outcome if isinstance(outcome, list) else [outcome])
    deliver_waiting(request.store)


@commands.command(name="download-shards")
def download_shards(recipe: RecipeName, *, set: Overrides = None, store: StoreUri = DEFAULT_STORE) -> None:
    """Fetch, curate and shard the pictures of a recipe's data set."""
    run_flow("download-shards", recipe, set, store)


@commands.command(name="train-first-stage")
def train_first_stage(
    recipe: RecipeName,
    *,
    set: Overrides = None,
    store: StoreUri = DEFAULT_STORE,
    build: Build = True,
) -> None:
    """Train the recipe's first stage (the autoencoder)."""
    run_flow("train-first-stage", recipe, set, store, build=build)


@commands.command(name="evaluate-first-stage")
def evaluate_first_stage(
    recipe: RecipeName,
    *,
    set: Overrides = None,
    store: StoreUri = DEFAULT_STORE,
    build: Build = True,
) -> None:
    """Score the recipe's first stage: rFID, PSNR, SSIM, LPIPS, beside those of bicubic scaling."""
    run_flow("evaluate-first-stage", recipe, set, store, build=build)


@commands.command(name="compare-first-stages")
def compare_first_stages(
    recipe: RecipeName,
    *,
    first_stages: Annotated[
        list[str],
        Parameter(help="Names of first stages, e.g. `cats-vq-f2 cats-vq-f4`.", consume_multiple=True),
    ],
    set: Overrides = None,
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Train and score several first stages on the pictures of one recipe (paper Tab. 8)."""
    run_flow("compare-first-stages", recipe, set, store, first_stages=first_stages)


@commands.command(name="encode-latents")
def encode_latents(
    recipe: RecipeName,
    *,
    set: Overrides = None,
    store: StoreUri = DEFAULT_STORE,
    build: Build = True,
) -> None:
    """Encode the corpus into latent shards."""
    run_flow("encode-latents", recipe, set, store, build=build)


@commands.command(name="train-ldm")
def train_ldm(
    recipe: RecipeName,
    *,
    set: Overrides = None,
    store: StoreUri = DEFAULT_STORE,
    build: Build = True,
) -> None:
    """Train the recipe's UNet on latents."""
    run_flow("train-ldm", recipe, set, store, build=build)


@commands.command
def evaluate(
    recipe: RecipeName,
    *,
    set: Overrides = None,
    store: StoreUri = DEFAULT_STORE,
    build: Build = True,
    model: Annotated[
        str | None, Parameter(help="Score this registered model, e.g. `ldm-demo@candidate`.")
    ] = None,
) -> None:
    """Score a model: FID, precision and recall, rFID, PSNR, class accuracy, each beside its floor."""
    run_flow("evaluate", recipe, set, store, build=build, model=model)


@commands.command
def reproduce(recipe: RecipeName, *, set: Overrides = None, store: StoreUri = DEFAULT_STORE) -> None:
    """Run a recipe from the URL list to the scores."""
    run_flow("reproduce", recipe, set, store)


@commands.command
def sample(
    model: Annotated[
        str,
        Parameter(help="A model folder, or `ldm-demo`, `ldm-demo@candidate`, or the first digits of a key."),
    ],
    *,
    output: Annotated[
        Path, Parameter(help="A `.png` gets a grid; any other name is a folder for a file per picture.")
    ] = Path("samples.png"),
    asked: Asked = ASKED,
    given: Given = GIVEN,
    settings: Settings = SETTINGS,
    weights: Weights = None,
    device: Device = "auto",
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Draw pictures from a trained or imported model.

    Each file says what it was drawn with: model, seed, index, settings. With --image pictures are changed,
    with --mask a part of one is painted, with --guide samples are drawn towards one.
    """
    from flows.sample import sample_to_files

    sample_to_files(
        store, model, output, asked=asked, given=given, settings=settings, weights=weights, device=device
    )


@commands.command
def reconstruct(
    images: Annotated[list[Path], Parameter(help="Pictures, or folders of them: PNG, JPEG or WebP.")],
    *,
    model: Annotated[
        str,
        Parameter(
            help="A model folder, or `first-stage-cats-vq-f4`, with `@alias`, or a key's first digits."
        ),
    ],
    output: Annotated[Path, Parameter(help="PNG to write.")] = Path("reconstructions.png"),
    size: Annotated[
        int | None,
        Parameter(
            help="Cut the middle square and shrink it to this side; by default a picture's own size.",
            validator=Number(gte=16),
        ),
    ] = None,
    crop: Annotated[
        bool, Parameter(negative="", help="Cut the middle to the next smaller size that f divides.")
    ] = False,
    memory: Annotated[
        float | None,
        Parameter(help="GiB that encoding and decoding may take beside the weights; they then go in bands."),
    ] = None,
    device: Device = "auto",
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Send pictures through a first stage and back: PSNR, SSIM and LPIPS of each, and a sheet to look at.

    Pictures become 8-bit sRGB as for training: transparency is laid on white, grey, palettes and 16 bits are
    converted, the camera's rotation is applied. Animations, damaged files and other formats are refused.
    """
    from flows.reconstruct import reconstruct_to_file

    reconstruct_to_file(
        store, model, images, output, size_px=size, crop=crop, memory_gib=memory, device=device
    )


@commands.command(name="import")
def import_model(
    config: Annotated[
        Path, Parameter(help="The published YAML beside a checkpoint, or a folder that diffusers wrote.")
    ],
    checkpoint: Annotated[Path | None, Parameter(help="The `.ckpt` that belongs to the YAML.")] = None,
    *,
    output: Annotated[Path, Parameter(help="Folder to make.")],
    register: Annotated[
        str | None,
        Parameter(help="Also put the model into the store, registered by this name for `ldm sample NAME`."),
    ] = None,
    one_head: Annotated[
        bool,
        Parameter(
            negative=(),
            help=(
                "Transformers have one head, as in checkpoints trained before April 2022: cin256, "
                "text2img256, layout2img-openimages256."
            ),
        ),
    ] = False,
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Turn a model of another program into a folder that `ldm.load` opens; nothing in it is run."""
    from flows.register import check_name, register_folder
    from ldm.bridge.transfer import import_to_folder

    if register is not None:
        check_name(register)
    print(*import_to_folder(config, checkpoint, output=output, one_head=one_head), sep="\n")
    if register is not None:
        print(register_folder(store, output, register))


@commands.command(name="export")
def export_model(
    model: Annotated[
        str,
        Parameter(
            help=(
                "A model folder, or `ldm-demo`, `first-stage-cats-vq-f4`, with `@alias`, or a key's first "
                "digits."
            )
        ),
    ],
    *,
    format: Annotated[Literal["compvis", "diffusers"], Parameter(help="Whose layout to write.")],
    output: Annotated[Path, Parameter(help="Folder to make.")],
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Write a model in the layout of another program, read it back and report every difference."""
    from flows.export import find_exportable
    from ldm.bridge.transfer import export_to_folder

    print(*export_to_folder(find_exportable(store, model), output, format=format), sep="\n")


@commands.command
def memory(
    recipe: RecipeName,
    *,
    set: Overrides = None,
    gpus: Annotated[int, Parameter(help="GPUs that share out a batch.", validator=Number(gte=1))] = 1,
    gib: Annotated[
        float | None, Parameter(help="Memory of each GPU; says what fits and what to set.")
    ] = None,
) -> None:
    """Count what training a recipe takes on each GPU, without one; infra/memory.md has the paper's models."""
    from flows.memory import print_memory

    print_memory(recipe, set or [], gpus=gpus, gib=gib)


@commands.command
def recipes() -> None:
    """List the recipes that come with the package."""
    from flows.listing import print_recipes

    print_recipes()


@commands.command(name="list")
def list_artifacts(*, store: StoreUri = DEFAULT_STORE) -> None:
    """List the artifacts of a store: size, cost, what each is made of, which are stale and why."""
    from flows.listing import print_artifacts

    print_artifacts(store)


@commands.command
def gc(
    *,
    recipe: Annotated[
        list[str] | None, Parameter(help="YAML of your own that counts as well. May be repeated.")
    ] = None,
    delete: Annotated[bool, Parameter(negative="", help="Remove it, and not only list it.")] = False,
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """List, or remove, what no alias, recipe or running attempt leads to, and abandoned work areas."""
    from flows.gc import collect_garbage

    collect_garbage(store, recipe or [], delete=delete)


@commands.command(name="copy")
def copy_to(
    key: Annotated[str, Parameter(help="The first digits of a key, or the name of a registered model.")],
    *,
    to: Annotated[str, Parameter(help="Root of the other store: a folder or an fsspec URI.")],
    with_parents: Annotated[
        bool, Parameter(negative="", help="Copy the files of all it was made of, not their manifests alone.")
    ] = False,
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Copy an artifact to another store, verified on both ends, with its parents' manifests.

    A diffusion model takes its first stage along. The same command again goes on, or verifies.
    """
    from flows.copy import copy_artifact

    copy_artifact(store, key, to, with_parents=with_parents)


@commands.command
def status(*, store: StoreUri = DEFAULT_STORE) -> None:
    """Say what runs, how far it is, and what was cut off."""
    from flows.listing import print_status

    print_status(store)


@commands.command
def logs(
    stage: Annotated[
        str | None, Parameter(help="A stage's name; the stage that ran last by default.")
    ] = None,
    *,
    lines: Annotated[int, Parameter(help="How many of the last lines.", validator=Number(gte=1))] = 50,
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Print the last lines of a stage's log."""
    from flows.listing import print_log

    print_log(store, stage, lines)


def app() -> None:
    """Run the command line; a foreseen error is one message on stderr and exit status 2."""
    from datasets.errors import DatasetsError
    from ldm.errors import LdmError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that exit handlers run
    try:
        commands(sys.argv[1:])
    except (DatasetsError, LdmError) as error:
        print(f"ldm: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt:
        print("ldm: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
