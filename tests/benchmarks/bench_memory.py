"""Counts what training the published models takes on each GPU: the tables of infra/memory.md.

.venv/bin/python -m pytest tests/benchmarks/bench_memory.py -m benchmark -s -q
"""

import pytest

from ldm.recipe import load_recipe
from ldm.training.memory import GIB, HEADROOM, Networks, TrainingStage, Way, networks_of_stage, training_of

UNETS = (
    *("celebahq", "ffhq256", "lsun-beds256", "lsun-churches256", "cin256", "cin256-v2"),
    *("layout2img-openimages256", "semantic-synthesis256", "bsr-sr", "inpainting-big", "text2img256"),
    *("rdm768", "txt2img-1p4b"),
)
FIRST_STAGES = {"vq-f4": "celebahq", "vq-f8": "cin256", "kl-f8": "txt2img-1p4b"}
GPUS_GIB = (24, 80)
FEW, MORE = 8, 16


def row(networks: Networks, *, checkpointing: bool) -> list[str]:
    """State, slope per picture, and the most pictures at once for each size of GPU."""
    few, more = (networks.need(Way(at_once, 1, checkpointing)) for at_once in (FEW, MORE))
    state = few.total - few.activations
    slope = (more.total - few.total) / (MORE - FEW)
    fits = [FEW + ((1 - HEADROOM) * gib * GIB - few.total) / slope for gib in GPUS_GIB]
    return [f"{state / GIB:.1f}", f"{slope / GIB:.2f}", *(f"{max(0, int(most)):d}" for most in fits)]


def print_table(rows: list[list[str]]) -> None:
    sizes = " | ".join(f"in {gib} GiB" for gib in GPUS_GIB)
    print(f"\n| model | batch | state, GiB | a picture, GiB | {sizes} | a picture, again | {sizes} |")
    print("|" + " --- |" * len(rows[0]))
    for cells in rows:
        print("| " + " | ".join(cells) + " |", flush=True)


def both(name: str, recipe: str, stage: TrainingStage) -> list[str]:
    found = load_recipe(recipe)
    networks = networks_of_stage(found, stage)
    kept, again = (row(networks, checkpointing=on) for on in (False, True))
    return [name, str(training_of(found, stage).batch_size), *kept, *again[1:]]


@pytest.mark.benchmark
@pytest.mark.timeout(3600)
def test_memory_of_the_published_models() -> None:
    print_table([both(name, name, "train-ldm") for name in UNETS])
    print_table([both(name, recipe, "train-first-stage") for name, recipe in FIRST_STAGES.items()])
