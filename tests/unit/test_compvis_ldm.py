"""Latent diffusion models in the published layout, one of each kind, written here by hand."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import ldm
from ldm.bridge.compvis_ldm import checkpoint_layout, ema_names, noise_levels
from ldm.bridge.compvis_ldm_config import latent_diffusion_config
from ldm.bridge.compvis_ldm_output import published_diffusion_config
from ldm.bridge.foreign import read_checkpoint
from ldm.bridge.section import Section
from ldm.bridge.transfer import export_to_folder, import_to_folder
from ldm.conditions import Condition
from ldm.diffusion.schedule import build_schedule
from ldm.errors import CheckpointError, ContractError
from ldm.latent_diffusion import LatentDiffusion
from ldm.model_config import LatentDiffusionModel
from ldm.model_folder import read_model_folder
from ldm.models.conditioning import SpatialRescaler
from ldm.models.text_transformer import Transformer
from ldm.models.unet import UNet

ENCODERS = "ldm.modules.encoders.modules"
COORDINATES = {"n_embed": 32, "n_layer": 2, "vocab_size": 64, "max_seq_len": 11, "use_tokenizer": False}
CAPTIONS = {"n_embed": 32, "n_layer": 2, "vocab_size": 128, "max_seq_len": 9}
TRANSFORMER = {"use_spatial_transformer": True, "context_dim": 32, "transformer_depth": 2}
CLASSES = {"target": f"{ENCODERS}.ClassEmbedder", "params": {"n_classes": 6, "embed_dim": 32}}
IDENTITY = {"target": "torch.nn.Identity"}
BIGGAN = {"resblock_updown": True, "use_scale_shift_norm": True, "num_heads": 8}
# Kind -> what its published config has beside the common part: parameters of the model, of its UNet.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unconditional": ({"cond_stage_config": "__is_unconditional__"}, {"num_head_channels": 32}),
    "churches": ({"cond_stage_config": "__is_unconditional__", "scale_by_std": True}, BIGGAN),
    "class_label": (
        {"cond_stage_config": CLASSES, "conditioning_key": "crossattn"},
        {"num_heads": 1, **TRANSFORMER},
    ),
    "caption": (
        {
            "cond_stage_config": {"target": f"{ENCODERS}.BERTEmbedder", "params": CAPTIONS},
            "conditioning_key": "crossattn",
            "scale_factor": 0.18215,
            "use_ema": False,
        },
        {"num_heads": 8, "legacy": False, **TRANSFORMER},
    ),
    "layout": (
        {
            "cond_stage_config": {"target": f"{ENCODERS}.BERTEmbedder", "params": COORDINATES},
            "conditioning_key": "crossattn",
        },
        {"num_head_channels": 16, **TRANSFORMER},
    ),
    "segmentation": (
        {
            "cond_stage_config": {
                "target": f"{ENCODERS}.SpatialRescaler",
                "params": {"n_stages": 1, "in_channels": 5, "out_channels": 3},
            },
            "concat_mode": True,
        },
        {"in_channels": 6, "num_heads": 8},
    ),
    "low_res": ({"cond_stage_config": IDENTITY, "concat_mode": True}, {"in_channels": 6, "num_heads": 4}),
    "masked_image": ({"cond_stage_config": "__is_first_stage__"}, {"in_channels": 7, **BIGGAN}),
    "embeddings": (
        {"cond_stage_config": IDENTITY, "conditioning_key": "crossattn"},
        {"num_head_channels": 32, **TRANSFORMER},
    ),
    "hybrid": (
        {"cond_stage_config": IDENTITY, "conditioning_key": "hybrid"},
        {"in_channels": 5, "num_head_channels": 32, **TRANSFORMER},
    ),
    "class_vector": (
        {"cond_stage_config": IDENTITY, "conditioning_key": "adm"},
        {"num_classes": 6, "num_heads": 4},
    ),
}
SEED = 5


def random(*shape: int, seed: int = SEED) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(SEED))


def published(kind: str) -> dict[str, Any]:
    """A config in the published form: tiny, but of the kind."""
    parameters, unet = copy.deepcopy(KINDS[kind])
    first_stage = {
        "target": "ldm.models.autoencoder.AutoencoderKL"
        if kind == "churches"
        else "ldm.models.autoencoder.VQModelInterface",
        "params": {
            "embed_dim": 3,
            **({} if kind == "churches" else {"n_embed": 16}),
            "ddconfig": {
                **({"attn_type": "none"} if kind == "masked_image" else {}),
                "double_z": kind == "churches",
                "z_channels": 3,
                "resolution": 16,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }
    network = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [2, 16],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
    }
    common = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "image_size": 8,
        "channels": 3,
        "monitor": "val/loss_simple_ema",
        "first_stage_config": first_stage,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": network | unet,
        },
    }
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return {"model": {"base_learning_rate": 2e-6, "target": target, "params": common | parameters}}


def config_of(raw: dict[str, Any], *, one_head: bool = False) -> LatentDiffusionModel:
    return latent_diffusion_config(Section("config.yaml", "", raw).section("model"), one_head=one_head)


def state_of(raw: dict[str, Any]) -> dict[str, Tensor]:
    """A checkpoint's tensors, all random but the noise levels; two leftovers of the first stage's loss."""
    has_ema = raw["model"]["params"].get("use_ema", True)
    config = config_of(raw).model_copy(update={"has_ema": has_ema})
    by_std = raw["model"]["params"].get("scale_by_std", False)
    shapes = checkpoint_layout(config, scale_in_checkpoint=by_std)
    drawn = {
        name: random(*shape, seed=i) * (0.3 if len(shape) < 2 else shape[1:].numel() ** -0.5)
        for i, (name, shape) in enumerate((name, torch.Size(shape)) for name, shape in shapes.items())
    }
    state = drawn | noise_levels(build_schedule(config.diffusion))
    if by_std:
        state["scale_factor"] = torch.tensor(0.7)
    if has_ema:
        state |= {"model_ema.decay": torch.tensor(0.9999)}
        state |= {"model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    if config.conditioning is not None and config.conditioning.kind == "masked_image":
        for name in [name for name in state if name.startswith("cond_stage_model.")]:
            state[name] = state[name.replace("cond_stage_model", "first_stage_model")].clone()
    return state | {"first_stage_model.loss.logvar": torch.zeros(())}


def written(folder: Path, raw: dict[str, Any], state: dict[str, Tensor], **facts: Any) -> tuple[Path, Path]:
    """A published pair of files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    torch.save({"state_dict": state, "global_step": 3, **facts}, folder / "model.ckpt")
    return folder / "config.yaml", folder / "model.ckpt"


