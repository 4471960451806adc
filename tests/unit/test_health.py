import math
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets.store import Store
from datasets.stream import SampleReader
from ldm.config import Recipe
from ldm.errors import TrainingError
from ldm.health_page import MAX_POINTS, health_page, thinned
from ldm.latents import STORED
from ldm.latents import moments as corpus_moments
from ldm.models.lpips import LPIPS
from ldm.training.first_stage import FirstStageTrainee
from ldm.training.first_stage_loss import MAX_ADAPTIVE_WEIGHT
from ldm.training.health import (
    channel_moments,
    norms,
    watch_discriminator,
    watch_latents,
    watch_weight,
)
from ldm.training.loop import NUM_SILENT_LOGS, History, check_gradients, train
from ldm.training.report import Silent
from ldm.training.verdicts import Facts, judge, recent

Cats = Callable[[str], SampleReader]
LONG = (
    "first_stage.training.num_images=240",
    "first_stage.training.picture_every_images=1000",
)
PERCEPTUAL = ("first_stage.loss.perceptual_weight=1", "first_stage.loss.perceptual_start_images=0")
VQ = Facts(num_codes=100, positions_per_batch=400, values_per_latent=256, kl_weight=0.0, judged_after=100)
KL = Facts(num_codes=0, positions_per_batch=400, values_per_latent=256, kl_weight=1e-6, judged_after=100)


def run(recipe: Recipe, cats: Cats, *, lpips: LPIPS | None = None) -> History:
    """Train a first stage, with another LPIPS if one is given."""
    trainee = FirstStageTrainee(recipe.first_stage, cats("train"), cats("held_out"))
    trainee.lpips = lpips or trainee.lpips
    work = Store("memory://health").work("train", "2" * 64)
    work.clear()
    return train(trainee, work, report=Silent())


class WithoutGradient(LPIPS):
    """The trap: a perceptual term that is logged and trains nothing."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean((1, 2, 3))


class WithGradient(WithoutGradient):
    """The same with its gradient."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean((1, 2, 3))


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_perceptual_term_evaluated_without_gradient_stops_the_run(
    kind: str, tiny_recipe: Callable[..., Recipe], cats: Cats
) -> None:
    codes = "first_stage.model.num_codes=null" if kind == "kl" else "first_stage.model.num_codes=32"
    recipe = tiny_recipe(*LONG, *PERCEPTUAL, f"first_stage.model.kind={kind}", codes)
    message = (
        r"that of 'perceptual' was exactly zero at the last 5 logged steps \(40 to 200 images seen\)\. It is "
        r"evaluated without gradient .* its weight is zero .* saturated; let the gradient through"
    )
    with pytest.raises(TrainingError, match=message):
        run(recipe, cats, lpips=WithoutGradient())
    history = run(recipe, cats, lpips=WithGradient())
    assert len(history["gradient/perceptual"]) == 6


def test_a_gradient_that_comes_back_is_forgiven_and_only_gradients_are_judged() -> None:
    zeros = [(n, 0.0) for n in range(NUM_SILENT_LOGS)]
    check_gradients({"gradient/kl": [*zeros[1:], (9, 1e-30)], "watch/codes_revived": zeros})
    check_gradients({"gradient/kl": zeros[1:]})
    with pytest.raises(TrainingError, match="that of 'kl' was exactly zero"):
        check_gradients({"gradient/kl": [(0, 1.0), *zeros]})


def test_a_metric_that_is_no_number_stops_the_run(tiny_recipe: Callable[..., Recipe], cats: Cats) -> None:
    class Broken(WithGradient):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, y) * math.inf

    with pytest.raises(TrainingError, match=r"loss and gradient must be finite, got loss (nan|inf)"):
        run(tiny_recipe(*LONG, *PERCEPTUAL), cats, lpips=Broken())


def test_what_is_watched_is_logged_with_every_logged_step(
    tiny_recipe: Callable[..., Recipe], cats: Cats
) -> None:
    history = run(tiny_recipe(*LONG, "first_stage.loss.adversarial_start_images=80"), cats)
    logged = [images for images, _ in history["loss"]]
    for name in ("gradient/pixel", "gradient/commitment", "gradient/codebook", "watch/codes_revived"):
        assert [images for images, _ in history[name]] == logged
    for name in ("latent/largest_mean", "latent/smallest_std", "latent/largest_std"):
        assert [images for images, _ in history[name]] == logged
    late = [images for images in logged if images > 80]
    for name in ("gradient/adversarial", "watch/adaptive_weight_at_clamp", "watch/accuracy_real"):
        assert [images for images, _ in history[name]] == late
    for real, fake, margin in zip(
        history["logits_real"], history["logits_fake"], history["watch/discriminator_margin"], strict=True
    ):
        assert margin[1] == pytest.approx(real[1] - fake[1], abs=1e-6)


