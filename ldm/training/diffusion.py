"""Training of the UNet, and with it the conditioning encoder, on latents (paper Sec. 3.2, 3.3, eq. 2, 3).

B batch, C channels of the latent, h w its height and width.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from datasets.stream import SampleReader
from ldm.config import Recipe, Training
from ldm.diffusion.objective import draw_timesteps, prediction_loss
from ldm.diffusion.schedule import linear_schedule
from ldm.latents import LatentContract, scaled_latent
from ldm.model import Denoising, build_denoising
from ldm.models.conditioning import ClassEmbedder, drop_labels
from ldm.models.first_stage import FirstStage
from ldm.training.checkpoint import load_module, load_optimizer, module_tensors, optimizer_tensors
from ldm.training.ema import Ema
from ldm.training.loop import learning_rate
from ldm.training.randomness import generator, seed_of

TIMESTEP_BUCKETS = 4


class DiffusionTrainee:
    """A UNet in training with its conditioning encoder, optimiser and averaged weights.

    Args:
        recipe: the run.
        reader: training latents, as stored.
        contract: what the latents are; its scale is applied here, once.
        first_stage: turns stored latents into latents.
        num_classes: classes of the data set.
        look: called with the averaged networks, gives pictures.
    """

    def __init__(
        self,
        recipe: Recipe,
        reader: SampleReader,
        contract: LatentContract,
        first_stage: FirstStage,
        *,
        num_classes: int,
        look: Callable[[Denoising], Mapping[str, bytes]],
    ) -> None:
        self.recipe, self.training = recipe, recipe.training
        self.reader, self.contract, self.first_stage, self.look_at = reader, contract, first_stage, look
        self.num_classes = num_classes
        torch.manual_seed(seed_of(self.training.seed, "diffusion"))
        self.networks = build_denoising(recipe, num_classes=num_classes)
        self.networks.train()
        diffusion = recipe.diffusion
        self.schedule = linear_schedule(diffusion.num_timesteps, diffusion.linear_start, diffusion.linear_end)
        self.optimizer = adamw(self.networks, self.training)
        self.ema = Ema(dict(self.networks.named_parameters()), decay=self.training.ema_decay)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Scaled latents (B, C, h, w) and labels (B,) of the step-th batch."""
        training = self.training
        position = step * training.batch_size
        samples = self.reader.in_order(training.seed, position=position, count=training.batch_size)
        stored = torch.from_numpy(samples["latent"])
        draws = generator(training.seed, step, "posterior")
        latents = scaled_latent(self.first_stage, stored, self.contract, generator=draws)
        return latents.contiguous(memory_format=torch.channels_last), torch.from_numpy(samples["class_label"])

    def step(self, step: int) -> Mapping[str, Tensor]:
        """One optimiser step on one batch."""
        seed = self.training.seed
        x_0, labels = self.batch(step)
        t = draw_timesteps(len(x_0), self.schedule.num_timesteps, generator(seed, step, "timesteps"))
        eps = torch.randn(x_0.shape, generator=generator(seed, step, "noise"))
        context = self.condition(labels, step)
        losses = prediction_loss(
            lambda x_t, t: self.networks.unet(x_t, t, context),
            x_0,
            t,
            eps,
            schedule=self.schedule,
            objective=self.recipe.diffusion.objective,
        )
        loss = losses.mean()
        loss.backward()
        logged = {"loss": loss.detach(), **self.by_timestep(losses.detach(), t)}
        if self.training.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.networks.parameters(), self.training.clip_norm)
            logged["gradient_norm"] = norm.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(step)
        return logged

    def condition(self, labels: Tensor, step: int) -> Tensor | None:
        """Tokens of the labels, (B, 1, D), some of them dropped; None when the model is unconditional."""
        conditioner, config = self.networks.conditioner, self.recipe.conditioning
        if conditioner is None or config is None:
            return None
        assert isinstance(conditioner, ClassEmbedder), "other kinds are refused before a run"
        drops = generator(self.training.seed, step, "drop labels")
        return conditioner(drop_labels(labels, null=self.num_classes, rate=config.drop_rate, generator=drops))

    def by_timestep(self, losses: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Mean loss in each quarter of the time steps that this batch has samples in."""
        bucket = t * TIMESTEP_BUCKETS // self.schedule.num_timesteps
        return {f"loss_t{i + 1}of4": losses[bucket == i].mean() for i in bucket.unique().tolist()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on."""
        return {
            **module_tensors(self.networks, "networks"),
            **optimizer_tensors(self.optimizer, "optimizer"),
            **{f"ema.{name}": value for name, value in self.ema.averages.items()},
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        load_module(self.networks, tensors, "networks")
        load_optimizer(self.optimizer, tensors, "optimizer")
        for name, average in self.ema.averages.items():
            average.copy_(tensors[f"ema.{name}"])

    def averaged(self) -> Denoising:
        """The networks with their averaged weights, in evaluation mode."""
        networks = build_denoising(self.recipe, num_classes=self.num_classes)
        networks.load_state_dict(self.ema.averages)
        return networks.eval()

    def look(self) -> Mapping[str, bytes]:
        """Samples of the averaged weights."""
        return self.look_at(self.averaged())


def adamw(module: nn.Module, training: Training) -> torch.optim.Optimizer:
    """AdamW (paper App. E; Loshchilov & Hutter 2019) in one fused kernel."""
    return torch.optim.AdamW(
        module.parameters(),
        lr=training.lr,
        betas=training.betas,
        weight_decay=training.weight_decay,
        fused=True,
    )