def loaded(folder: Path, weights: Any = None) -> LatentDiffusion:
    model = ldm.load(folder, weights=weights)
    assert isinstance(model, LatentDiffusion)
    return model


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., LatentDiffusion]:
    """Imports a model of a kind through its files and loads it."""

    def make(kind: str, weights: Any = None, **choices: Any) -> LatentDiffusion:
        raw = published(kind)
        pair = written(tmp_path / "there", raw, state_of(raw))
        import_to_folder(*pair, output=tmp_path / "here", **choices)
        return loaded(tmp_path / "here", weights)

    return make


def direct_unet(raw: dict[str, Any], state: dict[str, Tensor], *, one_head: bool = False) -> UNet:
    """The UNet made of the raw weights without any import."""
    unet = UNet(config_of(raw, one_head=one_head).unet)
    prefix = "model.diffusion_model."
    unet.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return unet.eval().requires_grad_(False)


def encoder_state(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    whole = f"cond_stage_model.{prefix}"
    return {name.removeprefix(whole): t for name, t in state.items() if name.startswith(whole)}


def tokens_by_hand(parameters: dict[str, Any], state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """What the transformer makes of tokens, without any import."""
    sizes = {"width": "n_embed", "depth": "n_layer", "vocab_size": "vocab_size", "num_tokens": "max_seq_len"}
    transformer = Transformer(**{ours: parameters[theirs] for ours, theirs in sizes.items()})
    transformer.load_state_dict(encoder_state(state, "transformer."))
    return transformer(tokens).detach()


def asked(kind: str, model: LatentDiffusion, state: dict[str, Tensor]) -> tuple[dict[str, Any], Condition]:
    """Fields of a condition, and what the UNet ought to get of them, computed by hand."""
    match kind:
        case "class_label":
            rows = state["cond_stage_model.embedding.weight"]
            return {"class_label": torch.tensor([4, 5])}, Condition(context=rows[[4, 5]][:, None])
        case "caption":
            tokens = integers(128, 2, 9)
            return {"caption": tokens}, Condition(context=tokens_by_hand(CAPTIONS, state, tokens))
        case "layout":
            tokens = integers(64, 2, 11)
            return {"layout": tokens}, Condition(context=tokens_by_hand(COORDINATES, state, tokens))
        case "segmentation":
            rescaler = SpatialRescaler(5, 3, num_stages=1)
            rescaler.load_state_dict(encoder_state(state, ""))
            labels = integers(5, 2, 16, 16)
            return {"segmentation": labels}, Condition(concat=rescaler(labels).detach())
        case "low_res":
            small = random(2, 3, 8, 8)
            return {"low_res": small}, Condition(concat=small)
        case "masked_image":
            image, mask = random(2, 3, 16, 16).clamp(-1, 1), integers(2, 2, 1, 16, 16).float()
            holes = 2 * (1 - mask) * (image + 1) / 2 - 1
            maps = [model.autoencoder.encode(holes), 2 * mask[:, :, ::2, ::2] - 1]
            return {"image": image, "mask": mask}, Condition(concat=torch.cat(maps, 1))
        case "embeddings":
            vectors = random(2, 4, 32)
            return {"embeddings": vectors}, Condition(context=vectors)
        case "hybrid":
            vectors, small = random(2, 4, 32), random(2, 2, 8, 8)
            return {"embeddings": vectors, "low_res": small}, Condition(context=vectors, concat=small)
        case "class_vector":
            return {"class_label": torch.tensor([4, 5])}, Condition(label=torch.tensor([4, 5]))
    return {}, Condition()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_model_of_each_kind_is_imported_and_computes_what_its_parts_compute(
    kind: str, imported: Callable[..., LatentDiffusion]
) -> None:
    model, raw = imported(kind, "raw"), published(kind)
    state = state_of(raw)
    fields, wanted = asked(kind, model, state)
    condition = model.condition(**fields)
    assert condition.parts().keys() == wanted.parts().keys()
    for name, tensor in wanted.parts().items():
        torch.testing.assert_close(condition.parts()[name], tensor, atol=1e-5, rtol=0)
    x, t = random(2, 3, 8, 8, seed=1), torch.tensor([3, 900])
    direct = direct_unet(raw, state)(x, t, wanted.context, concat=wanted.concat, label=wanted.label)
    torch.testing.assert_close(model.predict(x, t, condition), direct, atol=1e-4, rtol=0)
    pictures = model.sample(condition if fields else None, num=2, steps=2)
    assert pictures.shape == (2, 3, 16, 16)
    assert bool(pictures.isfinite().all())


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_was_imported_is_written_back_key_for_key(kind: str, tmp_path: Path) -> None:
    raw = published(kind)
    state = state_of(raw)
    import_to_folder(*written(tmp_path / "there", raw, state), output=tmp_path / "here")
    model = read_model_folder(tmp_path / "here")
    export_to_folder(model, tmp_path / "back", format="compvis")
    back = read_checkpoint(tmp_path / "back" / "model.ckpt")
    assert back.tensors.keys() == state.keys()
    assert [name for name in state if not torch.equal(back.tensors[name], state[name])] == []
    again = config_of(yaml.safe_load((tmp_path / "back" / "config.yaml").read_text()))
    unread = {"has_ema": model.config.has_ema, "scale": model.config.scale}  # pyright: ignore
    assert again.model_copy(update=unread) == model.config


def test_weights_are_a_choice_and_averages_are_used_where_there_are_some(
    imported: Callable[..., LatentDiffusion], tmp_path: Path
) -> None:
    averaged = imported("unconditional")
    folder = tmp_path / "here"
    state = state_of(published("unconditional"))
    names = ema_names(averaged.config)
    assert len(set(names.values())) == len(names)
    found = averaged.networks.state_dict()
    assert all(torch.equal(found[ours], state[theirs]) for ours, theirs in names.items())
    raw = loaded(folder, "raw").networks.state_dict()
    assert torch.equal(raw["unet.out.2.weight"], state["model.diffusion_model.out.2.weight"])
    x, t = random(1, 3, 8, 8), torch.tensor([5])
    assert not torch.allclose(averaged.predict(x, t), loaded(folder, "raw").predict(x, t), atol=1e-3)


def test_averages_that_are_not_there_are_refused(imported: Callable[..., LatentDiffusion]) -> None:
    with pytest.raises(CheckpointError, match=r"no averaged weights; load it with weights=.raw."):
        imported("caption", "ema")


def test_the_scale_of_a_checkpoint_and_that_of_a_config_both_multiply_latents(
    imported: Callable[..., LatentDiffusion], tmp_path: Path
) -> None:
    model = imported("churches")
    assert model.config.scale == pytest.approx(0.7)
    x = random(1, 3, 16, 16).clamp(-1, 1)
    torch.testing.assert_close(model.encode(x), model.config.scale * model.autoencoder.encode(x))
    torch.testing.assert_close(
        model.decode(model.encode(x)), model.autoencoder.decode(model.autoencoder.encode(x))
    )
    assert config_of(published("caption")).scale == 0.18215


def test_one_head_is_a_choice_that_changes_what_is_computed_and_a_note_asks_for_it(tmp_path: Path) -> None:
    raw = published("layout")
    state = state_of(raw)
    pair = written(tmp_path / "there", raw, state)
    lines = {
        one: import_to_folder(*pair, output=tmp_path / f"one_head_{one}", one_head=one)
        for one in (False, True)
    }
    assert any(re.search(r"note: .*one head: import those with --one-head", line) for line in lines[False])
    assert not any("--one-head" in line for line in lines[True])
    tokens, x, t = integers(64, 1, 11), random(1, 3, 8, 8), torch.tensor([500])
    eps = {}
    for one in (False, True):
        model = loaded(tmp_path / f"one_head_{one}", "raw")
        condition = model.condition(layout=tokens)
        eps[one] = model.predict(x, t, condition)
        direct = direct_unet(raw, state, one_head=one)(x, t, condition.context)
        torch.testing.assert_close(eps[one], direct, atol=1e-4, rtol=0)
    assert not torch.allclose(eps[True], eps[False], atol=1e-3)


def test_a_config_that_says_legacy_false_leaves_no_question(tmp_path: Path) -> None:
    raw = published("layout")
    raw["model"]["params"]["unet_config"]["params"]["legacy"] = False
    lines = import_to_folder(*written(tmp_path / "there", raw, state_of(raw)), output=tmp_path / "here")
    assert not any("--one-head" in line for line in lines)


class ModelCheckpoint:
    """Stands for a class of Lightning: pickled, and not there when the file is read."""


def test_a_checkpoint_that_pickles_a_class_is_read_as_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = published("masked_image")
    state = state_of(raw)
    pair = written(tmp_path / "there", raw, state, callbacks={ModelCheckpoint: {"best": ModelCheckpoint()}})
    monkeypatch.delitem(globals(), "ModelCheckpoint")
    import_to_folder(*pair, output=tmp_path / "here")
    assert loaded(tmp_path / "here").config.first_stage.mid_attention is False


def test_guidance_moves_from_the_null_condition_and_needs_one(
    imported: Callable[..., LatentDiffusion],
) -> None:
    model = imported("class_label")
    condition = model.condition(class_label=torch.tensor([1]))
    x, t = random(1, 3, 8, 8), torch.tensor([400])
    asked_for, nothing = model.predict(x, t, condition), model.predict(x, t, model.null(condition))
    guided = model.denoiser(condition, guidance=3.0)(x, t)
    torch.testing.assert_close(guided, nothing + 3 * (asked_for - nothing), atol=1e-4, rtol=0)
    none = model.condition(class_label=torch.tensor([-1])).parts()["context"]
    assert torch.equal(none, model.null(condition).parts()["context"])


def test_the_pictures_of_a_seed_do_not_depend_on_how_many_there_are(
    imported: Callable[..., LatentDiffusion],
) -> None:
    model = imported("unconditional")
    two = model.sample_latents(num=2, steps=3, eta=1.0, seed=4)
    torch.testing.assert_close(model.sample_latents(num=1, steps=3, eta=1.0, seed=4), two[:1])
    assert not torch.allclose(two[0], two[1], atol=1e-2)
    assert not torch.allclose(model.sample_latents(num=1, steps=3, seed=5), two[:1], atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("class_label", lambda m: m.condition(), r"made of the fields class_label; got none"),
        ("class_label", lambda m: m.condition(label=1), r"class_label; got label"),
        ("class_label", lambda m: m.condition(class_label=torch.tensor([6])), r"-1 to 5 .* got \[6\]"),
        (
            "class_label",
            lambda m: m.condition(class_label=torch.ones(1)),
            r"integers \(B,\), got torch.float",
        ),
        ("class_label", lambda m: m.sample(), r"takes \{'context': '\(1, L, 32\)'\} .* got none; make it by"),
        ("unconditional", lambda m: m.sample(guidance=2.0), r"guidance needs .*\(unconditional\) was not"),
        (
            "unconditional",
            lambda m: m.condition(class_label=torch.ones(1)),
            r"no condition.*\(none\); got cl",
        ),
        (
            "low_res",
            lambda m: m.sample(m.condition(low_res=random(1, 3, 8, 8)), guidance=2.0),
            r"guidance needs .*conditioned on low_res",
        ),
        ("low_res", lambda m: m.condition(low_res=random(1, 4, 8, 8)), r"\(B, 3, h, w\), got \(1, 4, 8, 8\)"),
        ("masked_image", lambda m: m.condition(image=random(1, 3, 16, 16).tanh()), r"image, mask; got image"),
        (
            "masked_image",
            lambda m: m.condition(image=random(1, 3, 16, 16).tanh(), mask=torch.full((1, 1, 16, 16), 0.5)),
            r"a mask must be 1 .* and 0 elsewhere",
        ),
        ("caption", lambda m: m.condition(caption=torch.ones(1, 8).long()), r"\(B, 9\), got \(1, 8\)"),
        ("unconditional", lambda m: m.predict(random(1, 4, 8, 8), torch.ones(1).long()), r"\(B, 3, h, w\)"),
        ("unconditional", lambda m: m.predict(random(1, 3, 7, 8), torch.ones(1).long()), r"divisible by 2"),
        ("unconditional", lambda m: m.predict(random(1, 3, 8, 8), torch.tensor([1000])), r"must be 0 to 999"),
        ("unconditional", lambda m: m.predict(random(1, 3, 8, 8), torch.ones(2).long()), r"of shape \(1,\)"),
    ],
)
def test_what_a_model_does_not_take_is_refused(
    imported: Callable[..., LatentDiffusion],
    kind: str,
    call: Callable[[LatentDiffusion], object],
    message: str,
) -> None:
    model = imported(kind)
    with pytest.raises(ContractError, match=message):
        call(model)


def damaged(kind: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A pair with parameters changed; a dotted name reaches into the UNet's."""
    raw = published(kind)
    state = state_of(raw)
    for name, value in changes.items():
        inner = raw["model"]["params"]["unet_config"] if name.startswith("unet_") else raw["model"]
        inner["params"][name.removeprefix("unet_")] = value
    return raw, state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, r"unknown in model.params: surprise; known are"),
        ({"unet_surprise": 1}, r"unknown in model.params.unet_config.params: surprise"),
        ({"linear_end": 0.02}, r"noise levels of model.ckpt .* betas\[1\] is 0.0015.* by the config's"),
        ({"timesteps": 500}, r"misshapen: betas \(1000,\) instead of \(500,\)"),
        ({"v_posterior": 0.5}, r"v_posterior must be 0.0, got 0.5"),
        ({"unet_dims": 3}, r"dims must be 2, got 3"),
        ({"unet_model_channels": 64}, r"misshapen: model.diffusion_model.time_embed.0.weight \(128, 32\)"),
        ({"parameterization": "epsilon"}, r"must be one of eps, x0, v, got 'epsilon'"),
        ({"unet_context_dim": 8}, r"context_dim must be given with use_spatial_transformer"),
        ({"cond_stage_config": {"target": "os.system"}}, r"target must be one of .*ClassEmbedder"),
        ({"scale_by_std": True}, r"missing: scale_factor \(\)"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    pair = written(tmp_path / "there", *damaged("unconditional", **changes))
    with pytest.raises(CheckpointError, match=message):
        import_to_folder(*pair, output=tmp_path / "here")
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.diffusion_model.out.2.bias", r"missing: model.diffusion_model.out.2.bias \(3,\)"),
        ("model_ema.diffusion_modelout2bias", r"missing: model_ema.diffusion_modelout2bias"),
        ("alphas_cumprod", r"missing: alphas_cumprod \(1000,\)"),
    ],
)
def test_a_checkpoint_with_a_tensor_missing_is_refused(tmp_path: Path, name: str, message: str) -> None:
    raw = published("unconditional")
    state = state_of(raw)
    del state[name]
    with pytest.raises(CheckpointError, match=message):
        import_to_folder(*written(tmp_path / "there", raw, state), output=tmp_path / "here")


def test_another_first_stage_and_an_unequal_copy_of_it_are_refused(tmp_path: Path) -> None:
    raw = published("masked_image")
    state = state_of(raw)
    changed = state | {"cond_stage_model.quant_conv.bias": torch.zeros(3)}
    pair = written(tmp_path / "one", raw, changed)
    with pytest.raises(CheckpointError, match=r"differ from first_stage_model\.\*: quant_conv.bias"):
        import_to_folder(*pair, output=tmp_path / "here")
    raw["model"]["params"]["first_stage_config"]["params"]["n_embed"] = 99
    with pytest.raises(CheckpointError, match=r"has codebook size 16, the config 99"):
        import_to_folder(*written(tmp_path / "two", raw, state), output=tmp_path / "here")


def test_a_schedule_or_an_encoder_that_is_not_published_is_not_exported() -> None:
    config = config_of(published("unconditional"))
    flow = config.diffusion.model_copy(update={"schedule": "flow"})
    changed = config.model_copy(update={"diffusion": flow})
    with pytest.raises(CheckpointError, match=r"no diffusion.schedule or objective flow"):
        published_diffusion_config(changed, scale_in_checkpoint=False, use_ema=False)
