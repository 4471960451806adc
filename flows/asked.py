"""What `ldm sample` is asked for: conditions, pictures to edit, settings; as options of the command line.

Nothing slow is imported, so that `ldm sample --help` is instant.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

CONDITION = Group("What to draw", sort_key=1)
EDIT = Group("Pictures to start from", sort_key=2)
HOW = Group(
    "How to draw",
    sort_key=3,
    help="By default as a trained model's recipe says; for an imported one ddim, 50 steps, guidance 1.",
)


@Parameter(name="*", group=CONDITION)
@dataclass(frozen=True)
class Asked:
    """What pictures are to show."""

    classes: Annotated[
        list[str] | None,
        Parameter(
            help="Class names or numbers, a row each; all by default.", consume_multiple=True, negative=()
        ),
    ] = None
    prompt: Annotated[
        list[str] | None, Parameter(help="Captions, a row each.", consume_multiple=True, negative=())
    ] = None
    condition: Annotated[
        Path | None,
        Parameter(
            help=(
                "Conditions of any kind: a safetensors file with the fields that are listed in "
                "ldm/conditions.py, a row each."
            )
        ),
    ] = None
    num: Annotated[
        int, Parameter(help="Pictures of each class, prompt or condition.", validator=Number(gte=1))
    ] = 4


@Parameter(name="*", group=EDIT)
@dataclass(frozen=True)
class Given:
    """Pictures that samples start from or are drawn towards."""

    image: Annotated[
        Path | None,
        Parameter(
            help=(
                "Picture to change, or, of a model that is conditioned on pictures, its condition. The "
                "middle square is taken."
            )
        ),
    ] = None
    strength: Annotated[
        float | None,
        Parameter(help="How far --image is changed, above 0 to 1; 0.6 by default without --mask."),
    ] = None
    mask: Annotated[
        Path | None, Parameter(help="White where --image is to be painted, black where it is kept.")
    ] = None
    guide: Annotated[Path | None, Parameter(help="Picture to be near to (image guiding).")] = None
    guide_scale: Annotated[
        float | None, Parameter(help="How hard --guide pulls; 1 by default, the formula's.")
    ] = None


@Parameter(name="*", group=HOW)
@dataclass(frozen=True)
class Settings:
    """Fields of `ldm.config.Sampling` that are set."""

    seed: Annotated[int | None, Parameter(help="Of all noise; the i-th picture's is keyed by it and i.")] = (
        None
    )
    sampler: Annotated[
        str | None, Parameter(help="ddim, ddpm, plms, dpmpp_2m, dpmpp_2m_sde, unipc, euler, heun.")
    ] = None
    steps: Annotated[int | None, Parameter(help="Sampling steps.")] = None
    eta: Annotated[float | None, Parameter(help="Noise of ddim, 0 to 1.")] = None
    guidance: Annotated[float | None, Parameter(help="Scale of classifier-free guidance; 1 is none.")] = None
    guidance_interval: Annotated[
        tuple[int, int] | None, Parameter(help="First and last time step that is guided.", negative=())
    ] = None
    guidance_rescale: Annotated[
        float | None, Parameter(help="Share by which guided noise is scaled back, 0 to 1.")
    ] = None
    micro_batch: Annotated[
        int | None,
        Parameter(
            help=(
                "Pictures per pass. The bits of a picture do not depend on how many are drawn; another "
                "number here may change its last ones."
            )
        ),
    ] = None

    def changes(self) -> dict[str, Any]:
        """Those that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}


ASKED, GIVEN, SETTINGS = Asked(), Given(), Settings()

Weights = Annotated[
    Literal["ema", "raw"] | None,
    Parameter(help="Averaged weights, or those of the last step; averaged where there are some."),
]
