import pytest
import torch

from ldm.first_stage_config import FirstStageModel
from ldm.models.autoencoder import AttnBlock, Downsample, ResnetBlock, Upsample, group_norm
from ldm.models.first_stage import KLModel, VQModel, build_first_stage, decode_in_micro_batches

MULT = {1: (1,), 2: (1, 2), 4: (1, 2, 2), 8: (1, 1, 2, 2), 16: (1, 1, 1, 2, 2), 32: (1, 1, 1, 1, 2, 2)}


def some_config(kind: str = "kl", factor: int = 4, **more: object) -> FirstStageModel:
    settings = {
        "kind": kind,
        "channels": 8,
        "channel_mult": MULT[factor],
        "num_res_blocks": 1,
        "norm_groups": 4,
        "z_channels": 5,
        "embed_dim": 3,
        "num_codes": 16 if kind == "vq" else None,
    }
    return FirstStageModel.model_validate(settings | more)


def some_model(kind: str = "kl", factor: int = 4, **more: object) -> VQModel | KLModel:
    torch.manual_seed(0)
    model = build_first_stage(some_config(kind, factor, **more))
    assert isinstance(model, VQModel | KLModel)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("factor", list(MULT))
@pytest.mark.parametrize(("kind", "stored"), [("vq", 3), ("kl", 6)])
def test_latents_are_f_times_smaller_and_pictures_come_back_whole(
    kind: str, stored: int, factor: int
) -> None:
    model, config = some_model(kind, factor), some_config(kind, factor)
    x = torch.zeros(2, 3, 64, 32)
    encoded = model.encode(x)
    assert config.factor == factor
    assert config.stored_channels == stored
    assert encoded.shape == (2, stored, 64 // factor, 32 // factor)
    z = model.latent(encoded, None)
    assert z.shape == (2, 3, 64 // factor, 32 // factor)
    assert model.decode(z).shape == x.shape


def test_identity_keeps_the_picture() -> None:
    model = build_first_stage(FirstStageModel(kind="identity"))
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.decode(model.latent(model.encode(x), None)), x)


def test_attention_stands_where_it_is_asked_for() -> None:
    def count(**settings: object) -> int:
        return sum(isinstance(m, AttnBlock) for m in some_model("kl", 4, **settings).modules())

    assert count() == 2  # the middles of encoder and decoder
    assert count(mid_attention=False) == 0
    assert count(attention_factors=[4]) == 2 + 1 + 2  # a decoder's level has one block more
    assert count(attention_factors=[16]) == 2


def test_downsampling_pads_right_and_bottom_only() -> None:
    down = Downsample(1)
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 0, 0] = 1.0
    down.load_state_dict({"conv.weight": kernel, "conv.bias": torch.zeros(1)})
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert down(x).flatten().tolist() == [0.0, 2.0, 8.0, 10.0]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 4), (8, 8)])
def test_upsampling_is_the_same_with_and_without_a_gradient(height: int, width: int) -> None:
    torch.manual_seed(0)
    up = Upsample(6)
    x = torch.randn(2, 6, height, width)
    plain = up(x)
    with torch.no_grad():
        torch.testing.assert_close(up(x), plain.detach())
    assert plain.shape == (2, 6, 2 * height, 2 * width)


def test_working_in_place_leaves_the_input_and_every_number_alone() -> None:
    torch.manual_seed(0)
    block = ResnetBlock(8, 8, groups=4, dropout=0.0)
    x = torch.randn(2, 8, 6, 6)
    before = x.clone()

    def branch(conv: torch.nn.Module, norm: torch.nn.Module, h: torch.Tensor) -> torch.Tensor:
        return conv(torch.nn.functional.silu(norm(h)))

    expected = branch(block.conv2, block.norm2, branch(block.conv1, block.norm1, x)) + x
    assert torch.equal(block(x), expected)
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    assert torch.equal(x, before)
    x.requires_grad_()
    parameters = [x, *block.parameters()]
    gradients = torch.autograd.grad(block(x).square().sum(), parameters)
    h = branch(block.conv2, block.norm2, branch(block.conv1, block.norm1, x)) + x
    plain = torch.autograd.grad(h.square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))


def test_vq_decodes_what_the_quantiser_makes_of_a_latent() -> None:
    model = some_model("vq")
    assert isinstance(model, VQModel)
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    codes = model.quantize.lookup(model.quantize.nearest(z))
    assert torch.equal(model.decode(z), model.decode(codes))
    assert torch.equal(model.decode(z), model.decode_codes(codes))


def test_a_kl_latent_is_the_mean_or_a_draw_around_it() -> None:
    model = some_model("kl")
    stored = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.ones(2, 3, 4, 4)
    assert torch.equal(model.latent(stored, None), stored[:, :3])
    torch.testing.assert_close(model.latent(stored, noise), stored[:, :3] + (0.5 * stored[:, 3:]).exp())


def test_a_decoding_does_not_depend_on_how_many_were_asked_for() -> None:
    model = some_model("vq")
    z = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    all_seven = decode_in_micro_batches(model, z, micro_batch=4)
    assert all_seven.shape == (7, 3, 16, 16)
    assert torch.equal(decode_in_micro_batches(model, z[:2], micro_batch=4), all_seven[:2])
    assert all_seven.abs().max() <= 1.0


def test_a_large_map_is_normalised_exactly() -> None:
    x = 3.0 + torch.randn(1, 4, 300, 260, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    norm = group_norm(4, 2)
    exact = torch.nn.functional.group_norm(x.double(), 2, eps=1e-6)
    assert (norm(x) - exact).abs().max() < 3e-6
    small = x[:, :, :250]
    assert torch.equal(norm(small), torch.nn.functional.group_norm(small, 2, norm.weight, norm.bias, 1e-6))
