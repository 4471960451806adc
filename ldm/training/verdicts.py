"""What the history of a first stage says about its health: one verdict per idea, from thresholds below.

A verdict is a hint where to look, not a reason to stop. Numbers are means over the last tenth of what was
logged. The thresholds are rules of thumb; they stand here and nowhere else.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ldm.training.loop import GRADIENT, History
from ldm.training.validation import LPIPS_DISTANCE, PSNR, RFID

MAX_RISE = 1.5
"""L1 may stand so far above its lowest: it rises a little where LPIPS and the discriminator join in."""
MIN_GRADIENT_SHARE = 1e-3
"""A term whose gradient in the picture is a smaller share of the largest trains next to nothing."""
MAX_CLAMP_SHARE = 0.1
"""Share of logged steps with the adaptive weight at its limit, where the discriminator gives no gradient."""
MARGIN = (-0.1, 2.0)
"""Healthy margins: below, the discriminator is wrong; about 0, it has just begun; above, it has won."""
MAX_ACCURACY = 0.95
"""Share of patches told apart, mean of real and reconstructed ones; 0.5 is chance."""
MIN_CODE_USAGE = 0.5
"""Share of the codebook that was used lately."""
MIN_PERPLEXITY_SHARE = 0.1
"""Perplexity of a batch as a share of what it can be: the smaller of its positions and the codebook."""
KL_PER_VALUE = (0.05, 14.0)
"""Nats per number of the latent: below, it carries nothing; above, log-variances are near their clamp."""
MIN_STD_SHARE = 0.1
"""A channel with a smaller share of the largest deviation carries next to nothing after scaling."""
MAX_MEAN_SHARE = 3.0
"""|mean| of a channel in deviations of the largest: the one latent scale does not centre."""
MAX_PSNR_LOSS_DB = 1.0
MAX_DISTANCE_RISE = 1.1
"""How far the last validation may be from the best one since all terms joined in."""

IN_PICTURE = ("pixel", "perceptual", "adversarial")


@dataclass(frozen=True)
class Facts:
    """What the numbers of a history are judged by."""

    num_codes: int
    """0 without a codebook."""
    positions_per_batch: int
    """Places of a batch of latents."""
    values_per_latent: int
    """Numbers in the latent of one picture."""
    kl_weight: float
    """0 without a KL term."""
    judged_after: int
    """Images seen when the last loss term has joined in."""


@dataclass(frozen=True)
class Verdict:
    """One idea, judged."""

    panel: str
    ok: bool
    words: str

    @property
    def word(self) -> str:
        """`ok` or `look`."""
        return "ok" if self.ok else "look"


def recent(history: History, name: str) -> float | None:
    """Mean of the last tenth of a metric, at least its last value; None where it was never logged."""
    values = [value for _, value in history.get(name, [])]
    last = values[-max(1, len(values) // 10) :]
    return math.fsum(last) / len(last) if last else None


def per_picture_kl(history: History, facts: Facts) -> list[tuple[int, float]]:
    """KL of one picture's posterior in nats at each logged step."""
    if not facts.kl_weight:
        return []
    return [(images, value / facts.kl_weight) for images, value in history.get("regulariser", [])]


def judge_losses(history: History, facts: Facts) -> Verdict | None:
    """L1 has fallen and does not rise again."""
    del facts
    last, values = recent(history, "l1"), [value for _, value in history.get("l1", [])]
    if last is None:
        return None
    first, low = values[0], min(values)
    words = f"L1 {last:.3g}, from {first:.3g}"
    if len(values) > 1 and last >= first:
        return Verdict("losses", False, f"{words}: nothing is learnt; raise or lower training.lr")
    if last > MAX_RISE * low:
        return Verdict("losses", False, f"{words}, but {low:.3g} before: it diverges; lower training.lr")
    return Verdict("losses", True, words)


def judge_gradients(history: History, facts: Facts) -> Verdict | None:
    """Every term trains something."""
    del facts
    found = {
        name.removeprefix(GRADIENT): recent(history, name) for name in history if name.startswith(GRADIENT)
    }
    norms = {term: norm for term, norm in found.items() if norm is not None}
    if not norms:
        return None
    shares = {term: norms[term] / (max(norms[t] for t in IN_PICTURE if t in norms) or 1.0) for term in norms}
    weak = [
        t for t, norm in norms.items() if not norm or (t in IN_PICTURE and shares[t] < MIN_GRADIENT_SHARE)
    ]
    if weak:
        return Verdict(
            "gradients", False, f"{', '.join(weak)} trains next to nothing; see its weight in `loss`"
        )
    return Verdict("gradients", True, f"all {len(norms)} terms have one")


