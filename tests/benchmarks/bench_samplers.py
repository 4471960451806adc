"""How near few steps come to many: each deterministic sampler against DDIM with all 999 steps.

Reads a trained model from the store that LDM_BENCH_STORE names (./artifacts by default), and writes its table
and plot into the folder that LDM_BENCH_OUTPUT names, if any.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datasets.store import Store
from flows.models import recipe_of
from ldm.diffusion.samplers import SAMPLERS, STOCHASTIC
from ldm.latent_diffusion import LatentDiffusion, class_condition
from ldm.pictures import curves
from ldm.stored_models import load_model

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(900)]
STEPS = (5, 10, 20, 50, 200)
DETERMINISTIC = [name for name in SAMPLERS if name not in STOCHASTIC]
NUM_SAMPLES = 8


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    """The newest trained model of the store."""
    store = Store(os.environ.get("LDM_BENCH_STORE", "./artifacts"))
    manifests = store.manifests("train-ldm")
    if not manifests:
        pytest.skip(f"no trained model in {store.uri}; `make demo` makes one, LDM_BENCH_STORE names another")
    torch.set_num_threads(1)
    return load_model(store, manifests[-1], recipe_of(manifests[-1]))


def drawer(model: LatentDiffusion, guidance: float) -> Callable[[str, int], Tensor]:
    """(sampler, steps) -> latents of the same noise and labels each time."""
    labels = [i % len(model.classes) for i in range(NUM_SAMPLES)] if model.classes else [-1] * NUM_SAMPLES

    def draw(sampler: str, steps: int) -> Tensor:
        wanted = {"sampler": sampler, "steps": steps, "guidance": guidance, "micro_batch": NUM_SAMPLES}
        return model.sample_latents(class_condition(model, labels), num=NUM_SAMPLES, **wanted)

    return draw


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_distance_to_the_solution_of_all_steps(model: LatentDiffusion, guidance: float) -> None:
    draw = drawer(model, guidance)
    exact = draw("ddim", 999)
    found = {
        sampler: [(n, float((draw(sampler, n) - exact).square().mean().sqrt())) for n in STEPS]
        for sampler in DETERMINISTIC
    }
    lines = ["sampler    " + "".join(f"{n:>9}" for n in STEPS)]
    lines += [f"{name:<11}" + "".join(f"{error:9.4f}" for _, error in row) for name, row in found.items()]
    title = f"Distance to DDIM with 999 steps from the same noise, guidance {guidance:g}"
    table = "\n".join([f"{title}: RMS in the latent, by steps", *lines])
    sys.stdout.write(f"\n{table}\n")
    if folder := os.environ.get("LDM_BENCH_OUTPUT"):
        plot = curves(found, title=title, ylabel="RMS in the latent", xlabel="steps", log_y=True)
        Path(folder, f"samplers-guidance-{guidance:g}.png").write_bytes(plot)
        Path(folder, f"samplers-guidance-{guidance:g}.txt").write_text(table + "\n", "utf-8")
    assert dict(found["unipc"])[20] < float((draw("ddim", 100) - exact).square().mean().sqrt())
    assert dict(found["dpmpp_2m"])[20] < dict(found["ddim"])[50]
