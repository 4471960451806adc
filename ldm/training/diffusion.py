"""Training of the UNet, and with it the conditioning encoder, on latents (paper Sec. 3.2, 3.3, eq. 2, 3).

B batch, C channels of the latent, h w its height and width.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datasets.stream import SampleReader
from ldm.conditions import Condition, Fields, fields_of
from ldm.config import Recipe
from ldm.diffusion.objective import draw_timesteps, loss_weights, prediction_loss, with_log_variance
from ldm.diffusion.schedule import build_schedule
from ldm.latents import LatentContract, scaled_latent
from ldm.model import Autoencoder, Denoising, build_denoising
from ldm.models.first_stage import FirstStage
from ldm.training.dropout import encode_some
from ldm.training.ema import Ema
from ldm.training.loop import History, learning_rate
from ldm.training.randomness import generator, seed_of
from ldm.training.state import check_state, load_module, load_optimizer, module_tensors, optimizer_tensors
from ldm.training_config import Training

TIMESTEP_BUCKETS = 4


class DiffusionTrainee:
    """A UNet in training with its conditioning encoder, optimiser and averaged weights.

    Args:
        recipe: the run.
        reader: training latents, as stored, with what the recipe's condition is made of.
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
        self.autoencoder = Autoencoder(first_stage, recipe.first_stage.model)
        rows = recipe.unet.num_classes  # of a table of class vectors, whose last is the null class
        self.num_classes = num_classes if rows is None else rows - 1
        torch.manual_seed(seed_of(self.training.seed, "diffusion"))
        self.networks = build_denoising(recipe, num_classes=num_classes)
        self.networks.train()
        diffusion = recipe.diffusion
        self.schedule = build_schedule(diffusion)
        self.weights = loss_weights(
            self.schedule, objective=diffusion.objective, weighting=diffusion.weighting
        )
        self.log_variance = (
            nn.Parameter(torch.zeros(diffusion.num_timesteps)) if diffusion.learn_log_variance else None
        )
        learned = [] if self.log_variance is None else [self.log_variance]
        self.optimizer = adamw([*self.networks.parameters(), *learned], self.training)
        self.ema = Ema(dict(self.networks.named_parameters()), decay=self.training.ema_decay)

    def batch(self, step: int) -> tuple[Tensor, Fields]:
        """Scaled latents (B, C, h, w) of the step-th batch, and the fields of their conditions."""
        training = self.training
        position = step * training.batch_size
        samples = self.reader.in_order(training.seed, position=position, count=training.batch_size)
        stored = torch.from_numpy(samples["latent"])
        draws = generator(training.seed, step, "posterior")
        latents = scaled_latent(self.first_stage, stored, self.contract, generator=draws)
        given = fields_from(samples, fields_of(self.recipe.conditioning))
        return latents.contiguous(memory_format=torch.channels_last), given

    def step(self, step: int) -> Mapping[str, Tensor]:
        """One optimiser step on one batch."""
        seed = self.training.seed
        x_0, given = self.batch(step)
        t = draw_timesteps(len(x_0), self.schedule.num_timesteps, generator(seed, step, "timesteps"))
        eps = torch.randn(x_0.shape, generator=generator(seed, step, "noise"))
        asked = self.condition(given, step, count=len(x_0))
        losses = prediction_loss(
            lambda x_t, t: self.networks.unet(x_t, t, asked.context, concat=asked.concat, label=asked.label),
            x_0,
            t,
            eps,
            schedule=self.schedule,
            objective=self.recipe.diffusion.objective,
            distance=self.recipe.diffusion.loss,
        )
        weighted = self.weights[t] * losses
        if self.log_variance is not None:
            weighted = with_log_variance(weighted, self.log_variance, t)
        loss = weighted.mean()
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

    def condition(self, given: Fields, step: int, *, count: int) -> Condition:
        """What the UNet gets of the fields of `count` conditions, a share of them left out."""
        config = self.recipe.conditioning
        rate = 0.0 if config is None else config.drop_rate
        # the name is from when there were labels alone; another would drop others
        dropped = torch.rand(count, generator=generator(self.training.seed, step, "drop labels")) < rate
        return encode_some(
            given,
            config,
            self.networks.conditioner,
            dropped,
            num_classes=self.num_classes,
            autoencoder=self.autoencoder,
        )

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
            **({} if self.log_variance is None else {"log_variance": self.log_variance.detach()}),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back, after a look at whether they fit."""
        check_state(tensors, self.tensors(), optimizers={"optimizer": self.optimizer})
        load_module(self.networks, tensors, "networks")
        load_optimizer(self.optimizer, tensors, "optimizer")
        for name, average in self.ema.averages.items():
            average.copy_(tensors[f"ema.{name}"])
        if self.log_variance is not None:
            self.log_variance.data.copy_(tensors["log_variance"])

    def averaged(self) -> Denoising:
        """The networks with their averaged weights, in evaluation mode."""
        networks = build_denoising(self.recipe, num_classes=self.num_classes)
        networks.load_state_dict(self.ema.averages)
        return networks.eval()

    def validate(self, images: int, history: History) -> Mapping[str, float]:
        """Nothing: a diffusion model is scored by the stage evaluate."""
        del images, history
        return {}

    def stops(self, history: History) -> bool:
        """Never early."""
        del history
        return False

    def look(self, history: History) -> Mapping[str, bytes]:
        """Samples of the averaged weights."""
        del history
        return self.look_at(self.averaged())


def adamw(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """AdamW (paper App. E; Loshchilov & Hutter 2019) in one fused kernel."""
    return torch.optim.AdamW(
        parameters,
        lr=training.lr,
        betas=training.betas,
        weight_decay=training.weight_decay,
        fused=True,
    )


def fields_from(samples: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """The fields of conditions that a reader's samples hold, arrays as tensors."""
    return {
        name: torch.from_numpy(samples[name]) if isinstance(samples[name], np.ndarray) else samples[name]
        for name in wanted
    }
