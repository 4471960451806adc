"""How much memory a training step takes on each device, counted beforehand (`ldm.training.allocations`).

A step holds weights, their averages, two Adam moments each, gradients, and what the layers leave for the
backward pass. Ranks hold all of it once each and share out the pictures, so more ranks make activations
smaller and nothing else. A rank computes one virtual shard at a time. Not counted: pictures on their way,
libraries (a CUDA context takes some 0.5 GiB), and workspaces of convolutions, for which HEADROOM is left.

B pictures at once, C channels of the latent, h w its height and width, H W those of the picture.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from ldm.conditions import Condition
from ldm.config import Recipe
from ldm.diffusion.objective import prediction_loss
from ldm.diffusion.schedule import build_schedule
from ldm.errors import RecipeError
from ldm.model import Denoising, build_denoising
from ldm.models.autoencoder import ResnetBlock, to_channels_last
from ldm.models.conditioning import AsGiven, ClassEmbedder, Hybrid, SpatialRescaler, TokenEncoder
from ldm.models.discriminator import PatchDiscriminator, hinge_loss
from ldm.models.first_stage import KLModel, VQModel, build_first_stage
from ldm.models.gaussian import kl_to_standard_normal, sample_posterior
from ldm.models.lpips import build_lpips
from ldm.network_config import HybridConditioning
from ldm.training.allocations import backward, counted
from ldm.training.first_stage_loss import Encoded, adaptive_weight, reconstruction_loss
from ldm.training_config import Precision, Training, is_power_of_two

GIB = 2**30
HEADROOM = 0.1
"""Share of the free memory that is left to libraries and to gaps between tensors."""
NUM_EMBEDDINGS = 20
"""Vectors of a condition of kind embeddings, whose number no recipe says; rdm768 draws so many at most."""

TrainingStage = Literal["train-first-stage", "train-ldm"]


@dataclass(frozen=True)
class Way:
    """How a step is done on each device."""

    at_once: int
    """B: pictures of one pass, those of a virtual shard."""
    shards: int
    """Virtual shards that a rank computes one after the other."""
    checkpointing: bool
    """Whether activations are made again in the backward pass."""
    precision: Precision = "float32"


@dataclass(frozen=True)
class Need:
    """Bytes that training takes on each device."""

    parameters: int
    averages: int
    moments: int
    frozen: int
    """Weights that are not trained: LPIPS, or the first stage."""
    gradients: int
    """Of all partial sums that are held at once."""
    activations: int
    """The most that is held beside one set of gradients."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Networks:
    """The networks of a stage without numbers, and what one step does with them."""

    trained: nn.Module
    num_averages: int
    """Numbers in averaged weights."""
    frozen: nn.Module
    step: Callable[[int], None]
    """Forward and backward pass of B pictures, within `counted`."""
    set_checkpointing: Callable[[bool], None]

    def need(self, way: Way) -> Need:
        """What a step takes, done this way."""
        learned = [p for p in self.trained.parameters() if p.requires_grad]
        gradient = bytes_of(learned)
        self.set_checkpointing(way.checkpointing)
        with counted(autocast=way.precision == "bfloat16") as allocations:
            allocations.hold(self.trained)
            allocations.hold(self.frozen)
            before = allocations.now
            allocations.reset()
            self.step(way.at_once)
            most = allocations.most - before
        for parameter in self.trained.parameters():
            parameter.grad = None
        return Need(
            parameters=bytes_of(self.trained.parameters()) + bytes_of(self.trained.buffers()),
            averages=4 * self.num_averages,
            moments=2 * gradient,
            frozen=bytes_of(self.frozen.parameters()) + bytes_of(self.frozen.buffers()),
            gradients=gradient * (1 + int(math.log2(way.shards))),
            activations=max(0, most - gradient),
        )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def num_of(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def networks_of_stage(recipe: Recipe, stage: TrainingStage) -> Networks:
    """The networks that a stage trains.

    Raises:
        ValueError: the first stage is the identity, which has nothing to train.
    """
    return diffusion_networks(recipe) if stage == "train-ldm" else first_stage_networks(recipe)


def diffusion_networks(recipe: Recipe) -> Networks:
    """UNet and conditioning encoder, beside the first stage."""
    with torch.device("meta"):
        networks = build_denoising(recipe, num_classes=max(recipe.num_classes, 1)).train()
        first_stage = build_first_stage(recipe.first_stage.model)

    def step(batch: int) -> None:
        asked = some_condition(recipe, networks, batch)
        shape = (batch, recipe.first_stage.model.embed_dim, recipe.latent_size, recipe.latent_size)
        x_0 = torch.empty(shape).contiguous(memory_format=torch.channels_last)
        losses = prediction_loss(
            lambda x_t, t: networks.unet(x_t, t, asked.context, concat=asked.concat, label=asked.label),
            x_0,
            torch.zeros(batch, dtype=torch.int64),
            torch.empty(shape),
            schedule=build_schedule(recipe.diffusion),
            objective=recipe.diffusion.objective,
            distance=recipe.diffusion.loss,
        )
        backward([losses.mean()], [torch.ones(())])

    def set_checkpointing(on: bool) -> None:
        networks.unet.config = recipe.unet.model_copy(update={"checkpoint_activations": on})

    frozen = first_stage if isinstance(first_stage, nn.Module) else nn.Identity()
    return Networks(networks, num_of(networks), frozen, step, set_checkpointing)


def some_condition(recipe: Recipe, networks: Denoising, batch: int) -> Condition:
    """What the UNet gets of `batch` conditions, with the graph of what encoded them."""
    config, encoder = recipe.conditioning, networks.conditioner
    if isinstance(config, HybridConditioning) and isinstance(encoder, Hybrid):
        whole = {"context": tokens_of(recipe, encoder.tokens, batch)}
        return Condition(**whole, concat=maps_of(recipe, encoder.maps, batch))
    if recipe.unet.num_classes is not None:
        return Condition(label=torch.zeros(batch, dtype=torch.int64))
    if recipe.unet.context_dim is not None:
        return Condition(context=tokens_of(recipe, encoder, batch))
    return Condition() if config is None else Condition(concat=maps_of(recipe, encoder, batch))


def tokens_of(recipe: Recipe, encoder: object, batch: int) -> Tensor:
    """Tokens (B, L, D) of a condition."""
    if isinstance(encoder, ClassEmbedder):
        return encoder(torch.zeros(batch, dtype=torch.int64))
    if isinstance(encoder, TokenEncoder) and num_of(encoder) > 0:
        return encoder(torch.zeros(batch, len(encoder.empty), dtype=torch.int64))
    given = len(encoder.empty) if isinstance(encoder, TokenEncoder) else NUM_EMBEDDINGS
    return torch.empty(batch, given, recipe.unet.context_dim or 1)


def maps_of(recipe: Recipe, encoder: object, batch: int) -> Tensor:
    """Maps (B, K, h, w) of a condition."""
    if isinstance(encoder, SpatialRescaler):
        size = recipe.dataset.image_size_px
        return encoder(torch.zeros(batch, size, size, dtype=torch.int64))
    assert isinstance(encoder, AsGiven)
    channels = recipe.unet.in_channels - recipe.first_stage.model.embed_dim
    return torch.empty(batch, channels, recipe.latent_size, recipe.latent_size)


def first_stage_networks(recipe: Recipe) -> Networks:
    """A first stage and its discriminator, beside LPIPS; with all terms of the loss switched on."""
    config, size = recipe.first_stage, recipe.dataset.image_size_px
    with torch.device("meta"):
        model = build_first_stage(config.model)
        discriminator = PatchDiscriminator(
            config.loss.discriminator_channels, config.loss.discriminator_layers
        )
        to_channels_last(discriminator)
    if not isinstance(model, VQModel | KLModel):
        raise ValueError(f"first stage {config.name!r} has nothing to train")  # noqa: TRY004
    lpips = build_lpips().to("meta") if config.loss.perceptual_weight > 0 else None

    def step(batch: int) -> None:
        x = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        encoded = encoded_of(model, x)
        picture = encoded.reconstruction.detach().requires_grad_()
        summed, weight = isinstance(model, KLModel), config.loss.perceptual_weight
        loss, _ = reconstruction_loss(picture, x, lpips, weight=weight, summed=summed)
        (gradient,) = torch.autograd.grad(loss, picture)
        if config.loss.adversarial_weight > 0:
            gradient = gradient + adversarial(encoded, picture, x, gradient)
        backward([encoded.reconstruction, encoded.regulariser], [gradient, torch.ones(())])

    def adversarial(encoded: Encoded, picture: Tensor, x: Tensor, of_rest: Tensor) -> Tensor:
        fake = discriminator(picture)
        (pushed,) = torch.autograd.grad(-fake.mean(), picture, retain_graph=True)
        weight = adaptive_weight(encoded.reconstruction, model.decoder.last_layer, of_rest, pushed)
        loss = hinge_loss(discriminator(x), fake)
        torch.autograd.backward([loss], inputs=list(discriminator.parameters()))
        return weight * pushed

    def set_checkpointing(on: bool) -> None:
        for module in model.modules():
            if isinstance(module, ResnetBlock):
                module.checkpointing = on

    copies = 2 if config.validation.keep_best else 1
    frozen = nn.Identity() if lpips is None else lpips
    trained = nn.ModuleList([model, discriminator])
    return Networks(trained, copies * num_of(model), frozen, step, set_checkpointing)


def encoded_of(model: VQModel | KLModel, x: Tensor) -> Encoded:
    """The forward pass of pictures, as training does it."""
    if isinstance(model, VQModel):
        reconstruction, latents, quantized = model(x)
        return Encoded(reconstruction, quantized.loss, quantized, latents)
    moments = model.encode(x)
    noise = torch.empty_like(moments.chunk(2, dim=1)[0])
    reconstruction = model.decode(sample_posterior(moments, noise))
    return Encoded(reconstruction, kl_to_standard_normal(moments).mean(), None, moments)


def training_of(recipe: Recipe, stage: TrainingStage) -> Training:
    """The training that a stage does.

    Raises:
        ValueError: the first stage is the identity, which has none.
    """
    training = recipe.training if stage == "train-ldm" else recipe.first_stage.training
    if training is None:
        raise ValueError(f"first stage {recipe.first_stage.name!r} has nothing to train")
    return training


def checkpoints(recipe: Recipe, stage: TrainingStage) -> bool:
    """Whether a recipe's stage makes activations again in the backward pass."""
    unet, first_stage = recipe.unet, recipe.first_stage
    return unet.checkpoint_activations if stage == "train-ldm" else first_stage.gradient_checkpointing


def way_of(recipe: Recipe, stage: TrainingStage, *, ranks: int = 1) -> Way:
    """How a recipe's step is done on each of so many ranks."""
    training = training_of(recipe, stage)
    shards = max(training.virtual_shards, ranks)
    return Way(
        at_once=-(-training.batch_size // shards),
        shards=max(1, shards // ranks),
        checkpointing=checkpoints(recipe, stage),
        precision=training.precision,
    )


def largest_at_once(networks: Networks, way: Way, budget_bytes: float) -> int:
    """The most pictures at once with which a step stays within a budget, 0 if not even one does.

    What is needed grows with the pictures, at first slower than in proportion, so the line through two
    numbers of pictures that fit meets the budget at one that is too high or just fits.
    """
    needs: dict[int, int] = {}

    def need(at_once: int) -> int:
        if at_once not in needs:
            needs[at_once] = networks.need(replace(way, at_once=at_once)).total
        return needs[at_once]

    if need(1) > budget_bytes:
        return 0
    low, high = 1, 2
    while need(high) <= budget_bytes:
        rise = max(1.0, (need(high) - need(low)) / (high - low))
        low, high = high, high + max(1, int((budget_bytes - need(high)) / rise))
    while high - low > 1:
        share = (budget_bytes - need(low)) / max(1, need(high) - need(low))
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        low, high = (middle, high) if need(middle) <= budget_bytes else (low, middle)
    return low


def available_bytes(device: torch.device, *, ranks: int = 1) -> int:
    """Free memory of a device, in bytes; ranks that compute on a CPU share its memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // ranks


SETTINGS = {
    "train-ldm": ("unet.checkpoint_activations", "training"),
    "train-first-stage": ("first_stage.gradient_checkpointing", "first_stage.training"),
}
"""Of each stage: what switches checkpointing on, and where its training is set."""


def cures(networks: Networks, training: Training, way: Way, *, ranks: int, budget: float) -> list[Way]:
    """Ways to do the same step within a budget: the fewest shards as it is, and with checkpointing."""
    found, size = list[Way](), training.batch_size
    more = [n for n in range(ranks, size + 1, ranks) if size % n == 0 and size // n <= way.at_once]
    more = [n for n in more if ranks == 1 or is_power_of_two(n // ranks)]
    for checkpointing in sorted({way.checkpointing, True}):
        ways = [Way(size // n, n // ranks, checkpointing, way.precision) for n in more]
        fits = (one for one in ways if networks.need(one).total <= budget)  # more shards may need more
        found += itertools.islice(fits, 1)
    return found


def require_memory(
    recipe: Recipe,
    stage: TrainingStage,
    *,
    available_bytes: int,
    ranks: int = 1,
) -> Need:
    """What a step needs on each device, if that is there; called before anything is put on the device.

    Args:
        recipe: what is trained.
        stage: which of its trainings.
        available_bytes: free memory of the device (`available_bytes`).
        ranks: processes with a device each that share out the batch.

    Raises:
        RecipeError: it does not fit; the message names what is needed and the settings that make it fit.
    """
    networks, training = networks_of_stage(recipe, stage), training_of(recipe, stage)
    way, budget = way_of(recipe, stage, ranks=ranks), (1 - HEADROOM) * available_bytes
    need = networks.need(way)
    if need.total <= budget:
        return need
    said = ", or ".join(
        words(stage, way, cure, ranks=ranks)
        for cure in cures(networks, training, way, ranks=ranks, budget=budget)
    )
    if not said:
        least = networks.need(replace(way, at_once=1, checkpointing=True))
        gib = least.total / (1 - HEADROOM) / GIB
        said = f"use a device with {gib:.1f} GiB, which one picture takes at the least, or a smaller network"
    raise RecipeError(
        f"{stage} of {recipe.name} must fit into the memory of each device: {way.at_once} pictures at once "
        f"on each of {ranks} take {need.total / GIB:.1f} GiB, and of {available_bytes / GIB:.1f} GiB that "
        f"are free {budget / GIB:.1f} may be used; {said}"
    )


def words(stage: str, way: Way, cure: Way, *, ranks: int) -> str:
    """What to set for a cure."""
    checkpointing, training = SETTINGS[stage]
    changes = [f"{checkpointing}=true"] if cure.checkpointing and not way.checkpointing else []
    if cure.at_once != way.at_once:
        changes.append(f"{training}.virtual_shards={cure.shards * ranks} ({cure.at_once} pictures at once)")
    return "set " + " and ".join(changes)
