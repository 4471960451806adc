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
from ldm.model import Autoencoder, Denoising, build_denoising, moved
from ldm.models.first_stage import FirstStage
from ldm.precision import autocast, set_products
from ldm.training.batches import Batches
from ldm.training.dropout import encode_some
from ldm.training.ema import Ema
from ldm.training.learning_rate import learning_rate
from ldm.training.loop import History, is_logged
from ldm.training.randomness import generator, seed_of
from ldm.training.ranks import ALONE, Ranks
from ldm.training.state import check_state, load_module, load_optimizer, module_tensors, optimizer_tensors
from ldm.training.virtual_shards import run_shards
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
        ranks: who trains with this process.
        device: where the networks are.
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
        ranks: Ranks = ALONE,
        device: torch.device | str = "cpu",
    ) -> None:
        self.recipe, self.training, self.ranks = recipe, recipe.training, ranks
        self.device = torch.device(device)
        set_products(self.training.precision)
        self.batches = Batches(reader, self.training, ranks)
        self.contract, self.first_stage, self.look_at = contract, first_stage, look
        moved(first_stage, self.device)
        self.autoencoder = Autoencoder(first_stage, recipe.first_stage.model)
        rows = recipe.unet.num_classes  # of a table of class vectors, whose last is the null class
        self.num_classes = num_classes if rows is None else rows - 1
        torch.manual_seed(seed_of(self.training.seed, "diffusion"))
        self.networks = build_denoising(recipe, num_classes=num_classes)
        self.networks.train().to(self.device)
        diffusion = recipe.diffusion
        self.schedule = build_schedule(diffusion)
        self.weights = loss_weights(
            self.schedule, objective=diffusion.objective, weighting=diffusion.weighting
        ).to(self.device)
        self.log_variance = (
            nn.Parameter(torch.zeros(diffusion.num_timesteps, device=self.device))
            if diffusion.learn_log_variance
            else None
        )
        learned = [] if self.log_variance is None else [self.log_variance]
        self.optimizer = adamw([*self.networks.parameters(), *learned], self.training)
        self.ema = Ema(dict(self.networks.named_parameters()), decay=self.training.ema_decay)
        self.gradient_norm = torch.zeros(())

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Gradients of the step-th step, the mean over its virtual shards."""
        training = self.training
        samples, own = self.batches.at(step), self.ranks.own(training.virtual_shards)
        size = training.batch_size // training.virtual_shards

        def work(index: int) -> tuple[dict[str, Tensor], None]:
            start = (index - own.start) * size
            shard = {name: value[start : start + size] for name, value in samples.items()}
            return self.backward(shard, step, index), None

        learned = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        logged, _ = run_shards(work, training.virtual_shards, parameters=learned, ranks=self.ranks)
        found = [p.grad for p in self.networks.parameters() if p.grad is not None]
        self.gradient_norm = logged["gradient_norm"] = nn.utils.get_total_norm(found).detach()
        return quarters(logged)

    def backward(self, samples: Mapping[str, Any], step: int, index: int) -> dict[str, Tensor]:
        """Gradients of one shard of a step, and what is logged; the first one draws as a step of one does."""
        seed, key = self.training.seed, (index,) if index else ()
        if index:
            torch.manual_seed(seed_of(seed, step, "layers", *key))
        x_0, given = self.prepared(samples, step, *key)
        t = draw_timesteps(len(x_0), self.schedule.num_timesteps, generator(seed, step, "timesteps", *key))
        eps = torch.randn(x_0.shape, generator=generator(seed, step, "noise", *key))
        t, eps = t.to(self.device), eps.to(self.device)
        with autocast(self.device, self.training.precision):
            asked = self.condition(given, step, *key, count=len(x_0))
        losses = prediction_loss(
            lambda x_t, t: self.predict(x_t, t, asked),
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
        measured = is_logged(self.training, step + 1)
        return {"loss": loss.detach(), **(self.by_timestep(losses.detach(), t) if measured else {})}

    def predict(self, x_t: Tensor, t: Tensor, asked: Condition) -> Tensor:
        """What the UNet says of noisy latents, (B, C, h, w) float32."""
        with autocast(self.device, self.training.precision):
            return self.networks.unet(x_t, t, asked.context, concat=asked.concat, label=asked.label).float()

    def update(self, step: int) -> dict[str, Tensor]:
        """Step on the gradients that are there; the averages follow."""
        if self.training.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(
                self.networks.parameters(), self.training.clip_norm, self.gradient_norm
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(step)
        return {}

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def prepared(self, samples: Mapping[str, Any], step: int, *key: int) -> tuple[Tensor, Fields]:
        """Scaled latents (B, C, h, w) of what shards hold, and the fields of their conditions."""
        stored = torch.from_numpy(samples["latent"])
        draws = generator(self.training.seed, step, "posterior", *key)
        latents = scaled_latent(self.first_stage, stored, self.contract, generator=draws).to(self.device)
        given = fields_from(samples, fields_of(self.recipe.conditioning))
        return latents.contiguous(memory_format=torch.channels_last), given

    def condition(self, given: Fields, step: int, *key: int, count: int) -> Condition:
        """What the UNet gets of the fields of `count` conditions, a share of them left out."""
        config = self.recipe.conditioning
        rate = 0.0 if config is None else config.drop_rate
        # the name is from when there were labels alone; another would drop others
        dropped = torch.rand(count, generator=generator(self.training.seed, step, "drop labels", *key)) < rate
        return encode_some(
            given,
            config,
            self.networks.conditioner,
            dropped,
            num_classes=self.num_classes,
            autoencoder=self.autoencoder,
        )

    def by_timestep(self, losses: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Sum of the losses in each quarter of the time steps, and how many there are."""
        bucket = t * TIMESTEP_BUCKETS // self.schedule.num_timesteps
        quarters = [losses[bucket == i] for i in range(TIMESTEP_BUCKETS)]
        sums = {f"sum{i}": quarter.sum() for i, quarter in enumerate(quarters)}
        return sums | {f"count{i}": losses.new_tensor(len(quarter)) for i, quarter in enumerate(quarters)}

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
        return networks.to(self.device).eval()

    def validates(self, images: int) -> bool:
        """Never: a diffusion model is scored by the stage evaluate."""
        del images
        return False

    def validate(self) -> Mapping[str, float]:
        """Nothing."""
        return {}

    def heed(self, images: int, history: History) -> None:
        """Nothing follows."""
        del images, history

    def stops(self, history: History) -> bool:
        """Never early."""
        del history
        return False

    def look(self, history: History) -> Mapping[str, bytes]:
        """Samples of the averaged weights."""
        del history
        return self.look_at(self.averaged())


def quarters(logged: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is logged, with `loss_t<i>of4` of the quarters of the time steps that the batch has samples in."""
    logged = dict(logged)
    for i in range(TIMESTEP_BUCKETS if "sum0" in logged else 0):
        total, count = logged.pop(f"sum{i}"), logged.pop(f"count{i}")
        if count > 0:
            logged[f"loss_t{i + 1}of4"] = total / count
    return logged


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
