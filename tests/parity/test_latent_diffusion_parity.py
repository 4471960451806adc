"""Whole models of the published code: its stored outputs, and its checkpoints key for key.

B batch, C channels of the latent, h w its height and width. LDM_PARITY_FIXTURES may name a folder with more
cases in the same form, which are judged by the same tests.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import ldm
from ldm.bridge.foreign import read_checkpoint
from ldm.bridge.transfer import export_to_folder, import_to_folder
from ldm.conditions import Condition, fields_of
from ldm.diffusion.ddpm import posterior_mean
from ldm.diffusion.editing import paste
from ldm.latent_diffusion import LatentDiffusion
from ldm.model_folder import read_model_folder

pytestmark = pytest.mark.parity

FIXTURES = Path(__file__).parent / "fixtures"
ROOTS = [FIXTURES, *(Path(root) for root in [os.environ.get("LDM_PARITY_FIXTURES")] if root)]
CASES = {path.name: path for root in ROOTS for path in sorted(root.glob("ldm_*"))}
GUIDANCE = 3.0
DDIM = {"sampler": "ddim", "steps": 10}
PLMS = {"sampler": "plms", "steps": 10}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folder of each case, made by the public import."""
    folders = {case: tmp_path_factory.mktemp("imported") / case for case in CASES}
    for case, folder in folders.items():
        import_to_folder(CASES[case] / "config.yaml", CASES[case] / "model.ckpt", output=folder)
    return folders


def loaded(folder: Path, weights: Any) -> LatentDiffusion:
    model = ldm.load(folder, weights=weights)
    assert isinstance(model, LatentDiffusion)
    return model


def condition_of(model: LatentDiffusion, given: Mapping[str, Tensor]) -> Condition | None:
    """The condition of the stored inputs, whose names are our fields'."""
    fields = fields_of(model.config.conditioning)
    return model.condition(**{name: given[name] for name in fields}) if fields else None


def of_networks(model: LatentDiffusion, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """First stage, condition, one evaluation of the UNet, noise and losses."""
    condition, schedule = condition_of(model, given), model.schedule
    z, t, noise = given["latent"], given["t"], given["noise"]
    encoded, eps = model.encode(given["image"]), model.predict(z, t, condition)
    x_0 = schedule.x_0_of_eps(z, t, eps)
    means = [posterior_mean(a, b, schedule=schedule, t=int(at)) for a, b, at in zip(x_0, z, t, strict=True)]
    variance = schedule.posterior_variance.clamp(min=1e-20)[t].float().reshape(-1, 1, 1, 1)
    made = {
        "first_stage_latent": encoded,
        "first_stage_decoded": model.decode(encoded),
        "first_stage_decoded_unquantised": model.decode(encoded, quantise=False),
        "eps": eps,
        "q_sample": schedule.add_noise(z, t, noise),
        "p_mean": torch.stack(means),
        "p_variance": variance,
        "p_log_variance": variance.log(),
        **model.losses(z, t, noise, condition),
    }
    if condition is not None:
        [made["conditioning"]] = condition.parts().values()
    if "null_label" in given:
        made["conditioning_null"] = model.condition(class_label=given["null_label"]).parts()["context"]
        assert condition is not None
        assert torch.equal(made["conditioning_null"], model.null(condition).parts()["context"])
    if condition is None or condition.concat is None:
        one = None if condition is None else condition.rows(torch.arange(1))
        made["eps_wide"] = model.predict(given["latent_wide"], given["t_wide"], one)
    return made


def of_samplers(
    model: LatentDiffusion, given: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Every sampler, from the stored noise."""
    condition, start = condition_of(model, given), given["x_T"]
    ddim = model.sample_latents(condition, **DDIM, start=start)
    made = {
        "ddim10": ddim,
        "ddim10_decoded": model.decode(ddim),
        "plms10": model.sample_latents(condition, **PLMS, start=start),
    }
    if model.config.can_guide:
        for name, settings in (("ddim10_guided", DDIM), ("plms10_guided", PLMS)):
            made[name] = model.sample_latents(condition, **settings, start=start, guidance=GUIDANCE)
    if "ddim10_eta1_noise" in stored:
        noise = stored["ddim10_eta1_noise"]
        made["ddim10_eta1"] = model.sample_latents(
            condition, **DDIM, start=start, eta=1.0, noise=lambda step: noise[step]
        )
    if "ddpm_last8_noise" in stored:
        drawn = stored["ddpm_last8_noise"]
        made["ddpm_last8"] = model.sample_latents(
            condition, sampler="ddpm", steps=8, start=start, noise=lambda step: drawn[step]
        )
    if "mask" in given:
        painted = paste(model.decode(ddim).clamp(-1, 1), given["image"], 1 - given["mask"])
        made["inpainted"] = (painted + 1) / 2
    return made


def of_averages(model: LatentDiffusion, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is stored of the averaged weights."""
    condition = condition_of(model, given)
    return {
        "eps_ema": model.predict(given["latent"], given["t"], condition),
        "ddim10_ema": model.sample_latents(condition, **DDIM, start=given["x_T"]),
    }


def test_the_committed_cases_are_there() -> None:
    assert {"ldm_class_crossattn"} <= CASES.keys()


@pytest.mark.parametrize("case", list(CASES))
def test_every_stored_output_of_the_published_code_is_reproduced(
    case: str, imported: dict[str, Path], differs: Callable[..., str]
) -> None:
    given, want = (load_file(CASES[case] / f"{name}.safetensors") for name in ("in", "out"))
    rules = json.loads((CASES[case] / "tolerances.json").read_text("utf-8"))
    model = loaded(imported[case], "raw")
    got = of_networks(model, given) | of_samplers(model, given, want)
    if model.config.has_ema:
        got |= of_averages(loaded(imported[case], None), given)
    assert {name for name in want if not name.endswith("_noise")} == rules.keys() <= got.keys()
    verdicts = {name: differs(got[name], want[name], **rule) for name, rule in rules.items()}
    assert not any(verdicts.values()), verdicts


@pytest.mark.parametrize("case", list(CASES))
def test_a_checkpoint_is_written_back_key_for_key_and_bit_for_bit(
    case: str, imported: dict[str, Path], tmp_path: Path
) -> None:
    export_to_folder(read_model_folder(imported[case]), tmp_path / "back", format="compvis")
    before = read_checkpoint(CASES[case] / "model.ckpt")
    after = read_checkpoint(tmp_path / "back" / "model.ckpt")
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        assert after.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(after.tensors[name], tensor), name
    assert after.facts == before.facts
    report = json.loads((tmp_path / "back" / "parity.json").read_text("utf-8"))["parity"]
    assert set(report["largest_difference"].values()) == {0.0}
    target = yaml.safe_load((tmp_path / "back" / "config.yaml").read_text("utf-8"))["model"]["target"]
    assert target == "ldm.models.diffusion.ddpm.LatentDiffusion"
