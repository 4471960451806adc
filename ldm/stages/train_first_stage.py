"""The stage train-first-stage: image shards -> a trained first stage."""

from collections.abc import Mapping
from typing import Any

from safetensors.torch import save

from datasets.keys import canonical_json
from datasets.manifest import Manifest
from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.device import resolve
from ldm.model import WEIGHTS
from ldm.pictures import curves
from ldm.stages.stage import Job, Result, Stage, trained
from ldm.training.checkpoint import num_kept
from ldm.training.first_stage import FirstStageTrainee
from ldm.training.loop import History, images_seen
from ldm.training.ranks import Ranks
from ldm.training.validation import best
from ldm.training.verdicts import judge
from ldm.training_config import NOT_WHAT
from ldm.weights import inception_state

MIB = 2**20


def what(recipe: Recipe) -> dict[str, Any]:
    """Network, objective and training; validation where there is any: its scores are part of the result."""
    return {
        "model": recipe.first_stage.model.model_dump(mode="json"),
        "loss": recipe.first_stage.loss.model_dump(mode="json"),
        "training": recipe.first_stage.training.model_dump(mode="json", exclude=NOT_WHAT)
        if recipe.first_stage.training
        else None,
        "validation": recipe.first_stage.validation.model_dump(mode="json")
        if recipe.first_stage.validation.every_images
        else None,
        "threads": recipe.threads,
    }


def need_bytes(recipe: Recipe, inputs: Mapping[str, Manifest]) -> int:
    """Checkpoints and the result; a network of 128 channels has some 55 million parameters."""
    del inputs
    parameters = 55e6 * (recipe.first_stage.model.channels / 128) ** 2 + 3e6
    training = recipe.first_stage.training
    per_checkpoint = 20 if recipe.first_stage.validation.keep_best else 16
    checkpoints = num_kept(training) * per_checkpoint if training else 0
    return int(200 * MIB + checkpoints * parameters + 8 * parameters)


def build(job: Job) -> Result:
    """Train, then store the averaged and the raw weights with the history of every metric."""
    training = job.recipe.first_stage.training
    if training is None:
        return Result(files=(), statistics={"num_images": 0})
    trainee, history = trained(job, training, make_trainee)
    pictures = {**trainee.look(history), **loss_curves(history)}
    for name, png in pictures.items():
        job.report.picture(name, images_seen(history), png)
    raw = {name: value.contiguous() for name, value in trainee.model.state_dict().items()}
    files = (
        job.put(WEIGHTS, save({name: value.contiguous() for name, value in trainee.result().items()})),
        job.put("raw.safetensors", save(raw)),
        job.put("history.json", canonical_json(history)),
        job.put("health.png", pictures["first_stage_health"]),
    )
    return Result(files=files, statistics=last_values(history) | how_it_went(trainee, history))


def make_trainee(job: Job, ranks: Ranks) -> FirstStageTrainee:
    """The first stage in training, as one of the ranks has it."""
    shards = job.inputs["shards"]
    return FirstStageTrainee(
        job.recipe.first_stage,
        SampleReader(job.store, shards, split="train"),
        SampleReader(job.store, shards, split="held_out"),
        inception=lambda: inception_state(job.store.local_root / "cache"),
        ranks=ranks,
        device=resolve(job.recipe.device),
    )


def how_it_went(trainee: FirstStageTrainee, history: History) -> dict[str, Any]:
    """Size, verdicts on the run's health, where it ended, and which of its weights are the result."""
    statistics: dict[str, Any] = {
        "num_parameters": trainee.num_parameters,
        "health": {v.panel: f"{v.word}: {v.words}" for v in judge(history, trainee.facts())},
    }
    if trainee.validation.patience:
        stopped = trainee.stops(history)
        statistics["stopped_early_at_images"] = images_seen(history) if stopped else None
    found = best(trainee.judged(history))
    if trainee.validation.keep_best and found is not None:
        statistics["best"] = {"num_images": found[0], "score": abs(found[1])}
    return statistics


def loss_curves(history: History) -> dict[str, bytes]:
    """One plot of every metric whose name starts with "loss", and one of the rest that people ask for."""
    losses = {
        name: points
        for name, points in sorted(history.items())
        if name.startswith(("loss", "reconstruction", "l1"))
    }
    return {"loss_curves": curves(losses, title="training losses", ylabel="loss", log_y=True)}


def last_values(history: History) -> dict[str, Any]:
    """The last logged value of every metric."""
    return {"last": {name: points[-1][1] for name, points in history.items()}}


TRAIN_FIRST_STAGE = Stage(
    name="train-first-stage",
    code_version=3,
    inputs={"shards": "download-shards"},
    what=what,
    build=build,
    need_bytes=need_bytes,
    make_trainee=make_trainee,
)
