"""The whole chain at its smallest, made once, and the command line as people call it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from datasets.cats import CatPainter, draw_combinations

ROOT = Path(__file__).parents[2]
CHAIN = ("download-shards", "train-first-stage", "encode-latents", "train-ldm", "evaluate")
TINY_MODEL = [
    "first_stage.model.channels=8",
    "first_stage.training.num_images=64",
    "first_stage.training.picture_every_images=32",
    "first_stage.loss.perceptual_start_images=16",
    "first_stage.loss.adversarial_start_images=32",
    "first_stage.loss.discriminator_channels=8",
    "unet.model_channels=32",
    "training.num_images=96",
    "training.picture_every_images=64",
    "evaluation.num_images=4",
    "evaluation.micro_batch=4",
    "evaluation.classifier_images=0",
    "sampling.steps=2",
    "sampling.micro_batch=15",
    "threads=1",
]
TINY = [
    "dataset.source.train=40",
    "dataset.source.held_out=8",
    "dataset.source.dead=2",
    *TINY_MODEL,
]


def ldm_command(*arguments: str) -> dict[str, Any]:
    """How to start the command line in a process of its own, with all its state under the store."""
    users = ("PREFECT_", "MLFLOW_", "LDM_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(users)}
    return {
        "args": [sys.executable, "-c", "from flows.cli import app; app()", *arguments],
        "cwd": ROOT,
        "env": environ,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


@pytest.fixture(scope="session")
def ldm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `ldm` with these arguments to its end."""
    return lambda *arguments: subprocess.run(**ldm_command(*arguments), check=False)


@pytest.fixture(scope="session")
def ldm_started() -> Callable[..., subprocess.Popen[str]]:
    """Starts `ldm` with these arguments, and variables of the environment; what it prints is lost."""
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def start(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        command = ldm_command(*arguments)
        command["env"] |= environ or {}
        return subprocess.Popen(**(command | silent))

    return start


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Overrides that make the demo as small as it runs."""
    return TINY


@pytest.fixture(scope="session")
def tiny_model() -> list[str]:
    """The same but for the demo's data set, so for any pictures of 32 px."""
    return TINY_MODEL


@pytest.fixture(scope="session")
def options() -> Callable[[list[str]], list[str]]:
    """Overrides as arguments of the command line."""
    return lambda overrides: [argument for override in overrides for argument in ("--set", override)]


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs `ldm` in this process: exit status, stdout, stderr; environment and signals are put back."""
    from flows.cli import app

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ldm", *arguments])
        before = signal.getsignal(signal.SIGTERM)
        status = 0
        with patch.dict(os.environ):
            try:
                app()
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                signal.signal(signal.SIGTERM, before)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def cat_pictures() -> list[tuple[str, bytes]]:
    """200 cats of 32 px: file name and PNG; the part of the name before the dash is one of two classes."""
    painter = CatPainter(32)
    return [
        (f"{('dark', 'light')[cat.body % 2]}-{i:03d}.png", painter.png(cat))
        for i, cat in enumerate(draw_combinations(200, seed=3))
    ]


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with an artifact of every stage, made without a Prefect server."""
    from flows.produce import make
    from flows.request import Request

    folder = tmp_path_factory.mktemp("tiny")
    request = Request.resolve("demo", TINY, str(folder))
    for stage in CHAIN:
        request.found[stage] = make.fn(request, stage)
    return folder


SMALL = [
    "first_stage.model.channels=32",
    "first_stage.model.channel_mult=[1, 1, 1]",
    "first_stage.model.norm_groups=32",
    "first_stage.model.num_codes=32",
    "unet.model_channels=32",
    "unet.context_dim=32",
    "conditioning.context_dim=32",
    "threads=1",
    "sampling.micro_batch=2",
    "sampling.steps=3",
]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    """Commits a model of random weights as training would, by the demo's recipe with overrides.

    Returns the store and the first digits of the model's key.
    """
    import torch
    from safetensors.torch import save

    from datasets.keys import artifact_key
    from datasets.manifest import Content, Parent
    from datasets.store import Store
    from ldm.model import WEIGHTS, build_denoising
    from ldm.models.first_stage import build_first_stage
    from ldm.recipe import load_recipe
    from ldm.stages import STAGES
    from ldm.stored_models import RAW

    def make(*overrides: str) -> tuple[str, str]:
        store = Store(tmp_path_factory.mktemp("small"))
        recipe = load_recipe("demo", [*SMALL, *overrides])
        torch.manual_seed(0)
        first_stage = build_first_stage(recipe.first_stage.model)
        averaged, raw = (build_denoising(recipe, num_classes=15) for _ in range(2))
        for parameter in [*averaged.parameters(), *raw.parameters()]:
            parameter.data += 0.05 * torch.randn(parameter.shape)

        def commit(stage: str, what: dict[str, Any], parents: dict[str, Any], files: dict[str, Any]) -> Any:
            key = artifact_key(stage, 1, what=what, parents={role: m.digest for role, m in parents.items()})
            states = {name: dict(module.state_dict()) for name, module in files.items()}
            put = [
                store.put(stage, key, name, save({n: t.contiguous() for n, t in state.items()}))
                for name, state in states.items()
            ]
            facts = {"scale": 1.5, "classes": recipe.dataset.classes if recipe.conditioning else []}
            above = {role: Parent(m.stage, m.key, m.digest) for role, m in parents.items()}
            content = Content(stage, key, 1, what=what, parents=above, files=tuple(put), statistics=facts)
            return store.commit(content, {"recipe": recipe.model_dump(mode="json")})

        model = {"model": recipe.first_stage.model.model_dump(mode="json")}
        below = commit("train-first-stage", model, {}, {WEIGHTS: first_stage})
        what = STAGES["train-ldm"].what(recipe)
        trained = commit("train-ldm", what, {"first_stage": below}, {WEIGHTS: averaged, RAW: raw})
        return store.uri, trained.short

    return make