def judge_weight(history: History, facts: Facts) -> Verdict | None:
    """The adaptive weight is seldom at its limit."""
    del facts
    points = [value for _, value in history.get("watch/adaptive_weight_at_clamp", [])]
    if not points:
        return None
    share = math.fsum(points) / len(points)
    words = f"{recent(history, 'adaptive_weight'):.3g}, at its limit in {share:.0%} of logged steps"
    cure = "" if share <= MAX_CLAMP_SHARE else ": no adversarial gradient; start the discriminator later"
    return Verdict("adaptive weight", not cure, words + cure)


def judge_discriminator(history: History, facts: Facts) -> Verdict | None:
    """The discriminator tells patches apart, but has not won."""
    del facts
    margin = recent(history, "watch/discriminator_margin")
    if margin is None:
        return None
    sides = [recent(history, f"watch/accuracy_{side}") or 0.0 for side in ("real", "fake")]
    accuracy = math.fsum(sides) / 2
    words = f"margin {margin:.2g}, accuracy {accuracy:.2f}"
    if margin > MARGIN[1] or accuracy > MAX_ACCURACY:
        return Verdict("discriminator", False, f"{words}: it has won; lower loss.discriminator_lr")
    if margin < MARGIN[0]:
        return Verdict(
            "discriminator", False, f"{words}: it takes one kind for the other; raise loss.discriminator_lr"
        )
    return Verdict("discriminator", True, words)


def judge_codes(history: History, facts: Facts) -> Verdict | None:
    """Enough codes are used, and evenly."""
    usage, perplexity = recent(history, "code_usage"), recent(history, "code_perplexity")
    if usage is None or perplexity is None:
        return None
    words = f"{usage:.0%} of codes used, perplexity {perplexity:.3g}"
    enough = MIN_PERPLEXITY_SHARE * min(facts.num_codes, facts.positions_per_batch)
    if usage < MIN_CODE_USAGE or perplexity < enough:
        return Verdict("codes", False, f"{words}: codes are dead; set loss.revive_after_images")
    return Verdict("codes", True, words)


def judge_kl(history: History, facts: Facts) -> Verdict | None:
    """The posterior carries something and is not a point."""
    points = per_picture_kl(history, facts)
    kl = recent({"kl": points}, "kl")
    if kl is None:
        return None
    per_value = kl / facts.values_per_latent
    words = f"{kl:.3g} nats per picture, {per_value:.2g} per number"
    if per_value < KL_PER_VALUE[0]:
        return Verdict("KL", False, f"{words}: the latent is empty; lower loss.kl_weight")
    if per_value > KL_PER_VALUE[1]:
        return Verdict("KL", False, f"{words}: the posterior is a point; raise loss.kl_weight")
    return Verdict("KL", True, words)


def judge_latents(history: History, facts: Facts) -> Verdict | None:
    """All channels carry something, around zero."""
    del facts
    small, large = recent(history, "latent/smallest_std"), recent(history, "latent/largest_std")
    mean = recent(history, "latent/largest_mean")
    if small is None or large is None or mean is None:
        return None
    words = f"deviations {small:.3g} to {large:.3g}, |mean| up to {mean:.3g}"
    if small < MIN_STD_SHARE * large:
        return Verdict("latents", False, f"{words}: a channel is nearly dead; fewer channels would do")
    if mean > MAX_MEAN_SHARE * large:
        return Verdict("latents", False, f"{words}: far from zero, which the latent scale does not undo")
    return Verdict("latents", True, words)


def judge_held_out(history: History, facts: Facts) -> Verdict | None:
    """Held-out scores do not get worse while training goes on."""
    series = {
        name: [value for images, value in history.get(name, []) if images > facts.judged_after]
        or [value for _, value in history.get(name, [])][-1:]
        for name in (PSNR, LPIPS_DISTANCE, RFID)
    }
    if not series[PSNR]:
        return None
    words = f"PSNR {series[PSNR][-1]:.3g} dB, LPIPS {series[LPIPS_DISTANCE][-1]:.3g}"
    words += f", rFID {series[RFID][-1]:.3g}" if series[RFID] else ""
    worse = series[PSNR][-1] < max(series[PSNR]) - MAX_PSNR_LOSS_DB or any(
        series[name][-1] > MAX_DISTANCE_RISE * min(series[name])
        for name in (LPIPS_DISTANCE, RFID)
        if series[name]
    )
    if worse:
        return Verdict(
            "held-out", False, f"{words}, better before; set validation.keep_best or train shorter"
        )
    return Verdict("held-out", True, words)


JUDGES: tuple[Callable[[History, Facts], Verdict | None], ...] = (
    judge_losses,
    judge_gradients,
    judge_weight,
    judge_discriminator,
    judge_codes,
    judge_kl,
    judge_latents,
    judge_held_out,
)


def judge(history: History, facts: Facts) -> list[Verdict]:
    """One verdict for each idea that the history has numbers on."""
    found = [judge_one(history, facts) for judge_one in JUDGES]
    return [verdict for verdict in found if verdict is not None]
