"""Scores a model beside its floor, and draws what people look at.

N pictures, H W height and width.
"""

import io
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from datasets.keys import canonical_json
from datasets.manifest import Manifest
from datasets.stream import SampleReader
from ldm.conditions import reads_captions
from ldm.config import Recipe
from ldm.device import full_float32, resolve
from ldm.errors import ContractError
from ldm.evaluation import fidelity, reconstruction
from ldm.evaluation.classifier import accuracy, train_classifier
from ldm.evaluation.features import distance
from ldm.evaluation.sets import MIN_SCORED, SETS, make_set, nchw, num_scored, sample_labels
from ldm.latent_diffusion import LatentDiffusion
from ldm.latents import LatentContract, check_contract
from ldm.pictures import bars, png, side_by_side
from ldm.stages.stage import Job, Result
from ldm.stages.train_ldm import MAX_GRID_CLASSES, labelled_grid
from ldm.stored_models import load_model
from ldm.weights import FID_INCEPTION, inception_state

logger = logging.getLogger(__name__)
MAX_JUDGE_PICTURES = 20_000


def kept(job: Job, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array of an earlier attempt, or made now and kept for the next one."""
    saved = job.work.read(f"{name}.npy")
    if saved is None:
        buffer = io.BytesIO()
        np.save(buffer, make(), allow_pickle=False)
        saved = buffer.getvalue()
        job.work.write(f"{name}.npy", saved)
    return np.load(io.BytesIO(saved), allow_pickle=False)


def made_sets(
    job: Job, *, model: LatentDiffusion, contract: LatentContract, held_out: SampleReader
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Pictures (n, H, W, 3) and Inception features (n, 2048) of every set, kept for later attempts."""
    recipe, count = job.recipe, num_scored(job.recipe, held_out)
    weights = inception_state(job.store.local_root / "cache")
    pictures, features = {}, {}
    for index, name in enumerate(SETS):

        def report(done: int, total: int, *, half: int = 2 * index) -> None:
            job.report.progress((half * total + done) * count // total, 2 * len(SETS) * count)

        pictures[name] = kept(
            job,
            f"pictures-{name}",
            partial(
                make_set,
                name,
                recipe=recipe,
                model=model,
                contract=contract,
                held_out=held_out,
                on_step=report,
            ),
        )
        features[name] = kept(
            job,
            f"features-{name}",
            partial(
                fidelity.extract_features,
                [nchw(pictures[name])],
                weights_path=weights,
                micro_batch=recipe.evaluation.micro_batch,
                num_images=count,
                device=model.device,
                progress=partial(report, half=2 * index + 1),
            ),
        )
    return pictures, features


@full_float32()
def score(job: Job) -> Result:
    """Make the sets, extract their features, compare them, judge the classes, draw what people look at."""
    recipe = job.recipe
    held_out = SampleReader(
        job.store, job.inputs["shards"], split="held_out", captions=reads_captions(recipe.conditioning)
    )
    count = num_scored(recipe, held_out)
    if count < MIN_SCORED:
        raise ContractError(
            f"scores need at least {2 * MIN_SCORED} held-out pictures, the data set has {len(held_out)}; "
            "raise the held-out share (for a folder: --set dataset.source.held_out_share=0.2)"
        )
    contract = check_contract(job.inputs["latents"], recipe, job.inputs["first_stage"])
    model = load_model(job.store, job.inputs["model"], recipe).to(resolve(recipe.device))
    pictures, features = made_sets(job, model=model, contract=contract, held_out=held_out)
    scores = compare(pictures, features) | judge(job, pictures["samples"], model.classes, held_out)
    scores["num_images"] = count
    job.report.metrics(0, {name: value for name, value in scores.items() if isinstance(value, float)})
    document: dict[str, Any] = {"scores": scores, "protocol": protocol(recipe, job.inputs, count)}
    warning = fidelity.bias_warning(count)
    if warning:
        logger.warning("%s", warning)
        document["warning"] = warning
    files = [job.put("scores.json", canonical_json(document))]
    for name, picture in draw(pictures, scores, model.classes, recipe).items():
        job.report.picture(name, 0, picture)
        files.append(job.put(f"{name}.png", picture))
    return Result(files=tuple(files), statistics=document)


def compare(pictures: dict[str, np.ndarray], features: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every set's scores against the reference, and reconstructions against their own originals."""
    prefixes = {"samples": "", "reconstruction": "r", "noise": "noise_", "real": "floor_"}
    scores = {}
    for name, prefix in prefixes.items():
        for metric, value in fidelity.scores(features[name], features["reference"]).items():
            scores[f"{prefix}{metric}"] = value
    scores["rfid_same_pictures"] = distance(features["reconstruction"], features["real"])
    return scores | reconstruction.scores([(nchw(pictures["reconstruction"]), nchw(pictures["real"]))])


def judge(job: Job, samples: np.ndarray, classes: tuple[str, ...], held_out: SampleReader) -> dict[str, Any]:
    """Share of samples of the class asked for, by a classifier of real pictures, and its own accuracy."""
    budget = job.recipe.evaluation.classifier_images
    if len(classes) < 2 or not budget:
        return {}
    train = SampleReader(job.store, job.inputs["shards"], split="train")
    real = train.fetch(range(min(len(train), MAX_JUDGE_PICTURES)))
    known = real["class_label"] >= 0
    classifier = train_classifier(
        nchw(real["image"][known]),
        torch.from_numpy(real["class_label"][known]),
        num_classes=len(classes),
        seed=job.recipe.sampling.seed,
        num_images=budget,
        device=resolve(job.recipe.device),
    )
    unseen = held_out.fetch(range(min(len(held_out), MAX_JUDGE_PICTURES)))
    known = unseen["class_label"] >= 0
    labels = torch.tensor(sample_labels(len(classes), len(samples)))
    return {
        "class_accuracy": accuracy(classifier, nchw(samples), labels),
        "judge_accuracy": accuracy(
            classifier, nchw(unseen["image"][known]), torch.from_numpy(unseen["class_label"][known])
        ),
    }


def protocol(recipe: Recipe, inputs: Mapping[str, Manifest], count: int) -> dict[str, Any]:
    """What a score depends on besides the model; scores of other protocols are not comparable."""
    return {
        "extractor_sha256": FID_INCEPTION.sha256,
        "resize": "torch-fidelity, TensorFlow 1 bilinear to 299",
        "codec": "none",
        "num_images": count,
        "sampling": recipe.sampling.model_dump(mode="json"),
        "weights": "ema",
        "reference": {"key": inputs["shards"].key, "split": "held_out", "half": "second"},
    }


def draw(
    pictures: dict[str, np.ndarray], scores: dict[str, Any], classes: tuple[str, ...], recipe: Recipe
) -> dict[str, bytes]:
    """A grid of samples with a row per class, reconstructions below their originals, and FIDs as bars."""
    per_class = recipe.evaluation.grid_per_class
    scale = max(1, 128 // recipe.dataset.image_size_px)
    fids = {
        "samples": scores["fid"],
        "reconstructions (rFID)": scores["rfid"],
        "decoded noise": scores["noise_fid"],
    }
    return {
        "samples": labelled_grid(
            by_class(pictures["samples"], len(classes), per_class), classes, per_class=per_class
        ),
        "reconstructions": png(
            side_by_side(pictures["real"][:24], pictures["reconstruction"][:24], columns=12, scale=scale)
        ),
        "fid": bars(
            fids,
            title=f"Frechet distance to held-out pictures, n = {scores['num_images']}",
            xlabel="FID, lower is better",
            floor=scores["floor_fid"],
            floor_label="two halves of real pictures",
        ),
    }


def by_class(samples: np.ndarray, num_classes: int, per_class: int) -> np.ndarray:
    """The first samples of each class, class by class; white where a class has too few."""
    if not num_classes:
        return samples[: 8 * per_class]
    labels = np.array(sample_labels(num_classes, len(samples)))
    rows = []
    for label in range(min(num_classes, MAX_GRID_CLASSES)):
        found = samples[labels == label][:per_class]
        blank = np.full((per_class - len(found), *samples.shape[1:]), 255, np.uint8)
        rows.append(np.concatenate([found, blank]))
    return np.concatenate(rows)
