"""What some published UNets use: BigGAN blocks, scale and shift, concatenation, class vectors, one head."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from ldm.config import UNetConfig
from ldm.models.unet import ResBlock, UNet, Upsample, build_unet
from ldm.recipe import load_recipe
from ldm.stages.train_ldm import TRAIN_LDM

CONTEXT_DIM, NUM_CLASSES = 12, 5
SWITCHES: dict[str, dict[str, Any]] = {
    "biggan": {"resblock_updown": True, "scale_shift_norm": True},
    "concat": {"in_channels": 5, "num_heads": 2, "head_channels": None},
    "hybrid": {"in_channels": 5, "context_dim": CONTEXT_DIM, "transformer_depth": 2},
    "vector": {"num_classes": NUM_CLASSES},
    "one head": {"context_dim": CONTEXT_DIM, "one_head_transformers": True},
}


def some_config(**changes: Any) -> UNetConfig:
    plain = {
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 16,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_factors": (2,),
        "head_channels": 8,
        "norm_groups": 8,
    }
    return UNetConfig.model_validate(plain | changes)


def some_unet(config: UNetConfig) -> UNet:
    """A network of random weights, none of them zero; equal shapes get equal weights."""
    unet, draws = build_unet(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    return unet


def some_inputs(config: UNetConfig, *, batch: int = 2) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(1)
    inputs = {"x": torch.randn(batch, 3, 8, 6, generator=draws), "t": torch.tensor([3, 700])[:batch]}
    if config.in_channels > 3:
        inputs["concat"] = torch.randn(batch, config.in_channels - 3, 8, 6, generator=draws)
    if config.context_dim is not None:
        inputs["context"] = torch.randn(batch, 4, config.context_dim, generator=draws)
    if config.num_classes is not None:
        inputs["label"] = torch.tensor([1, 4])[:batch]
    return inputs


@pytest.mark.parametrize("name", list(SWITCHES))
def test_the_prediction_has_the_latents_size_and_gradient_reaches_every_parameter(name: str) -> None:
    config = some_config(**SWITCHES[name])
    unet = some_unet(config)
    out = unet(**some_inputs(config))
    assert out.shape == (2, 3, 8, 6)
    out.square().mean().backward()
    missed = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert missed == []


@pytest.mark.parametrize("name", list(SWITCHES))
def test_a_fresh_network_predicts_nothing(name: str) -> None:
    config = some_config(**SWITCHES[name])
    assert not build_unet(config)(**some_inputs(config)).any()


@pytest.mark.parametrize("resample", [nn.AvgPool2d(2), nn.Upsample(scale_factor=2.0)])
def test_a_block_changes_the_resolution_before_its_first_convolution_and_on_the_shortcut(
    resample: nn.Module,
) -> None:
    torch.manual_seed(0)
    block = ResBlock(8, 6, 8, dropout=0.0, groups=4, scale_shift=True, resample=resample)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, embedding = torch.randn(2, 8, 4, 6), torch.randn(2, 6)
    p = dict(block.named_parameters())
    h = F.silu(F.group_norm(x, 4, p["in_layers.0.weight"], p["in_layers.0.bias"]))
    h = F.conv2d(resample(h), p["in_layers.2.weight"], p["in_layers.2.bias"], padding=1)
    time = F.linear(F.silu(embedding), p["emb_layers.1.weight"], p["emb_layers.1.bias"])
    scale, shift = time[:, :8, None, None], time[:, 8:, None, None]
    h = F.group_norm(h, 4, p["out_layers.0.weight"], p["out_layers.0.bias"]) * (1 + scale) + shift
    h = F.conv2d(F.silu(h), p["out_layers.3.weight"], p["out_layers.3.bias"], padding=1)
    torch.testing.assert_close(block(x, embedding), resample(x) + h)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (16, 16), (15, 20)])
def test_doubling_before_the_convolution_is_the_same_on_maps_of_every_size(height: int, width: int) -> None:
    torch.manual_seed(0)
    up, x = Upsample(6), torch.randn(2, 6, height, width)
    plain = up.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(up(x), plain)
    found, expected = (torch.autograd.grad(y.square().sum(), list(up.parameters())) for y in (up(x), plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_working_in_place_leaves_the_input_alone() -> None:
    torch.manual_seed(0)
    block, x, embedding = ResBlock(8, 6, 8, dropout=0.0, groups=4), torch.randn(2, 8, 4, 6), torch.randn(2, 6)
    before, expected = x.clone(), block(x, embedding).detach()
    with torch.no_grad():
        assert torch.equal(block(x, embedding), expected)
    assert torch.equal(x, before)


def test_the_condition_is_put_behind_the_noisy_latent() -> None:
    config = some_config(in_channels=5)
    unet, inputs = some_unet(config), some_inputs(config)
    x, t, concat = inputs["x"], inputs["t"], inputs["concat"]
    together = unet(torch.cat([x, concat], dim=1), t)
    assert torch.equal(unet(x, t, concat=concat), together)
    assert not torch.allclose(unet(torch.cat([concat, x], dim=1), t), together, atol=1e-4)


@pytest.mark.parametrize("name", ["concat", "hybrid", "vector"])
def test_every_part_of_a_condition_changes_the_prediction_of_its_sample_alone(name: str) -> None:
    config = some_config(**SWITCHES[name])
    unet, inputs = some_unet(config), some_inputs(config)
    before = unet(**inputs)
    for part in inputs.keys() - {"x", "t"}:
        other = inputs[part].clone()
        other[1] = other[1] - 2 if part == "label" else -other[1]
        after = unet(**inputs | {part: other})
        torch.testing.assert_close(before[0], after[0])
        assert not torch.allclose(before[1], after[1], atol=1e-4), part


def test_a_condition_that_is_missing_is_refused() -> None:
    x, t = torch.zeros(1, 3, 8, 8), torch.tensor([1])
    with pytest.raises(ValueError, match=r"must have 5 channels together, got 3; give .* as `concat`"):
        some_unet(some_config(in_channels=5))(x, t)
    with pytest.raises(ValueError, match=r"needs a label of shape \(B,\), got None"):
        some_unet(some_config(num_classes=NUM_CLASSES))(x, t)


@pytest.mark.parametrize("name", list(SWITCHES))
def test_recomputed_activations_give_the_same_bits(name: str) -> None:
    gradients = []
    for recompute in (False, True):
        config = some_config(**SWITCHES[name], dropout=0.3, checkpoint_activations=recompute)
        unet = some_unet(config).train()
        torch.manual_seed(7)
        loss = unet(**some_inputs(config)).square().mean()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in unet.parameters())])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


def test_recomputed_activations_are_not_kept() -> None:
    saved: dict[bool, int] = {}
    for recompute in (False, True):
        config, count = some_config(checkpoint_activations=recompute), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            some_unet(config)(**some_inputs(config))
        saved[recompute] = count
    assert saved[True] < saved[False] / 2


def test_what_changes_no_bit_is_not_part_of_the_key_and_what_is_off_leaves_it_as_it_was() -> None:
    plain = load_recipe("demo")
    recomputing = load_recipe("demo", ["unet.checkpoint_activations=true"])
    assert recomputing.unet.checkpoint_activations
    assert TRAIN_LDM.what(recomputing) == TRAIN_LDM.what(plain)
    assert (
        not {"checkpoint_activations", "num_classes", "resblock_updown"}
        & TRAIN_LDM.what(plain)["unet"].keys()
    )
    biggan = TRAIN_LDM.what(load_recipe("demo", ["unet.resblock_updown=true"]))
    assert biggan["unet"]["resblock_updown"] is True


def test_one_head_is_another_function_of_the_same_weights() -> None:
    context = {"context_dim": CONTEXT_DIM, "transformer_depth": 2}
    several, one = some_config(**context), some_config(**context, one_head_transformers=True)
    by_count = some_config(**context, head_channels=None, num_heads=1)
    layout = {name: value.shape for name, value in some_unet(several).state_dict().items()}
    assert {name: value.shape for name, value in some_unet(one).state_dict().items()} == layout
    inputs = some_inputs(several)
    assert torch.equal(some_unet(one)(**inputs), some_unet(by_count)(**inputs))
    assert not torch.allclose(some_unet(one)(**inputs), some_unet(several)(**inputs), atol=1e-3)


def test_one_head_without_transformers_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"one_head_transformers is for transformers, .*num_heads: 1"):
        some_config(one_head_transformers=True)