def test_codes_revived_between_two_logs_are_counted_once(
    tiny_recipe: Callable[..., Recipe], cats: Cats
) -> None:
    recipe = tiny_recipe("first_stage.loss.revive_after_images=1").first_stage
    trainee = FirstStageTrainee(recipe, cats("train"), cats("held_out"))
    num_revived = 0
    for step in range(12):
        before = trainee.codes.num_revived.item()
        logged = trainee.gradients(step) | trainee.update(step)
        assert ("watch/codes_revived" in logged) == (step in (9, 11))
        if "watch/codes_revived" in logged:
            assert logged["watch/codes_revived"] >= before > 0
            assert trainee.codes.num_revived == 0
            num_revived += int(logged["watch/codes_revived"])
    assert num_revived >= 12


def test_norms_margins_accuracies_and_clamps_are_their_definitions() -> None:
    assert norms({"pixel": torch.tensor([3.0, 4.0])}) == {"gradient/pixel": 5.0}
    real, fake = torch.tensor([2.0, 1.0, -3.0, 4.0]), torch.tensor([-1.0, -2.0, 3.0, 4.0])
    assert watch_discriminator(real, fake) == {
        "watch/discriminator_margin": 0.0,
        "watch/accuracy_real": 0.75,
        "watch/accuracy_fake": 0.5,
    }
    assert watch_weight(torch.tensor(MAX_ADAPTIVE_WEIGHT)) == {"watch/adaptive_weight_at_clamp": 1.0}
    assert watch_weight(torch.tensor(MAX_ADAPTIVE_WEIGHT - 1)) == {"watch/adaptive_weight_at_clamp": 0.0}


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_channels_are_measured_as_the_corpus_is(kind: str) -> None:
    from ldm.models.first_stage import KLModel, VQModel

    stored = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.3
    model = (KLModel if kind == "kl" else VQModel).__new__(KLModel if kind == "kl" else VQModel)
    corpus = corpus_moments(model, stored, STORED[kind])
    mean = np.array(corpus["sum"]) / corpus["count"]
    std = np.sqrt(np.array(corpus["squares"]) / corpus["count"] - mean**2)
    found = channel_moments(stored, kind=kind)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.std, std, rtol=1e-6)
    assert watch_latents(found) == {
        "latent/largest_mean": pytest.approx(np.abs(mean).max()),
        "latent/smallest_std": pytest.approx(std.min()),
        "latent/largest_std": pytest.approx(std.max()),
    }


def healthy(facts: Facts) -> History:
    """The history of a run as it should be."""
    steps = range(10, 410, 10)
    series: dict[str, Callable[[int], float]] = {
        "loss": lambda n: 5.0 / n,
        "l1": lambda n: 2.0 / n,
        "regulariser": lambda _: 1e-6 * 256,
        "gradient/pixel": lambda _: 1.0,
        "gradient/perceptual": lambda _: 0.5,
        "adaptive_weight": lambda _: 0.7,
        "watch/adaptive_weight_at_clamp": lambda _: 0.0,
        "watch/discriminator_margin": lambda _: 0.3,
        "watch/accuracy_real": lambda _: 0.6,
        "watch/accuracy_fake": lambda _: 0.7,
        "latent/largest_mean": lambda _: 0.2,
        "latent/smallest_std": lambda _: 0.5,
        "latent/largest_std": lambda _: 1.0,
        "validation/psnr_db": lambda n: 30.0 if n <= 100 else 20 + n / 400,
        "validation/lpips": lambda n: 0.3 - n / 4000,
        "validation/rfid_same_pictures": lambda n: 30 - n / 40,
    }
    if facts.num_codes:
        series |= {"code_usage": lambda _: 0.9, "code_perplexity": lambda _: 40.0}
    return {name: [(n, value(n)) for n in steps] for name, value in series.items()}


