"""Every kind of condition is trained jointly with the UNet, on latents that the condition tells.

Each sample is of one of two sorts. Its latent is +1 or -1 all over, beside a little noise, and its condition
says which; kinds of maps say it for every position.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.conditions import Condition, Fields, encode_condition, null_condition
from ldm.config import Recipe
from ldm.diffusion.objective import prediction_loss
from ldm.latents import contract_of
from ldm.model import load_first_stage
from ldm.training.diffusion import DiffusionTrainee
from ldm.training.dropout import encode_some

SIDE, FACTOR, CHANNELS, BATCH = 8, 4, 4, 16
NUM_STEPS = 160
TOKENS = "context_dim: 16, drop_rate: 0.1"
SMALL_TEXT = f"{{kind: caption, depth: 1, num_tokens: 8, {TOKENS}}}"
MAPS = ("unet.context_dim=null", "sampling.guidance=1")
KINDS: dict[str, tuple[str, ...]] = {
    "class_label": (f"conditioning={{kind: class_label, {TOKENS}}}",),
    "class_vector": (
        "conditioning={kind: class_vector}",
        "unet.context_dim=null",
        "unet.num_classes=16",
    ),
    "caption": (f"conditioning={SMALL_TEXT}",),
    "minilm": (
        "conditioning={kind: caption, encoder: minilm, num_tokens: 8, context_dim: 384, drop_rate: 0.1}",
        "unet.context_dim=384",
    ),
    "layout": (f"conditioning={{kind: layout, depth: 1, vocab_size: 16, num_tokens: 5, {TOKENS}}}",),
    "embeddings": (f"conditioning={{kind: embeddings, {TOKENS}}}",),
    "segmentation": (
        "conditioning={kind: segmentation, num_classes: 3, drop_rate: 0.1}",
        "unet.in_channels=7",
        *MAPS,
    ),
    "low_res": ("conditioning={kind: low_res, drop_rate: 0.1}", "unet.in_channels=7", *MAPS),
    "masked_image": ("conditioning={kind: masked_image, drop_rate: 0.1}", "unet.in_channels=9", *MAPS),
    "hybrid": (
        f"conditioning={{kind: hybrid, tokens: {SMALL_TEXT}, maps: {{kind: low_res}}}}",
        "unet.in_channels=7",
    ),
}
WORDS = ("a dark cat", "a bright cat")


def fields_of_sorts(kind: str, sorts: Tensor) -> dict[str, Any]:
    """What samples of these sorts, (B,) 0 or 1, are asked by."""
    signs = sorts.float() * 2 - 1
    pictures = signs[:, None, None, None].expand(-1, 3, SIDE * FACTOR, SIDE * FACTOR) * 0.9
    match kind:
        case "class_label" | "class_vector":
            return {"class_label": sorts + 3}
        case "caption" | "minilm":
            return {"caption": [WORDS[sort] for sort in sorts.tolist()]}
        case "layout":
            return {"layout": torch.tensor([1, 2, 3, 4, 15]) + sorts[:, None] * torch.tensor([5, 0, 0, 5, 0])}
        case "embeddings":
            return {"embeddings": signs[:, None, None].expand(-1, 3, 16).contiguous()}
        case "segmentation":
            return {"segmentation": sorts[:, None, None].expand(-1, SIDE * FACTOR, SIDE * FACTOR)}
        case "low_res":
            return {"low_res": pictures[:, :, ::FACTOR, ::FACTOR].contiguous()}
        case "masked_image":
            mask = torch.zeros(len(sorts), 1, SIDE * FACTOR, SIDE * FACTOR)
            mask[..., SIDE * FACTOR // 2 :] = 1.0
            return {"image": pictures.contiguous(), "mask": mask}
        case _:
            return fields_of_sorts("caption", sorts) | fields_of_sorts("low_res", sorts)


def some_batch(kind: str, seed: int, *, wrong: bool = False) -> tuple[Tensor, dict[str, Any]]:
    """Latents (B, C, h, w), and the fields of their conditions, or of the other sort's."""
    draws = torch.Generator().manual_seed(seed)
    sorts = torch.randint(2, (BATCH,), generator=draws)
    noise = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=draws)
    latents = (sorts.float() * 2 - 1)[:, None, None, None] + 0.1 * noise
    asked = 1 - sorts if wrong else sorts
    return latents.contiguous(memory_format=torch.channels_last), fields_of_sorts(kind, asked)


class FedTrainee(DiffusionTrainee):
    """The training of `train-ldm`, fed with latents of two sorts."""

    kind: str

    def prepared(self, samples: Mapping[str, Any], step: int, *key: int) -> tuple[Tensor, Fields]:
        """The batch of a step."""
        del samples, key
        return some_batch(self.kind, step)


@pytest.fixture
def trainee_of(vq_chain: Any, tiny_recipe: Callable[..., Recipe]) -> Callable[..., FedTrainee]:
    """`trainee_of(kind, *overrides)`."""

    def build(kind: str, *overrides: str) -> FedTrainee:
        recipe = tiny_recipe(
            *KINDS[kind],
            "diffusion.objective=v",
            f"training.num_images={NUM_STEPS * BATCH}",
            f"training.batch_size={BATCH}",
            "training.lr=0.003",
            *overrides,
        )
        trainee = FedTrainee(
            recipe,
            vq_chain.reader(),
            contract_of(vq_chain.latents),
            load_first_stage(vq_chain.store, vq_chain.first_stage),
            num_classes=15,
            look=lambda networks: {},
        )
        trainee.kind = kind
        return trainee

    return build


