"""Exported latent diffusion models open as pipelines of the library diffusers and compute the same there.

B batch, C channels of the latent, h w its height and width.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.bridge.diffusers_unet import diffusers_unet_config, from_diffusers_unet, to_diffusers_unet
from ldm.bridge.transfer import export_to_folder
from ldm.conditions import Condition
from ldm.config import Diffusion
from ldm.errors import CheckpointError
from ldm.first_stage_config import FirstStageModel
from ldm.layout import first_stage_layout, networks_layout
from ldm.model_config import LatentDiffusionModel
from ldm.model_folder import Origin, StoredDiffusion, latent_diffusion_of
from ldm.network_config import ClassConditioning, LowResConditioning, UNetConfig

pytestmark = pytest.mark.parity

VQ = FirstStageModel(
    kind="vq", channels=16, channel_mult=(1, 2), num_res_blocks=1, num_codes=24, norm_groups=8
)
KL = FirstStageModel(
    kind="kl", channels=16, channel_mult=(1, 2), num_res_blocks=1, z_channels=4, embed_dim=4, norm_groups=8
)
SIZES: dict[str, Any] = {
    "model_channels": 16,
    "channel_mult": (1, 2, 3),
    "attention_factors": (2, 4),
    "norm_groups": 8,
}
COMMON: dict[str, Any] = SIZES | {"in_channels": 3, "out_channels": 3, "num_res_blocks": 1}
TRANSFORMERS = {"context_dim": 12, "transformer_depth": 2}
# What a UNet has beside the common part.
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"head_channels": 8},
    "two blocks, scale and shift": {"num_res_blocks": 2, "head_channels": 16, "scale_shift_norm": True},
    "BigGAN": {"attention_factors": (1,), "head_channels": 16, "resblock_updown": True},
    "maps": {"in_channels": 6, "head_channels": 8},
    "transformers": {"num_heads": 2, **TRANSFORMERS},
    "one head": {"head_channels": 8, "context_dim": 12, "one_head_transformers": True},
}
UNETS = {name: UNetConfig.model_validate(COMMON | more) for name, more in KINDS.items()}


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, told that there is no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import diffusers

    return diffusers


def some_model(unet: UNetConfig, first_stage: FirstStageModel = VQ, **more: Any) -> StoredDiffusion:
    """A model in which every number is random, also those that training starts at zero."""
    conditioning, num_classes = None, 0
    if unet.context_dim is not None:
        conditioning, num_classes = ClassConditioning(kind="class_label", context_dim=unet.context_dim), 5
    elif unet.in_channels > unet.out_channels:
        conditioning = LowResConditioning(kind="low_res", factor=2)
    config = LatentDiffusionModel(
        first_stage=first_stage,
        unet=unet,
        conditioning=conditioning,
        num_classes=num_classes,
        latent_size=8,
        **{"diffusion": Diffusion(), "scale": 0.5} | more,
    )
    generator = torch.Generator().manual_seed(1)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        tensor = torch.randn(shape, generator=generator)
        return tensor * (0.5 if len(shape) < 2 else torch.Size(shape[1:]).numel() ** -0.5)

    origin = Origin(format="compvis", file="model.ckpt", sha256="0" * 64)
    return StoredDiffusion(
        config,
        {name: drawn(shape) for name, shape in networks_layout(config).items()},
        {name: drawn(shape) for name, shape in first_stage_layout(first_stage).items()},
        {},
        origin,
    )


def their_eps(unet: Any, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """What a UNet of the library says."""
    x = x if condition.concat is None else torch.cat([x, condition.concat], dim=1)
    with torch.no_grad():
        if condition.context is None:
            return unet(x, t).sample
        return unet(x, t, encoder_hidden_states=condition.context).sample


def random_condition(model: StoredDiffusion) -> Condition:
    generator = torch.Generator().manual_seed(3)
    unet = model.config.unet
    beside = unet.in_channels - unet.out_channels
    return Condition(
        context=torch.randn(2, 5, unet.context_dim, generator=generator) if unet.context_dim else None,
        concat=torch.randn(2, beside, 8, 8, generator=generator) if beside else None,
    )


@pytest.mark.filterwarnings("ignore")  # the library's own, on opening a folder
@pytest.mark.parametrize("name", list(UNETS))
def test_an_exported_model_computes_the_same_in_diffusers(name: str, diffusers: Any, tmp_path: Path) -> None:
    stored = some_model(UNETS[name])
    lines = export_to_folder(stored, tmp_path / "out", format="diffusers")
    assert any("largest difference of the eps: 0 " in line for line in lines)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    ours, condition = latent_diffusion_of(stored), random_condition(stored)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([5, 800])
    eps = their_eps(theirs.unet, x, t, condition)
    torch.testing.assert_close(eps, ours.predict(x, t, condition), atol=1e-4, rtol=1e-4)

    theirs.scheduler.set_timesteps(5)
    z = x
    for at in theirs.scheduler.timesteps:
        z = theirs.scheduler.step(their_eps(theirs.unet, z, at, condition), at, z).prev_sample
    mine = ours.sample_latents(condition if condition.parts() else None, steps=5, start=x)
    torch.testing.assert_close(z, mine, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        pictures = theirs.vqvae.decode(mine / theirs.vqvae.config.scaling_factor).sample
    torch.testing.assert_close(pictures, ours.decode(mine), atol=1e-3, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_an_unconditional_pipeline_draws_our_pictures(diffusers: Any, tmp_path: Path) -> None:
    unet = UNETS["attention"].model_copy(update={"in_channels": 4, "out_channels": 4})
    stored = some_model(unet, KL, diffusion=Diffusion(objective="v"))
    export_to_folder(stored, tmp_path / "out", format="diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(7), output_type="numpy"
    ).images
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    ours = latent_diffusion_of(stored).sample(num=2, steps=4, start=start)
    torch.testing.assert_close(torch.from_numpy(drawn).movedim(3, 1), (ours + 1) / 2, atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(UNETS))
def test_every_tensor_has_a_place_in_diffusers_and_comes_back(name: str, diffusers: Any) -> None:
    stored = some_model(UNETS[name])
    ours = {key.removeprefix("unet."): t for key, t in stored.weights.items() if key.startswith("unet.")}
    config = diffusers_unet_config(UNETS[name], sample_size=8)
    there = to_diffusers_unet(ours, UNETS[name])
    library = getattr(diffusers, config["_class_name"]).from_config(config)
    wanted = {key: t.shape for key, t in library.state_dict().items()}
    assert {key: t.shape for key, t in there.items()} == wanted
    back = from_diffusers_unet(there, ours, UNETS[name])
    assert [key for key, t in ours.items() if not torch.equal(back[key], t)] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 2, "head_channels": None},
            r"unet.num_heads 2, has \[16, 24\]; export it with --format",
        ),
        ({"channel_mult": (2, 3)}, r"unet.channel_mult must begin with 1, and this model has \[2, 3\]"),
        ({"resblock_updown": True, "context_dim": 8}, r"no unet.resblock_updown together with transformers"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        export_to_folder(
            some_model(UNetConfig.model_validate(COMMON | {"head_channels": 8} | changes)),
            tmp_path / "out",
            format="diffusers",
        )
    assert not (tmp_path / "out").exists()


def test_the_report_is_kept_with_the_digest_of_every_file(tmp_path: Path) -> None:
    export_to_folder(some_model(UNETS["one head"]), tmp_path / "out", format="diffusers")
    report = json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert report["files"].keys() == found - {"parity.json"}
    assert report["parity"]["largest_difference"]["sample"] == 0.0
    assert "conditioner/diffusion_pytorch_model.safetensors" in found