def ending(history: History, name: str, value: float) -> History:
    """A history whose last tenth of one metric is another."""
    points = history[name]
    return history | {name: [*points[:-4], *((images, value) for images, _ in points[-4:])]}


@pytest.mark.parametrize("facts", [VQ, KL])
def test_a_healthy_history_is_ok_in_every_panel(facts: Facts) -> None:
    found = judge(healthy(facts), facts)
    assert [verdict.word for verdict in found] == ["ok"] * 7
    assert ("codes" in {v.panel for v in found}, "KL" in {v.panel for v in found}) == (
        facts is VQ,
        facts is KL,
    )
    assert judge({}, facts) == []


@pytest.mark.parametrize(
    ("facts", "name", "value", "panel", "words"),
    [
        (VQ, "l1", 0.3, "losses", "nothing is learnt"),
        (VQ, "l1", 0.02, "losses", "it diverges; lower training.lr"),
        (VQ, "gradient/perceptual", 0.0, "gradients", "perceptual trains next to nothing"),
        (VQ, "gradient/perceptual", 1e-4, "gradients", "perceptual trains next to nothing"),
        (VQ, "watch/discriminator_margin", 2.5, "discriminator", "it has won; lower loss.discriminator_lr"),
        (VQ, "watch/discriminator_margin", -0.5, "discriminator", "it takes one kind for the other"),
        (VQ, "code_usage", 0.1, "codes", "codes are dead; set loss.revive_after_images"),
        (VQ, "code_perplexity", 9.0, "codes", "codes are dead"),
        (KL, "regulariser", 1e-6, "KL", "the latent is empty; lower loss.kl_weight"),
        (KL, "regulariser", 1e-6 * 256 * 15, "KL", "the posterior is a point; raise loss.kl_weight"),
        (VQ, "latent/smallest_std", 0.05, "latents", "a channel is nearly dead"),
        (VQ, "latent/largest_mean", 4.0, "latents", "far from zero"),
        (VQ, "validation/psnr_db", 19.0, "held-out", "better before; set validation.keep_best"),
        (VQ, "validation/rfid_same_pictures", 29.0, "held-out", "better before"),
    ],
)
def test_each_ill_has_its_verdict_and_no_other_changes(
    facts: Facts, name: str, value: float, panel: str, words: str
) -> None:
    before, after = judge(healthy(facts), facts), judge(ending(healthy(facts), name, value), facts)
    changed = [verdict for verdict in after if not verdict.ok]
    assert [verdict.panel for verdict in changed] == [panel]
    assert words in changed[0].words
    assert len(after) == len(before)


def test_a_weight_often_at_its_limit_wants_a_look() -> None:
    history = healthy(VQ)
    points = history["watch/adaptive_weight_at_clamp"]
    history["watch/adaptive_weight_at_clamp"] = [(n, float(i % 5 == 0)) for i, (n, _) in enumerate(points)]
    (found,) = [verdict for verdict in judge(history, VQ) if not verdict.ok]
    assert "at its limit in 20% of logged steps: no adversarial gradient" in found.words


def test_recent_is_the_mean_of_the_last_tenth() -> None:
    history: History = {"l1": [(n, float(n)) for n in range(40)], "one": [(0, 7.0)]}
    assert recent(history, "l1") == 37.5
    assert recent(history, "one") == 7.0
    assert recent(history, "none") is None


@pytest.mark.parametrize("facts", [VQ, KL])
def test_the_page_is_a_picture_and_a_verdict_changes_it(facts: Facts) -> None:
    page = health_page(healthy(facts), facts, deviations=[1.0, 0.5])
    with Image.open(BytesIO(page)) as image:
        assert image.width > 1500
    again = dict(sorted(healthy(facts).items(), reverse=True))  # the order of a history read back is another
    assert page == health_page(again, facts, deviations=[1.0, 0.5])
    ill = ending(healthy(facts), "latent/smallest_std", 0.0)
    assert page != health_page(ill, facts, deviations=[1.0, 0.5])
    assert health_page({"loss": [(10, 1.0)]}, facts, deviations=[0.0])


def test_long_histories_are_thinned_with_both_ends() -> None:
    points = [(n, float(n)) for n in range(5000)]
    values = thinned(points)
    assert len(values) == MAX_POINTS
    assert (tuple(values[0]), tuple(values[-1])) == (points[0], points[-1])
    assert len(thinned(points[:7])) == 7