def encoded(trainee: FedTrainee, given: Mapping[str, Any]) -> Condition:
    return encode_condition(
        given,
        trainee.recipe.conditioning,
        trainee.networks.conditioner,
        num_classes=15,
        autoencoder=trainee.autoencoder,
    )


def nothing_like(trainee: FedTrainee, condition: Condition) -> Condition:
    return null_condition(
        condition, trainee.recipe.conditioning, trainee.networks.conditioner, num_classes=15
    )


def predicted(trainee: FedTrainee, x_t: Tensor, t: Tensor, asked: Condition) -> Tensor:
    return trainee.networks.unet(x_t, t, asked.context, concat=asked.concat, label=asked.label)


def held_out_loss(trainee: FedTrainee, *, wrong: bool) -> float:
    """Mean loss of batches that training never saw, at late time steps, where the noise hides the latent."""
    losses = []
    for seed in range(10_000, 10_004):
        latents, given = some_batch(trainee.kind, seed, wrong=wrong)
        asked = encoded(trainee, given)
        found = prediction_loss(
            lambda x_t, t, asked=asked: predicted(trainee, x_t, t, asked),
            latents,
            torch.full((BATCH,), 900),
            torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)),
            schedule=trainee.schedule,
            objective="v",
            distance="l2",
        )
        losses.append(float(found.mean()))
    return sum(losses) / len(losses)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_falls_and_the_condition_is_used(kind: str, trainee_of: Callable[..., FedTrainee]) -> None:
    trainee = trainee_of(kind)
    losses = [float((trainee.gradients(step) | trainee.update(step))["loss"]) for step in range(NUM_STEPS)]
    first, last = sum(losses[:5]) / 5, sum(losses[-20:]) / 20
    assert last < 0.5 * first
    with torch.no_grad():
        right, wrong = (held_out_loss(trainee, wrong=is_wrong) for is_wrong in (False, True))
        assert right < 0.5 * wrong
        latents, given = some_batch(kind, 20_000)
        asked, t = encoded(trainee, given), torch.full((BATCH,), 900)
        prediction = predicted(trainee, latents, t, asked)
        if kind != "hybrid":  # whose maps stay
            assert not torch.allclose(
                predicted(trainee, latents, t, nothing_like(trainee, asked)), prediction
            )
        if asked.concat is not None:  # a change at the maps' border reaches the border of the prediction
            asked.concat[:, :, :, -1] += 1.0
            changed = (predicted(trainee, latents, t, asked) - prediction).abs().amax((0, 1, 2))
            assert changed[-1] > 1e-3
            assert changed[-1] > 2 * changed[0]


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_dropped_is_the_null_condition_and_the_rest_stays(
    kind: str, trainee_of: Callable[..., FedTrainee]
) -> None:
    trainee = trainee_of(kind)
    given = some_batch(kind, 0)[1]
    asked = encoded(trainee, given)
    nothing = nothing_like(trainee, asked)
    dropped = torch.arange(BATCH) % 3 == 0
    for chosen in (dropped, dropped & False, dropped | True):
        found = encode_some(
            given,
            trainee.recipe.conditioning,
            trainee.networks.conditioner,
            chosen,
            num_classes=15,
            autoencoder=trainee.autoencoder,
        )
        assert found.parts().keys() == asked.parts().keys()
        for name, tensor in found.parts().items():
            assert torch.equal(tensor[~chosen], asked.parts()[name][~chosen])
            assert torch.equal(tensor[chosen], nothing.parts()[name][chosen])


def test_conditions_are_dropped_at_the_rate_asked_for(trainee_of: Callable[..., FedTrainee]) -> None:
    trainee = trainee_of("class_vector", "conditioning.drop_rate=0.3")
    labels = torch.zeros(4000, dtype=torch.int64)
    found = trainee.condition({"class_label": labels}, 0, count=4000).label
    assert found is not None
    assert float((found == 15).float().mean()) == pytest.approx(0.3, abs=0.03)


def test_the_null_class_of_a_larger_table_is_its_last_row_in_training_too(
    trainee_of: Callable[..., FedTrainee],
) -> None:
    trainee = trainee_of("class_vector", "unet.num_classes=101", "conditioning.drop_rate=1")
    found = trainee.condition({"class_label": torch.zeros(3, dtype=torch.int64)}, 0, count=3).label
    assert found is not None
    assert found.tolist() == [100, 100, 100]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {"class_vector", "embeddings"}])
def test_gradients_reach_the_conditioning_encoder(kind: str, trainee_of: Callable[..., FedTrainee]) -> None:
    trainee = trainee_of(kind)
    encoder = trainee.networks.conditioner
    assert encoder is not None
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    trainee.gradients(0)
    trainee.update(0)
    trainee.gradients(1)
    trainee.update(1)
    moved = [name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])]
    assert bool(moved) == (kind not in {"minilm", "low_res", "masked_image"}), moved
