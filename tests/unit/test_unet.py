import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from ldm.config import UNetConfig
from ldm.models.unet import UNet, build_unet, timestep_embedding

CONTEXT_DIM = 12
KINDS = pytest.mark.parametrize("context_dim", [None, CONTEXT_DIM], ids=["unconditional", "conditional"])


def some_config(context_dim: int | None) -> UNetConfig:
    return UNetConfig(
        in_channels=3,
        out_channels=2,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_factors=(2,),
        head_channels=8,
        context_dim=context_dim,
        norm_groups=8,
    )


def away_from_zero(unet: UNet) -> UNet:
    """The network with every parameter moved a little, so that no branch is cut off by its zero start."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
    return unet


def some_unet(context_dim: int | None) -> UNet:
    torch.manual_seed(0)
    return away_from_zero(build_unet(some_config(context_dim)))


def some_inputs(context_dim: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    draws = torch.Generator().manual_seed(1)
    context = None if context_dim is None else torch.randn(2, 3, context_dim, generator=draws)
    return torch.randn(2, 3, 8, 6, generator=draws), torch.tensor([3, 700]), context


@KINDS
def test_the_prediction_has_the_latents_size(context_dim: int | None) -> None:
    assert some_unet(context_dim)(*some_inputs(context_dim)).shape == (2, 2, 8, 6)


@KINDS
def test_a_fresh_network_predicts_nothing(context_dim: int | None) -> None:
    assert not build_unet(some_config(context_dim))(*some_inputs(context_dim)).any()


@KINDS
def test_gradient_reaches_every_parameter(context_dim: int | None) -> None:
    unet = some_unet(context_dim)
    unet(*some_inputs(context_dim)).square().mean().backward()
    reached = {name: p.grad is not None and bool(p.grad.any()) for name, p in unet.named_parameters()}
    assert len(reached) > 50
    assert all(reached.values()), [name for name, was in reached.items() if not was]


@KINDS
def test_the_time_step_changes_the_prediction(context_dim: int | None) -> None:
    unet, (x, t, context) = some_unet(context_dim), some_inputs(context_dim)
    assert not torch.allclose(unet(x, t, context), unet(x, t + 200, context), atol=1e-4)


def test_the_condition_changes_the_prediction_of_its_sample_alone() -> None:
    unet, (x, t, context) = some_unet(CONTEXT_DIM), some_inputs(CONTEXT_DIM)
    assert context is not None
    other = context.clone()
    other[1] = -other[1]
    before, after = unet(x, t, context), unet(x, t, other)
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-4)


def test_a_missing_condition_is_refused() -> None:
    x, t, _ = some_inputs(None)
    with pytest.raises(ValueError, match=r"needs a context of shape \(B, L, context_dim\), got None"):
        some_unet(CONTEXT_DIM)(x, t)


def test_channels_that_do_not_divide_into_heads_are_refused() -> None:
    config = some_config(None).model_copy(update={"head_channels": None, "num_heads": 5})
    with pytest.raises(ValueError, match=r"channels \(32\) must be divisible into heads"):
        UNet(config)


@KINDS
def test_saving_and_loading_gives_equal_predictions(context_dim: int | None) -> None:
    unet = some_unet(context_dim)
    other = build_unet(some_config(context_dim))
    other.load_state_dict(load(save({name: v.contiguous() for name, v in unet.state_dict().items()})))
    assert torch.equal(unet(*some_inputs(context_dim)), other(*some_inputs(context_dim)))


@KINDS
def test_the_memory_layout_does_not_change_the_prediction(context_dim: int | None) -> None:
    channels_last, contiguous = some_unet(context_dim), UNet(some_config(context_dim))
    contiguous.load_state_dict(channels_last.state_dict())
    x, t, context = some_inputs(context_dim)
    torch.testing.assert_close(
        channels_last(x.contiguous(memory_format=torch.channels_last), t, context), contiguous(x, t, context)
    )


def test_time_steps_become_cosines_and_sines_from_fast_to_slow() -> None:
    embedding = timestep_embedding(torch.tensor([0, 1]), 6)
    assert embedding[0].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    frequency = torch.tensor([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)])
    torch.testing.assert_close(embedding[1], torch.cat([frequency.cos(), frequency.sin()]))
